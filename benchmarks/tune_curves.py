"""The curves of recipes/guides/tune_ppo.md: a healthy run on the toy reviews, and others with one thing wrong in each.

    make notebook                              # recipes/learn_ppo.ipynb makes the models and the prompts
    python benchmarks/tune_curves.py

Trains each case by recipes/sentiment_gpt2_ppo.py with the variant `tiny` and the case's own settings, for 20 rollouts
of 48 completions. Writes what it logged (`curves.json`) and a picture of each case beside the healthy one to
`recipes/guides/tune_ppo`. A case that stands in the JSON is not run again.
"""

import argparse
import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes"), str(ROOT / "data_prep")]

import matplotlib  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from trl import ModelConfig  # noqa: E402

import sentiment_gpt2_ppo  # noqa: E402
from command_line import one_line_errors, parse  # noqa: E402
from eval.machine import cpu_name, git_commit  # noqa: E402
from recipe_args import PPOArguments  # noqa: E402
from trl_ppo import PPOConfig  # noqa: E402

TINY = ROOT / "recipes" / "variants" / "sentiment_gpt2_ppo" / "tiny.yaml"
METRICS = {
    "score": "objective/scores",
    "KL, nats": "objective/kl",
    "length, tokens": "completions/mean_length",
    "entropy, nats": "policy/entropy_avg",
    "explained variance": "val/explained_variance",
    "approxkl": "policy/approxkl_avg",
    "clipped, share": "policy/clipfrac_avg",
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tune_curves",  # the same runs, the same file
    "font.sans-serif": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
UPDATE = ("score", "KL, nats", "approxkl", "clipped, share")
CASES = {  # what differs from the healthy run, and which curves tell
    "healthy": ({}, ("score", "KL, nats", "entropy, nats", "explained variance", "approxkl", "clipped, share")),
    "too_fast": ({"learning_rate": 1e-2}, UPDATE),
    "too_slow": ({"learning_rate": 1e-6}, UPDATE),
    "too_dear": ({"kl_coef": 5.0, "kl_target": None}, UPDATE),
    "cheated": (
        {"rewards": {"length_penalty": 1.0}, "kl_coef": 0.0, "kl_target": None, "num_mini_batches": 4},
        ("score", "KL, nats", "entropy, nats", "length, tokens"),
    ),
    "no_critic": ({"vf_coef": 0.0}, ("score", "KL, nats", "explained variance")),
}


def train(name, args):
    """What a case logged, {curve: a number for each rollout}, the names of the doctor's lines, and where that was."""
    settings = yaml.safe_load(TINY.read_text()) | {
        "model_name_or_path": str(args.models / "sft"),
        "reward_model": str(args.models / "reward"),
        "dataset_name": str(args.prompts),
        "total_episodes": args.rollouts * args.batch,
        "output_dir": str(args.models / "tune" / name),
        "overwrite_output_dir": True,
        "disable_tqdm": True,
    }
    settings |= {"num_mini_batches": 1} | CASES[name][0]
    settings["per_device_train_batch_size"] = args.batch // settings["num_mini_batches"]
    settings["logging_steps"] = settings["num_iterations"] * settings["num_mini_batches"]  # a row for each rollout
    config = args.models / "tune" / f"{name}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(settings))
    arguments = parse(sentiment_gpt2_ppo.__file__, PPOArguments, PPOConfig, ModelConfig, args=["--config", str(config)])
    with redirect_stdout(io.StringIO()) as printed:
        trainer = sentiment_gpt2_ppo.main(*arguments)
    rows = [row for row in trainer.state.log_history if METRICS["score"] in row]
    return {
        "curves": {curve: [float(f"{row[metric]:.4g}") for row in rows] for curve, metric in METRICS.items()},
        "doctor": re.findall(r"^doctor \(([^)]+)\)", printed.getvalue(), re.MULTILINE),
        "seed": trainer.args.seed,
        "commit": git_commit(),
        "hardware": f"{cpu_name()}, {torch.get_num_threads()} thread(s)",
    }


def draw(name, cases, path):
    """The curves that tell, of a case in red and of the healthy run in grey (which alone is blue)."""
    shown = CASES[name][1]
    columns = 3 if len(shown) == 6 else len(shown)
    colours = {"healthy": "tab:blue"} if name == "healthy" else {"healthy": "darkgrey", name: "tab:red"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.7 * columns, 2.2 * (len(shown) // columns)), layout="constrained")
        for curve, axes in zip(shown, figure.subplots(len(shown) // columns, columns).flat, strict=True):
            for run, colour in colours.items():
                numbers = cases[run]["curves"][curve]
                axes.plot(range(1, len(numbers) + 1), numbers, color=colour, marker=".", markersize=3, linewidth=1)
            axes.set(title=curve, xlabel="rollout")
            axes.locator_params(nbins=5)
        figure.savefig(path, metadata={"Date": None})


def make_parser():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/learn_ppo"), help="folder of sft and reward")
    parser.add_argument("--prompts", type=Path, default=Path("data/learn_ppo/prompts"))
    parser.add_argument("--output", type=Path, default=ROOT / "recipes" / "guides" / "tune_ppo")
    parser.add_argument("--rollouts", type=int, default=20)
    parser.add_argument("--batch", type=int, default=48, help="completions of a rollout (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    return parser


def main(argv=None):
    """Train what is missing, then draw all that is there."""
    args = make_parser().parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "curves.json"
    cases = json.loads(path.read_text()) if path.exists() else {}
    for name in dict.fromkeys(["healthy", *args.cases]):
        if name not in cases:
            cases[name] = train(name, args)
            path.write_text("{\n" + ",\n".join(f'"{key}": {json.dumps(case)}' for key, case in cases.items()) + "\n}\n")
        print(f"{name}: {', '.join(cases[name]['doctor']) or 'the doctor says nothing'}", flush=True)
    for name in cases:
        draw(name, cases, args.output / f"{name}.svg")


if __name__ == "__main__":
    with one_line_errors():
        main()
