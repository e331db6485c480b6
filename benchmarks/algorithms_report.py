"""The runs of `benchmarks/algorithms.py` as a table and a figure, from their JSON alone."""

import json
import statistics
from collections import defaultdict

import matplotlib
from matplotlib.figure import Figure

SHARE = 0.9
FAILED = 0.8  # a run is held to have failed whose policy never gets this share within the highest level
SEEDS = 3  # that a setting needs to stand for its algorithm, where it has one with so many
STARTS = {  # of each family: what PPO's settings are where a run names none
    "scratch": {"num_iterations": "4", "learning_rate": "3e-4"},
    "tiny": {"num_iterations": "4", "learning_rate": "5e-4"},
}
NAMES = {
    "ppo": "PPO, value head",
    "ppo_own_critic": "PPO, critic of its own",
    "grpo": "GRPO (TRL 1.16)",
    "rloo": "RLOO (TRL 1.16)",
    "sft": "SFT on positive reviews",
    "best_of_n": "best of n",
}
COLOURS = ("tab:blue", "tab:cyan", "tab:orange", "tab:green", "tab:red", "black")


def key(algorithm, settings, seed):
    """What tells one run from another."""
    return json.dumps([algorithm, settings, seed], sort_keys=True)


def collect(folder, together):
    """`{key: run}` of the runs in the file `together` and of those in a JSON each in `folder`, in the order of keys.

    SystemExit where they did not all start from the same models.
    """
    found = json.loads(together.read_text()) if together.exists() else []
    found += [short(json.loads(path.read_text())) for path in folder.glob("*.json")]
    if len(models := {run["models"] for run in found}) > 1:
        raise SystemExit(f"{folder}, {together}: runs that start from different models: {', '.join(sorted(models))}")
    return dict(sorted((key(run["algorithm"], run["settings"], run["seed"]), run) for run in found))


def short(run):
    """A run without what no report reads, and with four digits."""

    def rounded(value):
        return float(f"{value:.4g}") if isinstance(value, float) else value

    variances = run["logged"].get("val/explained_variance", [])[:5]
    logged = {"val/explained_variance": variances, "doctor": run["logged"].get("doctor")}
    points = [{name: rounded(value) for name, value in point.items()} for point in run["points"]]
    return run | {"logged": logged, "points": points}


def by_setting(runs):
    """`{(algorithm, settings): runs}`, the runs of one setting by seed."""
    groups = defaultdict(list)
    for run in sorted(runs, key=lambda run: run["seed"]):
        groups[run["algorithm"], settings_text(run)].append(run)
    return dict(groups)


def settings_text(run):
    """What a run set, beginning with where PPO starts."""
    start = STARTS[run["family"]] if run["algorithm"].startswith("ppo") else {}
    return ", ".join(f"{key} {value}" for key, value in (start | run["settings"]).items()) or "–"


def judge_at(points, level):
    """The judge's share for the policy of highest reward among those evaluated within `level` nats.

    It is chosen as a user can choose it, by the reward that was trained on: the judge has no say in it.
    """
    return max((point for point in points if point["kl"] <= level), key=lambda point: point["reward"])["judge"]


def reached(points, level, share=SHARE):
    """The first evaluation with that share and no more KL, or None."""
    return next((point for point in points if point["judge"] >= share and point["kl"] <= level), None)


def has_failed(points, level):
    return reached(points, level, FAILED) is None


def spread(values, digits):
    """`mean ± standard deviation` over seeds; the value alone for one."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def row(runs, levels):
    """The cells of one setting, over its seeds."""
    curves = [run["points"] for run in runs]
    arrived = [point for points in curves if (point := reached(points, levels[-1]))]
    cells = [spread([judge_at(points, level) for points in curves], 3) for level in levels]
    cells.append(spread([points[-1]["kl"] for points in curves], 1))
    for name in ("seconds", "episodes"):
        text = spread([point[name] for point in arrived], 0) if arrived else "–"
        missing = f" ({len(arrived)} of {len(runs)})" if 0 < len(arrived) < len(runs) else ""
        cells.append(text + missing)
    cells.append(spread([points[-1]["seconds"] for points in curves], 0))
    cells.append(f"{max(run['peak_memory_gb'] for run in runs):.2f}")
    cells.append(f"{sum(has_failed(points, levels[-1]) for points in curves)} of {len(runs)}")
    variances = [values for run in runs if (values := run.get("logged", {}).get("val/explained_variance"))]
    means = [f"{statistics.mean(each):.2f}" for each in list(zip(*variances, strict=False))[:5]]
    return [*cells, ", ".join(means) or "–"]


def at_best(groups, levels):
    """Those of `groups` that the judge likes most at one of the levels, among an algorithm's of three seeds or more.

    Where an algorithm has none of three seeds, among all that it has. And, of three seeds or more, the one that gets to
    `SHARE` first, if each of its seeds does.
    """
    chosen, fastest = set(), {}
    for (algorithm, settings), runs in groups.items():
        arrived = [point["seconds"] for run in runs if (point := reached(run["points"], levels[-1]))]
        if len(arrived) == len(runs) >= SEEDS and algorithm != "best_of_n":
            found = statistics.mean(arrived), settings
            fastest[algorithm] = min(fastest.get(algorithm, found), found)
    chosen |= {(algorithm, settings) for algorithm, (_, settings) in fastest.items()}
    for level in levels:
        ranked = {}
        for (algorithm, settings), runs in groups.items():
            mean = statistics.mean(judge_at(run["points"], level) for run in runs)
            ranked.setdefault(algorithm, []).append((len(runs) >= SEEDS, mean, settings))
        chosen |= {(algorithm, max(rows)[-1]) for algorithm, rows in ranked.items()}
    return {key: runs for key, runs in groups.items() if key in chosen}


def table(groups, levels):
    """A row for each setting of each algorithm."""
    at = [f"at {level:g} nats" for level in levels]
    header = ["algorithm", "settings", "n", *at, "KL at the end"]
    header += ["seconds to 0.9", "episodes to 0.9", "seconds", "memory, GB", "failed", "explained variance at first"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header))]
    for name in NAMES:
        for (algorithm, settings), runs in groups.items():
            if algorithm == name and name != "best_of_n":
                lines.append(f"| {' | '.join([NAMES[name], settings, str(len(runs)), *row(runs, levels)])} |")
    return "\n".join(lines) + "\n"


def best_of_n_table(run):
    lines = ["| best of n | at most, nats | judge | seconds a completion |", "|---|---|---|---|"]
    for point in run["points"]:
        lines.append(f"| {point['n']} | {point['kl']:.2f} | {point['judge']:.3f} | {point['seconds']:.3f} |")
    return "\n".join(lines) + "\n"


def draw(groups, levels, path):
    """The judge's share against KL: a line, with a dot at its end, for each seed of an algorithm's best settings."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    chosen = at_best(groups, levels)
    for (algorithm, name), colour in zip(NAMES.items(), COLOURS, strict=True):
        runs = [run for (its, _), group in chosen.items() if its == algorithm for run in group]
        for number, run in enumerate(runs):
            axes.plot(
                [point["kl"] for point in run["points"]],
                [point["judge"] for point in run["points"]],
                "s--" if algorithm == "best_of_n" else "o-",
                color=colour,
                markevery=1 if algorithm == "best_of_n" else [-1],  # a run's end
                markersize=5,
                linewidth=0.7,
                alpha=0.7,
                label=None if number else f"{name}, n = {len(runs)}" if algorithm != "best_of_n" else name,
            )
    axes.axhline(SHARE, color="grey", linewidth=0.5)
    axes.set(xlim=(0, 16), xlabel="KL to the start, nats per completion", ylabel="positive by an unseen judge")
    axes.legend(frameon=False, loc="lower right")
    with matplotlib.rc_context({"svg.hashsalt": "algorithms"}):  # the same file for the same runs
        figure.savefig(path, metadata={"Date": None})


def write(folder, name, levels):
    """`name`.json, .md and .svg of all runs; returns the tables."""
    runs = list(collect(folder, name.with_suffix(".json")).values())
    name.parent.mkdir(exist_ok=True)
    name.with_suffix(".json").write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
    text = render(runs, levels)
    name.with_suffix(".md").write_text(text)
    draw(by_setting(runs), levels, name.with_suffix(".svg"))
    return text


def render(runs, levels):
    """The tables as Markdown: each algorithm at its best, every setting, best-of-n."""
    groups = by_setting(runs)
    tables = {"Each algorithm at its best": table(at_best(groups, levels), levels)}
    tables["Every setting"] = table(groups, levels)
    if picked := [run for run in runs if run["algorithm"] == "best_of_n"]:
        tables["Best of n"] = best_of_n_table(picked[0])
    return "\n".join(f"## {title}\n\n{text}" for title, text in tables.items())
