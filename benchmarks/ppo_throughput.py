"""How fast is PPO, and how much memory does it take? This trainer and TRL 1.12's, on the same jobs.

    python benchmarks/ppo_throughput.py
    python benchmarks/ppo_throughput.py --job sentiment --repeats 5
    python benchmarks/ppo_throughput.py --job gpt2 gpt2_large_lora qwen05_lora qwen15_qlora --rollouts 2 --minutes 10
    python benchmarks/ppo_throughput.py --grow --repeats 1
    python benchmarks/ppo_throughput.py --smoke

Runs each job `--repeats` times with either trainer in turn, each time in a process of its own: one rollout to warm up,
then `--rollouts` that are timed. TRL 1.12 is the last release with a PPOTrainer, and gets an environment of its own
under `runs/throughput`, with every other package as requirements.txt pins it. Both start from the same random weights
of a real architecture (nothing is downloaded but packages) and take the same prompts in the same order, to completions
of the same lengths; benchmarks/throughput_run.py says how, benchmarks/throughput_jobs.py has the jobs. With a value
head this trainer has no second trunk to train, as TRL's has; that is a choice of algorithm, so on a CPU it is measured
with a separate critic as well.

Prints medians, ranges and ratios of each pair, and writes them, every run, hardware and versions to
`runs/throughput/<job>.json`; with `--minutes` it makes fewer repeats where they would take longer. `--grow` measures
this trainer alone while one size of the sentiment job grows, and writes `growth.json` and `growth.svg` (drawn with
matplotlib) there. The machine has to be otherwise idle.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # the same modules, run as a script or imported

from throughput_jobs import CPU_JOBS, JOBS, growing, operations, tiny

from eval.machine import cpu_name, git_commit

ROOT = Path(__file__).resolve().parent.parent
TRL = "trl==1.12.0"
OURS, SEPARATE, BFLOAT16, THEIRS = "ours", "ours, separate critic", "ours, bf16", "TRL 1.12"
FIGURES = {  # of a run: what is printed, and how
    "samples_per_second": ("samples/s", "{:.2f}"),
    "rollout_seconds": ("rollout, s", "{:.2f}"),
    "scoring_seconds": ("scoring, s", "{:.2f}"),
    "update_seconds": ("update, s", "{:.2f}"),
    "peak_memory_gb": ("peak memory, GB", "{:.2f}"),
    "peak_gpu_gb": ("peak GPU memory, GB", "{:.2f}"),
}

# ---------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------


def pins():
    """The packages of TRL 1.12's environment: those of requirements.txt, and another trl."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [TRL if line.startswith("trl==") else line for line in lines if line]


def trl112_python(folder):
    """The interpreter of TRL 1.12's environment in `folder`, made there if it is not, or if a pin has changed."""
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(pins()) + "\n"
    if not installed.exists() or installed.read_text() != wanted:
        print(f"making the environment of {TRL} in {folder}", flush=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *pins()]
        for command in ([sys.executable, "-m", "venv", str(folder)], install):
            if subprocess.run(command).returncode:
                raise SystemExit(f"{folder}: '{command[2]}' failed, see above; --ours_only does without it")
        installed.write_text(wanted)
    return str(python)


def environment(job, threads):
    """Of a measured process: its threads, its device, its precision, and nothing from the network."""
    own = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    own |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    own |= {"ACCELERATE_MIXED_PRECISION": job.mixed_precision}
    return os.environ | own | ({} if job.gpu else {"CUDA_VISIBLE_DEVICES": ""})


def check_machine(jobs, grows):
    """Raise `SystemExit` where a job needs a GPU and torch finds none, or matplotlib is missing for the figure."""
    named = [job.name for job in jobs if job.gpu]
    has_gpu = "import sys, torch; sys.exit(not torch.cuda.is_available())"  # in a process of its own: this stays small
    if named and subprocess.run([sys.executable, "-c", has_gpu]).returncode:
        raise SystemExit(f"job: {', '.join(named)} needs a GPU, and torch finds none; --smoke runs it small on a CPU")
    if grows and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("grow: its figure is drawn with matplotlib, which is not installed; pip install matplotlib")


def start(python, job, threads, *arguments):
    """One process of throughput_run.py; its last words if it fails."""
    command = [python, str(ROOT / "benchmarks" / "throughput_run.py"), *arguments]
    done = subprocess.run(command, env=environment(job, threads), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job.name}: {' '.join(command)} failed:\n{done.stderr[-3000:]}")


def built(job, folder, threads):
    """The folder of the job's models, written if they are not there or are another job's."""
    folder = folder / "models" / job.name
    marker = folder / "job.json"
    if not marker.exists() or marker.read_text() != job.to_json():
        folder.mkdir(parents=True, exist_ok=True)
        marker.unlink(missing_ok=True)
        start(sys.executable, job, threads, str(folder), "--build", job.to_json())
    return folder


def run(python, side, job, models, rollouts, threads):
    """What `throughput_run.measure` returns, of a fresh process."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "result.json"
        arguments = ["--side", side, "--rollouts", str(rollouts), "--output", str(output)]
        if side == BFLOAT16:
            job = replace(job, mixed_precision="bf16")  # of this process; the models stay as they are
        start(python, job, threads, str(models), *arguments)
        return json.loads(output.read_text())


# ---------------------------------------------------------------------------------------------------------------
# One job
# ---------------------------------------------------------------------------------------------------------------


def measure(job, folder, sides, repeats, rollouts, threads, minutes=None):
    """Every run of a job, by side; the sides take turns, so that a slower hour of the machine meets all of them.

    With `minutes` no repeat but the first is begun that would, lasting as long as the one before, end later.
    """
    deadline = time.monotonic() + 60 * minutes if minutes else math.inf
    models = built(job, folder, threads)
    python = {side: trl112_python(folder / "venv112") if side == THEIRS else sys.executable for side in sides}
    runs = {side: [] for side in sides}
    for repeat in range(repeats):
        begun = time.monotonic()
        for side in sides:
            runs[side].append(run(python[side], side, job, models, rollouts, threads))
            print(f"{job.name}, {side}, {repeat + 1} of {repeats}: {describe(runs[side][-1])}", flush=True)
        if repeat + 1 < repeats and 2 * time.monotonic() - begun > deadline:
            print(f"{job.name}: no time for another repeat, {repeat + 1} of {repeats} done", flush=True)
            break
    check_like_for_like(runs)
    return runs


def describe(result):
    return ", ".join(f"{name} {form.format(result[key])}" for key, (name, form) in FIGURES.items() if result[key])


def check_like_for_like(runs):
    """Raise `SystemExit` where two runs did not do the same work, or differ in a package besides trl."""
    first, *others = [result for results in runs.values() for result in results]
    for other in others:
        for name in ("prompt_tokens", "new_tokens", "threads", "device"):
            if other[name] != first[name]:
                raise SystemExit(f"{name}: {other[name]} in one run, {first[name]} in another; they cannot be compared")
        for name, version in other["versions"].items():
            if name != "trl" and version != first["versions"][name]:
                raise SystemExit(f"{name}: {version} in one run, {first['versions'][name]} in another; remove venv112")


def summarise(runs):
    """Median and range of each figure by side, and of each pair's ratio to TRL 1.12's run of the same repeat."""
    summary = {}
    for side, results in runs.items():
        summary[side] = {key: spread([result[key] for result in results]) for key in FIGURES}
        if side != THEIRS and THEIRS in runs:
            pairs = list(zip(results, runs[THEIRS], strict=True))
            ratios = {key: spread([a[key] / b[key] for a, b in pairs if a[key] and b[key]]) for key in FIGURES}
            summary[f"{side} / {THEIRS}"] = ratios
    return summary


def spread(values):
    values = [value for value in values if value is not None]
    return {"median": statistics.median(values), "low": min(values), "high": max(values)} if values else None


def table(summary):
    """Markdown: a row a side or ratio, each figure as median and range."""
    shown = [key for key in FIGURES if any(row[key] for row in summary.values())]
    lines = [["", *(FIGURES[key][0] for key in shown)], ["---"] * (1 + len(shown))]
    lines += [[name, *(cell(row[key], FIGURES[key][1]) for key in shown)] for name, row in summary.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value, form):
    return "–" if value is None else "{} [{}, {}]".format(*(form.format(value[k]) for k in ("median", "low", "high")))


def provenance(args):
    """When, where and on what; a busy machine shows in its load."""
    return {
        "command": " ".join(["python", "benchmarks/ppo_throughput.py", *args]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "load_at_start": os.getloadavg()[0],
    }


def write(path, content):
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def report(job, folder, sides, settings, where):
    """Measure one job, print it and write it."""
    runs = measure(job, folder, sides, **settings)
    summary = summarise(runs)
    content = {"job": json.loads(job.to_json()), **where, "settings": settings, "summary": summary, "runs": runs}
    write(folder / f"{job.name}.json", content)
    print(f"\n{job.name}, n = {len(runs[OURS])}, median [lowest, highest]\n\n{table(summary)}\n", flush=True)
    if job.episodes:
        for side in sides:
            minutes = job.episodes / summary[side]["samples_per_second"]["median"] / 60
            print(f"{side}: {job.episodes:,} episodes would take {minutes:.1f} minutes\n")


# ---------------------------------------------------------------------------------------------------------------
# How cost grows
# ---------------------------------------------------------------------------------------------------------------


def exponent(x, y):
    """b of y = a·x^b, by least squares on logarithms."""
    x, y = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def grow(points, folder, figure, settings, where):
    """`points` as `throughput_jobs.growing` has them; writes `figure`, and every point and exponent next to it."""
    series = {}
    for name, value, job in points:
        summary = summarise(measure(job, folder, [OURS], **settings))[OURS]
        point = {
            "value": value,
            "samples_per_second": summary["samples_per_second"],
            "peak_memory_gb": summary["peak_memory_gb"],
            "operations_per_sample": operations(job),
        }
        series.setdefault(name, []).append(point)
    exponents = {name: fit(points) for name, points in series.items()}
    write(figure.with_suffix(".json"), {**where, "settings": settings, "series": series, "exponents": exponents})
    for name, fitted in exponents.items():
        print(f"{name}: " + ", ".join(f"{key} ∝ x^{value:.2f}" for key, value in fitted.items()))
    draw(series, exponents, figure)


def fit(points):
    """Exponents of seconds and operations for one completion, and of peak memory, in what grows."""
    values = [point["value"] for point in points]
    seconds = [1 / point["samples_per_second"]["median"] for point in points]
    return {
        "seconds per sample": exponent(values, seconds),
        "operations per sample": exponent(values, [point["operations_per_sample"] for point in points]),
        "peak memory": exponent(values, [point["peak_memory_gb"]["median"] for point in points]),
    }


def draw(series, exponents, path):
    """Samples/s above, with what the operations alone would make of the last, and peak memory below; one SVG."""
    from matplotlib.figure import Figure  # not before all is measured: it is no small import
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(3 * len(series), 5.5), layout="constrained")
    rows = figure.subplots(2, len(series), squeeze=False)
    for column, (name, points) in enumerate(series.items()):
        values = [point["value"] for point in points]
        shown = (("samples_per_second", "seconds per sample", -1), ("peak_memory_gb", "peak memory", 1))
        for axes, (key, fitted, sign) in zip(rows[:, column], shown, strict=True):
            medians = [point[key]["median"] for point in points]
            errors = [[abs(p[key]["median"] - p[key][end]) for p in points] for end in ("low", "high")]
            axes.errorbar(values, medians, yerr=errors, marker="o", label="measured")
            axes.set(xscale="log", yscale="log", xlabel=name, ylabel=FIGURES[key][0])
            axes.set_title(f"∝ x$^{{{sign * exponents[name][fitted]:.2f}}}$")
            axes.set_xticks(values, [f"{value:,}" for value in values], rotation=30)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        last = points[-1]["operations_per_sample"] * points[-1]["samples_per_second"]["median"]
        by_operations = [last / point["operations_per_sample"] for point in points]
        rows[0, column].plot(values, by_operations, linestyle="--", label="by operations")
        rows[0, column].legend()
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", nargs="+", choices=JOBS, default=CPU_JOBS, help="default: those for a CPU")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each trainer (default: %(default)s)")
    parser.add_argument("--rollouts", type=int, default=3, help="timed ones of each run (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of each run (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="of all jobs together, in equal parts: fewer repeats if need be")
    parser.add_argument("--ours_only", action="store_true", help="this trainer alone, and no environment for TRL 1.12")
    parser.add_argument("--bf16", action="store_true", help="this trainer under bf16 autocast too, on a CPU")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one repeat: whether it runs, not how fast")
    parser.add_argument(
        "--grow", action="store_true", help="how this trainer's cost grows with the sentiment job's sizes"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "throughput", help="default: runs/throughput")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    for name in ("repeats", "rollouts", "threads"):
        if getattr(args, name) < 1:
            raise SystemExit(f"{name}: {getattr(args, name)} must be 1 or more")
    settings = {name: getattr(args, name) for name in ("repeats", "rollouts", "threads")}
    if args.smoke:
        settings = {"repeats": 1, "rollouts": 1, "threads": 1}
    jobs = [] if args.grow else [tiny(JOBS[name]) if args.smoke else JOBS[name] for name in args.job]
    check_machine(jobs, args.grow)
    args.output.mkdir(parents=True, exist_ok=True)
    where = provenance(sys.argv[1:] if argv is None else argv)
    if args.grow:
        points = growing(tiny(JOBS["sentiment"]), {"batch size": (4, 8, 16)}) if args.smoke else growing()
        figure = args.output / ("smoke-growth.svg" if args.smoke else "growth.svg")
        grow(points, args.output, figure, settings, where)
        return
    if args.minutes:
        settings["minutes"] = args.minutes / len(jobs)
    for name, job in zip(args.job, jobs, strict=True):
        sides = [OURS] if args.ours_only else [OURS, THEIRS]
        if not JOBS[name].gpu:
            sides += [SEPARATE] + [BFLOAT16] * args.bf16
        report(job, args.output, sides, settings, where)


if __name__ == "__main__":
    main()
