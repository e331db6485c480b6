// Shows the samples whose score lies within what the form says; without it all are shown.
const form = document.getElementById("filter");
const samples = Array.from(document.querySelectorAll("#samples article"), (article) => ({
  article,
  scores: JSON.parse(article.dataset.scores),
}));

function limit(input, otherwise) {
  return input.value === "" || Number.isNaN(input.valueAsNumber) ? otherwise : input.valueAsNumber;
}

function filter() {
  const { reward, side, lowest, highest } = form.elements;
  const low = limit(lowest, -Infinity);
  const high = limit(highest, Infinity);
  let shown = 0;
  for (const { article, scores } of samples) {
    const score = scores[side.value][Number(reward.value)];
    article.hidden = score < low || score > high;
    shown += article.hidden ? 0 : 1;
  }
  document.getElementById("shown").textContent = `${shown} of ${samples.length} samples shown`;
}

if (form) {
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
}
