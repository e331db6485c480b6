"""Does a long run leak? The tiny recipe for thousands of small rollouts, its memory, files and threads watched.

    make demo                                  # makes the models that it starts from
    python benchmarks/soak.py --rollouts 2000

Samples the process from outside (Linux) at each line that it logs, and prints a table. Exit status 1 if memory at the
end is more than 3 % over that at the first line, or if the number of open files or threads has grown.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPLETIONS, STEPS = 16, 4  # of a rollout


def sample(pid):
    """Resident memory in MB, open files and threads of a process."""
    process = Path("/proc") / str(pid)
    pages = int((process / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir(process / "fd")), len(os.listdir(process / "task"))


def watch(rollouts, every, output):
    """`sample` after each `every` rollouts."""
    command = [sys.executable, "-u", "recipes/sentiment_gpt2_ppo.py", "--config", "tiny", "--output_dir", output]
    command += ["--total_episodes", str(rollouts * COMPLETIONS), "--logging_steps", str(every * STEPS)]
    command += ["--per_device_train_batch_size", str(COMPLETIONS), "--num_iterations", str(STEPS)]
    command += ["--save_strategy", "steps", "--save_steps", str(every * STEPS), "--save_total_limit", "2"]
    samples = []
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if step := re.search(r"step (\d+)  score", line):
            samples.append((int(step[1]) // STEPS, *sample(process.pid)))
            print("| {} | {:.0f} | {} | {} |".format(*samples[-1]), flush=True)
    if process.wait():
        raise SystemExit(f"the run ended with status {process.returncode}")
    return samples


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--every", type=int, default=200, help="rollouts between two samples (default: %(default)s)")
    parser.add_argument("--output", default="runs/soak", help="folder of the run (default: %(default)s)")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    print("| rollouts | memory, MB | open files | threads |\n|---|---|---|---|")
    (_, *first), *_, (_, *last) = watch(args.rollouts, args.every, args.output)
    print(f"memory at the end is {last[0] / first[0]:.3f} of that after {args.every} rollouts")
    return int(last[0] > 1.03 * first[0] or last[1] > first[1] or last[2] > first[2])


if __name__ == "__main__":
    sys.exit(main())
