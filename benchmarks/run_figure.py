"""One picture of a PPO run for a README: score and KL on the way, and held-out prompts before and after.

    python benchmarks/run_figure.py eval/reports/imdb_scratch/results.json

Reads a results file of `eval.compare` alone, whose `training` holds the run's curves, and writes `run.svg` beside it.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
from matplotlib.figure import Figure

from eval.tables import label_of


def draw(results):
    """The figure."""
    figure = Figure(figsize=(9, 2.7), layout="constrained")
    score, kl, held_out = figure.subplots(1, 3)
    for axes, name, title in ((score, "objective/scores", "score"), (kl, "objective/kl", "KL, nats per completion")):
        axes.plot(*zip(*results["training"]["curves"][name], strict=True), color="tab:blue")
        axes.set(title=f"training: {title}", xlabel="optimiser step")
    names = list(results["metrics"]["rewards"])
    for shift, side, colour in ((-0.2, "base", "tab:gray"), (0.2, "tuned", "tab:blue")):
        found = [results["metrics"]["rewards"][name]["share_positive"][side] for name in names]
        ends = [[each["mean"] - each["low"] for each in found], [each["high"] - each["mean"] for each in found]]
        places, means = [i + shift for i in range(len(names))], [each["mean"] for each in found]
        bars = held_out.bar(places, means, 0.4, yerr=ends, color=colour, label=side, capsize=3)
        held_out.bar_label(bars, [f"{mean:.0%}" for mean in means], padding=2, fontsize=8)
    held_out.set(title=f"held-out, n = {found[0]['n']}: share above 0", ylim=(0, 1.3), yticks=[0, 0.5, 1])
    held_out.set_xticks(range(len(names)), [label_of(results, name) for name in names])
    held_out.legend(loc="upper left", ncols=2, frameon=False)
    for axes in (score, kl, held_out):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    return figure


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    return parser


def main(argv=None):
    path = make_parser().parse_args(argv).results
    with matplotlib.rc_context({"svg.hashsalt": "run"}):  # the same file for the same results
        draw(json.loads(path.read_text())).savefig(path.with_name("run.svg"), metadata={"Date": None})
    print(path.with_name("run.svg"))


if __name__ == "__main__":
    main()
