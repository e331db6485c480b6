"""Any recipe on a Ray cluster: Ray Train starts the ranks, and starts them all again when one is lost.

    pip install "ray[train]"
    python accelerate_configs/ray_launch.py --workers 2 recipes/sentiment_gpt2_ppo.py --resume_from_checkpoint true

The checkout, `data/` and `runs/` lie in a folder that all machines share. With `--resume_from_checkpoint true` a
restart goes on from the last checkpoint.
"""

import argparse
import os
import runpy
import sys
from pathlib import Path


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="ranks, each with one GPU (default: 1)")
    parser.add_argument("--cpu", action="store_true", help="ranks without a GPU, one core each")
    parser.add_argument("--max_failures", type=int, default=3, help="restarts before giving up (default: 3)")
    parser.add_argument("--storage", default="runs/ray", help="where Ray keeps its own files (default: runs/ray)")
    parser.add_argument("script", help="a recipe")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the recipe's own")
    return parser


def run_recipe(config):
    """One rank: the recipe as if it had been started by its path."""
    os.chdir(config["folder"])
    sys.argv = [config["script"], *config["arguments"]]
    sys.path.insert(0, str(Path(config["script"]).parent.resolve()))
    try:
        runpy.run_path(config["script"], run_name="__main__")
    except SystemExit as stop:  # Ray would take it for the end of the worker
        if stop.code:
            raise RuntimeError(stop.code) from None


def main(args):
    # Ray is optional, and takes seconds to import.
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    if not Path(args.script).is_file():
        sys.exit(f"script: '{args.script}' does not exist; give a recipe's path")
    trainer = TorchTrainer(
        run_recipe,
        train_loop_config={"folder": os.getcwd(), "script": args.script, "arguments": args.arguments},
        torch_config=TorchConfig(backend="gloo" if args.cpu else "nccl"),
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=not args.cpu),
        run_config=RunConfig(
            storage_path=str(Path(args.storage).resolve()), failure_config=FailureConfig(max_failures=args.max_failures)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main(make_parser().parse_args())
