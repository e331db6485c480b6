"""A process that trains two rollouts of a job, and writes the most bytes that each phase of the second one took.

Nothing of `trl_ppo/cpu` is used: on a GPU it is not there. What Python and the libraries take is left out, by a first
run of a tiny job.
"""

import gc
import json
import sys
import tempfile
from pathlib import Path

from datasets import Dataset

from benchmarks.throughput_jobs import Job, tiny
from benchmarks.throughput_run import adapters, build, load_tokenizer, make_prompts
from trl_ppo import PPOConfig, PPOTrainer, trainer


def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def peak_of(function, peaks, name):
    """`function`, which notes the most memory that it took."""

    def noted(*args, **kwargs):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        result = function(*args, **kwargs)
        peaks[name] = status("VmHWM")
        return result

    return noted


def settings(job):
    """What the job is to `PPOConfig`."""
    return {
        "output_dir": "none",
        "use_cpu": True,
        "bf16": job.mixed_precision == "bf16",
        "gradient_checkpointing": job.gradient_checkpointing,
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.batch // job.micro_batch,
        "num_iterations": 1,
        "max_completion_length": job.new_tokens[1],
        "generation_kwargs": {"min_new_tokens": job.new_tokens[1]},
        "model_init_kwargs": {"dtype": job.dtype},
    }


def run(job, folder):
    """Phase → the most bytes that were resident in it."""
    tokenizer, peaks = load_tokenizer(folder), {}
    prompts = [tokenizer.decode(ids) for ids in make_prompts(job, 1)]
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "total_episodes": 2 * job.batch}
    ppo = PPOTrainer(
        str(folder / "policy"),
        lambda completions, **columns: [float(len(text)) for text in completions],
        PPOConfig(**settings(job) | quiet | {"output_dir": tempfile.mkdtemp()}),
        Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        peft_config=adapters(job)[0],
    )
    ppo._generate_single_turn = peak_of(ppo._generate_single_turn, peaks, "sampling")
    ppo.logprobs = peak_of(ppo.logprobs, peaks, "log-probs")
    ppo.training_step = peak_of(ppo.training_step, peaks, "update")  # of the last micro-batch: no rollout in it
    ppo.train()
    return peaks


if __name__ == "__main__":
    trainer.cpu_folder = lambda device: None
    job, folder = Job.from_json(sys.argv[2]), Path(sys.argv[1])
    for each, name in ((tiny(job), "warm-up"), (job, "job")):
        (folder / name).mkdir()
        build(each, folder / name)
        gc.collect()
        baseline = status("VmRSS")
        peaks = {phase: peak - baseline for phase, peak in run(each, folder / name).items()}
    (folder / "peaks.json").write_text(json.dumps(peaks))
