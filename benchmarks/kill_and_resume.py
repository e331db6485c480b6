"""Kill a run at a random moment, resume it, and compare its end with that of a run that was left alone.

    make demo                                   # makes the models that the tiny variant starts from
    python benchmarks/kill_and_resume.py --moments 20

Each moment: PPO on the tiny sentiment recipe, with a checkpoint after every rollout, gets SIGKILL, is started again
with `--resume_from_checkpoint true`, and must end with the same policy, critic, β and logged history, bit for bit.
Moments are uniform over the run's duration, its start-up included, so that checkpoints are hit while they are written.
Prints a line a moment and how many were identical; exit status 1 if any was not. Takes about as long as twenty runs.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [
    *("recipes/sentiment_gpt2_ppo.py", "--config", "tiny", "--disable_tqdm", "true"),
    *("--save_strategy", "steps", "--save_steps", "4", "--score_norm", "true"),
]
FILES = ("model.safetensors", "critic.safetensors", "ppo_state.json")
TIMINGS = ("time/", "step_time", "train_", "total_flos")


def start(folder, *more):
    command = [sys.executable, *COMMAND, "--output_dir", str(folder), *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def end_of(folder):
    """What a finished run left: the bytes of its files and its logged history without timings."""
    state = json.loads((max(folder.glob("checkpoint-*"), key=number) / "trainer_state.json").read_text())
    history = [
        {key: value for key, value in entry.items() if not key.startswith(TIMINGS)} for entry in state["log_history"]
    ]
    return [(folder / name).read_bytes() for name in FILES], history


def number(checkpoint):
    return int(checkpoint.name.rpartition("-")[2])


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: %(default)s)")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    folder = ROOT / "runs" / "tiny" / "kill_and_resume"
    if folder.exists():
        raise SystemExit(f"{folder} exists: move it away first")

    started = time.monotonic()
    if start(folder / "whole").wait():
        raise SystemExit("the uninterrupted run failed")
    duration = time.monotonic() - started
    expected = end_of(folder / "whole")
    rng, identical = random.Random(args.seed), 0
    for moment in range(args.moments):
        run, delay = folder / f"moment-{moment}", rng.uniform(0.1, 0.98) * duration
        process = start(run)
        time.sleep(delay)
        finished = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached = max(map(number, run.glob("checkpoint-*")), default=0)
        start(run, "--resume_from_checkpoint", "true").wait()
        same = end_of(run) == expected
        identical += same
        when = "had just finished" if finished else f"killed after {delay:.1f} s"
        print(
            f"moment {moment}: {when}, newest checkpoint {reached}: {'identical' if same else 'DIFFERENT'}", flush=True
        )
        if same:
            shutil.rmtree(run)
    print(f"{identical} of {args.moments} bit-identical")
    raise SystemExit(identical != args.moments)


if __name__ == "__main__":
    main()
