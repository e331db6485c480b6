"""One process of `benchmarks/ppo_throughput.py`: builds a job's models, or runs the job once with one trainer.

Runs under this project's TRL and under TRL 1.12 alike, and imports either one's trainer only where it is run. What
both must share is written once and read by both: weights, prompts, reward model, and where completions end.

How completions end: `generate` gets one more logits processor, on both sides the same one, which forbids EOS until a
completion has the length that its prompt decides, and forces it there. A bias on EOS in the random head would give the
same distribution of lengths only, so that one side may draw a longer longest completion, which decides how many tokens
are decoded; forced lengths are the same ones, in every repeat. The processor writes two columns a step and otherwise
only rows that have ended.

Seconds are from the end of the first rollout's update, which is warm-up, to the end of the last one's. `rollout` is
sampling; `scoring` all between sampling and the first epoch: log-probs, values, reference, reward model, advantages;
`update` the rest: epochs, optimiser, logging, and what a trainer does between two rollouts.
"""

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    TrainerCallback,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the recipes stay out of TRL 1.12's path

from throughput_jobs import EOS, PAD, Job

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")
GPT2_KERNEL = {"activation_function": "gelu_pytorch_tanh"}  # as in the recipes' YAMLs
UNUSED_ROLLOUTS = 1  # prompts that nobody samples from: TRL 1.12 steps more often on the last batch of a pass

# ---------------------------------------------------------------------------------------------------------------
# Models and prompts
# ---------------------------------------------------------------------------------------------------------------


def make_tokenizer(vocab_size):
    """One character for each token, so that text and tokens say the same: no real tokenizer does, decoded and encoded.

    The reward model of this project reads text, that of TRL 1.12 tokens; both get the same ones.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    first = 0x10000  # beyond are no white space and no surrogates
    vocabulary = {"<pad>": PAD, "<eos>": EOS} | {chr(first + i): i for i in range(2, vocab_size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def load_tokenizer(folder):
    """Not by AutoTokenizer: next to a Qwen2 it takes every tokenizer for Qwen2's own."""
    return PreTrainedTokenizerFast.from_pretrained(folder / "policy")


def make_prompts(job, rollouts):
    """As many lists of token ids as `rollouts` take, and a warm-up; the same for every one that asks for as many."""
    generator = torch.Generator().manual_seed(0)
    shortest, longest = job.prompt_tokens
    count = job.batch * (1 + rollouts + UNUSED_ROLLOUTS)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, job.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def build(job, folder):
    """Random models of the job in `folder`: `policy`, `critic` of the same shape, a small `reward` model."""
    torch.manual_seed(0)
    tokens = {"vocab_size": job.vocab_size, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
    if job.architecture == "gpt2":
        config = GPT2Config(**job.size, **tokens)
    else:
        config = Qwen2Config(**job.size, **tokens, tie_word_embeddings=True, max_position_embeddings=32768)
    small = GPT2Config(n_embd=min(128, config.hidden_size), n_layer=2, n_head=2, num_labels=1, **tokens)
    tokenizer = make_tokenizer(job.vocab_size)
    save(AutoModelForCausalLM.from_config(config), tokenizer, folder / "policy", job.dtype)
    config.num_labels = 1
    save(AutoModelForSequenceClassification.from_config(config), tokenizer, folder / "critic", job.dtype)
    save(AutoModelForSequenceClassification.from_config(small), tokenizer, folder / "reward", "float32")
    (folder / "job.json").write_text(job.to_json())  # last: says that the rest is there


def save(model, tokenizer, folder, dtype):
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def end_lengths(job, prompts):
    """How many tokens, EOS included, are sampled for each row of left-padded `prompts` (B, P) → (B,).

    Hashed from the prompt's tokens, so that it depends on neither order nor padding; one more than can be sampled
    where no completion ends by itself.
    """
    shortest, longest = job.new_tokens
    if not job.ragged:
        return torch.full((len(prompts),), longest + 1, device=prompts.device)
    hashed = prompts.masked_fill(prompts == PAD, 0).sum(1) * 2654435761 % 2**32  # Knuth's multiplicative hash
    return shortest + hashed % (longest - shortest + 1)


class EndAt:
    """A logits processor under which a completion ends, in EOS, with as many tokens as `end_lengths` says.

    It knows a row by its prompt: a trainer may drop the rows that have ended.
    """

    def __init__(self, job, prompt_width):
        self.job, self.prompt_width = job, prompt_width

    def __call__(self, input_ids, scores):
        sampled = input_ids.size(1) - self.prompt_width + 1  # the number of the token that is sampled now
        ending = (end_lengths(self.job, input_ids[:, : self.prompt_width]) == sampled).nonzero().squeeze(1)
        scores[:, [PAD, EOS]] = -torch.inf
        scores[ending] = -torch.inf
        scores[ending, EOS] = 0.0
        return scores


def fix_lengths(policy, job):
    """Let `policy.generate` end completions where `end_lengths` says; returns the list of what it is then asked for."""
    original, asked = policy.generate, []

    def generate(*args, **kwargs):
        prompts = kwargs["input_ids"]
        new = end_lengths(job, prompts).clamp(max=job.new_tokens[1])
        asked.append({"prompt_tokens": int((prompts != PAD).sum()), "new_tokens": int(new.sum())})
        return original(*args, logits_processor=[EndAt(job, prompts.size(1))], **kwargs)

    policy.generate = generate
    return asked


# ---------------------------------------------------------------------------------------------------------------
# The two trainers
# ---------------------------------------------------------------------------------------------------------------


def now():
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class EndOfRollout(TrainerCallback):
    """The time after each rollout's last optimiser step."""

    def __init__(self, steps_per_rollout):
        self.steps_per_rollout, self.times = steps_per_rollout, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps_per_rollout == 0:
            self.times.append(now())


def shared_settings(job, rollouts, output_dir):
    """What both trainers call by the same name."""
    return {
        "output_dir": output_dir,
        "use_cpu": not job.gpu,
        # TRL 1.12 ignores it with transformers 5. Both heed ACCELERATE_MIXED_PRECISION, TRL's in the update alone.
        "bf16": False,
        "gradient_checkpointing": job.gradient_checkpointing,
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.batch // job.micro_batch,
        "total_episodes": job.batch * (1 + rollouts),
        "temperature": job.temperature,
        "learning_rate": 1e-6,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }


def adapters(job):
    """`peft_config` and `quantization_config`, as the recipes have them, or None."""
    lora = quantization = None
    if job.lora_targets:
        from peft import LoraConfig

        targets = job.lora_targets if isinstance(job.lora_targets, str) else list(job.lora_targets)
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    if job.four_bit:
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=job.dtype,
        )
    return lora, quantization


def run_ours(job, folder, rollouts, output_dir, separate_critic=False):
    """`(ends of rollouts, seconds of sampling, seconds of scoring, what generate was asked for)`, warm-up included."""
    sys.path.insert(0, str(RECIPES))
    from trl_ppo import PPOConfig, PPOTrainer, RewardModel

    tokenizer = load_tokenizer(folder)
    args = PPOConfig(
        **shared_settings(job, rollouts, output_dir),
        num_iterations=job.epochs,
        max_completion_length=job.new_tokens[1],
        value_model_path=str(folder / "critic") if separate_critic else None,
        shuffle_dataset=False,
        logging_steps=job.epochs,  # one entry a rollout
        model_init_kwargs={"dtype": job.dtype} | (GPT2_KERNEL if job.architecture == "gpt2" else {}),
    )
    clock = EndOfRollout(job.epochs)
    lora, quantization = adapters(job)
    trainer = PPOTrainer(
        str(folder / "policy"),
        # Text has lost the end token that TRL 1.12's reward model reads.
        RewardModel(str(folder / "reward"), max_length=2048, add_eos=job.ragged),
        args,
        Dataset.from_dict({"prompt": [tokenizer.decode(ids) for ids in make_prompts(job, rollouts)]}),
        processing_class=tokenizer,
        callbacks=[clock],
        peft_config=lora,
        quantization_config=quantization,
    )
    asked = fix_lengths(trainer.policy, job)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "time/generate" in entry]
    check_lengths(job, asked, [entry["completions/mean_length"] for entry in logged])
    return clock.times, *([entry[f"time/{phase}"] for entry in logged] for phase in ("generate", "score")), asked


def check_lengths(job, asked, mean_lengths):
    """Raise if completions were not sampled through `generate`, and so are not as long as they should be."""
    wanted = [rollout["new_tokens"] / job.batch for rollout in asked]
    if len(wanted) != len(mean_lengths) or any(abs(a - b) > 1e-3 for a, b in zip(wanted, mean_lengths, strict=True)):
        raise RuntimeError(f"{job.name}: completions of {mean_lengths} tokens, not of {wanted}: lengths are not forced")


def run_trl112(job, folder, rollouts, output_dir):
    """The same of TRL 1.12's trainer, timed from outside: nothing of it is changed but the order of its prompts."""
    from torch.utils.data import DataLoader
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    lora, quantization = adapters(job)
    loading = {"dtype": job.dtype} | ({"quantization_config": quantization} if quantization else {})
    clock = EndOfRollout(1)
    args = PPOConfig(
        **shared_settings(job, rollouts, output_dir),
        num_ppo_epochs=job.epochs,
        response_length=job.new_tokens[1],
        stop_token="eos",
        local_rollout_forward_batch_size=job.forward_batch,
        num_sample_generations=0,
        logging_steps=1,
    )
    trainer = PPOTrainer(
        args,
        load_tokenizer(folder),
        AutoModelForCausalLM.from_pretrained(folder / "policy", **loading),
        None,
        AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype="float32"),
        Dataset.from_dict({"input_ids": make_prompts(job, rollouts)}),
        # A quantised job has its critic in 4 bits too, as TRL's own example: full weights would be unfair on memory.
        AutoModelForSequenceClassification.from_pretrained(folder / "critic", **loading),
        callbacks=[clock],
        peft_config=lora,
    )
    in_order = DataLoader(trainer.train_dataset, job.batch, collate_fn=trainer.data_collator, drop_last=True)
    trainer.dataloader = trainer.accelerator.prepare(in_order)
    policy = trainer.policy_model.get_base_model() if trainer.is_peft_model else trainer.policy_model
    asked = fix_lengths(policy, job)
    marks, awaiting_update = [], False
    batch_generation, accumulate = ppo_trainer.batch_generation, trainer.accelerator.accumulate

    def timed_generation(*args):
        nonlocal awaiting_update
        started = now()
        result = batch_generation(*args)
        marks.append([started, now()])
        awaiting_update = True
        return result

    def first_accumulate(*args):
        nonlocal awaiting_update
        if awaiting_update:
            marks[-1].append(now())
            awaiting_update = False
        return accumulate(*args)

    with (
        mock.patch.object(ppo_trainer, "batch_generation", timed_generation),
        mock.patch.object(trainer.accelerator, "accumulate", first_accumulate),
    ):
        trainer.train()
    sampling = [generated - started for started, generated, _ in marks]
    scoring = [scored - generated for _, generated, scored in marks]
    return clock.times, sampling, scoring, asked


# ---------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------


SIDES = {
    "ours": run_ours,
    "ours, bf16": run_ours,  # by its environment
    "ours, separate critic": lambda *args: run_ours(*args, separate_critic=True),
    "TRL 1.12": run_trl112,
}


def measure(side, job, folder, rollouts):
    """Times are seconds a rollout, means over the measured ones; memory GB (10⁹ bytes), of the process so far."""
    memory_at_start = peak_memory()
    with tempfile.TemporaryDirectory() as output_dir:
        ends, sampling, scoring, asked = SIDES[side](job, Path(folder), rollouts, output_dir)
    if len(ends) != 1 + rollouts or len(sampling) != 1 + rollouts:
        raise RuntimeError(f"{side}, {job.name}: {len(ends)} rollouts ended, {len(sampling)} were timed")
    seconds = ends[-1] - ends[0]
    rollout, score = sum(sampling[1:]) / rollouts, sum(scoring[1:]) / rollouts
    gpu = torch.cuda.is_available()
    return {
        "samples_per_second": job.batch * rollouts / seconds,
        "rollout_seconds": rollout,
        "scoring_seconds": score,
        "update_seconds": seconds / rollouts - rollout - score,
        "peak_memory_gb": peak_memory(),
        "peak_gpu_gb": peak_gpu_memory(),
        "memory_at_start_gb": memory_at_start,
        "prompt_tokens": sum(call["prompt_tokens"] for call in asked),
        "new_tokens": sum(call["new_tokens"] for call in asked),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "versions": versions(),
    }


def peak_memory():
    """The most of this process that was resident at once, so far; GB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def peak_gpu_memory():
    """The most that the allocator held on the GPU, which a card must have; GB, None without one."""
    return torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else None


def versions():
    """Of Python and the packages that matter."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of job.json and the models")
    parser.add_argument("--build", help="a job as JSON: write its models instead of running it")
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--rollouts", type=int)
    parser.add_argument("--output", type=Path)
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.build:
        build(Job.from_json(args.build), args.folder)
        return
    job = Job.from_json((args.folder / "job.json").read_text())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    result = measure(args.side, job, args.folder, args.rollouts)
    args.output.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
