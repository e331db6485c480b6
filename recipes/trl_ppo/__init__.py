"""PPO for TRL: `from trl_ppo import PPOConfig, PPOTrainer, RewardModel`, and the formulas by their names."""

import importlib
import logging
import re
from pathlib import Path

# It warns when it is imported on a CPU, quantised model or not, that a kernel for 4 bits is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _warns_of_real_loss(record):
    """False for the warning, on resuming, of missing weights that are there: the critic's have a file of their own, and
    an output layer that is tied to the embedding is saved once."""
    text = record.getMessage()
    names = re.findall(r"'([^']+)'", text) if text.startswith("There were missing keys in the checkpoint") else []
    return not names or not all(name.startswith("critic.") or name == "lm_head.weight" for name in names)


logging.getLogger("transformers.trainer").addFilter(_warns_of_real_loss)

FORMULAS = (
    "kl_estimate",
    "token_rewards",
    "gae",
    "lambdas",
    "decoupled_gae",
    "whiten",
    "clipped_policy_loss",
    "importance_weights",
    "clipped_value_loss",
    "next_kl_coef",
    "explained_variance",
    "normalise",
)
MODULE_OF = {"PPOConfig": "config", "PPOTrainer": "trainer", "RewardModel": "reward_model"}
MODULE_OF |= dict.fromkeys(FORMULAS, "formulas")

__all__ = list(MODULE_OF)


def __getattr__(name):
    """Each name is imported when it is first used: TRL's trainers alone take many seconds."""
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULE_OF[name]}"), name)


def __dir__():
    return sorted({*globals(), *__all__})


def cpu_folder(device):
    """The module `trl_ppo.cpu` where a model is on a CPU; None on a GPU, or where that folder was deleted."""
    there = (Path(__file__).parent / "cpu" / "__init__.py").is_file()
    return importlib.import_module(".cpu", __name__) if there and device.type == "cpu" else None
