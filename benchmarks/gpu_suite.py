"""All that waits for a GPU, in one go: for a machine that is lent for minutes and has no network.

    python benchmarks/gpu_suite.py
    python benchmarks/gpu_suite.py --trl112 wheels/trl112 --seconds 540 --output runs/gpu_suite.json
    python benchmarks/gpu_suite.py --smoke --only sentiment_gpt2_ppo

Runs the jobs of `PLAN` in its order, each in a process of its own: PPO at the real sizes beside TRL 1.12's trainer (the
jobs of benchmarks/throughput_jobs.py), and two rollouts or four steps of every recipe by its own YAML. Weights are
random, of the real architecture and size, texts are random letters, the tokenizer is made on the spot: nothing comes
from the Hub. After each job the JSON is written; a job that is in it without an error is not run again, and one that
failed before comes last. A job that fails, or runs past its time, leaves its last words there and the next one starts.

Needs the packages of requirements.txt; an unpacked wheel on PYTHONPATH will do. `--trl112` is the folder of TRL 1.12's
unpacked wheel. What needs a package that is missing (bitsandbytes, vllm) is left out, and said to be.
"""

import argparse
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import typing
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import random_models
from throughput_jobs import JOBS, tiny

from eval.machine import cpu_name, git_commit

ROOT = Path(__file__).resolve().parent.parent
LIMIT, LEAST = 150, 25  # seconds that a job may take; with fewer left than the second no job is started
OURS, THEIRS, VLLM = ", ours", ", TRL 1.12", ", vLLM"
PLAN = ["gpt2, ours", "sentiment_gpt2_ppo", "qwen05_lora, ours", "qwen_summarize_ppo", "gpt2, TRL 1.12"]
PLAN += ["qwen05_lora, TRL 1.12", "gpt2_large_lora, ours", "length_gpt2_large_ppo", "qwen15_qlora, ours"]
PLAN += ["qwen_summarize_ppo qlora", "gpt2_large_lora, TRL 1.12", "qwen15_qlora, TRL 1.12", "sentiment_gpt2_ppo, vLLM"]
PLAN += ["sentiment_gpt2_sft", "sentiment_gpt2_reward", "sentiment_gpt2_classifier", "length_gpt2_large_reward"]
PLAN += ["qwen_summarize_sft", "qwen_summarize_reward", "qwen_summarize_sft qlora", "qwen_summarize_reward qlora"]
USE_VLLM = ["--use_vllm", "true", "--vllm_mode", "colocate", "--vllm_gpu_memory_utilization", "0.3"]

# -- What a job does, in its own process -------------------------------------------------------------------------------


def ppo(name, folder, smoke):
    """What `throughput_run.measure` returns; minutes of the published run where the job is a piece of one."""
    import throughput_run  # here and below: torch, and the TRL of this process
    import torch

    name, _, side = name.partition(", ")
    job, models = (tiny(JOBS[name]) if smoke else JOBS[name]), folder / "models" / name
    if not (models / "job.json").exists():
        models.mkdir(parents=True, exist_ok=True)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            throughput_run.build(job, models)
    forget_peak()
    result = throughput_run.measure(side, job, models, rollouts=1 if smoke else 2)
    if THEIRS.endswith(side) != result["versions"]["trl"].startswith("1.12."):
        raise RuntimeError(f"{side}: this is TRL {result['versions']['trl']}")
    if job.episodes:
        result["minutes_of_all_episodes"] = job.episodes / result["samples_per_second"] / 60
    return result


def recipe(name, folder, smoke):
    """Two rollouts, or four steps, of a recipe by its own YAML; the last of what it logs, and seconds of its `main`."""
    import throughput_run

    from command_line import parse

    stem, _, variant = name.removesuffix(VLLM).partition(" ")
    main = importlib.import_module(stem).main
    parsed = partial(parse, str(ROOT / "recipes" / f"{stem}.py"), *typing.get_type_hints(main).values())
    given = ["--config", variant] if variant else []
    script, training, model = parsed(args=given)
    own = random_models.build(model.model_name_or_path, folder, smoke)
    given += ["--model_name_or_path", own, "--output_dir", str(folder / "out" / name), "--save_strategy", "no"]
    given += ["--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1"]
    given += USE_VLLM if name.endswith(VLLM) else []
    given += ["--use_cpu", "true", "--per_device_train_batch_size", "2"] if smoke else []
    tokens = getattr(script, "max_prompt_tokens", None) or getattr(training, "max_length", None) or 64
    given += ["--dataset_name", random_models.write_data(folder / "data", stem, 32 if smoke else tokens)]
    if stem.endswith("_ppo"):
        given += ["--max_completion_length", "4", "--gradient_accumulation_steps", "1"] if smoke else []
        given += ["--total_episodes", str(4 if smoke else 2 * training.generation_batch_size)]
        if "reward_model" in script.rewards:
            given += ["--reward_model", random_models.build(script.reward_model, folder, smoke)]
    else:
        given += ["--max_steps", "1" if smoke else "4", "--test_rows" if stem.endswith("_sft") else "--test_pairs", "8"]
        given += ["--max_length", "64"] if smoke else []
    forget_peak()
    started = time.monotonic()
    trainer = main(*parsed(args=given))
    seconds, peak = time.monotonic() - started, throughput_run.peak_gpu_memory()
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    steps, versions = trainer.state.global_step, throughput_run.versions()
    return {"seconds": seconds, "steps": steps, "logged": logged, "peak_gpu_gb": peak, "versions": versions}


def forget_peak():
    """What making random weights has needed does not count."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# -- All of them -------------------------------------------------------------------------------------------------------


def missing(name, args):
    """What a job needs and this machine has not, or None."""
    if name.endswith(THEIRS) and not args.trl112:
        return "--trl112 is not given"
    package = "vllm" if name.endswith(VLLM) else "bitsandbytes" if "qlora" in name else "torch"
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def attempt(name, args, seconds):
    """The result of a job in a process of its own, or its error and last words."""
    job = JOBS.get(name.partition(", ")[0])
    precision = job.mixed_precision if job else "bf16"  # as accelerate_configs/single_gpu.yaml has it
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    env |= {"HF_DATASETS_CACHE": str(args.folder / "cache")}
    env |= {"ACCELERATE_MIXED_PRECISION": "no" if args.smoke else precision}
    if name.endswith(THEIRS):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(args.trl112.resolve()), env.get("PYTHONPATH")]))
    result, log = args.folder / "result.json", args.folder / "log.txt"
    result.unlink(missing_ok=True)
    started = time.monotonic()
    with open(log, "w") as out:
        process = subprocess.Popen(worker(name, args, result), env=env, stdout=out, stderr=out, start_new_session=True)
        try:
            ended = f"exit status {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
            ended = f"stopped after {seconds:.0f} s"
    if process.returncode or not result.exists():
        said = log.read_text(errors="replace").replace("\r", "\n").splitlines()
        return {"error": ended, "log": [line for line in said if line.strip()][-15:]}
    return {"seconds_in_all": time.monotonic() - started} | json.loads(result.read_text())


def worker(name, args, result):
    """The command of a job's process."""
    own = ["--worker", name, "--folder", str(args.folder), "--output", str(result)]
    return [sys.executable, __file__, *own, *(["--smoke"] if args.smoke else [])]


def machine():
    """Asked for in a process that ends: this one stays small, and holds nothing of the GPU."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'none')"
    gpu = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    return {"gpu": gpu, "processor": cpu_name(), "cores": os.cpu_count()}


def line(name, results):
    """One job's result, next to that of TRL 1.12."""
    result, theirs = results[name], results.get(name.replace(OURS, THEIRS), {})
    if "error" in result:
        return f"{name}: {result['error']}"
    figures = {"seconds_in_all": "{:.0f} s", "samples_per_second": "{:.2f} samples/s", "peak_gpu_gb": "peak {:.2f} GB"}
    figures["minutes_of_all_episodes"] = f"{{:.1f}} minutes for {JOBS['gpt2'].episodes:,} episodes"
    parts = [text.format(result[key]) for key, text in figures.items() if result.get(key)]
    if name.endswith(OURS) and "samples_per_second" in theirs:
        parts.append(f"{result['samples_per_second'] / theirs['samples_per_second']:.2f} × TRL 1.12")
    return f"{name}: {', '.join(parts)}"


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540, help="for all of it (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=PLAN, metavar="JOB", help="these jobs: " + "; ".join(PLAN))
    parser.add_argument("--trl112", type=Path, help="folder of TRL 1.12's unpacked wheel")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "gpu_suite", help="for models, data and logs")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu_suite.json", help="default: %(default)s")
    parser.add_argument("--commit", default=git_commit(), help="for the JSON, where git does not know it")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU: whether it runs, not how fast")
    parser.add_argument("--worker", choices=PLAN, help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    deadline, args = time.monotonic(), make_parser().parse_args(argv)
    deadline += args.seconds
    if args.worker:
        run = ppo if args.worker.endswith((OURS, THEIRS)) else recipe
        args.output.write_text(json.dumps(run(args.worker, args.folder, args.smoke)))
        return
    content = json.loads(args.output.read_text()) if args.output.exists() else {"jobs": {}}
    results, here = content["jobs"], machine() | {"commit": args.commit}
    args.folder.mkdir(parents=True, exist_ok=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    failed = [name for name in PLAN if "error" in results.get(name, {})]
    for name in [name for name in PLAN if name not in results] + failed:
        if args.only and name not in args.only:
            continue
        if (lacks := missing(name, args)) is not None:
            print(f"{name}: left out, {lacks}")
            continue
        if (left := deadline - time.monotonic()) < LEAST:
            print(f"no time for {name} and what follows; start it again")
            break
        results[name] = attempt(name, args, min(left, LIMIT)) | here
        content["summary"] = [line(done, results) for done in results]
        args.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(line(name, results), flush=True)


if __name__ == "__main__":
    main()
