"""PPO for language models: TRL's `GRPOTrainer` with the critic put back.

`PPOTrainer` overrides the few hooks of its parent in which PPO differs; the rest is TRL's and transformers'. The hooks
are private, so `trl` is pinned exactly. The settings are in `config.py` and `settings.py`, formulas in `formulas.py`.

Shapes: B completions, P prompt tokens (left-padded), C completion tokens (right-padded). A `mask` of shape (B, C) is 1
on the tokens that count: the completion's own, its end token included.

Sources: Schulman et al. 2017 (arXiv:1707.06347), Ziegler et al. 2019 (1909.08593), Stiennon et al. 2020 (2009.01325),
Huang et al. 2024 (2403.17031).
"""

import math
from pathlib import Path
from typing import ClassVar

import torch
from accelerate.utils import gather_object, is_peft_model
from transformers import GenerationConfig, TrainerState
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from . import cpu_folder, formulas
from .callbacks import RunningMean, StopOnSignal, add_callbacks, now
from .checkpoints import checkpoint_to_resume, files_beside_the_policy, load_state, numbered, save_state, set_aside
from .config import PPOConfig, check_arguments, check_given
from .critic import attach_critic, critic_weights, drop_policy_gradients, split_group
from .inputs import ScoreError, UserError, check_lengths, not_finite
from .loading import check_usable
from .logprobs import TokenLogprobs, add_logprobs_forward, pad_batch, split_rollout, take_rows
from .reward_model import with_finite_scores
from .vllm_sampler import fit_to_ppo, sampler_weights


class PPOTrainer(GRPOTrainer):
    """Actor-critic PPO on TRL's `GRPOTrainer`, whose arguments it takes.

    `reward_funcs` are plain functions with TRL's signature, `f(prompts, completions, **columns) -> list[float]`; wrap
    a sequence classifier in `RewardModel`. The critic is a value head on the policy's trunk, or a model of its own
    from `args.value_model_path`; it is saved as `critic.safetensors` next to the policy, which loads without it.

    Raises `UserError`, a `ValueError`, before any model loads, if the dataset is less than one rollout, a reward is no
    function, `model` is no whole language model, or an argument is given that PPO cannot honour.
    """

    _name = "PPO"
    _tag_names: ClassVar[list[str]] = ["trl", "ppo"]
    _paper: ClassVar[dict[str, str]] = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}

    def __init__(self, model=None, reward_funcs=None, args: PPOConfig = None, train_dataset=None, **kwargs):
        check_given(
            {"model": model, "reward_funcs": reward_funcs, "args": args, "train_dataset": train_dataset}, kwargs
        )
        check_arguments(model, args, train_dataset, kwargs)
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        super().__init__(model, [with_finite_scores(f, args) for f in reward_funcs], args, train_dataset, **kwargs)
        self.eos_token_ids = [*self.eos_token_ids, *args.end_token_ids]
        check_usable(self.policy, self._tokenizer)
        for model in [self.policy] if self.ref_model is None else [self.policy, self.ref_model]:
            add_logprobs_forward(self.accelerator.unwrap_model(model), self.temperature, args.cast_lm_head_to_fp32)
        attach_critic(self.policy, args, self.accelerator.device)
        if args.use_vllm:
            fit_to_ppo(self.vllm_generation, self.eos_token_ids)
        add_callbacks(self)
        self.kl_coef, self.score_sums = args.kl_coef, [0.0, 0.0, 0.0]  # sums of 1, score and score², for score_norm
        self._rollout, self._mini_batch_kl, self._skip_epochs = None, 0.0, False  # two for stop_epochs_at_kl
        if (cpu := cpu_folder(self.accelerator.device)) is not None:
            cpu.speed_up(self)

    @property
    def policy(self):
        """The causal LM itself, out of DDP's, FSDP's or PEFT's wrapper."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    @property
    def _mode(self):
        return "train" if self.model.training else "eval"

    # -- Rollout ---------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        """One rollout: samples completions and works out all that the updates need of them."""
        prompts = [example["prompt"] for example in inputs]
        started = now(self.args.device)

        # 1. Sample a completion for each prompt.
        batch, completions, completion_ids = self._sample(prompts)
        mask = batch["completion_mask"]
        ended = torch.tensor([ids[-1] in self.eos_token_ids for ids in completion_ids], device=mask.device)
        sampled = now(self.args.device)

        # 2. Log-probabilities and values under the policy, log-probabilities under the reference.
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            policy, reference = self.policy_logprobs(batch), self._ref_logprobs(batch)

        # 3. Scores: what the reward functions say, then the missing-EOS rule, normalisation and clipping.
        raw_scores = self._weighted_scores(inputs, prompts, completions, completion_ids)
        scores = self._shape_scores(raw_scores, ended)

        # 4. Rewards: the price of KL on every token, and the score on the last one.
        kl = formulas.kl_estimate(policy.logprobs, reference.logprobs, self.args.kl_estimator) * mask
        rewards = objective = formulas.token_rewards(scores, kl, mask, self.kl_coef)
        if self.args.whiten_rewards:
            rewards = formulas.whiten(rewards, mask, shift_mean=False, reduce=self._sum_over_ranks)

        # 5. Advantages and returns.
        lams = formulas.lambdas(mask, self.args.lam, self.args.lam_value, self.args.lam_length_alpha)
        advantages, returns = formulas.decoupled_gae(rewards, policy.state_values, mask, self.args.gamma, *lams)
        self._rollout_times = started, (scored := now(self.args.device))

        self._track("objective/kl", kl.sum(1))
        self._track("objective/entropy", -policy.logprobs.sum(1))
        self._track("objective/scores", raw_scores)
        self._track("objective/non_score_reward", -self.kl_coef * kl.sum(1))
        self._track("objective/rlhf_reward", objective.sum(1))
        self._track("objective/missing_eos", (~ended).float())
        self._track("objective/kl_coef", self.kl_coef)
        self._track("val/explained_variance", formulas.explained_variance(policy.state_values, returns, mask))
        self._track("time/generate", sampled - started)
        self._track("time/score", scored - sampled)
        if self._mode == "train" and (self.ceiling or self.args.kl_target):
            self._react_to_kl(kl.sum(1))
        advantages = formulas.whiten(advantages, mask, reduce=self._sum_over_ranks)
        if self.log_completions:
            means = advantages.sum(1) / mask.sum(1)
            self._keep_for_table(prompt=prompts, completion=completions, advantages=means.tolist())
        if self.args.vllm_importance_sampling_correction and (sampler := batch.get("sampler_logprobs")) is not None:
            advantages = advantages * sampler_weights(self, policy.logprobs, sampler, mask)
        old = {"old_logprobs": policy.logprobs, "old_values": policy.state_values}
        return batch | old | {"advantages": advantages, "returns": returns}

    def _sample(self, prompts):
        """`(batch, completions, completion_ids)`: padded tensors on this device; texts or messages; lists of ids."""
        prompt_ids, completion_ids, tool_mask, completions, logprobs, *_ = self._generate(prompts)
        if tool_mask is not None:
            raise UserError("rollout_func: returned env_mask, but tokens of an environment are not supported here")
        batch = pad_batch(prompt_ids, completion_ids, self._tokenizer.pad_token_id, logprobs)
        return {name: t.to(self.accelerator.device) for name, t in batch.items()}, completions, completion_ids

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        """Sample from the trainer's settings alone: `generate` fills what they leave open from the model's own."""
        policy = self.policy
        check_lengths(prompt_ids, self.max_completion_length, policy.config, self.args.vllm_max_model_length)
        saved, policy.generation_config = policy.generation_config, GenerationConfig()
        try:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        finally:
            policy.generation_config = saved

    def policy_logprobs(self, batch):
        """`TokenLogprobs` of a rollout under the policy that sampled it."""
        return self.logprobs(self.model, batch)

    def _ref_logprobs(self, batch):
        """The reference is a frozen copy or, with PEFT, the policy with its adapter off (or as it was loaded)."""
        if self.ref_model is not None:
            return self.logprobs(self.ref_model, batch)
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return self.logprobs(self.model, batch)

    def logprobs(self, model, batch):
        """`TokenLogprobs` of a whole rollout, in micro-batches of like length."""
        shape = batch["completion_mask"].shape
        total = {}
        for rows in batch["attention_mask"].sum(1).argsort().split(self.args.per_device_train_batch_size):
            for name, tensor in self._forward(model, take_rows(batch, rows)).items():
                total.setdefault(name, tensor.new_zeros(shape))[rows, : tensor.size(1)] = tensor
        return TokenLogprobs(**total)

    def _forward(self, model, batch):
        """`TokenLogprobs` of a micro-batch, through the wrapped model: DDP and FSDP see only such calls."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "states") if name in batch}
        with self.accelerator.autocast():
            tokens = model(num_completion_tokens=batch["completion_mask"].size(1), **inputs)
        return TokenLogprobs(**{name: tensor.float() for name, tensor in tokens.items()})

    # -- Scores ----------------------------------------------------------------------------------------------

    def _weighted_scores(self, inputs, prompts, completions, completion_ids):
        """Σ_k w_k·r_k for this rank's completions (B,); a reward function that says None has no say in a sample."""
        everyones = self._calculate_rewards(inputs, prompts, completions, completion_ids)  # over all ranks (N, K)
        per_func = everyones.view(-1, len(prompts), len(self.reward_funcs))[self.accelerator.process_index]
        for name, all_ranks, column in zip(self.reward_func_names, everyones.T, per_func.T, strict=True):
            self._logs["rewards"][name].extend(all_ranks.tolist())
            self._track(f"rewards/{name}", column)
        for name in sorted(set(gather_object(list(self._pending_metrics)))):  # by log_metric, on one rank or on all
            self._track(name, torch.tensor(self._pending_metrics.pop(name, [math.nan])).mean())
        if len(silent := per_func.isnan().all(1).nonzero()):
            names = ", ".join(self.reward_func_names)
            raise ScoreError(f"reward_funcs: every one returned None for sample {silent[0].item()} ({names})")
        return (per_func * self.reward_weights.to(per_func.device)).nansum(1)

    def _shape_scores(self, scores, ended):
        """The missing-EOS rule, then normalisation by the running moments, then clipping; (B,) → (B,)."""
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * ~ended
        if self.args.score_norm:
            if self._mode == "train":
                sums = self._sum_over_ranks(torch.stack([torch.ones_like(scores), scores, scores**2]).sum(1))
                self.score_sums = [a + b for a, b in zip(self.score_sums, sums.tolist(), strict=True)]
            scores = formulas.normalise(scores, *self.score_sums)
        return scores if (clip := self.args.score_clip) is None else scores.clamp(-clip, clip)

    def _react_to_kl(self, sequence_kl):
        """What the KL of all ranks' completions decides: whether training ends, and the next β."""
        total, n = self._sum_over_ranks(torch.stack([sequence_kl.sum(), torch.ones_like(sequence_kl).sum()])).tolist()
        if self.ceiling is not None:
            self.ceiling.measured(total / n)
        # While the policy waits for the critic its KL is 0, which says nothing of β: it would only fall.
        if self.args.kl_target is not None and not self._warms_up:
            self.kl_coef = formulas.next_kl_coef(self.kl_coef, total / n, self.args.kl_target, self.args.kl_horizon, n)

    # -- Update ----------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch):
        """The next micro-batch: a new rollout every `num_iterations` epochs, new mini-batches every epoch."""
        if self._mode == "eval":
            return self._generate_and_score_completions(generation_batch)
        if self._rollout is None or self._is_first_micro_batch:
            self._rollout, self._skip_epochs = self._generate_and_score_completions(generation_batch), False
        micro_batch = self._step % self.args.steps_per_generation
        if self._buffered_inputs is None or micro_batch == 0:
            self._buffered_inputs = split_rollout(
                self._rollout, self.args.num_mini_batches, self.args.per_device_train_batch_size, self._sum_over_ranks
            )
        return self._buffered_inputs[micro_batch]

    @property
    def _warms_up(self):
        """Whether this is one of the first rollouts, whose updates move the critic alone (`value_warmup_rollouts`)."""
        return self.state.global_step < self.args.value_warmup_rollouts * self.args.steps_per_rollout

    @property
    def _is_first_micro_batch(self):
        """Whether the next micro-batch is the first one of a rollout."""
        return self._step % (self.args.steps_per_generation * self.num_iterations) == 0

    def _compute_loss(self, model, inputs):
        """Clipped policy loss + `vf_coef` × clipped value loss, means over the mini-batch's tokens on all ranks."""
        mask, advantages, old = inputs["completion_mask"], inputs["advantages"], inputs["old_logprobs"]
        new = self._forward(model, inputs)
        clip = self.epsilon_low, self.epsilon_high
        policy_loss, policy_clipped = formulas.clipped_policy_loss(new.logprobs, old, advantages, *clip)
        value_loss, value_clipped = formulas.clipped_value_loss(
            new.state_values, inputs["old_values"], inputs["returns"], self.args.cliprange_value
        )
        # DDP averages gradients over ranks, hence its factor; micro-batches and ranks then add up to the mini-batch.
        share = self.accelerator.num_processes / inputs["num_tokens"]
        loss = ((policy_loss + self.args.vf_coef * value_loss) * mask).sum() * share
        if not torch.isfinite(loss):
            raise not_finite("loss", loss.item(), self.state.global_step)
        with torch.no_grad():
            log_ratio = new.logprobs - old
            if self.args.stop_epochs_at_kl is not None:
                self._mini_batch_kl += (0.5 * log_ratio**2 * mask).sum() / inputs["num_tokens"]
            self._track("policy/approxkl_avg", 0.5 * log_ratio**2, mask)
            self._track("policy/clipfrac_avg", policy_clipped, mask)
            self._track("policy/entropy_avg", new.entropy, mask)
            self._track("loss/policy_avg", policy_loss, mask)
            self._track("loss/value_avg", value_loss, mask)
            self._track("val/clipfrac_avg", value_clipped, mask)
            self._track("val/ratio", log_ratio.exp(), mask)
        return loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch; nothing once this rollout's updates have moved the policy past `stop_epochs_at_kl`."""
        if self._skip_epochs and not self._is_first_micro_batch:
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._warms_up:
            drop_policy_gradients(model, self.policy.critic)
        if self.args.stop_epochs_at_kl is not None and self.accelerator.sync_gradients:
            moved = self._sum_over_ranks(self._mini_batch_kl).item()
            self._mini_batch_kl, self._skip_epochs = 0.0, moved > self.args.stop_epochs_at_kl
            if self._skip_epochs:  # without gradients AdamW leaves a parameter as it is
                model.zero_grad(set_to_none=True)
        if self._is_first_micro_batch:  # of the next rollout: this one is done
            (started, scored), updated = self._rollout_times, now(self.args.device)
            self._track("time/update", updated - scored)
            self._track("time/samples_per_second", self.args.generation_batch_size / (updated - started))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Trainer's gradient norm; stops before the step if it is not finite (fp16's loss scaler skips such a step)."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.mixed_precision != "fp16" and not math.isfinite(norm):
            raise not_finite("gradient norm", norm, self.state.global_step)
        return norm

    def create_optimizer(self, model=None):
        """Trainer's optimiser, with the critic's own weights in a group of their own if they have a learning rate."""
        optimizer = super().create_optimizer(model)
        if self.args.value_learning_rate is not None:
            split_group(optimizer, self.policy.critic.parameters(), self.args.value_learning_rate)
        return optimizer

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluation samples and scores held-out prompts; there is no loss to report."""
        self._prepare_inputs(inputs)
        return None, None, None

    # -- Metrics ---------------------------------------------------------------------------------------------

    def _sum_over_ranks(self, tensor):
        return self.accelerator.reduce(tensor, reduction="sum")

    def _track(self, name, values, mask=None):
        """Add to the mean of a metric over what counts; the parent's `log` reads it, once for all ranks."""
        values = torch.as_tensor(values, dtype=torch.float, device=self.accelerator.device).reshape(-1)
        mask = torch.ones_like(values) if mask is None else mask.reshape(-1)
        if self._mode == "eval":  # without the samples that only fill up the last batch
            values, mask = self.accelerator.gather_for_metrics((values, mask))
        self._metrics[self._mode].setdefault(name, RunningMean(self._sum_over_ranks)).add(values, mask)

    def _keep_for_table(self, **columns):
        """What the parent's `log` shows as a table, in the terminal and in W&B, next to the scores."""
        for name, column in columns.items():
            self._logs[name].extend(gather_object(column))

    # -- Checkpoints -----------------------------------------------------------------------------------------

    def _save(self, output_dir=None, state_dict=None):
        """The policy without its critic, the critic, and what else a rollout depends on."""
        folder = Path(output_dir or self.args.output_dir)
        weights = critic_weights(self.policy.critic, state_dict)  # first: transformers takes them out of `state_dict`
        super()._save(str(folder), state_dict)
        if self.args.should_save:
            save_state(self, folder, weights)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Trainer's `train`; `True` (or "true") resumes from the newest whole checkpoint, if there is one."""
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args, files_beside_the_policy(self.args))
        if checkpoint:
            load_state(self, checkpoint)
            self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            if 0 < self.args.max_steps <= self.state.global_step:  # Trainer would take one step more
                self._load_from_checkpoint(checkpoint)
                return TrainOutput(self.state.global_step, 0.0, {})
        elif self.is_world_process_zero():  # or a later resume would take an earlier run's for this one's
            set_aside(numbered(self.args.output_dir))
        with StopOnSignal(self):
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _determine_best_metric(self, metrics, trial):
        return (self.ceiling is None or self.ceiling.allows(metrics)) and super()._determine_best_metric(metrics, trial)

    def _load_best_model(self):
        super()._load_best_model()
        load_state(self, self.state.best_model_checkpoint)
        self._last_loaded_step = -1  # vLLM has the last step's weights
