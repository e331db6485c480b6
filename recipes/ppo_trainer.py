"""PPO for language models: TRL's `GRPOTrainer` with the critic put back.

The formulas come first, as pure functions over `(batch, tokens)` tensors; then `PPOTrainer`, which overrides the few
hooks of its parent in which PPO differs. Everything else (generation, reward functions, PEFT, DeepSpeed, logging,
checkpoints) is TRL's and transformers'. The hooks are private, so `trl` is pinned exactly. The settings are in
`ppo_config.py`.

Shapes: B completions, P prompt tokens (left-padded), C completion tokens (right-padded). A `mask` of shape (B, C) is 1
on the tokens that count: the completion's own, its end token included.

Sources: Schulman et al. 2017 (arXiv:1707.06347), Ziegler et al. 2019 (1909.08593), Stiennon et al. 2020 (2009.01325),
Huang et al. 2024 (2403.17031).
"""

import functools
import math
import time
from collections import defaultdict
from typing import ClassVar

import torch
from accelerate.utils import gather_object, is_peft_model
from torch import nn
from transformers import GenerationConfig, ProgressCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

import decoding
from ppo_config import PPOConfig
from rewards import checked
from run_support import (
    CriticCheckpoints,
    LogBeforeSave,
    RolloutProgress,
    SeededByPass,
    keep_freed_memory,
    keep_trainable,
)
from scoring import ScoredTokens, ValueHead, ValueModel, add_scoring_forward, pad_batch, take_rows

# ---------------------------------------------------------------------------------------------------------------
# Formulas
# ---------------------------------------------------------------------------------------------------------------


def kl_estimate(logprobs, ref_logprobs, estimator="k1"):
    """Per-token estimate of KL(policy‖reference) on tokens that the policy sampled, in nats; (B, C) → (B, C).

    `k1` is unbiased and may be negative; `k3` is unbiased, non-negative and of lower variance
    (Schulman, "Approximating KL Divergence", 2020).
    """
    log_ratio = ref_logprobs - logprobs
    return -log_ratio if estimator == "k1" else torch.expm1(log_ratio) - log_ratio


def token_rewards(scores, kl, mask, kl_coef):
    """r_t = −β·kl_t, plus the score on the last token that counts; scores (B,), kl and mask (B, C) → (B, C)."""
    rewards = -kl_coef * kl * mask
    last = mask.sum(1).long() - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438) over the tokens that count.

    A_t = δ_t + γλ·A_{t+1} with δ_t = r_t + γ·V_{t+1} − V_t, and V = A = 0 after the last token.
    All (B, C); returns `(advantages, returns)`, both 0 where the mask is.
    """
    values, rewards = values * mask, rewards * mask
    advantage = next_value = torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = advantage
    return advantages, advantages + values


def whiten(x, mask, shift_mean=True, reduce=lambda sums: sums):
    """Scale `x` (B, C) to unit variance, and to zero mean if asked, over the tokens that count on every rank.

    `reduce` sums a tensor over ranks. The variance is the unbiased one (n − 1).
    """
    total, count = reduce(torch.stack([(x * mask).sum(), mask.sum()]))
    mean = total / count
    variance = reduce(((x - mean) ** 2 * mask).sum()) / (count - 1).clamp(min=1)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def clipped_policy_loss(logprobs, old_logprobs, advantages, epsilon_low=0.2, epsilon_high=0.2):
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated; (B, C) → per-token loss and where it clipped."""
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return torch.max(unclipped, clipped), (clipped > unclipped).float()


def clipped_value_loss(values, old_values, returns, cliprange=0.2):
    """½·max of the squared error and that of the value held within `cliprange` of the old one; (B, C) per token."""
    clipped_values = old_values + (values - old_values).clamp(-cliprange, cliprange)
    unclipped, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    return 0.5 * torch.max(unclipped, clipped), (clipped > unclipped).float()


def next_kl_coef(kl_coef, kl, target, horizon, n):
    """β ← β·(1 + clip(KL/target − 1, ±0.2)·n/horizon) after n episodes of mean KL `kl` (Ziegler et al. 2019, §2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * n / horizon)


# ---------------------------------------------------------------------------------------------------------------
# The trainer
# ---------------------------------------------------------------------------------------------------------------


class PPOTrainer(CriticCheckpoints, GRPOTrainer):
    """Actor-critic PPO on TRL's `GRPOTrainer`, whose arguments it takes.

    `reward_funcs` are plain functions with TRL's signature, `f(prompts, completions, **columns) -> list[float]`; wrap
    a sequence classifier in `rewards.RewardModel`. The critic is a value head on the policy's trunk, or a model of its
    own from `args.value_model_path`; it is saved as `critic.safetensors` beside the policy, which loads without it.

    Raises `ValueError`, before any model loads, if the dataset is less than one rollout or a reward is no function.
    """

    _name = "PPO"
    _tag_names: ClassVar[list[str]] = ["trl", "ppo"]
    _paper: ClassVar[dict[str, str]] = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}

    def __init__(self, model, reward_funcs, args: PPOConfig, train_dataset, **kwargs):
        if hasattr(train_dataset, "__len__") and len(train_dataset) < args.generation_batch_size:
            raise ValueError(
                f"train_dataset: {len(train_dataset)} prompts, but one rollout takes {args.generation_batch_size}; add "
                "prompts, or lower per_device_train_batch_size, gradient_accumulation_steps or num_mini_batches"
            )
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        for reward_func in reward_funcs:
            if not callable(reward_func) or isinstance(reward_func, nn.Module):
                raise ValueError(
                    f"reward_funcs: {reward_func!r:.60} is not a function; wrap a sequence classifier in "
                    "rewards.RewardModel(path)"
                )
        super().__init__(model, [checked(f) for f in reward_funcs], args, train_dataset, **kwargs)
        keep_trainable(self.model)
        end_tokens = (args.generation_kwargs or {}).get("eos_token_id", [])
        self.eos_token_ids += [end_tokens] if isinstance(end_tokens, int) else end_tokens
        add_scoring_forward(self._policy, self.temperature)
        self._sampled_states = []
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
            if not is_deepspeed_zero3_enabled():
                self._policy.generate = functools.partial(
                    self._policy.generate, custom_generate=decoding.sample, kept_states=self._sampled_states
                )
        if self.ref_model is not None:
            add_scoring_forward(self.accelerator.unwrap_model(self.ref_model), self.temperature)
        self._policy.critic = self._make_critic().to(self.accelerator.device)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RolloutProgress())
        self.add_callback(LogBeforeSave())
        self.kl_coef = args.kl_coef
        self.score_sums = [0.0, 0.0, 0.0]  # of 1, score and score², for score_norm
        self._rollout = None
        self._mini_batch_kl, self._skip_epochs = 0.0, False  # for target_kl
        self._sums = {"train": defaultdict(float), "eval": defaultdict(float)}

    def _make_critic(self):
        config = self._policy.config.get_text_config()
        if self.args.value_model_path is None:
            return ValueHead(config.hidden_size, self.args.seed)
        return ValueModel(self.args.value_model_path, config.vocab_size, dtype=torch.float32)

    @property
    def _policy(self):
        """The causal LM itself, out of DDP's, FSDP's or PEFT's wrapper."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    @property
    def _micro_batches_per_rollout(self):
        return self.args.steps_per_generation * self.num_iterations

    def _get_train_sampler(self, dataset=None):
        return SeededByPass(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    # -- Rollout ---------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch):
        """The next micro-batch: a new rollout every `num_iterations` epochs, new mini-batches every epoch."""
        if not self.model.training:
            return self._generate_and_score_completions(generation_batch)
        steps_per_epoch = self.args.steps_per_generation
        if self._rollout is None or self._step % self._micro_batches_per_rollout == 0:
            self._rollout, self._skip_epochs = self._generate_and_score_completions(generation_batch), False
        if self._buffered_inputs is None or self._step % steps_per_epoch == 0:
            self._buffered_inputs = self._split(self._rollout)
        return self._buffered_inputs[self._step % steps_per_epoch]

    def _split(self, rollout):
        """Random mini-batches; in each, micro-batches of like length, trimmed, that know its number of tokens."""
        lengths, tokens = rollout["attention_mask"].sum(1), rollout["completion_mask"].sum(1)
        mini_batches = torch.randperm(len(lengths)).to(lengths.device).chunk(self.args.num_mini_batches)
        counts = self._sum_over_ranks(torch.stack([tokens[rows].sum() for rows in mini_batches]).float())
        return [
            {**take_rows(rollout, micro_rows), "num_tokens": count}
            for rows, count in zip(mini_batches, counts, strict=True)
            for micro_rows in rows[lengths[rows].argsort()].split(self.args.per_device_train_batch_size)
        ]

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        """Sample from the trainer's settings alone: `generate` fills what they leave open from the model's own."""
        policy = self._policy
        positions = getattr(policy.config.get_text_config(), "max_position_embeddings", None) or math.inf
        if not all(prompt_ids):
            raise ValueError("prompt: one has no tokens; leave out empty prompts")
        longest = max(map(len, prompt_ids))
        if longest + self.max_completion_length > positions:
            raise ValueError(
                f"max_completion_length: {self.max_completion_length} after a prompt of {longest} tokens is more than "
                f"the {positions} positions of the policy; lower it, or cut the prompts"
            )
        saved, policy.generation_config = policy.generation_config, GenerationConfig()
        try:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        finally:
            policy.generation_config = saved

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        prompts = [example["prompt"] for example in inputs]

        # 1. Sample a completion for each prompt.
        started = time.perf_counter()
        self._sampled_states.clear()
        prompt_ids, completion_ids, _, completions, *_ = self._generate(prompts)
        batch = pad_batch(prompt_ids, completion_ids, self._tokenizer.pad_token_id)
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        mask = batch["completion_mask"]
        generated = time.perf_counter()

        # 2. Log-probabilities and values under the policy, log-probabilities under the reference.
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            policy = self._score(self.model, batch | self._states_of_sampling(mask))
            reference = self._score_reference(batch)

        # 3. Scores.
        finished = torch.tensor([ids[-1] in self.eos_token_ids for ids in completion_ids], device=mask.device)
        raw_scores = self._weighted_scores(inputs, prompts, completions, completion_ids)
        scores = self._shape_scores(raw_scores, finished, mode)

        # 4. The price of KL, and the score on the last token.
        kl = kl_estimate(policy.log_probs, reference.log_probs, self.args.kl_estimator) * mask
        rewards = token_rewards(scores, kl, mask, self.kl_coef)
        sequence_reward = rewards.sum(1)
        if self.args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, reduce=self._sum_over_ranks)

        # 5. Advantages and returns.
        advantages, returns = gae(rewards, policy.state_values, mask, self.args.gamma, self.args.lam)
        scored = time.perf_counter()
        self._rollout_times = started, scored

        self._track("objective/kl", kl.sum(1))
        self._track("objective/entropy", -policy.log_probs.sum(1))
        self._track("objective/scores", raw_scores)
        self._track("objective/non_score_reward", -self.kl_coef * kl.sum(1))
        self._track("objective/rlhf_reward", sequence_reward)
        self._track("objective/missing_eos", (~finished).float())
        self._track("objective/kl_coef", torch.full_like(raw_scores, self.kl_coef))
        self._track("val/explained_variance", self._explained_variance(policy.state_values, returns, mask)[None])
        self._track("time/generate", mask.new_tensor([generated - started], dtype=torch.float))
        self._track("time/score", mask.new_tensor([scored - generated], dtype=torch.float))
        if mode == "train" and self.args.kl_target is not None:
            self._adapt_kl_coef(kl.sum(1))
        advantages = whiten(advantages, mask, reduce=self._sum_over_ranks)
        if self.log_completions:
            self._keep_for_table(prompts, completions, advantages.sum(1) / mask.sum(1))
        return {
            **batch,
            "old_logprobs": policy.log_probs,
            "old_values": policy.state_values,
            "advantages": advantages,
            "returns": returns,
        }

    def _keep_for_table(self, prompts, completions, mean_advantages):
        """What the parent's `log` shows as a table, in the terminal and in W&B, beside the scores kept before."""
        self._logs["prompt"].extend(gather_object(prompts))
        self._logs["completion"].extend(gather_object(completions))
        self._logs["advantages"].extend(self.accelerator.gather(mean_advantages).tolist())

    def _states_of_sampling(self, mask):
        """`{"states": (B, C, H)}` where sampling kept them for all of these completions, else nothing: `{}`.

        They spare the policy a pass, in float32: with fewer bits they are rounded otherwise than in the update's pass.
        """
        if self.accelerator.mixed_precision != "no" or len(self._sampled_states) != 1:
            return {}
        states = self._sampled_states.pop()
        return {"states": states} if states.dtype == torch.float32 and states.shape[:2] == mask.shape else {}

    def _score(self, model, batch):
        """`ScoredTokens` of a whole rollout, in micro-batches of like length."""
        shape = batch["completion_mask"].shape
        total = {}
        for rows in batch["attention_mask"].sum(1).argsort().split(self.args.per_device_train_batch_size):
            scored = self._forward(model, take_rows(batch, rows))
            for name, tensor in scored.items():
                total.setdefault(name, tensor.new_zeros(shape))[rows, : tensor.size(1)] = tensor
        return ScoredTokens(**total)

    def _forward(self, model, batch):
        with self.accelerator.autocast():
            scored = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                num_completion_tokens=batch["completion_mask"].size(1),
                states=batch.get("states"),
            )
        return ScoredTokens(**{name: tensor.float() for name, tensor in scored.items()})

    def _score_reference(self, batch):
        """The reference is a frozen copy or, with PEFT, the policy with its adapter off (or as it was loaded)."""
        if self.ref_model is not None:
            return self._score(self.ref_model, batch)
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return self._score(self.model, batch)

    def _weighted_scores(self, inputs, prompts, completions, completion_ids):
        """Σ_k w_k·r_k for this rank's completions (B,); a reward function that says None has no say in a sample."""
        per_func = self._calculate_rewards(inputs, prompts, completions, completion_ids)  # over all ranks (N, K)
        for name, column in zip(self.reward_func_names, per_func.T, strict=True):
            self._logs["rewards"][name].extend(column.tolist())
        start = self.accelerator.process_index * len(prompts)
        per_func = per_func[start : start + len(prompts)]
        for name, column in zip(self.reward_func_names, per_func.T, strict=True):
            self._track(f"rewards/{name}", column.nan_to_num(), (~column.isnan()).float())
        silent = per_func.isnan().all(1).nonzero()
        if len(silent):
            raise ValueError(f"reward_funcs: every one returned None for sample {silent[0].item()} of the rollout")
        return (per_func * self.reward_weights.to(per_func.device)).nansum(1)

    def _shape_scores(self, scores, finished, mode):
        """The missing-EOS rule, then normalisation by the running moments, then clipping; (B,) → (B,)."""
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * ~finished
        if self.args.score_norm:
            if mode == "train":
                moments = torch.stack([torch.ones_like(scores), scores, scores**2]).double().sum(1)
                self.score_sums = [
                    a + b for a, b in zip(self.score_sums, self._sum_over_ranks(moments).tolist(), strict=True)
                ]
            count, total, squares = self.score_sums
            if count:  # none yet in an evaluation before the first rollout
                variance = (squares - total**2 / count) / max(count - 1, 1)
                scores = (scores - total / count) / max(math.sqrt(max(variance, 0.0)), 1e-8)
        if self.args.score_clip is not None:
            scores = scores.clamp(-self.args.score_clip, self.args.score_clip)
        return scores

    def _adapt_kl_coef(self, sequence_kl):
        total, n = self._sum_over_ranks(torch.stack([sequence_kl.sum(), torch.ones_like(sequence_kl).sum()])).tolist()
        self.kl_coef = next_kl_coef(self.kl_coef, total / n, self.args.kl_target, self.args.kl_horizon, n)

    # -- Update ----------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        """Clipped policy loss + `vf_coef` × clipped value loss, means over the mini-batch's tokens on all ranks."""
        mask, advantages = inputs["completion_mask"], inputs["advantages"]
        scored = self._forward(model, inputs)
        policy_loss, policy_clipped = clipped_policy_loss(
            scored.log_probs, inputs["old_logprobs"], advantages, self.epsilon_low, self.epsilon_high
        )
        value_loss, value_clipped = clipped_value_loss(
            scored.state_values, inputs["old_values"], inputs["returns"], self.args.cliprange_value
        )
        # DDP averages gradients over ranks, hence its factor; micro-batches and ranks then add up to the mini-batch.
        share = self.accelerator.num_processes / inputs["num_tokens"]
        loss = ((policy_loss + self.args.vf_coef * value_loss) * mask).sum() * share
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {self.state.global_step}; no step was taken")
        with torch.no_grad():
            log_ratio = scored.log_probs - inputs["old_logprobs"]
            if self.args.target_kl is not None:
                self._mini_batch_kl += (0.5 * log_ratio**2 * mask).sum() / inputs["num_tokens"]
            self._track("policy/approxkl_avg", 0.5 * log_ratio**2, mask)
            self._track("policy/clipfrac_avg", policy_clipped, mask)
            self._track("policy/entropy_avg", scored.entropy, mask)
            self._track("loss/policy_avg", policy_loss, mask)
            self._track("loss/value_avg", value_loss, mask)
            self._track("val/clipfrac_avg", value_clipped, mask)
            self._track("val/ratio", log_ratio.exp(), mask)
        return loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch; nothing once this rollout's updates have moved the policy further than `target_kl`."""
        if self._skip_epochs and self._step % self._micro_batches_per_rollout:
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.target_kl is not None and self.accelerator.sync_gradients:
            moved = self._sum_over_ranks(self._mini_batch_kl).item()
            self._mini_batch_kl, self._skip_epochs = 0.0, moved > self.args.target_kl
            if self._skip_epochs:  # without gradients AdamW leaves a parameter as it is
                model.zero_grad(set_to_none=True)
        if self._step % self._micro_batches_per_rollout == 0:
            started, scored = self._rollout_times
            now = time.perf_counter()
            self._track("time/update", loss.new_tensor([now - scored]))
            self._track("time/samples_per_second", loss.new_tensor([self.args.generation_batch_size / (now - started)]))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Trainer's gradient norm; stops before the step if it is not finite (fp16's loss scaler skips such a step)."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16 and not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"gradient norm is {grad_norm} at step {self.state.global_step}; no step was taken"
            )
        return grad_norm

    def create_optimizer(self, model=None):
        """Trainer's optimiser, with the critic's own weights in a group of their own if they have a learning rate."""
        optimizer = super().create_optimizer(model)
        if self.args.value_learning_rate is not None:
            critic = {id(parameter) for parameter in self._policy.critic.parameters()}
            own = [p for group in optimizer.param_groups for p in group["params"] if id(p) in critic]
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in critic]
            optimizer.add_param_group({"params": own, "lr": self.args.value_learning_rate, "weight_decay": 0.0})
        return optimizer

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluation samples and scores held-out prompts; there is no loss to report."""
        self._prepare_inputs(inputs)
        return None, None, None

    # -- Metrics ---------------------------------------------------------------------------------------------

    def _sum_over_ranks(self, tensor):
        return self.accelerator.reduce(tensor, reduction="sum")

    def _track(self, name, values, mask=None):
        """Add to the running mean of a metric over what counts; `log` sums over ranks once."""
        mode = "train" if self.model.training else "eval"
        mask = torch.ones_like(values) if mask is None else mask
        if mode == "eval":  # without the samples that only fill up the last batch
            values, mask = self.accelerator.gather_for_metrics((values, mask))
        self._sums[mode][name] = self._sums[mode][name] + torch.stack([(values * mask).sum(), mask.sum()]).double()

    def _explained_variance(self, values, returns, mask):
        """1 − Var(returns − values) / Var(returns) over this rank's tokens."""
        real = mask.bool()
        return 1 - (returns - values)[real].var() / returns[real].var().clamp(min=1e-8)

    def log(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        for name, sums in self._sums[mode].items():
            total, count = self._sum_over_ranks(sums).tolist()
            self._metrics[mode][name] = [total / count]
        self._sums[mode].clear()
        super().log(logs, start_time)
