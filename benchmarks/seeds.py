"""Does PPO learn whatever the seed? One variant of the recipe under several seeds, each evaluated on held-out prompts.

    make demo                                  # makes the models that the tiny variant starts from
    python benchmarks/seeds.py --family tiny --seeds 10
    python benchmarks/seeds.py --family scratch --seeds 3

Trains with `--seed 0, 1, …` into `runs/<family>/seeds/<seed>`, compares each with the base by `eval.compare`, prints a
Markdown table and writes it to `runs/<family>/seeds/table.md`. A seed that is finished already is not run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PPO = "recipes/sentiment_gpt2_ppo.py"
FAMILIES = {
    "tiny": {
        "prompts": ["data/toy_reviews/prompts"],
        "rewards": ["reward_model=runs/tiny/reward", "lexicon=data_prep.toy_reviews:lexicon_score"],
    },
    "scratch": {
        "prompts": ["data/imdb/prompts", "--prompt_tokens", "2", "8"],
        "rewards": ["reward_model=runs/scratch/reward", "judge=runs/scratch/judge"],
    },
}


def run(*command):
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def train_and_compare(family, seed, n_prompts):
    """The results of one seed, from its `results.json`."""
    folder = Path("runs") / family / "seeds" / str(seed)
    results = ROOT / folder / "report" / "results.json"
    if not results.exists():
        run(PPO, "--config", family, "--seed", str(seed), "--output_dir", str(folder), "--overwrite_output_dir", "true")
        settings = FAMILIES[family]
        rewards = [word for reward in settings["rewards"] for word in ("--reward", reward)]
        where = ["--base", f"runs/{family}/sft", "--tuned", str(folder), "--output", str(folder / "report")]
        run("-m", "eval.compare", *where, "--prompts", *settings["prompts"], *rewards, "--n_prompts", str(n_prompts))
    return json.loads(results.read_text())


def cell(value):
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def table(results):
    """A row a seed: share above 0 of each reward, KL, length, distinct trigrams; base first."""
    rewards = list(results[0]["metrics"]["rewards"])
    header = [
        "seed",
        *(f"share above 0: {name}" for name in rewards),
        "KL, nats",
        "length, tokens",
        "distinct trigrams",
    ]
    rows = [["base", *columns(results[0], rewards, "base")]]
    rows += [[str(seed), *columns(result, rewards, "tuned")] for seed, result in enumerate(results)]
    lines = [" | ".join(["", *row, ""]).strip() for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines) + "\n"


def columns(result, rewards, model):
    metrics = result["metrics"]
    values = [metrics["rewards"][name]["share_positive"][model] for name in rewards]
    values += [metrics[name][model] for name in ("kl", "length", "distinct_trigrams")]
    return ["–" if value is None else cell(value) for value in values]


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="tiny")
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 0 (default: %(default)s)")
    parser.add_argument("--n_prompts", type=int, default=500, help="held-out prompts (default: %(default)s)")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    results = [train_and_compare(args.family, seed, args.n_prompts) for seed in range(args.seeds)]
    text = table(results)
    (ROOT / "runs" / args.family / "seeds" / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
