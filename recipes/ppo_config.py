"""`PPOConfig`: the settings of `ppo_trainer.PPOTrainer`, and which of GRPO's it refuses."""

import math
from dataclasses import dataclass, field, fields
from typing import ClassVar

from trl import GRPOConfig

# GRPO's settings that mean nothing to PPO, by what to use instead. `recipe_args` leaves them out of --help.
NOT_PPO = {
    "use kl_coef": "beta",
    "PPO samples one completion for each prompt": "num_generations num_generations_eval",
    "use num_mini_batches and gradient_accumulation_steps": "generation_batch_size steps_per_generation",
    "with dropout, sampling and scoring would disagree": "disable_dropout",
    "use whiten_rewards or score_norm": "scale_rewards",
    "scores are summed with reward_weights": "multi_objective_aggregation",
    "use kl_estimator": "use_bias_correction_kl",
    "use missing_eos_penalty": "mask_truncated_completions",
    "the loss is PPO's": "loss_type importance_sampling_level delta off_policy_mask_threshold router_aux_loss_coef "
    "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg",
    "PPO here has no entropy term": "entropy_coef top_entropy_quantile use_adaptive_entropy entropy_coef_min "
    "entropy_coef_max entropy_coef_delta entropy_target",
    "the reference stays as it is": "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    "old log-probabilities are the trainer's own": "vllm_importance_sampling_correction vllm_importance_sampling_cap "
    "vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min",
    "tools are not supported": "max_tool_calling_iterations",
    "use use_transformers_continuous_batching": "use_transformers_paged",
    'use model_init_kwargs={"use_kernels": True}': "use_liger_kernel",
}


@dataclass
class PPOConfig(GRPOConfig):
    """`GRPOConfig` for PPO. One rollout is `per_device_train_batch_size × gradient_accumulation_steps ×
    num_mini_batches` completions on each rank, one for each prompt; it is followed by `num_iterations` PPO epochs of
    `num_mini_batches` optimiser steps each.

    Raises `ValueError`, naming the setting, for a value that cannot work or a GRPO setting that means nothing here.
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "Initial learning rate of AdamW."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Epsilon of AdamW; PPO implementations use 1e-5."})
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs: passes over each rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimiser steps per PPO epoch."})
    total_episodes: int | None = field(
        default=None, metadata={"help": "Completions to sample in all; sets `max_steps`, in whole rollouts."}
    )
    kl_coef: float = field(default=0.05, metadata={"help": "β, the price of KL inside the reward, per nat."})
    kl_estimator: str = field(
        default="k1", metadata={"help": "Per-token KL estimate in the reward.", "choices": ["k1", "k3"]}
    )
    kl_target: float | None = field(
        default=None, metadata={"help": "Adapt β towards this KL per sequence, in nats; fixed β if not set."}
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Episodes over which an adaptive β reacts."})
    target_kl: float | None = field(
        default=None,
        metadata={"help": "Skip the rest of a rollout's epochs once approxkl (new against old policy) passes this."},
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount of GAE, per token."})
    lam: float = field(default=0.95, metadata={"help": "λ of GAE."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "How far a value may move from the rollout's."})
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Scale per-token rewards to unit variance; the mean stays."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a completion without an end token."}
    )
    score_norm: bool = field(
        default=False, metadata={"help": "Normalise scores by their running mean and standard deviation."}
    )
    score_clip: float | None = field(default=None, metadata={"help": "Clip scores to ± this, after normalising."})
    value_model_path: str | None = field(
        default=None,
        metadata={"help": "Causal sequence classifier to start a separate critic from; value head if not set."},
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic's own weights; `learning_rate` if not set."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Always: sampling and scoring must agree."})
    num_generations: int = field(default=1, metadata={"help": "PPO samples one completion for each prompt."})
    num_generations_eval: int = field(default=1, metadata={"help": "One completion for each held-out prompt."})
    beta: float = field(default=1.0, metadata={"help": "Not PPO's; non-zero, so that the parent loads the reference."})

    REFUSED: ClassVar[dict[str, str]] = {name: advice for advice, names in NOT_PPO.items() for name in names.split()}

    def __post_init__(self):
        for setting in fields(self):
            advice = self.REFUSED.get(setting.name)
            if advice and getattr(self, setting.name) != setting.default:
                raise ValueError(f"{setting.name}: not a setting of PPO; {advice}")
        self._check_ranges()
        self.steps_per_generation = self.gradient_accumulation_steps * self.num_mini_batches
        local_rollout = self.per_device_train_batch_size * self.steps_per_generation
        if local_rollout < 2:
            raise ValueError("per_device_train_batch_size: a rollout of 1 completion has no variance to whiten; use 2")
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "objective/scores"
        self._round_to_rollouts()
        self.vllm_importance_sampling_correction = False
        # The parent insists on groups of two and more: show it one group the size of the rollout.
        self.num_generations = local_rollout
        super().__post_init__()
        self.num_generations = 1
        if self.total_episodes is not None:
            rollouts = math.ceil(self.total_episodes / self.generation_batch_size)
            self.max_steps = rollouts * self.num_iterations * self.num_mini_batches

    def _round_to_rollouts(self):
        """Checkpoints, and the evaluations that go with them, fall between rollouts: there a run resumes exactly."""
        steps_per_rollout = self.num_iterations * self.num_mini_batches
        for name in ("save_steps", "eval_steps") if self.load_best_model_at_end else ("save_steps",):
            steps = getattr(self, name) or self.logging_steps
            if self.save_strategy == "steps" and steps % steps_per_rollout:
                rounded = math.ceil(steps / steps_per_rollout) * steps_per_rollout
                setattr(self, name, rounded)
                print(f"{name}: {steps:g} is rounded up to {rounded}, whole rollouts of {steps_per_rollout} steps")

    def _check_ranges(self):
        for name in ("num_iterations", "num_mini_batches", "kl_horizon", "temperature", "max_completion_length"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be positive")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} must lie in [0, 1]")
        for name in ("kl_target", "target_kl", "score_clip", "total_episodes", "value_learning_rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be positive, or null")
        for name in ("kl_coef", "vf_coef", "cliprange_value", "epsilon"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} must not be negative")
        if self.kl_estimator not in ("k1", "k3"):
            raise ValueError(f"kl_estimator: '{self.kl_estimator}' must be 'k1' or 'k3'")
        if self.total_episodes is not None and self.max_steps > 0:
            raise ValueError(f"total_episodes: sets max_steps, which is {self.max_steps} already; give one of the two")
