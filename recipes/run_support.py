"""What a run needs beside its algorithm: progress that can be read, and checkpoints from which it resumes exactly."""

import ctypes
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import AutoTokenizer, ProgressCallback, TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from rewards import SCORE_OFFSET, load_classifier


def keep_freed_memory():
    """Let glibc keep what a tensor frees for the next one; it returns blocks of 32 MiB and more, and gets them anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # as malloc.h numbers them
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**31 - 1)


class SeededByPass(Sampler):
    """A sampler whose order depends on the seed and the pass alone, so that a resumed run sees the same prompts."""

    def __init__(self, sampler, current_pass):
        self.sampler, self.current_pass = sampler, current_pass

    def __iter__(self):
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + self.current_pass())
        return iter(self.sampler)

    def __len__(self):
        return len(self.sampler)


class LogBeforeSave(TrainerCallback):
    """Empties the running means at each checkpoint, so that a resumed run logs what an uninterrupted one does."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save


class RolloutProgress(ProgressCallback):
    """Trainer's progress bar, with a short line a log in place of the forty metrics that the loggers get."""

    SHOWN: ClassVar[dict[str, str]] = {
        "objective/scores": "score {:.3f}",
        "objective/kl": "kl {:.2f}",
        "completions/mean_length": "length {:.1f}",
        "objective/kl_coef": "β {:.3f}",
        "policy/entropy_avg": "entropy {:.2f}",
        "val/explained_variance": "explained variance {:.2f}",
    }

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            for prefix, title in (("", "step"), ("eval_", "held-out, step")):
                shown = [text.format(logs[prefix + name]) for name, text in self.SHOWN.items() if prefix + name in logs]
                if shown:
                    self.training_bar.write("  ".join([f"{title} {state.global_step}", *shown]))


def keep_trainable(model):
    """Keep bitsandbytes from repacking 4-bit weights in evaluation on a CPU: no gradient passes what it repacks."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_whole(checkpoint):
    """Whether a checkpoint was written to its end, the trainer's state coming last; a finished run's folder is none."""
    try:
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return "global_step" in state and any(Path(checkpoint).glob("rng_state*.pth"))


def last_checkpoint(folder):
    """The whole checkpoint of the most steps in `folder`, or None; half-written ones are passed over."""
    whole = [path for path in Path(folder).glob("checkpoint-*") if is_whole(path)]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


class CriticCheckpoints:
    """For a trainer whose policy carries a critic: writes both, restores both, and resumes from whole checkpoints only.

    `critic.safetensors` stands beside the policy, which is written as if it had none; `ppo_state.json` holds what else
    a rollout depends on, the trainer's `kl_coef` and `score_sums`.
    """

    @contextmanager
    def _without_critic(self):
        """The policy alone, so that what is written loads as a plain causal LM, and loads without a warning."""
        policy = self._policy
        critic = policy._modules.pop("critic")
        try:
            yield critic
        finally:
            policy.critic = critic

    def _save(self, output_dir=None, state_dict=None):
        output_dir = output_dir or self.args.output_dir
        with self._without_critic() as critic:
            critic_state = critic.state_dict()
            if state_dict is not None:  # gathered by FSDP or DeepSpeed, critic included
                critic_state = {k.rpartition("critic.")[2]: v for k, v in state_dict.items() if "critic." in k}
                state_dict = {k: v for k, v in state_dict.items() if "critic." not in k}
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            critic_state = {name: tensor.contiguous().cpu() for name, tensor in critic_state.items()}
            save_file(critic_state, os.path.join(output_dir, "critic.safetensors"))
            with open(os.path.join(output_dir, "ppo_state.json"), "w") as file:
                json.dump({"kl_coef": self.kl_coef, "score_sums": self.score_sums}, file)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Trainer's `train`; `True` (or "true") resumes from the last whole checkpoint, or starts if there is none."""
        if str(resume_from_checkpoint).lower() == "true":
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint and not is_whole(resume_from_checkpoint):
            raise ValueError(f"resume_from_checkpoint: '{resume_from_checkpoint}' is not a whole checkpoint")
        if resume_from_checkpoint:
            self._load_ppo_state(resume_from_checkpoint)
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, "trainer_state.json"))
            if 0 < self.args.max_steps <= state.global_step:  # Trainer would take one step more
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _load_ppo_state(self, folder):
        with open(os.path.join(folder, "ppo_state.json")) as file:
            self.__dict__.update(json.load(file))

    def _load_critic(self, folder):
        self._policy.critic.load_state_dict(load_file(os.path.join(folder, "critic.safetensors")))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):  # not called under DeepSpeed
        with self._without_critic():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_critic(resume_from_checkpoint)

    def _load_best_model(self):
        self._load_ppo_state(self.state.best_model_checkpoint)
        if self.is_deepspeed_enabled:  # whose engine loads the critic with the policy
            super()._load_best_model()
            return
        with self._without_critic():
            super()._load_best_model()
        self._load_critic(self.state.best_model_checkpoint)


def merge_adapter(folder, dtype="auto"):
    """Write the model that a LoRA adapter and its base make together to `folder`/merged, with its tokenizer.

    The base is loaded anew, so that weights which were quantised for training are merged at full precision. Returns
    the new folder; it loads with plain `AutoModelForCausalLM`, or as a sequence classifier if the adapter is one.
    """
    from peft import AutoPeftModelForCausalLM, PeftConfig  # takes seconds, and most runs have no adapter

    merged = Path(folder) / "merged"
    if PeftConfig.from_pretrained(folder).task_type == "SEQ_CLS":
        model, tokenizer = load_classifier(folder, dtype)
    else:
        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    model.merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    offset = Path(folder) / SCORE_OFFSET
    if offset.is_file():
        shutil.copy(offset, merged)
    return str(merged)
