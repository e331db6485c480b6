"""`PPOConfig`: the settings of `PPOTrainer`, and which of GRPO's it refuses."""

import math
import os
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import GenerationConfig
from transformers.utils import find_adapter_config_file
from trl import GRPOConfig
from trl.import_utils import is_vllm_available

from .critic import check_critic_file
from .inputs import UserError, check_numbers, looks_local
from .loading import load_skeleton
from .settings import RENAMED, RENAMED_IN_PYTHON, PPOSettings, setting

# GRPO's settings that mean nothing to PPO, each with what to do instead; a recipe's --help leaves them out.
NOT_PPO = {
    "beta": "use kl_coef",
    "disable_dropout": "with dropout, sampling and log-probabilities would disagree",
    "scale_rewards": "use whiten_rewards or score_norm",
    "multi_objective_aggregation": "scores are summed with reward_weights",
    "use_bias_correction_kl": "use kl_estimator",
    "mask_truncated_completions": "use missing_eos_penalty",
    "max_tool_calling_iterations": "tools are not supported",
    "use_transformers_paged": "use use_transformers_continuous_batching",
    "vllm_importance_sampling_mode": "each token's weight is held within bounds (token_truncate)",
    "vllm_importance_sampling_cap": "use vllm_importance_sampling_clip_max",
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C save anyway, at the end of a rollout",
    "use_liger_kernel": 'use model_init_kwargs={"use_kernels": True}',
} | {
    name: advice
    for advice, names in {
        "PPO samples one completion for each prompt": "num_generations num_generations_eval",
        "use num_mini_batches and gradient_accumulation_steps": "generation_batch_size steps_per_generation",
        "the loss is PPO's": "loss_type importance_sampling_level delta off_policy_mask_threshold router_aux_loss_coef "
        "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg",
        "PPO here has no entropy term": "entropy_coef top_entropy_quantile use_adaptive_entropy entropy_coef_min "
        "entropy_coef_max entropy_coef_delta entropy_target",
    }.items()
    for name in names.split()
}


# Settings that need all of the weights, and of the optimiser's state, on every rank.
WHOLE_WEIGHTS = ("value_warmup_rollouts", "stop_at_kl", "sync_ref_model")


@dataclass
class PPOConfig(PPOSettings, GRPOConfig):
    """`GRPOConfig` with `PPOSettings`. One rollout is `per_device_train_batch_size × gradient_accumulation_steps ×
    num_mini_batches` completions on each rank, one for each prompt; it is followed by `num_iterations` PPO epochs of
    `num_mini_batches` optimiser steps each.

    Raises `ValueError`, naming the setting, for a value that cannot work or a GRPO setting that means nothing here.
    """

    disable_dropout: bool = setting(True, "Always: sampling and log-probabilities must agree.")
    num_generations: int = setting(1, "PPO samples one completion for each prompt.")
    num_generations_eval: int = setting(1, "One completion for each held-out prompt.")
    vllm_importance_sampling_mode: str = setting("token_truncate", "Each token's weight is held within its bounds.")
    beta: float = setting(1.0, "Not PPO's; non-zero, so that the parent loads the reference.")

    REFUSED: ClassVar[dict[str, str]] = NOT_PPO

    def __new__(cls, *args, **given):  # before the TypeError of __init__, which names one unknown setting alone
        known = [each.name for each in fields(cls) if each.init]
        if unknown := [name for name in given if name not in known]:
            raise TypeError(unknown_settings(cls.__name__, unknown, known))
        return super().__new__(cls)

    def __post_init__(self):
        for each in fields(self):
            if each.name in NOT_PPO and getattr(self, each.name) != each.default:
                raise ValueError(f"{each.name}: not a setting of PPO; {NOT_PPO[each.name]}")
        self._check_ranges()
        self.steps_per_generation = self.gradient_accumulation_steps * self.num_mini_batches
        local_rollout = self.per_device_train_batch_size * self.steps_per_generation
        if local_rollout < 2:
            raise ValueError("per_device_train_batch_size: a rollout of 1 completion has no variance to whiten; use 2")
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "objective/scores"
        self._round_to_rollouts()
        self.vllm_importance_sampling_correction &= self.use_vllm
        # The parent insists on groups of two and more: show it one group the size of the rollout.
        self.num_generations = local_rollout
        super().__post_init__()
        self.num_generations = 1
        # TRL's default, "auto", would split the model over all GPUs that a single process sees.
        self.model_init_kwargs = {"device_map": None} | (self.model_init_kwargs or {})
        if self.use_transformers_continuous_batching and (self.bf16 or self.fp16):
            name = "bf16" if self.bf16 else "fp16"
            raise ValueError(
                f"{name}: true with use_transformers_continuous_batching: TRL would cast the trained weights for good; "
                f"set {name}: false, and mixed_precision: {name} in the accelerate config"
            )
        if self.mixed_precision == "fp16" and self.stop_epochs_at_kl is not None:
            raise ValueError("stop_epochs_at_kl: the loss scaler of fp16 cannot leave out a step; use bf16")
        given, known = self.generation_kwargs or {}, vars(GenerationConfig()).keys() - {"stop_strings"}
        if unknown := given if isinstance(given, str) else [key for key in given if key not in known]:
            raise ValueError(f"generation_kwargs: {unknown}: not settings of GenerationConfig, or without effect here")
        if self.total_episodes is not None:
            self._round_up("total_episodes", self.generation_batch_size, "completions")
            self.max_steps = self.total_episodes // self.generation_batch_size * self.steps_per_rollout

    @property
    def end_token_ids(self):
        """The tokens that `generation_kwargs` names as ends of a completion, besides those that the model declares."""
        ends = (self.generation_kwargs or {}).get("eos_token_id", [])
        return [ends] if isinstance(ends, int) else ends

    @property
    def steps_per_rollout(self):
        """Optimiser steps between two rollouts."""
        return self.num_iterations * self.num_mini_batches

    def _round_up(self, name, unit, of_what):
        """Set a number to the next multiple of `unit`, a rollout's, and say so where that changes it."""
        given = getattr(self, name)
        setattr(self, name, math.ceil(given / unit) * unit)
        if getattr(self, name) != given:
            print(f"{name}: {given:g} is rounded up to {getattr(self, name)}, whole rollouts of {unit} {of_what}")

    def _round_to_rollouts(self):
        """Checkpoints, and the evaluations that go with them, fall between rollouts: there a run resumes exactly."""
        if self.save_strategy != "steps":
            return
        for name in ("save_steps", "eval_steps") if self.load_best_model_at_end else ("save_steps",):
            setattr(self, name, getattr(self, name) or self.logging_steps)
            self._round_up(name, self.steps_per_rollout, "steps")

    def _check_ranges(self):
        check_numbers(vars(self))
        if self.kl_estimator not in ("k1", "k3"):
            raise ValueError(f"kl_estimator: '{self.kl_estimator}' must be 'k1' or 'k3'")
        if "stop_token_ids" in (self.generation_kwargs or {}):
            raise ValueError("generation_kwargs: stop_token_ids is vLLM's name; use eos_token_id, with vLLM or without")
        if self.total_episodes is not None and self.max_steps > 0:
            raise ValueError(f"total_episodes: sets max_steps, which is {self.max_steps} already; give one of the two")


def unknown_settings(cls, names, known):
    """One line for settings that there are not: what an old one is now, and what a misspelt one is like."""
    said = []
    for name in names:
        close = [f"did you mean {each}?" for each in get_close_matches(name, known, n=1, cutoff=0.75)]
        hint = [f"now {now}" for old in (RENAMED_IN_PYTHON, RENAMED) if (now := old.get(name))] + close
        said.append(f"{name} ({hint[0]})" if hint else name)
    return f"{cls} has no setting {'; '.join(said)}; old names and new ones: recipes/guides/from_trl.md"


def check_given(given, others):
    """UserError for an argument of `PPOTrainer` that is missing, or that TRL's old one had."""
    missing = [name for name, value in given.items() if value is None]
    old = sorted(
        {"ref_model", "reward_model", "value_model", "data_collator", "config", "tokenizer", "dataset"} & {*others}
    )
    if old or not isinstance(given["args"], PPOConfig | None):
        wrong = ", ".join(old) or f"args: {type(given['args']).__name__} is no PPOConfig"
        raise UserError(
            f"{wrong}: PPOTrainer takes model, reward_funcs, args and train_dataset. The reference is made of the "
            "policy, reward_funcs are functions or RewardModel(path), the critic is a value head or value_model_path; "
            "trl_ppo.compat takes the arguments of TRL's old one"
        )
    if missing:
        raise UserError(f"PPOTrainer needs {', '.join(missing)}")


def check_arguments(model, args, train_dataset, others):
    """UserError for a dataset that is smaller than a rollout, for what the parent takes and PPO cannot honour, and for
    a `model` given by its path that is no whole language model."""
    if hasattr(train_dataset, "__len__") and len(train_dataset) < args.generation_batch_size:
        raise UserError(
            f"train_dataset: {len(train_dataset)} prompts, but one rollout takes {args.generation_batch_size}; add "
            "prompts, or lower per_device_train_batch_size, gradient_accumulation_steps or num_mini_batches"
        )
    if args.use_vllm and not is_vllm_available():
        raise UserError(
            "use_vllm: vLLM is not installed; install a version that fits (recipes/README.md), or set false"
        )
    if args.use_vllm and others.get("quantization_config") is not None:
        raise UserError(
            "use_vllm: not with load_in_4bit or load_in_8bit; at each rollout TRL merges the adapter into these, "
            "and rounds them anew every time, the reference's too"
        )
    if args.sync_ref_model and others.get("peft_config") is not None:
        raise UserError(
            "sync_ref_model: not with LoRA, whose reference is the frozen base; set false, or train in full"
        )
    for name in ("tools", "environment_factory"):
        if others.get(name):
            raise UserError(f"{name}: not supported by PPOTrainer, whose completions are the policy's tokens alone")
    there = getattr(train_dataset, "column_names", None) or ()
    if there and "prompt" not in there and train_dataset.format["type"] != "custom":  # a transform may make it
        raise UserError(f"train_dataset: has no column prompt, only {', '.join(there)}; trl_ppo.compat takes input_ids")
    columns = {"prompts", "completions", "trainer_state", "log_extra", "log_metric"}  # what rewards get besides columns
    if taken := columns & set(there):
        raise UserError(f"train_dataset: rename column {min(taken)!r}; rewards get something else by that name")
    if args.critic_path is not None:
        check_critic_file(args)
    if isinstance(model, str) and looks_local(model) and not Path(model).exists():
        raise UserError(f"model: {model!r} does not exist in {Path.cwd()}; give a folder or a Hub id")
    if isinstance(model, str) and find_adapter_config_file(model) is None:
        load_skeleton(model, **({"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})))
    check_engine(args)


def check_engine(args):
    """UserError for settings under which FSDP or DeepSpeed would not train, or save, what PPO means them to.

    Under FSDP2 log-probabilities and values leave the model as they were computed; accelerate would round them to bf16.
    """
    if args.stop_epochs_at_kl is not None and args.deepspeed_plugin is not None:
        raise UserError("stop_epochs_at_kl: DeepSpeed steps before it could be stopped; leave it null, use kl_target")
    fsdp = args.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if args.critic_path and args.value_model_path and args.deepspeed_plugin is not None:
        raise UserError("critic_path: not with value_model_path under DeepSpeed, whose ZeRO-3 shards the critic first")
    for name in WHOLE_WEIGHTS if fsdp or args.deepspeed_plugin is not None else ():
        if getattr(args, name):
            raise UserError(f"{name}: not under FSDP or DeepSpeed; leave it out, or take accelerate's multi_gpu.yaml")
    if not fsdp:
        return
    plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    needed = {
        "version": (plugin.fsdp_version, 2, "FSDP1 is not supported"),
        "state_dict_type": (plugin.state_dict_type.name, "FULL_STATE_DICT", "no model would be written"),
        "cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, False, "only one rank would have a reference"),
    }
    for name, (given, value, why) in needed.items():
        if given != value:
            raise UserError(f"fsdp_{name}: {given}; set it to {value} in the accelerate config ({why})")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(os.environ.get("ACCELERATE_MIXED_PRECISION"))
    if dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        args.fsdp_plugin_args = (args.fsdp_plugin_args or {}) | {"mixed_precision_policy": policy}
