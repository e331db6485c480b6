"""How long until PPO's policy is good? Seconds to a share of positive reviews on real IMDB, for either critic.

    python benchmarks/time_to_quality.py --seeds 0 1 2
    python benchmarks/time_to_quality.py --share 0.85 --max_kl 8

Runs the sentiment recipe's variant `scratch` (its models have to be there: see the YAML's header) with a value head on
the policy's trunk and with a critic of its own that starts from the reward model. After every second rollout it
samples held-out prompts; a run is there at the first evaluation whose share of positive completions, by the judge that
PPO never sees, is at least `--share` at no more than `--max_kl` nats. Seconds are those of rollouts and updates so
far, without the evaluations. Prints a Markdown table and writes it, and each run's curve, to
`runs/scratch/time_to_quality`.
"""

import argparse
import functools
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = Path("runs") / "scratch" / "time_to_quality"
CRITICS = {"value head on the policy": None, "critic of its own": "runs/scratch/reward"}
PHASES = ("time/generate", "time/score", "time/update")


def train(critic, seed, args):
    """`(seconds, share, kl)` of each evaluation of a run, up to the first that will do; it is run once."""
    path = OUTPUT / f"{'shared' if critic is None else 'separate'}-{seed}-{args.share}-{args.max_kl}.json"
    if not path.exists():
        history = run_recipe(critic, seed, args)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(curve(history)) + "\n")
    return json.loads(path.read_text())


def run_recipe(critic, seed, args):
    """The recipe itself, with one more reward of weight 0: whether the judge finds a completion positive."""
    sys.path.insert(0, str(ROOT / "recipes"))
    from transformers import TrainerCallback
    from trl import ModelConfig

    import sentiment_gpt2_ppo as recipe
    from recipe_args import PPOArguments, parse
    from trl_ppo import PPOConfig, PPOTrainer

    class StopWhenThere(TrainerCallback):
        def on_evaluate(self, training_args, state, control, **kwargs):
            control.should_training_stop |= reached(curve(state.log_history), args.share, args.max_kl) is not None

    recipe.PPOTrainer = functools.partial(PPOTrainer, callbacks=[StopWhenThere()])
    settings = {
        "rewards": json.dumps({"reward_model": 1.0, f"{Path(__file__).resolve()}:positive": 0.0}),
        "seed": seed,
        "kl_target": args.max_kl - 0.5,
        "total_episodes": args.episodes,
        "eval_strategy": "steps",
        "eval_steps": 8,  # two rollouts of four epochs
        "test_prompts": args.n_prompts,
        "per_device_eval_batch_size": 128,
        "output_dir": str(OUTPUT / "run"),
    } | ({"value_model_path": critic} if critic else {})
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    parsed = parse(recipe.__file__, PPOArguments, PPOConfig, ModelConfig, args=["--config", "scratch", *words])
    return recipe.main(*parsed).state.log_history


def positive(prompts, completions, **columns):
    """A reward function: whether the judge finds a completion positive, 1 or 0."""
    return [float(score > 0) for score in judge()(prompts=prompts, completions=completions)]


@functools.cache
def judge():
    from trl_ppo import RewardModel

    return RewardModel("runs/scratch/judge")


def curve(history):
    seconds, points = 0.0, []
    for entry in history:
        seconds += sum(entry.get(phase, 0.0) for phase in PHASES)
        if "eval_rewards/positive" in entry:
            points.append((seconds, entry["eval_rewards/positive"], entry["eval_objective/kl"]))
    return points


def reached(points, share, max_kl):
    """The first point at that share and no more KL, or None."""
    return next((point for point in points if point[1] >= share and point[2] <= max_kl), None)


def table(curves, share, max_kl):
    lines = [f"| critic | seed | seconds to {share:g} at KL ≤ {max_kl:g} | share | KL, nats |", "|---|---|---|---|---|"]
    for (critic, seed), points in curves.items():
        point = reached(points, share, max_kl)
        values = ["not reached", "–", "–"] if point is None else ["{:.0f}", "{:.3f}", "{:.2f}"]
        lines.append(f"| {critic} | {seed} | {' | '.join(values).format(*(point or ()))} |")
    return "\n".join(lines) + "\n"


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=0.9, help="of positive completions (default: %(default)s)")
    parser.add_argument("--max_kl", type=float, default=10.0, help="nats (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=9600, help="at most, of a run (default: %(default)s)")
    parser.add_argument("--n_prompts", type=int, default=512, help="held-out ones (default: %(default)s)")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    os.chdir(ROOT)
    curves = {(name, seed): train(critic, seed, args) for seed in args.seeds for name, critic in CRITICS.items()}
    text = table(curves, args.share, args.max_kl)
    (OUTPUT / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
