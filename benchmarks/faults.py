"""Break runs at random moments, resume them, and compare their ends with those of runs that were left alone.

    make faults
    python benchmarks/faults.py --moments 20 --minutes 120
    python benchmarks/faults.py --kinds sigkill ctrl_c --moments 5

PPO as in the tiny sentiment recipe, on smaller models that are made on the spot, with a checkpoint after every rollout.
After each fault the run must have ended within seconds with a status that is not 0, a line that says why (no line is
possible for SIGKILL) and no process left; started again with `--resume_from_checkpoint true` it must end with the same
policy, critic, β and logged history as a run that was left alone, bit for bit. A moment where any of this fails is
lost. Prints a line a moment and a table; exit status 1 if a moment was lost, whose folder is then kept.

Moments are uniform over a run's duration, its start-up without imports included. Runs are forked from this process,
which has imported everything; ranks are forked by torchrun's agent (gloo). `node`, `link`, `disk` and `read_only` need
root, for network namespaces and small file systems, and are left out without it.
"""

import argparse
import contextlib
import ctypes
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "recipes/sentiment_gpt2_ppo.py"
ROLLOUTS = 10
SETTINGS = [
    *("--config", "tiny", "--disable_tqdm", "true", "--save_strategy", "steps", "--save_steps", "4"),
    *("--per_device_train_batch_size", "16", "--max_completion_length", "12", "--score_norm", "true"),
    *("--rewards", "{reward_model: 1.0, benchmarks/faults.py:scorer: 0.0}"),
]
FILES = ("model.safetensors", "critic.safetensors", "ppo_state.json")
TIMINGS = ("time/", "step_time", "train_", "total_flos")
RESUME = ("--resume_from_checkpoint", "true")
WAIT = 15  # seconds that a rank waits for another one, and a run for a reward function
LIMIT = 30  # seconds within which a broken run must have ended
NODES, TWO_HOSTS = (
    ("10.77.0.1", "10.77.0.2"),
    {"ranks": 2, "nodes": 2},
)  # whose rounding is not that of two ranks on one

# What a run says that was broken so; it may have been killed before it could say anything.
SAYS = {
    "sigkill": "",
    "sigterm": "to go on, launch: .* --resume_from_checkpoint true",
    "ctrl_c": "to go on, launch: .* --resume_from_checkpoint true|stopped by Ctrl-C",
    "ctrl_c_twice": "a second signal .* leaves at once|stopped by Ctrl-C",
    "rank": "Signal 9|another rank",
    "node": r"another rank|Dist\w+Error",  # while the hosts look for each other, torchrun's own
    "link": r"another rank|Dist\w+Error",
    "disk": "No space left|disk full",
    "read_only": "Read-only|cannot be written to",
    "files": "",
    "two_runs": "output_dir: .*(another run is writing|holds a run already)",
    "raises": "reward function 'scorer' failed: ConnectionError: the scorer is down",
    "hangs": "reward function 'scorer' failed: TimeoutError: no scores after",
    "nan": "reward function 'scorer' returned nan for sample",
}
NEEDS_ROOT = ("node", "link", "disk", "read_only")
calls = 0


def scorer(prompts, completions, **columns):
    """A reward of 0 that breaks where the environment says: `FAULT=kind:call:rank`."""
    global calls
    calls += 1
    kind, call, rank = os.environ.get("FAULT", "none:0:0").split(":")
    if calls == int(call) and rank == os.environ.get("RANK", "0"):
        if kind == "raises":
            raise ConnectionError("the scorer is down")
        if kind == "hangs":
            time.sleep(3600)
        return [math.nan] * len(prompts)
    return [0.0] * len(prompts)


# --- One run ----------------------------------------------------------------------------------------------------------


def recipe(arguments):
    """The recipe's own `__main__`, in this process."""
    from command_line import run
    from sentiment_gpt2_ppo import main

    sys.argv = [SCRIPT, *arguments]
    run(main, str(ROOT / SCRIPT))


def one_rank(arguments):
    """What torchrun's agent starts. transformers ignores `ddp_timeout` on a CPU, so the group is made here."""
    import torch

    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=WAIT))
    recipe(arguments)


def launch(arguments, log, ranks, node, port, env):
    """A forked process: one run, or torchrun's agent with its ranks, in a session of its own."""
    os.setsid()
    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(out, stream.fileno())
        stream.reconfigure(line_buffering=True)
    os.environ.update(env)
    if ranks == 1:
        return recipe(arguments)

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    nodes, endpoint, address = 1, "localhost:0", None
    if node is not None:
        nodes, endpoint, address = 2, f"{NODES[0]}:{port}", NODES[node]
        os.environ["GLOO_SOCKET_IFNAME"] = f"faults{node}"
        with open(f"/run/netns/faults{node}") as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=ranks // nodes,
        run_id=f"faults{port}",
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs={"is_host": node in (0, None), "join_timeout": WAIT, "read_timeout": WAIT},
        local_addr=address,
        start_method="fork",
        max_restarts=0,
    )
    try:
        elastic_launch(config, one_rank)(arguments)
    except ChildFailedError as error:
        print(error)
        raise SystemExit(1) from None
    return None


class Run:
    """The processes of one run, forked at once: one, an agent with two ranks, or two such agents of a rank each."""

    port = random.randrange(20000, 50000)

    def __init__(self, folder, *options, ranks=1, nodes=1, **env):
        self.log = Path(f"{folder}.log")
        arguments = [*SETTINGS, "--total_episodes", str(16 * ranks * ROLLOUTS), "--ddp_timeout", str(WAIT)]
        arguments += [*models(folder.parent), "--output_dir", str(folder), *options]
        Run.port += 1
        self.processes = [
            multiprocessing.get_context("fork").Process(
                target=launch, args=(arguments, self.log, ranks, node if nodes > 1 else None, Run.port, env)
            )
            for node in range(nodes)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds=180):
        """Status of each process, None for one that still runs; seconds until the others had ended; whether a rank is
        left, which is killed then."""
        started, took = time.monotonic(), 0.0
        for process in self.processes:
            process.join(max(0, started + seconds - time.monotonic()))
            took = time.monotonic() - started if process.exitcode is not None else took
        statuses = [process.exitcode for process in self.processes]
        time.sleep(0.2)
        left = [process.pid for process in self.processes if session(process.pid)]
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        return statuses, took, bool(left)

    def alive(self):
        return any(process.is_alive() for process in self.processes)

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[0].pid, number)


def models(folder):
    """The options that name what `make_models` made."""
    names = {"--model_name_or_path": "sft", "--reward_model": "reward", "--dataset_name": "data/prompts"}
    return [word for option, name in names.items() for word in (option, str(folder / name))]


def session(leader):
    """The processes of that session besides its leader; one that has ended and waits for its parent is none."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader != int(stat.parent.name) and state != "Z":
                pids.append(int(stat.parent.name))
    return pids


def make_models(folder):
    """Toy reviews, a language model and a reward model of them, in a forked process: torch must not run in this one."""
    from data_prep import toy_reviews

    toy_reviews.main(["--output", str(folder / "data"), "--train", "96", "--test", "24"])
    small = ["--per_device_train_batch_size", "16", "--max_steps", "4", "--disable_tqdm", "true", "--config", "tiny"]
    for stage, data, *options in (
        ("sft", "sft", "--scratch_width", "32", "--scratch_layers", "2"),
        ("reward", "pairs", "--model_name_or_path", str(folder / "sft")),
    ):
        import sentiment_gpt2_reward
        import sentiment_gpt2_sft
        from command_line import parse

        module = {"sft": sentiment_gpt2_sft, "reward": sentiment_gpt2_reward}[stage]
        kinds = module.main.__annotations__.values()
        where = ["--dataset_name", str(folder / "data" / data), "--output_dir", str(folder / stage)]
        module.main(*parse(module.__file__, *kinds, args=[*small, *where, *options]))


# --- Faults -----------------------------------------------------------------------------------------------------------


def end_of(folder):
    """What a finished run left: the bytes of its files and its logged history without timings."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    state = json.loads((checkpoints[-1] / "trainer_state.json").read_text())
    history = [
        {key: value for key, value in entry.items() if not key.startswith(TIMINGS)} for entry in state["log_history"]
    ]
    return [(folder / name).read_bytes() for name in FILES], history


def shell(command, check=True):
    return subprocess.run(command.split(), check=check, capture_output=True).returncode


@contextlib.contextmanager
def network():
    """Two hosts as network namespaces with a cable between them."""
    shell("ip link add faults0 type veth peer name faults1")
    try:
        for node, address in enumerate(NODES):
            shell(f"ip netns add faults{node}")
            shell(f"ip link set faults{node} netns faults{node}")
            shell(f"ip -n faults{node} addr add {address}/24 dev faults{node}")
            shell(f"ip -n faults{node} link set lo up")
            shell(f"ip -n faults{node} link set faults{node} up")
        yield
    finally:
        for node in range(2):
            shell(f"ip netns del faults{node}", check=False)


@contextlib.contextmanager
def file_system(folder, size):
    """A small file system of its own at `folder`."""
    folder.mkdir()
    shell(f"mount -t tmpfs -o size={size} faults {folder}")
    try:
        yield
    finally:
        shell(f"umount --lazy {folder}")


def break_run(kind, folder, share, whole, rng, room):
    """Start a run, break it at that share of its duration; the run, and options of the same for its resume."""
    several = {"rank": {"ranks": 2}, "node": TWO_HOSTS, "link": TWO_HOSTS}.get(kind, {})
    if kind in ("raises", "hangs", "nan"):
        several, call = rng.choice([{}, {"ranks": 2}]), 1 + int(share * ROLLOUTS)
        return Run(folder, **several, FAULT=f"{kind}:{call}:{len(several)}"), several
    if kind == "disk":
        shell(f"mount -o remount,size={int(share * room) // 4096 * 4096} {folder}")
        return Run(folder), several
    run = Run(folder, **several)
    time.sleep(share * whole[several.get("ranks", 1)])
    if kind in ("sigkill", "files"):
        run.signal(signal.SIGKILL)
    elif kind == "sigterm":
        run.signal(signal.SIGTERM)
    elif kind in ("ctrl_c", "ctrl_c_twice"):
        run.signal(signal.SIGINT)
        if kind == "ctrl_c_twice":
            time.sleep(rng.uniform(0.02, 0.2))
            run.signal(signal.SIGINT)
    elif kind == "rank":
        while run.alive() and len(ranks := session(run.processes[0].pid)) < 2:
            time.sleep(0.01)
        if run.alive():
            os.kill(rng.choice(ranks), signal.SIGKILL)
    elif kind == "node":
        os.killpg(run.processes[1].pid, signal.SIGKILL)
    elif kind == "link":
        shell("ip -n faults1 link set faults1 down")
    elif kind == "read_only":
        while shell(f"mount -o remount,ro {folder}", check=False) and run.alive():  # busy while a file is written
            time.sleep(0.01)
    return run, several


def damage_newest(folder, rng):
    """Truncate or remove a file of the newest checkpoint; its name."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    files = [path for path in sorted(checkpoints[-1].iterdir()) if path.suffix != ".md"] if checkpoints else []
    if not files:
        return "no checkpoint yet"
    path = rng.choice(files)
    if rng.random() < 0.5:
        path.unlink()
        return f"{path.name} removed"
    os.truncate(path, int(rng.random() * path.stat().st_size))
    return f"{path.name} truncated"


def one_moment(kind, folder, expected, whole, room, rng):
    """Break a run and resume it; what was seen, and what of it is not as it should be."""
    share, wrong = rng.uniform(0.05, 0.98), []
    if kind == "two_runs":
        first = Run(folder)
        time.sleep(share * whole[1])
        second = Run(folder)
        second.log = first.log
        statuses = first.wait()[0] + second.wait()[0]
        wrong += [] if sorted(statuses) == [0, 2] else [f"the two ended with {statuses}"]
        several, took, seen = {}, 0.0, f"second run at {share:.0%}"
    else:
        run, several = break_run(kind, folder, share, whole, rng, room)
        statuses, took, left = run.wait(LIMIT)
        seen = f"at {share:.0%}, ended with {statuses} after {took:.1f} s"
        if kind in ("node", "link"):  # that host is lost, and its agent, if it lives, looks for the other one
            statuses = statuses[:1]
        finished = all(status == 0 for status in statuses)
        wrong += [f"still ran {LIMIT} s later"] if None in statuses else []
        wrong += ["left a process behind"] if left else []
        wrong += ["a broken run ended with status 0"] if 0 in statuses and not finished else []
        killed = {"sigterm": -signal.SIGTERM, "ctrl_c": -signal.SIGINT, "ctrl_c_twice": -signal.SIGINT}
    silent = kind != "two_runs" and (finished or statuses == [killed.get(kind)])
    if not silent and not re.search(SAYS[kind], Path(f"{folder}.log").read_text()):
        wrong.append("did not say why")
    if kind == "link":
        shell("ip -n faults1 link set faults1 up")
    if kind == "read_only":
        shell(f"mount -o remount,rw {folder}")
    if kind == "disk":
        shell(f"mount -o remount,size=1g {folder}")
    if kind == "files":
        seen += f", {damage_newest(folder, rng)}"
    if kind != "two_runs":
        resumed, _, left = Run(folder, *RESUME, **several).wait()
        wrong += [] if set(resumed) == {0} and not left else [f"its resume ended with {resumed}"]
    if not wrong and end_of(folder) != expected[several.get("ranks", 1)]:
        wrong.append("ended differently")
    return seen, took, wrong


# --- Command line -----------------------------------------------------------------------------------------------------


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=SAYS, default=list(SAYS), help="of faults (default: all)")
    parser.add_argument("--moments", type=int, default=20, help="of each kind (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=120, help="begin no moment after them (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "faults", help="folder (default: runs/faults)")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.output.exists():
        raise SystemExit(f"{args.output} exists: move it away first")
    kinds = [kind for kind in args.kinds if os.geteuid() == 0 or kind not in NEEDS_ROOT]
    for kind in set(args.kinds) - set(kinds):
        print(f"{kind}: left out, it needs root")
    started, root = time.monotonic(), args.output.resolve()
    root.mkdir(parents=True)
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]
    import sentiment_gpt2_ppo  # noqa: F401  what every run would spend its first ten seconds on
    import trl_ppo.trainer  # noqa: F401

    maker = multiprocessing.get_context("fork").Process(target=make_models, args=(root,))
    maker.start()
    maker.join()
    expected, whole = {}, {}
    for ranks in (1, 2):
        run = Run(root / f"whole-{ranks}", ranks=ranks)
        statuses, whole[ranks], _ = run.wait()
        if statuses != [0]:
            raise SystemExit(f"the run that was left alone failed: see {run.log}")
        expected[ranks] = end_of(root / f"whole-{ranks}")
    room = sum(path.stat().st_size for path in (root / "whole-1").rglob("*") if path.is_file())
    print(f"a run left alone takes {whole[1]:.1f} s, on two ranks {whole[2]:.1f} s", flush=True)

    rng, done, lost, slowest = random.Random(args.seed), Counter(), Counter(), Counter()
    for moment in range(args.moments):
        for kind in kinds:
            if time.monotonic() - started > 60 * args.minutes:
                break
            folder = root / f"{kind}-{moment}"
            with contextlib.ExitStack() as stack:
                if kind in ("node", "link"):
                    stack.enter_context(network())
                if kind in ("disk", "read_only"):
                    stack.enter_context(file_system(folder, "1g"))
                seen, took, wrong = one_moment(kind, folder, expected, whole, room, rng)
            done[kind] += 1
            lost[kind] += bool(wrong)
            slowest[kind] = max(slowest[kind], took)
            print(f"{kind} {moment}: {seen}: {'LOST: ' + '; '.join(wrong) if wrong else 'same end'}", flush=True)
            if not wrong:
                shutil.rmtree(folder)
                Path(f"{folder}.log").unlink()
    minutes = (time.monotonic() - started) / 60
    print(f"\n| kind | moments | lost | slowest end, s |\n|---|---|---|---|\n{rows(kinds, done, lost, slowest)}")
    print(f"{sum(lost.values())} of {sum(done.values())} lost; {minutes:.0f} minutes, seed {args.seed}")
    raise SystemExit(bool(sum(lost.values())) or not sum(done.values()))


def rows(kinds, done, lost, slowest):
    return "\n".join(f"| {kind} | {done[kind]} | {lost[kind]} | {slowest[kind]:.1f} |" for kind in kinds)


if __name__ == "__main__":
    main()
