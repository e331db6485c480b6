"""The tables and facts of a report as plain text, from a results file alone; nothing here is escaped."""

from dataclasses import dataclass

from eval.best_of_n import tuned_on_its_prompts
from eval.overoptimisation import overoptimisation

NONE = "–"
REWARD_LABELS = {
    "mean": "mean",
    "median": "median",
    "share_positive": "share above 0",
    "win_rate": "win rate of tuned over base",
}
METRIC_LABELS = {
    "kl": "KL(tuned‖base), nats per completion",
    "kl_per_token": "KL(tuned‖base), nats per token",
    "length": "completion length, tokens",
    "missing_eos": "share without EOS",
    "distinct_unigrams": "share of distinct words",
    "distinct_bigrams": "share of distinct bigrams",
    "distinct_trigrams": "share of distinct trigrams",
    "self_repetition": "self-repetition",
    "perplexity": "perplexity under the base",
    "rouge1": "ROUGE-1 against the reference",
    "rouge2": "ROUGE-2 against the reference",
    "rougeL": "ROUGE-L against the reference",
}
JUDGED_LABELS = {
    f"judged_{other}{key}": label.format(other)
    for other in ("base", "reference")
    for key, label in {
        "": "pairwise win rate over {}",
        "_lc": "pairwise win rate over {}, equal length",
        "_flips": "flip rate against {}",
    }.items()
}
PAIR_LABELS = {
    "accuracy": "accuracy",
    "log_loss": "log loss",
    "brier": "Brier score",
    "overconfidence": "overconfidence",
}
METRICS_NOTE = (
    "Value and 95 % interval. Both models sampled from the same prompts, so differences are paired. Bootstrap over "
    "prompts; for distinct n-grams a delete-one jackknife. KL is measured on the tuned model's samples, at the "
    "sampling temperature, and so is perplexity. A judge is a reward that training never saw. An interval of no width "
    "means that all samples agree, not that the value is certain."
)
JUDGED_NOTE = (
    " The pairwise judge is asked in both orders; where they disagree it is a tie, which counts half, and the flip "
    "rate is how often they do."
)
RUNS_NOTE = (
    "A row a run, value and 95 % interval over prompts. The last row is the mean over runs ± its standard deviation, "
    "with Student's t interval over runs."
)
BEST_OF_NOTE = (
    "Samples of the base, of which {reward} picks one in n; expected over {samples_per_prompt} samples of each of the "
    "first {n_prompts} prompts. Their KL to the base is at most log n − (n−1)/n nats. "
)
AT_EQUAL_KL = "The tuned model is compared where its KL equals that bound, which favours it."
BEYOND = "No n here has a KL as large as the tuned model's; it is compared with the largest n."
OVEROPTIMISATION_NOTE = (
    "Least squares of the gain over the base, with d = √KL: d(α − β log d) for the run's checkpoints, d(α − βd) for "
    "best-of-n (Gao et al. 2023, arXiv:2210.10760). This β is not the price of KL; where it is below 0 the gain has "
    "not begun to level off. A peak beyond the checkpoints' own KL is an extrapolation. Where a judge is highest "
    "before the reward is, the run has over-optimised the reward from there on."
)
PAIRS_NOTE = (
    "How each reward orders judged pairs, ties counting half. The rest holds for reward models trained by the "
    "Bradley–Terry loss: the chance of a pair is the sigmoid of its margin; overconfidence is the mean chance of the "
    "preferred text minus the accuracy, 0 if calibrated."
)


WORDS = {  # what a report speaks of, for someone who has nothing but the report
    "base, tuned": "the model before training, and after",
    "reward": "the function whose value training raises; its value for a completion is the score",
    "judge": "a reward marked as one that training never saw; a model of the same kind, trained on data of the same "
    "kind, may share the reward's weaknesses",
    "share above 0": "the share of completions with a score above 0; for a reward model that was trained to a mean of "
    "0, those that it finds better than most",
    "KL": "how far the tuned model is from the base: the mean over its completions of log π_tuned − log π_base, their "
    "log ratio; for one completion that may be negative",
    "nat": "the unit of KL; at 5 nats a completion is e⁵ ≈ 150 times as likely under the tuned model as under the base",
    "EOS": "the end-of-sequence token; a completion without one was cut off by the limit of tokens",
    "distinct trigrams": "the number of different trigrams (three words in a row) in all completions, over the number "
    "of all trigrams; it falls where completions resemble each other, and with the number of prompts, so compare only "
    "reports of equal n",
    "self-repetition": "the share of a completion's own trigrams that repeat an earlier one",
    "perplexity under the base": "how surprising the completions are to the base: far higher is text that it would not "
    "write, far lower is safe and repetitive; neither is a measure of quality",
    "win rate": "the share of prompts for which the tuned model's completion scores higher; a tie counts half",
    "95 % interval": "where the figure would mostly lie with other prompts of the same kind; the difference of two "
    "models, which had the same prompts, is known better than either's own figure. Where its interval holds 0, these "
    "prompts do not tell the two apart. It says nothing about another training seed",
    "best-of-n": "of n completions of the base, the one that the reward likes best: no training, n times the sampling",
    "step": "one update of the weights; a rollout (sampling and scoring new completions) comes before several of them",
    "β": "kl_coef, what PPO pays in score for a nat of KL; with a kl_target it moves until KL is there",
    "entropy": "how many ways the model sees to go on, in nats; a slow fall is healthy, a collapse to 0 is not",
    "critic, explained variance": "the critic predicts the score during a completion; its explained variance is 1 "
    "where it is right, 0 where it knows no more than the mean, below 0 where it is worse; it should rise above 0",
    "share of clipped tokens": "those on which an update went further than PPO allows; 0.3 and more is too fast",
}


@dataclass
class Table:
    """A table with its title, an explanation, the header and rows of plain text."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


def label_of(results: dict, name: str) -> str:
    """A reward's name; a judge is marked as such."""
    return f"{name} (judge)" if results["rewards"][name].get("judge") and name != "judge" else name


def title_of(results: dict) -> str:
    """What was compared, as a heading."""
    base = results["models"]["base"]["path"]
    tuned = results["models"]["tuned"]["path"] if results["kind"] == "comparison" else f"{len(results['runs'])} runs"
    return f"{tuned} against {base}"


def tables(results: dict) -> list[Table]:
    """Every table of the report, the metrics first."""
    if results["kind"] == "runs":
        return [
            runs_table(results),
            *([best_of_table(results)] if results["best_of_n"] else []),
            *_pairs_tables(results),
        ]
    header = ["metric", "base", "tuned", "tuned − base", "n"]
    note = METRICS_NOTE + (JUDGED_NOTE if results.get("pairwise") else "")
    found = [Table("Numbers", note, header, [list(row) for row in table_rows(results)])]
    if results["sweep"]:
        note = "The same figures for each checkpoint of the run; value and 95 % interval over prompts."
        rows = [[run["name"], *_run_cells(results, run["metrics"], "tuned")] for run in results["sweep"]]
        rows.insert(0, ["base", *_run_cells(results, results["metrics"], "base")])
        found.append(Table("Checkpoints", note, ["checkpoint", *_run_header(results)], rows))
        found.append(overoptimisation_table(results))
    if results["best_of_n"]:
        found.append(best_of_table(results))
    return [*found, *_pairs_tables(results)]


def table_rows(results: dict) -> list[tuple[str, str, str, str, str]]:
    """The rows of the metrics: metric, base, tuned, difference (each `value [low, high]`) and n."""
    metrics = results["over_runs"] if results["kind"] == "runs" else results["metrics"]
    rows = [
        _row(f"{label_of(results, name)}: {label}", estimates[key])
        for name, estimates in metrics["rewards"].items()
        for key, label in REWARD_LABELS.items()
    ]
    labels = METRIC_LABELS | JUDGED_LABELS
    return rows + [_row(label, metrics[key]) for key, label in labels.items() if key in metrics]


def runs_table(results: dict) -> Table:
    """A row a run, the base first and the mean over runs last."""
    first = results["runs"][0]["metrics"]
    rows = [["base", *_run_cells(results, first, "base")]]
    rows += [[run["name"], *_run_cells(results, run["metrics"], "tuned")] for run in results["runs"]]
    rows.append([f"mean of {len(results['runs'])}", *_run_cells(results, results["over_runs"], "tuned")])
    return Table("Runs", RUNS_NOTE, ["run", *_run_header(results)], rows)


def overoptimisation_table(results: dict) -> Table:
    """A row for each reward and way to optimise it: the best checkpoint, α, β and the peak of the fitted curve."""
    rows = []
    for name, curves in overoptimisation(results).items():
        for kind, label in (("tuned", "PPO"), ("best_of_n", "best-of-n")):
            if curves[kind] is None:
                continue
            fitted = curves[kind]["fit"]
            best = curves["best"] if kind == "tuned" else NONE
            cells = [f"{fitted[key]:.3f}" for key in ("alpha", "beta", "rmse")] if fitted else [NONE] * 3
            top = fitted and fitted["peak_kl"]
            rows.append([label_of(results, name), label, best, *cells, NONE if top is None else f"{top:.1f}"])
    header = ["reward", "optimised by", "highest at", "fit's α", "fit's β", "error of the fit", "peak of the fit, nats"]
    return Table("Over-optimisation", OVEROPTIMISATION_NOTE, header, rows)


def best_of_table(results: dict) -> Table:
    """A row for each n, with every reward; the tuned model on the same prompts last."""
    found = results["best_of_n"]
    names = list(results["rewards"])
    rows = [
        [f"best of {point['n']}", f"≤ {point['kl']:.2f}", *(estimate_text(point["rewards"][name]) for name in names)]
        for point in found["points"]
    ]
    note = BEST_OF_NOTE.format(**found)
    if found["at_equal_kl"]:
        tuned = tuned_on_its_prompts(results)
        cells = [estimate_text(tuned[name]) for name in names]
        rows.append(["tuned, on the same prompts", f"{tuned['kl']['mean']:.2f}", *cells])
        note += AT_EQUAL_KL if found["at_equal_kl"]["equal_kl"] else BEYOND
    header = ["", "KL, nats", *(f"{label_of(results, name)}: mean" for name in names)]
    return Table("Best-of-n", note.strip(), header, rows)


def facts(results: dict) -> dict[str, str]:
    """Where the results come from, by name."""
    prompts, memory = results["prompts"], results["peak_memory_bytes"]
    tuned = results["runs"] if results["kind"] == "runs" else [{"name": "tuned", "model": results["models"]["tuned"]}]
    gpu_memory = f", {memory['gpu'] / 2**20:.0f} MiB of GPU memory" if memory["gpu"] else ""
    return {
        **origin(results),
        "base": source_text(results["models"]["base"]),
        **{run["name"]: source_text(run["model"]) for run in tuned},
        **{f"reward {name}": source_text(reward) for name, reward in results["rewards"].items()},
        **({"pairwise judge": _judge_fact(results["pairwise"])} if results.get("pairwise") else {}),
        "prompts": f"{prompts['source']}, split {prompts['split']}, first {prompts['n']}, sha256 {prompts['sha256']}",
        "settings": ", ".join(f"{name} {value}" for name, value in results["settings"].items()),
        "peak memory": f"{memory['process'] / 2**20:.0f} MiB{gpu_memory}",
    }


def origin(results: dict) -> dict[str, str]:
    """How the results were made, by name."""
    hardware = results["hardware"]
    resumed = f", going on from {results['resumed']} completions" if results.get("resumed") else ""
    return {
        "command": results["command"],
        "created": f"{results['created']}, in {results['wall_seconds']:.0f} s{resumed}",
        "commit": results["git_commit"] or "not in git",
        "seed of this evaluation": str(results["seed"]),
        "hardware": f"{hardware['cpu']}, {hardware['threads']} threads, GPU {hardware['gpu'] or 'none'}",
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
    }


def estimate_text(estimate: dict | None, sign: str = "") -> str:
    """`value [low, high]`, `value ± sd [low, high]` over runs; `sign="+"` writes the sign of positive numbers too."""
    if estimate is None or estimate["mean"] is None:
        return NONE
    style = f"{sign}z.3f"  # z: a rounded −0.0004 is 0.000
    spread = f" ± {estimate['sd']:.3f}" if estimate.get("sd") is not None else ""
    if estimate["low"] is None:
        return f"{estimate['mean']:{style}}{spread}"
    return f"{estimate['mean']:{style}}{spread} [{estimate['low']:{style}}, {estimate['high']:{style}}]"


def worst(results: dict, name: str, n: int = 5) -> list[dict]:
    """The samples whose tuned completions score lowest by the reward, lowest first."""
    return sorted(results["samples"], key=lambda sample: sample["tuned"]["scores"][name])[:n]


def _row(label: str, metric: dict) -> tuple[str, str, str, str, str]:
    tuned = metric["tuned"]
    return (
        label,
        estimate_text(metric["base"]),
        estimate_text(tuned),
        estimate_text(metric["difference"], "+"),
        NONE if tuned is None else str(tuned["n"]),
    )


def _run_header(results: dict) -> list[str]:
    rewards = [label_of(results, name) for name in results["rewards"]]
    columns = [f"{name}: {what}" for name in rewards for what in ("mean", "win rate")]
    judged = ["pairwise win rate over base"] if results.get("pairwise") else []
    return [*columns, *judged, "KL, nats", "length, tokens", "distinct trigrams"]


def _run_cells(results: dict, metrics: dict, side: str) -> list[str]:
    cells = [metrics["rewards"][name][key][side] for name in results["rewards"] for key in ("mean", "win_rate")]
    others = [*(["judged_base"] if results.get("pairwise") else []), "kl", "length", "distinct_trigrams"]
    return [estimate_text(cell) for cell in [*cells, *(metrics[name][side] for name in others)]]


def _pairs_tables(results: dict) -> list[Table]:
    if not results["pairs"]:
        return []
    measured = results["pairs"]["rewards"]
    rows = [
        [label_of(results, name), *(estimate_text(each[key]) for key in PAIR_LABELS), str(each["accuracy"]["n"])]
        for name, each in measured.items()
    ]
    return [Table("Judged pairs", PAIRS_NOTE, ["reward", *PAIR_LABELS.values(), "n"], rows)]


def _judge_fact(found: dict) -> str:
    tokens = f"{found['prompt_tokens']} + {found['completion_tokens']} tokens, " if found["prompt_tokens"] else ""
    unreadable = f", {found['unreadable']} unreadable" if found["unreadable"] else ""
    unreadable += f" such as {found['unreadable_example']!r}" if found["unreadable"] else ""
    prompt = f"prompt {found['prompt']['path']}, sha256 {found['prompt']['sha256']}"
    asked = f"{found['questions']} questions, {tokens}{found['retries']} retries{unreadable}"
    return f"{source_text(found['judge'])}, {prompt}, {asked}"


def source_text(source: dict) -> str:
    """A model's path, with what identifies its weights."""
    known = [f"{key} {source[key]}" for key in ("sha256", "revision") if source.get(key)]
    adapter = [f"adapter of {source_text(source['adapter_of'])}"] if "adapter_of" in source else []
    return ", ".join([source["path"], *known, *adapter])
