"""`PPOSettings`: what PPO adds to GRPO's settings or gives another default; imports nothing slow, for `--help`."""

from dataclasses import dataclass, field

# Settings of TRL's removed PPO trainers that have another name now.
RENAMED = {
    "num_ppo_epochs": "num_iterations",
    "ppo_epochs": "num_iterations",
    "batch_size": "per_device_train_batch_size",
    "local_rollout_forward_batch_size": "per_device_train_batch_size",
    "response_length": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "stop_token": "generation_kwargs",
    "stop_token_id": "generation_kwargs",
    "sft_model_path": "model_name_or_path",
    "reward_model_path": "reward_model",
    "cliprange": "epsilon",
    "init_kl_coef": "kl_coef",
    "exp_name": "run_name",
    "num_sample_generations": "eval_steps",
}
# What they are in a script, where that differs from a recipe; and TRL 0.11's that no recipe ever had.
RENAMED_IN_PYTHON = {
    "batch_size": "per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches",
    "mini_batch_size": "per_device_train_batch_size",
    "forward_batch_size": "per_device_train_batch_size",
    "local_rollout_forward_batch_size": "RewardModel(batch_size=…), or per_device_train_batch_size",
    "stop_token": "left out: every end token of the model ends a completion",
    "stop_token_id": "generation_kwargs, with an eos_token_id",
    "sft_model_path": "PPOTrainer(model=path)",
    "model_name": "PPOTrainer(model=path)",
    "reward_model_path": "PPOTrainer(reward_funcs=RewardModel(path))",
    "num_sample_generations": "eval_strategy, eval_steps and log_completions",
    "steps": "total_episodes",
    "target": "kl_target",
    "horizon": "kl_horizon",
    "adap_kl_ctrl": "kl_target",
    "target_kl": "stop_epochs_at_kl",
    "early_stopping": "stop_epochs_at_kl",
    "use_score_scaling": "score_norm",
    "kl_penalty": "kl_estimator",
    "log_with": "report_to",
    "world_size": "left to the launcher",
    "dataset_num_proc": "left to your script",
}


def setting(default, help, **metadata):
    """A field of the config with its text for --help."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class PPOSettings:
    """PPO's own settings, and those of TRL's that it gives another default."""

    learning_rate: float = setting(3e-6, "Initial learning rate of AdamW.")
    adam_epsilon: float = setting(1e-5, "Epsilon of AdamW; PPO implementations use 1e-5.")
    num_iterations: int = setting(4, "PPO epochs: passes over each rollout.")
    num_mini_batches: int = setting(1, "Optimiser steps per PPO epoch.")
    total_episodes: int | None = setting(
        None, "Completions to sample in all, rounded up to whole rollouts; sets `max_steps`."
    )
    kl_coef: float = setting(0.05, "β, the price of KL inside the reward, per nat.")
    kl_estimator: str = setting(
        "k1",
        "Per-token KL estimate in the reward. k1 is unbiased; k3 varies less, but its gradient inside a reward is "
        "biased (arXiv:2510.01555, 2512.21852).",
        choices=["k1", "k3"],
    )
    kl_target: float | None = setting(None, "Adapt β towards this KL per completion, in nats; fixed β if not set.")
    kl_horizon: int = setting(10_000, "Episodes over which an adaptive β reacts.")
    stop_at_kl: float | None = setting(
        None,
        "End training at the first rollout whose KL per completion passes this, with the policy of the one before, or "
        "the best checkpoint below it (past some KL the true reward falls: arXiv:2210.10760).",
    )
    stop_epochs_at_kl: float | None = setting(
        None, "Skip the rest of a rollout's epochs once approxkl (new against old policy, per token) passes this."
    )
    gamma: float = setting(1.0, "Discount of GAE, per token.")
    lam: float = setting(0.95, "λ of GAE.")
    lam_value: float | None = setting(
        None, "λ of the targets that the critic learns, 1 in VC-PPO (arXiv:2503.01491); `lam` if not set."
    )
    lam_length_alpha: float | None = setting(
        None,
        "α of a λ that grows with the completion: 1 − 1/(α·tokens), at least 0, in place of `lam`, for the policy's "
        "advantages alone; 0.05 in VAPO (arXiv:2504.05118).",
    )
    vf_coef: float = setting(0.1, "Weight of the value loss.")
    cliprange_value: float = setting(0.2, "How far a value may move from the rollout's.")
    whiten_rewards: bool = setting(False, "Scale per-token rewards to unit variance; the mean stays.")
    missing_eos_penalty: float | None = setting(None, "Subtracted from the score of a completion without an end token.")
    score_norm: bool = setting(False, "Normalise scores by their running mean and standard deviation.")
    score_clip: float | None = setting(None, "Clip scores to ± this, after normalising.")
    value_model_path: str | None = setting(
        None, "Causal sequence classifier to start a separate critic from; value head if not set."
    )
    critic_path: str | None = setting(
        None, "Folder of an earlier run, whose critic.safetensors the critic starts from; of the same kind and shape."
    )
    value_learning_rate: float | None = setting(
        None, "Learning rate of the critic's own weights; `learning_rate` if not set."
    )
    value_warmup_rollouts: int = setting(
        0,
        "Rollouts at the start whose updates move the critic alone, and leave the policy as it is (VC-PPO, "
        "arXiv:2503.01491); part of `total_episodes`.",
    )
    sync_ref_model: bool = setting(
        False,
        "Move the reference towards the policy every `ref_model_sync_steps` steps: `ref_model_mixup_alpha` of the "
        "policy, the rest of what it was (arXiv:2404.10719). KL is then that to the moving reference.",
    )
    doctor: bool = setting(True, "Say in one line each what looks wrong with the run; changes nothing.")
