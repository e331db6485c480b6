"""PPO for TRL: `from trl_ppo import PPOConfig, PPOTrainer, RewardModel`, and the formulas by their names."""

import importlib
import logging
from pathlib import Path

# It warns when it is imported on a CPU, quantised model or not, that a kernel for 4 bits is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

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


def cpu_folder(device):
    """The module `trl_ppo.cpu` where a model is on a CPU; None on a GPU, or where that folder was deleted."""
    there = (Path(__file__).parent / "cpu" / "__init__.py").is_file()
    return importlib.import_module(".cpu", __name__) if there and device.type == "cpu" else None
