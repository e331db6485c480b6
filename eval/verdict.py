"""What a comparison found, in words: first for someone who reads a report for the first time, then with intervals."""

from eval.best_of_n import distance_sentence, verdict_sentence
from eval.tables import estimate_text, label_of

SURPRISING = 100  # a base's perplexity on its own samples above which its language is poor
NEWS = 0.1  # a share or a change below it is not worth a sentence of the verdict
FEW = 100  # prompts below which all of it is a hint
FAR = 15  # nats per completion


def verdict(results: dict) -> list[str]:
    """Short sentences without intervals: what changed, how far from the base, who agrees, and what to look out for."""
    metrics = results["over_runs"] if results["kind"] == "runs" else results["metrics"]
    judges = [name for name in metrics["rewards"] if results["rewards"][name].get("judge")]
    trained = [name for name in metrics["rewards"] if name not in judges]
    n = results["prompts"]["n"]
    found = _on_rewards(results, metrics["rewards"], trained, judges)
    found[0] = f"On {n} prompts, b{found[0][1:]}"  # it begins with "By"
    if n < FEW:
        found.insert(1, f"{n} prompts are few: take all of this as a hint.")
    if results["kind"] == "runs":
        runs = f"a mean over {len(results['runs'])} runs, which should differ in their seed alone"
        found.append(f"Each figure of the tuned model is {runs}.")
    if "judged_base" in metrics:
        share = metrics["judged_base"]["tuned"]
        unsure = share["low"] is not None and share["low"] <= 0.5 <= share["high"]
        said = f"which {n} prompts cannot tell from 50 %" if unsure else "where 50 % would be no difference"
        found.append(
            "Asked which of two completions is better, the pairwise judge takes the tuned model's "
            f"{_percent(share['mean'])} of the time, {said}."
        )
    found.append(f"The tuned model is {metrics['kl']['tuned']['mean']:.1f} nats (KL per completion) from the base.")
    if "rouge1" in metrics:
        base, tuned = _means(metrics["rouge1"])
        curves = (results.get("training") or {}).get("curves", {})
        logged = {"rewards/rouge1", "rewards/rouge1/mean"} & curves.keys()
        seen = "; training logged it as a reward, so it is no independent witness" if logged else ""
        found.append(f"ROUGE-1 against the references goes from {100 * base:.1f} to {100 * tuned:.1f}{seen}.")
    found += _warnings(metrics, results["settings"]["max_new_tokens"])
    found += _exploited(metrics, trained, judges)
    seeds = "" if results["kind"] == "runs" else " It is one model: another training seed may end elsewhere."
    return [*found, f"Nothing here measures grammar or sense: read the samples.{seeds}"]


def _on_rewards(results: dict, rewards: dict, trained: list[str], judges: list[str]) -> list[str]:
    """What each reward says, then what each judge does."""
    if not trained:
        return [f"{_change(name, rewards[name])}; it is marked as a judge." for name in judges]
    found = []
    for name in trained:
        unsure = "" if _way(rewards[name]["mean"]["difference"]) else "; these prompts do not tell them apart"
        found.append(f"{_change(name, rewards[name])}{_ties(results, name)}{unsure}.")
    if _way(rewards[trained[0]]["mean"]["difference"]) < 0:
        found.append("The base's reward is higher: if tuned came from it, are the two the wrong way round?")
    return found + [f"{_agreement(name, rewards[name], rewards[trained[0]])}{_ties(results, name)}." for name in judges]


def _exploited(metrics: dict, trained: list[str], judges: list[str]) -> list[str]:
    """Whether the figures look like a reward that is exploited, by the limits of the guide, where its gain is sure."""
    if not trained or _way(metrics["rewards"][trained[0]]["mean"]["difference"]) <= 0:
        return []
    if not judges:
        return ["No judge was given (--judge), so nothing here can show whether the reward is exploited."]
    lengths, words, surprise = (_means(metrics[name]) for name in ("length", "distinct_trigrams", "perplexity"))
    ways = [_way(metrics["rewards"][name]["mean"]["difference"]) for name in judges]
    shares = [_means(metrics["rewards"][name]["share_positive"]) for name in (trained[0], *judges)]
    tell = [share for share in shares if min(share) < 1 - NEWS / 10 and max(share) > NEWS / 10]
    apart = max((abs(share[1] - shares[0][1]) for share in tell), default=0) if shares[0] in tell else 0
    signs = {
        f"reward and judge differ by {100 * apart:.0f} points in the share above 0": apart > 0.25,
        "a judge that does not rise with the reward": min(ways) < 1,
        f"a KL above {FAR} nats": metrics["kl"]["tuned"]["mean"] > FAR,
        "a length that changed by more than a quarter": abs(lengths[1] / lengths[0] - 1) > 0.25,
        "far fewer distinct trigrams": None not in words and words[0] - words[1] > 0.2,
        "a perplexity twice or half the base's": None not in surprise and not 0.5 < surprise[1] / surprise[0] < 2,
    }
    there = [sign for sign, is_there in signs.items() if is_there]
    if there:
        return [f"Look for a reward that is exploited: {', '.join(there)} (the guide says what to do)."]
    return ["No figure here looks like a reward that is exploited; a judge of the reward's own kind may miss it."]


def _change(name: str, reward: dict) -> str:
    """What a reward says of both models: the share above 0 where that says anything, else the mean."""
    base, tuned = _means(reward["share_positive"])
    if min(base, tuned) < 1 - NEWS / 10 and max(base, tuned) > NEWS / 10:
        share = f"{_percent(tuned)} of the tuned model's completions score above 0"
        return f"By {name}, {share}, {_percent(base)} of the base's"
    base, tuned = _means(reward["mean"])
    return f"By {name}, the tuned model's completions score {tuned:z.2f} on average, and the base's {base:z.2f}"


def _ties(results: dict, name: str) -> str:
    """How many score exactly 0, where that is news: they are not above it, and not below."""
    samples = results.get("samples") or []
    shares = [sum(sample[role]["scores"][name] == 0 for sample in samples) for role in ("tuned", "base")]
    if not samples or max(shares) < NEWS * len(samples):
        return ""
    tuned, base = (_percent(share / len(samples)) for share in shares)
    return f" (exactly 0: {tuned} and {base})"


def _agreement(name: str, judge: dict, reward: dict) -> str:
    """Whether a judge sees the change that the reward does."""
    if (way := _way(judge["mean"]["difference"])) == 0:
        agrees = "cannot tell the two apart on these prompts"
    else:
        agrees = "agrees" if way == _way(reward["mean"]["difference"]) else "does not agree"
    says = _change(name, judge).removeprefix(f"By {name}, ")
    named = "" if name == "judge" else f" ({name})"
    return f"The judge{named}, marked as one that training never saw, {agrees}: {says}"


def _way(difference: dict) -> int:
    """1 if a difference is above 0, −1 if it is below; 0 if its interval holds 0."""
    low, high = (difference[end] if difference[end] is not None else difference["mean"] for end in ("low", "high"))
    return int(low > 0) - int(high < 0)


def _warnings(metrics: dict, max_new_tokens: int) -> list[str]:
    """What a reader should know before they believe the figures."""
    found = []
    base, tuned = _means(metrics["length"])
    if abs(tuned / base - 1) > NEWS:
        word = "longer" if tuned > base else "shorter"
        found.append(f"Its completions are {word}: {tuned:.1f} tokens instead of {base:.1f}.")
    base, tuned = _means(metrics["perplexity"])
    if base is not None and base > SURPRISING:
        found.append(
            f"The base's own completions surprise it (perplexity {base:.0f}): its language is poor, whatever a reward "
            "says of it; look at the samples first."
        )
    base, tuned = _means(metrics["missing_eos"])
    if max(base, tuned) > NEWS:
        cut = (
            "All completions of both models are"
            if min(base, tuned) == 1
            else (f"{_percent(tuned)} of the tuned model's completions and {_percent(base)} of the base's are")
        )
        found.append(
            f"{cut} cut off by the limit of {max_new_tokens} tokens (--max_new_tokens raises it); they are scored as "
            "they stand."
        )
    base, tuned = _means(metrics["distinct_trigrams"])
    if None not in (base, tuned) and base - tuned > NEWS:  # None: no completion has three words
        found.append(
            f"Its completions resemble each other more: {_percent(tuned)} of their trigrams are distinct, "
            f"{_percent(base)} of the base's."
        )
    return found


def _means(metric: dict) -> list[float | None]:
    """Base's and tuned model's, None where there is none."""
    return [metric[role] and metric[role]["mean"] for role in ("base", "tuned")]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def sentences(results: dict) -> list[str]:
    """The answer with its intervals: better or not by each reward, at what price, and against best-of-n."""
    metrics = results["over_runs"] if results["kind"] == "runs" else results["metrics"]
    found = [_reward_sentence(results, name, each["mean"]) for name, each in metrics["rewards"].items()]
    kl, length, trigrams = (metrics[name] for name in ("kl", "length", "distinct_trigrams"))
    found.append(
        f"The price: a KL to the base of {estimate_text(kl['tuned'])} nats per completion; length changes by "
        f"{estimate_text(length['difference'], '+')} tokens, the share of distinct trigrams by "
        f"{estimate_text(trigrams['difference'], '+')}."
    )
    if "judged_base" in metrics:
        win_rate, controlled, flips = (metrics[f"judged_base{key}"]["tuned"] for key in ("", "_lc", "_flips"))
        found.append(
            f"A pairwise judge, asked in both orders, has the tuned model win against the base on a share of "
            f"{estimate_text(win_rate)}, at equal length {estimate_text(controlled)}; flip rate {estimate_text(flips)}."
        )
    if results["best_of_n"] and results["best_of_n"]["at_equal_kl"]:
        found.append(" ".join(_on_best_of_n(results, results["best_of_n"])))
    return found


def _on_best_of_n(results: dict, best: dict) -> list[str]:
    """Best-of-n beside the tuned model: by the reward that picked it, which flatters it, and by each judge."""
    return [
        verdict_sentence(best["at_equal_kl"], f"{best['reward']}, which picked best-of-n's samples"),
        *(
            verdict_sentence(found, f"{label_of(results, judge)}, which picked nothing")
            for judge, found in best.get("judges", {}).items()
        ),
        distance_sentence(best["at_equal_kl"]),
        "(Best-of-n trains nothing: it samples n completions of the base for each prompt, at every use, and keeps the "
        "one that the reward likes best.)",
    ]


def _reward_sentence(results: dict, name: str, mean: dict) -> str:
    difference, by = mean["difference"], f"By {label_of(results, name)}"
    means = f"the base's mean is {mean['base']['mean']:z.3f} and the tuned model's {mean['tuned']['mean']:z.3f}"
    differs = {1: "higher", -1: "lower", 0: "cannot be told apart"}[_way(difference)]
    if difference["low"] is None:
        differs = "by one run"
    return f"{by} {means}, {differs}: difference {estimate_text(difference, '+')}."
