"""The pictures of a report as SVG text, drawn by matplotlib from a results file alone.

Backgrounds are transparent, and text, axes and series take the page's colours, so that a picture reads in a dark
theme as in a light one. Each has a text that says what it shows.
"""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eval.best_of_n import tuned_on_its_prompts
from eval.overoptimisation import gain, overoptimisation
from eval.tables import estimate_text, label_of
from eval.training import CURVES

# Colours that no drawing uses, in place of those that only the page knows.
TEXT, LINE, BASE, TUNED, OTHER = (f"#0{digit}0{digit}0{digit}" for digit in "12345")
PAGE_COLOURS = {
    TEXT: "currentColor",
    LINE: "var(--line)",
    BASE: "var(--base)",
    TUNED: "var(--tuned)",
    OTHER: "var(--other)",
}
SERIES = {"base": {"color": BASE, "linestyle": "--"}, "tuned": {"color": TUNED, "linestyle": "-"}}
MOST_DOTS = 2000  # of a scatter plot: more make a heavy page and a black cloud
STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, copied and coloured
    "text.parse_math": False,  # a run may have dollar signs in its name
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.alpha": 0.5,
    "grid.linewidth": 0.5,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@dataclass
class Picture:
    """An SVG with its caption and description; `name` can be an id."""

    name: str
    caption: str
    description: str
    svg: str


def pictures(results: dict) -> list[Picture]:
    """Every picture that the results have data for."""
    with matplotlib.rc_context(STYLE):
        found = _of_runs(results) if results["kind"] == "runs" else _of_comparison(results)
        return list(found) + _calibration(results)


def _of_comparison(results: dict) -> Iterator[Picture]:
    for name in results["rewards"]:
        yield _histogram(
            f"score-{name}",
            f"Score by {label_of(results, name)}",
            results,
            lambda side, name=name: side["scores"][name],
        )
    if len({sample[role]["tokens"] for sample in results["samples"] for role in SERIES}) > 1:  # else it shows nothing
        yield _histogram("length", "Completion length, tokens", results, lambda side: side["tokens"])
    for name in results["rewards"]:
        yield _score_against_kl(results, name)
    if results["sweep"] or results["best_of_n"]:
        yield _frontier(results)
    if results["sweep"]:
        yield _overoptimisation(results)
    if results["training"]:
        yield _training(results["training"])


def _of_runs(results: dict) -> Iterator[Picture]:
    for name in results["rewards"]:
        yield _runs(results, f"{label_of(results, name)}: mean", lambda m, name=name: m["rewards"][name]["mean"], name)
    yield _runs(results, "KL(tuned‖base), nats per completion", lambda metrics: metrics["kl"], "kl")
    yield _frontier(results)


def _histogram(name: str, label: str, results: dict, value_of: Callable[[dict], float]) -> Picture:
    values = {role: [value_of(sample[role]) for sample in results["samples"]] for role in SERIES}
    edges = _edges(np.concatenate(list(values.values())))
    figure, axes = _subplots()
    for role, style in SERIES.items():
        counts, _ = np.histogram(values[role], edges)
        axes.stairs(counts, edges, label=role, color=style["color"], linestyle=style["linestyle"], linewidth=1.5)
        axes.stairs(counts, edges, fill=True, color=style["color"], alpha=0.25)
    axes.set(xlabel=label, ylabel="samples")
    _legend(figure)
    means = ", ".join(f"{role} mean {np.mean(values[role]):z.3f}" for role in SERIES)
    description = f"Histograms of {label} for base and tuned, n = {len(results['samples'])}: {means}."
    return _picture(figure, name, f"{label}: base and tuned", description)


def _edges(values: np.ndarray) -> np.ndarray:
    """√n bins, at most 40, whatever the outliers; whole numbers get bins of whole width, centred on them."""
    low, high = values.min(), values.max()
    if (values == np.round(values)).all() and high - low <= 10_000:
        step = int(np.ceil((high - low + 1) / 40))
        return np.arange(low - 0.5, high + step + 0.5, step)
    margin = 0.5 if low == high else 0
    return np.linspace(low - margin, high + margin, min(40, int(np.ceil(len(values) ** 0.5))) + 1)


def _score_against_kl(results: dict, name: str) -> Picture:
    sides = [sample["tuned"] for sample in results["samples"][:MOST_DOTS]]
    kl, scores = [side["kl"] for side in sides], [side["scores"][name] for side in sides]
    figure, axes = _subplots()
    axes.scatter(kl, scores, s=9, color=TUNED, alpha=0.5, linewidths=0)
    axes.set(xlabel="log ratio of the completion, nats (their mean is the KL)", ylabel=label_of(results, name))
    spread = f"log ratio {min(kl):.2f} to {max(kl):.2f} nats, score {min(scores):.2f} to {max(scores):.2f}"
    description = f"Each of {len(sides)} tuned samples by its log-ratio and its score by {name}: {spread}."
    caption = f"Score by {label_of(results, name)} against log π_tuned − log π_base, a dot a sample"
    caption += "; far right is text that the base would hardly write"
    return _picture(figure, f"kl-{name}", caption, description)


def _frontier(results: dict) -> Picture:
    """The rewards against KL, a panel each: checkpoints in their order, or separate runs; best-of-n where it is known.

    Best-of-n picks by the first reward, which flatters it there; a judge's panel says what that is worth.
    """
    best = results["best_of_n"]
    names = list(results["rewards"])[: 1 if best is None and not results.get("sweep") else 3]
    models = results["runs"] if results["kind"] == "runs" else results["sweep"] or [{"name": "tuned", **results}]
    on_which = ""
    own = None
    if results["kind"] == "comparison" and not results["sweep"]:  # on the prompts that best-of-n had
        own, on_which = tuned_on_its_prompts(results), f", on the first {best['n_prompts']} prompts"
    figure = Figure(figsize=(10.4, 3.6))
    places = []
    for index, reward in enumerate(names):
        axes = figure.add_subplot(1, len(names), index + 1)
        kls = [own["kl"]] if own else [model["metrics"]["kl"]["tuned"] for model in models]
        means = [own[reward]] if own else [model["metrics"]["rewards"][reward]["mean"]["tuned"] for model in models]
        if results.get("sweep"):
            start = results["metrics"]["rewards"][reward]["mean"]["base"][
                "mean"
            ]  # where every run begins, at a KL of 0
            path = [(0.0, start), *((kl["mean"], mean["mean"]) for kl, mean in zip(kls, means, strict=True))]
            axes.plot(*zip(*path, strict=True), color=TUNED, linewidth=1, alpha=0.6)
        labels = ("tuned", "best-of-n of the base") if index == 0 else (None, None)
        said = _points(axes, kls, means, [model["name"] for model in models], "o", TUNED, labels[0], (5, -10))
        if best:
            bounds = [dict.fromkeys(("mean", "low", "high"), point["kl"]) for point in best["points"]]
            scores = [point["rewards"][reward] for point in best["points"]]
            at = [f"n={point['n']}" for point in best["points"]]
            said += _points(axes, bounds, scores, at, "s--", OTHER, labels[1], (-6, 2))
        axes.set(xlabel="KL to the base, nats per completion", ylabel=f"{label_of(results, reward)}: mean")
        places.append(f"{reward}: " + "; ".join(said))
    _legend(figure)
    what = "the runs" if results["kind"] == "runs" else "the checkpoints" if results["sweep"] else "the tuned model"
    what += f" and best-of-n of the base{on_which}; {best['reward']} picked its samples" if best else ""
    shown = ", ".join(label_of(results, name) for name in names)
    return _picture(figure, "frontier", f"{shown} against KL: {what}", ". ".join(places) + ".")


def _overoptimisation(results: dict) -> Picture:
    """The gain of each reward and judge against √KL, a panel each: checkpoints and best-of-n with their fits."""
    found = overoptimisation(results)
    figure = Figure(figsize=(min(10.4, 5.2 * len(found)), 3.2))
    described = []
    for index, (name, curves) in enumerate(found.items()):
        axes = figure.add_subplot(1, len(found), index + 1)
        axes.axhline(0, color=LINE, linewidth=0.5)
        for kind, label, mark, colour in (("tuned", "checkpoints", "o", TUNED), ("best_of_n", "best-of-n", "s", OTHER)):
            if curves[kind] is None:
                continue
            kl, gains = map(np.array, zip(*curves[kind]["points"], strict=True))
            kl = kl.clip(min=0)  # an estimate may lie below
            axes.plot(np.sqrt(kl), gains, mark, color=colour, markersize=4, label=None if index else label)
            if fitted := curves[kind]["fit"]:
                fine = np.linspace(1e-3, 1.05 * np.sqrt(kl.max()), 200) ** 2
                axes.plot(np.sqrt(fine), gain(kind, fitted, fine), "--", color=colour, linewidth=1)
        best = next(run for run in results["sweep"] if run["name"] == curves["best"])
        at = best["metrics"]["kl"]["tuned"]["mean"]
        axes.axvline(np.sqrt(max(at, 0)), color=TUNED, linewidth=0.8, linestyle=":")
        axes.set(xlabel="√KL to the base, √nats", ylabel="gain over the base", title=label_of(results, name))
        described.append(f"{name} is highest at {curves['best']}, KL {at:.2f}")
    _legend(figure)
    caption = "Gain of each reward and judge against √KL; dashed: the curves of Gao et al. 2023; dotted: the highest"
    return _picture(figure, "overoptimisation", caption, "; ".join(described) + ".")


def _points(axes, kls: list[dict], means: list[dict], names: list[str], mark: str, colour: str, label: str, offset):
    """Draws named points with their intervals; returns where each is, in words."""
    x, y = [kl["mean"] for kl in kls], [mean["mean"] for mean in means]
    axes.errorbar(
        x, y, xerr=_reach(kls), yerr=_reach(means), fmt=mark, markersize=4, color=colour, linewidth=1, label=label
    )
    side = "left" if offset[0] > 0 else "right"
    for at_x, at_y, name in zip(x, y, names, strict=True):
        axes.annotate(name, (at_x, at_y), xytext=offset, textcoords="offset points", fontsize=7, ha=side)
    return [f"{name} at KL {at_x:.2f} scores {at_y:.3f}" for at_x, at_y, name in zip(x, y, names, strict=True)]


def _training(training: dict) -> Picture:
    curves = training["curves"]
    columns = 4
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(10.4, 2.0 * rows))
    for index, (name, points) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.plot(*zip(*points, strict=True), color=TUNED, linewidth=1.2)
        axes.set_title(CURVES.get(name, f"{name.split('/')[1]}, as logged" if "/" in name else name))
        axes.locator_params(nbins=4)
        if index >= len(curves) - columns:
            axes.set_xlabel("step")
    ends = ", ".join(f"{name} {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in curves.items())
    description = f"Curves over training steps, first to last value: {ends}."
    healthy = "healthy: score and KL rise and level off, entropy stays well above 0, explained variance rises above 0"
    caption = f"Training, from {training['source']}; {healthy} (sick ones: recipes/guides/tune_ppo.md)"
    if any(name.startswith("rewards/") for name in curves):
        caption += "; “as logged”: the mean of one reward, whatever its weight, 0 included"
    return _picture(figure, "training", caption, description)


def _runs(results: dict, label: str, metric_of: Callable[[dict], dict], name: str) -> Picture:
    runs = results["runs"]
    estimates = [metric_of(run["metrics"])["tuned"] for run in runs]
    together = metric_of(results["over_runs"])
    figure, axes = _subplots(height=1.2 + 0.25 * len(runs))
    axes.errorbar(
        [each["mean"] for each in estimates],
        range(len(runs)),
        xerr=_reach(estimates),
        fmt="o",
        markersize=4,
        color=TUNED,
    )
    axes.axvline(together["tuned"]["mean"], color=TUNED, linewidth=1, label="mean of the runs")
    if together["base"] is not None:
        axes.axvline(together["base"]["mean"], color=BASE, linestyle="--", linewidth=1, label="base")
    axes.set_yticks(range(len(runs)), [run["name"] for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)  # the first on top
    axes.set_xlabel(label)
    _legend(figure)
    each = "; ".join(f"{run['name']} {estimate_text(found)}" for run, found in zip(runs, estimates, strict=True))
    return _picture(figure, f"runs-{name}", f"{label}, a run a row", f"{label} of each run: {each}.")


def _calibration(results: dict) -> list[Picture]:
    if not results["pairs"]:
        return []
    figure, axes = _subplots(height=3.4)
    axes.plot([0.5, 1], [0.5, 1], color=LINE, linewidth=1)
    described = []
    for (name, measured), colour, marker in zip(
        results["pairs"]["rewards"].items(), [TUNED, BASE, OTHER] * 9, "osD^vP*X<>dph" * 3, strict=False
    ):
        if not measured["bins"]:
            continue
        accuracy = [each["accuracy"] for each in measured["bins"]]
        x, y = [each["confidence"] for each in measured["bins"]], [each["mean"] for each in accuracy]
        axes.errorbar(
            x, y, yerr=_reach(accuracy), fmt=f"{marker}-", color=colour, markersize=4, linewidth=1, label=name
        )
        described.append(f"{name}: " + ", ".join(f"{a:.2f} implied {b:.2f} right" for a, b in zip(x, y, strict=True)))
    axes.set(xlabel="chance that the margin implies", ylabel="accuracy", ylim=(0, 1.02))
    _legend(figure)
    caption = "Judged pairs: how often the reward is right, against how sure it is (the line: calibrated)"
    return [_picture(figure, "calibration", caption, "; ".join(described) + ".")]


def _picture(figure: Figure, name: str, caption: str, description: str) -> Picture:
    name = re.sub(r"[^\w-]", "-", name)
    return Picture(name, caption, description, _svg(figure, name))


def _subplots(width: float = 5.2, height: float = 2.8) -> tuple[Figure, object]:
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside upper right", ncols=3)  # where it hides nothing


def _reach(estimates: list[dict]) -> np.ndarray:
    """How far each interval reaches below and above its value, (2, n)."""
    low, high = (
        [each[end] if each[end] is not None else each["mean"] for each in estimates] for end in ("low", "high")
    )
    mean = np.array([each["mean"] for each in estimates])
    return np.maximum(0, [mean - low, high - mean])  # rounding can put an end on the wrong side


def _svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for a page: its own ids, the page's colours, no prologue, no style of its own."""
    stream = io.StringIO()
    with matplotlib.rc_context(
        {"svg.hashsalt": name}
    ):  # ids that differ between the pictures of a page, and not by chance
        figure.savefig(
            stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    for part in ("metadata", "style"):
        svg = re.sub(rf"<{part}.*?</{part}>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"<[^<>]*>", lambda tag: re.sub(r'\b(id="|href="#|url\(#)', partial(_own_id, name), tag[0]), svg)
    for ours, pages in PAGE_COLOURS.items():
        svg = svg.replace(ours, pages)
    return svg.strip()


def _own_id(name: str, match: re.Match) -> str:
    return f"{match[1]}{name}-"
