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

// Shows the two texts of a prompt in an order drawn for it, and keeps which one was chosen.
const blind = document.getElementById("blind");
const choices = [];
let order = [];
let shown = null; // the prompt on the screen, with the roles of its texts from left to right

function shuffled(items) {
  const keyed = items.map((item) => [Math.random(), item]);
  return keyed.sort((one, other) => one[0] - other[0]).map(([, item]) => item);
}

function textOf(article, side) {
  return article.querySelector(side ? `.${side} .text` : ".text").textContent;
}

function nextPrompt() {
  const article = order.pop();
  shown = article && { article, roles: shuffled(["base", "tuned"]) };
  document.getElementById("blind-prompt").hidden = !shown;
  for (const button of blind.querySelectorAll("[data-choice]")) button.hidden = !shown;
  if (shown) {
    const [prompt, ...texts] = blind.querySelectorAll(".text");
    prompt.textContent = textOf(article);
    texts.forEach((text, side) => { text.textContent = textOf(article, shown.roles[side]); });
  }
  const rest = shown ? `${order.length + 1} prompts are left` : "no prompt is left";
  document.getElementById("blind-said").textContent = `${choices.length} chosen, ${rest}`;
}

// The 95 % interval of a share, after Wilson 1927.
function wilson(wins, n) {
  const z = 1.96;
  const middle = wins + z * z / 2;
  const reach = z * Math.sqrt(wins * (n - wins) / n + z * z / 4);
  return [(middle - reach) / (n + z * z), (middle + reach) / (n + z * z)];
}

function choose(side) {
  if (!shown) return;
  if (side !== "") {
    const [chosen, rejected] = [Number(side), 1 - Number(side)].map((each) => shown.roles[each]);
    choices.push({
      prompt: textOf(shown.article),
      chosen: textOf(shown.article, chosen),
      rejected: textOf(shown.article, rejected),
      source: `${chosen} over ${rejected}`,
    });
    const rows = choices.map((choice) => `${JSON.stringify(choice)}\n`);
    const link = document.getElementById("blind-export");
    if (link.href) URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(new Blob(rows, { type: "application/jsonl" }));
    link.hidden = document.getElementById("blind-show").hidden = false;
  }
  nextPrompt();
}

if (blind) {
  blind.hidden = false;
  document.getElementById("blind-start").addEventListener("click", (event) => {
    event.target.hidden = true;
    order = shuffled(samples.map(({ article }) => article));
    nextPrompt();
  });
  for (const button of blind.querySelectorAll("[data-choice]")) {
    button.addEventListener("click", () => choose(button.dataset.choice));
  }
  document.getElementById("blind-show").addEventListener("click", () => {
    const wins = choices.filter((choice) => choice.source.startsWith("tuned")).length;
    const [low, high] = wilson(wins, choices.length).map((share) => Math.round(100 * share));
    document.getElementById("blind-said").textContent =
      `you took the tuned model's text ${wins} times in ${choices.length}, the base's ${choices.length - wins} times: ` +
      `between ${low} and ${high} % (95 % interval)` + (low <= 50 && high >= 50 ? ", which does not tell them apart" : "");
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select");
    const side = { 1: "0", 2: "1", 0: "" }[event.key];
    if (!typing && side !== undefined) choose(side);
  });
}
