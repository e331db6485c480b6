"""What makes PPO fast on a CPU: log-probabilities in tiles, passes of like length, a sampling loop without waste.

Nothing needs it. With this folder deleted everything still trains, with the same results but for rounding and the
random numbers of sampling; on a GPU it is never imported.
"""

import ctypes
import functools
import os
import sys

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from ..inputs import UserError
from .decoding import sample
from .lm_head import PackedTokens


def speed_up(trainer):
    """Make a `PPOTrainer` on a CPU fast; the one call that the trainer makes."""
    keep_freed_memory()
    if trainer.is_fsdp_enabled:  # its modules and weights are of types of their own
        return
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError("FSDP: accelerate shards on GPUs alone; on a CPU take accelerate_configs/cpu_2_ranks.yaml")
    use_tiles(trainer.policy, trainer.temperature)
    if trainer.ref_model is not None:
        use_tiles(trainer.accelerator.unwrap_model(trainer.ref_model), trainer.temperature)
    if not is_deepspeed_zero3_enabled():  # there every rank has to run as many passes as the others
        kept = {}
        policy = trainer.policy
        policy.generate = functools.partial(policy.generate, custom_generate=sample, kept=kept)
        trainer.policy_logprobs = functools.partial(logprobs_of_sampled, trainer, kept)


def use_tiles(model, temperature):
    """Give a model with `add_logprobs_forward` the log-probabilities of `lm_head`; returns it."""
    model.completion_tokens = functools.partial(PackedTokens, temperature=temperature)
    return model


def logprobs_of_sampled(trainer, kept, batch):
    """`TokenLogprobs` of what was sampled just now, without a pass: sampling has kept its hidden states.

    In float32 alone: with fewer bits those states are rounded otherwise than in the update's pass.
    """
    sequences, states = kept.pop("sequences", None), kept.pop("states", None)
    exact = trainer.accelerator.mixed_precision == "no" and states is not None and states.dtype == torch.float32
    if exact and torch.equal(sequences, batch["input_ids"]):
        batch = batch | {"states": states}
    return trainer.logprobs(trainer.model, batch)


def keep_freed_memory():
    """Let glibc keep the memory that a tensor frees; by default it returns blocks of 32 MiB and more to the system."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # as malloc.h numbers them
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**31 - 1)
