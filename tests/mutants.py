"""Does a test fail when a line of the PPO code is wrong? `make mutants` breaks one line at a time and says.

Each mutant is a line's text, what it becomes, and the tests that should notice. The text stands in exactly one file of
`recipes/`, wherever that is, so the list outlives a move; a text that is no longer found is an error. The libraries are
imported once, and each mutant is tried in a fork of that process, on a copy of the project.
"""

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # for one mutant; a hang is noticed too

FORMULAS, TRAINER, RESUME = (f"tests/test_ppo_{name}.py" for name in ("formulas", "trainer", "resume"))
STABILITY = "tests/test_ppo_stability.py"
LORA, RANKS, DEVICE = (f"tests/test_ppo_{name}.py" for name in ("lora", "ranks", "device"))
LOGPROBS, DECODING, REWARDS = (f"tests/test_{name}.py" for name in ("logprobs", "decoding", "rewards"))
ENGINES, FAULTS, FIDELITY = (f"tests/test_{name}.py" for name in ("engines", "faults", "fidelity"))
VLLM, BAD_INPUT, GROUPS = (f"tests/test_{name}.py" for name in ("vllm", "bad_input", "group_trainers"))
DOCTOR, COMPAT = "tests/test_doctor.py", "tests/test_compat.py"


class Mutant(NamedTuple):
    """A fault: the text it replaces, the tests to run, and, if no test can fail on it, why."""

    fault: str
    old: str
    new: str
    tests: str
    equivalent: str | None = None


MUTANTS = [
    # Formulas
    Mutant("k1 with the wrong sign", "return -log_ratio if", "return log_ratio if", FORMULAS),
    Mutant("k3 without its correction", "torch.expm1(log_ratio) - log_ratio", "torch.expm1(log_ratio)", FORMULAS),
    Mutant("the price of KL is paid out", "rewards = -kl_coef * kl * mask", "rewards = kl_coef * kl * mask", FORMULAS),
    Mutant("the score one token late",
           "last = mask.sum(1).long() - 1", "last = mask.sum(1).long() % mask.size(1)", FORMULAS),
    Mutant("the score replaces the price of KL",
           "device=scores.device), last] += scores", "device=scores.device), last] = scores", FORMULAS),
    Mutant("GAE without the next value",
           "rewards[:, t] + gamma * next_value - values[:, t]", "rewards[:, t] - values[:, t]", FORMULAS),
    Mutant("GAE without gamma in its decay",
           "delta + gamma * lam * advantage", "delta + lam * advantage", FORMULAS),
    Mutant("values after the end leak into GAE",
           "values, rewards = values * mask, rewards * mask", "values, rewards = values, rewards * mask", FORMULAS),
    Mutant("returns are advantages",
           "return advantages, advantages + values", "return advantages, advantages", FORMULAS),
    Mutant("whitening by the biased variance", "(count - 1).clamp(min=1)", "count", FORMULAS),
    Mutant("whitening per rank",
           "total, count = reduce(torch.stack([(x * mask).sum(), mask.sum()]))",
           "total, count = torch.stack([(x * mask).sum(), mask.sum()])", FORMULAS),
    Mutant("whitening loses the mean that should stay",
           "whitened if shift_mean else whitened + mean", "whitened if shift_mean else whitened", FORMULAS),
    Mutant("the optimistic policy loss",
           "return torch.max(unclipped, clipped), (clipped > unclipped).float()\n\n\ndef clip",
           "return torch.min(unclipped, clipped), (clipped > unclipped).float()\n\n\ndef clip", FORMULAS),
    Mutant("epsilon_low and epsilon_high swapped",
           "ratio.clamp(1 - epsilon_low, 1 + epsilon_high)",
           "ratio.clamp(1 - epsilon_high, 1 + epsilon_low)", FORMULAS),
    Mutant("the value loss without its half", "return 0.5 * torch.max(", "return torch.max(", FORMULAS),
    Mutant("the value loss unclipped",
           "0.5 * torch.max(unclipped, clipped), (clipped > unclipped)",
           "0.5 * unclipped, (clipped > unclipped)", FORMULAS),
    Mutant("beta reacts without bound", "min(max(kl / target - 1, -0.2), 0.2)", "kl / target - 1", FORMULAS),
    Mutant("beta moves the wrong way",
           "kl_coef * (1 + error * n / horizon)", "kl_coef * (1 - error * n / horizon)", FORMULAS),
    Mutant("explained variance counts padding", "real = mask.bool()", "real = torch.ones_like(mask).bool()", TRAINER),
    Mutant("scores are normalised by the raw moment",
           "(squares - total**2 / n) / max(n - 1, 1)", "squares / n", TRAINER),
    # The trainer: rollout
    Mutant("the model's own generation settings leak",
           "policy.generation_config, GenerationConfig()",
           "policy.generation_config, policy.generation_config", TRAINER),
    Mutant("the model's generation settings are lost", "policy.generation_config = saved", "pass", TRAINER),
    Mutant("only the tokenizer's end token counts",
           "self.eos_token_ids = [*self.eos_token_ids, *args.end_token_ids]", "pass", TRAINER),
    Mutant("a ref adapter ignored",
           'adapter_name="ref" if "ref" in model.peft_config else None', "adapter_name=None", LORA),
    Mutant("with LoRA the policy is its own reference",
           "with use_adapter(model, adapter_name=", "with use_adapter(None, adapter_name=", LORA),
    Mutant("the estimator of the KL ignored",
           "reference.logprobs, self.args.kl_estimator)", "reference.logprobs)", FIDELITY),
    Mutant("rewards are whitened unasked", "if self.args.whiten_rewards:", "if True:", FIDELITY),
    Mutant("gamma ignored", "mask, self.args.gamma, *lams)", "mask, 1.0, *lams)", FIDELITY),
    Mutant("advantages not whitened",
           "advantages = formulas.whiten(advantages, mask, reduce=self._sum_over_ranks)", "pass", FIDELITY),
    Mutant("advantages whitened per rank",
           "formulas.whiten(advantages, mask, reduce=self._sum_over_ranks)",
           "formulas.whiten(advantages, mask)", RANKS),
    Mutant("the objective is logged after whitening",
           'self._track("objective/rlhf_reward", objective.sum(1))',
           'self._track("objective/rlhf_reward", rewards.sum(1))', TRAINER),
    Mutant("kl_coef adapts in evaluation too",
           'if self._mode == "train" and (self.ceiling', "if (self.ceiling", TRAINER),
    Mutant("the table's advantage averaged over padding",
           "advantages.sum(1) / mask.sum(1)", "advantages.mean(1)", TRAINER),
    Mutant("a reward of None counts as 0 in the logged mean",
           "mask = mask * ~values.isnan()", "values = values.nan_to_num()", TRAINER),
    Mutant("reward weights ignored", "per_func * self.reward_weights.to(per_func.device)", "per_func * 1.0", TRAINER),
    Mutant("each rank is given the first rank's scores",
           "len(self.reward_funcs))[self.accelerator.process_index]", "len(self.reward_funcs))[0]", RANKS),
    Mutant("what reward functions log is lost", "self._pending_metrics.pop(name, [math.nan])", "[math.nan]", TRAINER),
    Mutant("a sample without any score counts as 0",
           "if len(silent := per_func.isnan().all(1).nonzero()):", "if False:", TRAINER),
    Mutant("the missing-EOS penalty taken from completions that ended",
           "self.args.missing_eos_penalty * ~ended", "self.args.missing_eos_penalty * ended", TRAINER),
    Mutant("score_norm takes evaluation's samples into its moments",
           'if self._mode == "train":\n                sums =', "if True:\n                sums =", TRAINER),
    Mutant("an empty prompt is let through", "if not all(prompt_ids):", "if False:", TRAINER),
    Mutant("too long a completion is let through",
           "if longest + max_completion_length > positions:", "if False:", TRAINER),
    Mutant("too small a dataset is let through", "len(train_dataset) < args.generation_batch_size", "False", TRAINER),
    Mutant("tools are accepted and ignored", "if others.get(name):", "if False:", TRAINER),
    Mutant("env_mask is accepted and ignored", "if tool_mask is not None:", "if False:", TRAINER),
    # The trainer: update
    Mutant("the flag that skips epochs survives into the next rollout",
           "self._rollout, self._skip_epochs = self._generate_and_score_completions(generation_batch), False",
           "self._rollout = self._generate_and_score_completions(generation_batch)", TRAINER),
    Mutant("mini-batches not redrawn for each epoch",
           "if self._buffered_inputs is None or micro_batch == 0:",
           "if self._buffered_inputs is None or self._is_first_micro_batch:", TRAINER),
    Mutant("mini-batches not random",
           "torch.randperm(len(lengths)).to(lengths.device)", "torch.arange(len(lengths)).to(lengths.device)", TRAINER),
    Mutant("micro-batches of any length",
           "rows[lengths[rows].argsort()].split(micro_batch_size)", "rows.split(micro_batch_size)", TRAINER),
    Mutant("a micro-batch loses its longest completion's end",
           'longest = int(batch["completion_mask"].sum(1).max())',
           'longest = int(batch["completion_mask"].sum(1).min())', FORMULAS),
    Mutant("tokens counted per rank", "counts = reduce(torch.stack(", "counts = (torch.stack(", RANKS),
    Mutant("the loss without the factor of DDP",
           "share = self.accelerator.num_processes / inputs", "share = 1 / inputs", RANKS),
    Mutant("the loss counts padding",
           "policy_loss + self.args.vf_coef * value_loss) * mask)",
           "policy_loss + self.args.vf_coef * value_loss))", FIDELITY),
    Mutant("vf_coef ignored", "self.args.vf_coef * value_loss", "value_loss", FIDELITY),
    Mutant("cliprange_value ignored", 'inputs["returns"], self.args.cliprange_value', 'inputs["returns"]', TRAINER),
    Mutant("the value loss does not reach the trunk",
           "critic(states, tokens)", "critic(states.detach(), tokens)", TRAINER),
    Mutant("a loss that is not finite let through", "if not torch.isfinite(loss):", "if False:", TRAINER),
    Mutant("a gradient norm that is not finite let through",
           'if self.accelerator.mixed_precision != "fp16" and not math.isfinite(norm):', "if False:", TRAINER),
    Mutant("epochs stopped by one rank alone",
           "moved = self._sum_over_ranks(self._mini_batch_kl).item()", "moved = self._mini_batch_kl.item()", RANKS),
    Mutant("epochs stopped by the last micro-batch alone",
           "self._mini_batch_kl += (0.5", "self._mini_batch_kl = (0.5", TRAINER),
    Mutant("the step past stop_epochs_at_kl is taken", "model.zero_grad(set_to_none=True)", "pass", TRAINER),
    Mutant("the critic's learning rate ignored", "if self.args.value_learning_rate is not None:", "if False:", TRAINER),
    Mutant("the critic's own group gets weight decay", '"weight_decay": 0.0', '"weight_decay": 0.5', TRAINER),
    Mutant("samples that only fill up the last batch are counted",
           "values, mask = self.accelerator.gather_for_metrics((values, mask))", "pass", RANKS),
    Mutant("metrics are each rank's own",
           "total, count = self.reduce(self.sums).tolist()", "total, count = self.sums.tolist()", RANKS),
    # Critic and checkpoints
    Mutant("the value head ignores the seed",
           "ValueHead(config.hidden_size, args.seed)", "ValueHead(config.hidden_size)", TRAINER),
    Mutant("the value head starts too large", "/ math.sqrt(hidden_size + 1)", "/ 1", FORMULAS),
    Mutant("a critic of several labels is accepted",
           "if head is None or head.out_features != 1:", "if head is None:", TRAINER),
    Mutant("a critic of another vocabulary is accepted",
           "if classifier.config.vocab_size != vocab_size:", "if False:", TRAINER),
    Mutant("a separate critic keeps its dropout", "disable_dropout_in_model(self.trunk)", "pass", TRAINER),
    Mutant("the critic is written into the policy",
           "policy._keys_to_ignore_on_save |= names |", "policy._keys_to_ignore_on_save |= set() |", TRAINER),
    Mutant("beta is not restored",
           'trainer.kl_coef, trainer.score_sums = state["kl_coef"], state["score_sums"]', "pass", RESUME),
    Mutant("the critic is not restored", "load_critic(trainer.policy.critic, folder)", "pass", RESUME),
    Mutant("a finished run takes a further step",
           "if 0 < self.args.max_steps <= self.state.global_step:", "if False:", RESUME),
    Mutant("the order of prompts does not change with the pass",
           "sampler.seed + int(state.epoch or 0)", "sampler.seed", RESUME),
    Mutant("the order of prompts is TRL's", 'if getattr(sampler, "shuffle", False):', "if False:", RESUME),
    Mutant("a resumed run logs other means", "control.should_log |= control.should_save", "pass", RESUME),
    Mutant("the newest checkpoint chosen by name",
           "sorted(found, key=_step, reverse=True)", "sorted(found)[::-1]", FAULTS),
    Mutant("a copy of a checkpoint is taken for one",
           'if path.name.partition("-")[2].isdecimal()', 'if path.name[11:12].isdecimal()', FAULTS),
    Mutant("a checkpoint without its random state taken for whole", '[TRAINER_STATE, f"rng_state_{rank}.pth" if rank '
           'else "rng_state*.pth", *also]', "[TRAINER_STATE, *also]", FAULTS),
    Mutant("a file that is cut off taken for whole", "if not _is_whole(path)]", "if False]", FAULTS),
    Mutant("a checkpoint that one rank lacks is resumed from",
           "for theirs in of_ranks]", "for theirs in of_ranks[:1]]", FAULTS),
    Mutant("a named checkpoint that is not whole is resumed from",
           "        if not newest:\n            raise UserError(",
           "        if False:\n            raise UserError(", FAULTS),
    Mutant("newer checkpoints stay", "if _step(path) > step]", "if False]", FAULTS),
    Mutant("a run goes on with what it cannot change",
           "for name in set(FIXED) & set(other):", "for name in ():", FAULTS),
    Mutant("a signal stops within a rollout",
           "if state.global_step % args.steps_per_rollout == 0:", "if True:", FAULTS),
    Mutant("a signal stops without saving", 'for what in ("log", "save", "training_stop")',
           'for what in ("log", "training_stop")', FAULTS),
    Mutant("a reward function may take for ever", "signal.alarm(seconds)", "0", FAULTS),
    # Engines
    Mutant("FSDP is taken as it writes no model", "        if given != value:", "        if False:", ENGINES),
    Mutant("epochs are stopped under DeepSpeed",
           "stop_epochs_at_kl is not None and args.deepspeed_plugin is not None",
           "stop_epochs_at_kl is not None and False", ENGINES),
    Mutant("FSDP2 rounds log-probabilities and values",
           "param_dtype=dtype, reduce_dtype=torch.float32)",
           "param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=dtype)", ENGINES),
    Mutant("the value head takes its weights as they are",
           "F.linear(states.float(), self.weight.float(), self.bias.float())",
           "F.linear(states.float(), self.weight, self.bias)", ENGINES),
    # Stability options
    Mutant("the policy moves while the critic warms up", "if self._warms_up:", "if False:", STABILITY),
    Mutant("the critic warms up for steps, not rollouts",
           "value_warmup_rollouts * self.args.steps_per_rollout", "value_warmup_rollouts", STABILITY),
    Mutant("the warm-up drops the critic's gradients too", "if id(parameter) not in own:", "if True:", STABILITY),
    Mutant("gradients become 0 instead of none: weight decay and moments go on",
           "parameter.grad = None", "parameter.grad = torch.zeros_like(parameter)", STABILITY),
    Mutant("beta falls while the critic warms up", "is not None and not self._warms_up", "is not None", STABILITY),
    Mutant("the critic's targets have the policy's lambda",
           "return of_policy, lam if lam_value is None else lam_value", "return of_policy, of_policy", STABILITY),
    Mutant("lambda by length may be negative", "mask.sum(1))).clamp(min=0)", "mask.sum(1)))", FORMULAS),
    Mutant("a run ends at the KL ceiling with the policy above it", "weight.copy_(self.kept[name])", "pass", STABILITY),
    Mutant("the KL ceiling keeps a view, not a copy",
           'weight.detach().to("cpu", copy=True)', "weight.detach()", STABILITY),
    Mutant("what the KL ceiling keeps is not in the checkpoint",
           "trainer.ceiling.kept = load_file(Path(folder) / BELOW_KL)", "pass", STABILITY),
    Mutant("each rank has a KL ceiling of its own", "self.ceiling.measured(total / n)",
           "self.ceiling.measured(sequence_kl.mean().item())", RANKS),
    Mutant("the reference is paired with the critic's weights",
           'self.policy.named_parameters() if not name.startswith("critic.")',
           "self.policy.named_parameters()", STABILITY),
    Mutant("a resumed run begins with the first reference",
           "reference.load_state_dict(load_file(Path(folder) / REFERENCE), strict=False)", "pass", STABILITY),
    # vLLM as the sampler
    Mutant("the critic is sent to vLLM", 'if not pair[0].startswith("critic.")', "if True", VLLM),
    Mutant("vLLM stops at end tokens of its own", '"ignore_eos": True', '"ignore_eos": False', VLLM),
    Mutant("importance weights without bounds", ".exp().clamp(low, high)", ".exp()", VLLM),
    Mutant("importance weights are computed and not used",
           "advantages = advantages * sampler_weights(", "advantages = advantages + 0 * sampler_weights(", VLLM),
    Mutant("vLLM samples with other weights than the best that were loaded",
           "self._last_loaded_step = -1", "pass", VLLM),
    # Another device than the CPU, and fewer bits
    Mutant("which completions ended is said on the CPU", "for ids in completion_ids], device=mask.device)",
           "for ids in completion_ids])", DEVICE),
    Mutant("mini-batches are drawn on the CPU",
           "torch.randperm(len(lengths)).to(lengths.device)", "torch.randperm(len(lengths))", DEVICE),
    Mutant("what is sampled stays on the CPU",
           "name: t.to(self.accelerator.device) for", "name: t for", DEVICE),
    Mutant("metrics are summed in float64",
           "torch.stack([values.where(mask > 0, 0).sum(), mask.sum()])\n\n    def __iter__",
           "torch.stack([values.where(mask > 0, 0).sum(), mask.sum()]).double()\n\n    def __iter__", DEVICE),
    Mutant("the values of a separate critic are rounded under autocast",
           "enabled=False):\n            return self.head(", "enabled=True):\n            return self.head(", DEVICE),
    Mutant("the type of a device named instead of asked for",
           "with torch.autocast(states.device.type, enabled=False):\n            return self.head(",
           'with torch.autocast("cuda", enabled=False):\n            return self.head(', DEVICE),
    Mutant("cast_lm_head_to_fp32 ignored in the log-probabilities",
           "temperature, cast_lm_head_to_fp32, outputs", "temperature, False, outputs", DEVICE),
    Mutant("cast_lm_head_to_fp32 ignored in tiles", 'and "forward" not in vars(lm_head)', "", DEVICE),
    Mutant("a model is split over all GPUs", '{"device_map": None}', '{"device_map": "auto"}', DEVICE),
    Mutant("seconds are read before the device is idle",
           "torch.get_device_module(device).synchronize()", "pass", DEVICE),
    Mutant("a step that the loss scaler leaves out ends the run",
           'self.accelerator.mixed_precision != "fp16" and', "not self.args.fp16 and", DEVICE),
    Mutant("stop_epochs_at_kl is taken with a loss scaler",
           'if self.mixed_precision == "fp16" and', "if False and", DEVICE),
    Mutant("TRL casts the trained weights for continuous batching",
           "if self.use_transformers_continuous_batching and", "if False and", DEVICE),
    # Log-probabilities, sampling and rewards
    Mutant("left padding shifts the position ids",
           "flush_left(attention_mask, input_ids)", "(attention_mask, input_ids)", LOGPROBS),
    Mutant("the hidden state after the token",
           "prompt_lengths[self.row] + token - 1", "prompt_lengths[self.row] + token", LOGPROBS),
    Mutant("temperature ignored in the log-probabilities",
           "add_fused_lm_head(model, temperature, cast", "add_fused_lm_head(model, 1.0, cast", TRAINER),
    Mutant("temperature ignored in tiles",
           "scaled = (hidden.float() / temperature).to(dtype)", "scaled = hidden.to(dtype)", LOGPROBS),
    Mutant("one tile's top for all of them",
           "logits.sub_(torch.amax(logits, 1, out=tops[k])[:, None])",
           "logits.sub_(torch.amax(logits, 1, out=tops[k])[:, None] * 0)", LOGPROBS),
    Mutant("the head's gradient without its token",
           "grad_weight.index_add_(0, targets, weighted.float(), alpha=-1)", "grad_weight", LOGPROBS),
    Mutant("saved exponentials are not normalised", ".mul_((tops[k] - log_partition).exp_()[:, None])", "", LOGPROBS),
    Mutant("scaled logits are taken for plain ones", "and all(scale is None for scale in scales)", "", LOGPROBS),
    Mutant("states of other samples are taken for the rollout's",
           'exact and torch.equal(sequences, batch["input_ids"])', "exact", TRAINER),
    Mutant("states with fewer bits are used",
           'exact = trainer.accelerator.mixed_precision == "no" and', "exact =", TRAINER),
    Mutant("states kept from sampling pile up",
           'kept.pop("sequences", None), kept.pop("states", None)',
           'kept.get("sequences"), kept.get("states")', TRAINER),
    Mutant("a draw at the very end of the distribution",
           "threshold = threshold.minimum(torch.nextafter(total, torch.zeros_like(total)))", "pass", DECODING),
    Mutant("rows that have ended are overwritten",
           "stopping_criteria(input_ids, None) & ~ended", "stopping_criteria(input_ids, None)", DECODING),
    Mutant("the cache keeps rows that have left", "value.batch_select_indices(rows)", "pass", DECODING),
    Mutant("sampling takes the likeliest word",
           "draw(logits) if generation_config.do_sample", "draw(logits) if False", DECODING),
    Mutant("a score that is not finite let through", "if not abs(number) <= LARGEST:", "if False:", REWARDS),
    Mutant("the best member of an ensemble counts", "scores.min(0) if", "scores.max(0) if", REWARDS),
    Mutant("the members' disagreement is rewarded",
           "- variance_coef * scores.var(0)", "+ variance_coef * scores.var(0)", REWARDS),
    Mutant("a deviation for a variance", "scores.var(0)", "scores.std(0)", REWARDS),
    Mutant("preference the wrong way round",
           "margins = own - reward(prompts, sample_reference(prompts))",
           "margins = reward(prompts, sample_reference(prompts)) - own", REWARDS),
    Mutant("a preference twice as sure", "np.tanh(margins / 2)", "np.tanh(margins)", REWARDS),
    Mutant("references drawn from the run's own random numbers",
           "torch.manual_seed(zlib.crc32(repr((args.seed, prompts)).encode()))", "pass", REWARDS),
    Mutant("references that leave the random numbers elsewhere",
           "with torch.random.fork_rng(devices=[device] if device.type == \"cuda\" else []):", "if True:", REWARDS),
    Mutant("references under the model's own generation settings",
           "model.generation_config = GenerationConfig()  # which", "# which", REWARDS),
    Mutant("references padded on the right",
           'AutoTokenizer.from_pretrained(path, padding_side="left")\n    tokenizer.pad_token',
           'AutoTokenizer.from_pretrained(path, padding_side="right")\n    tokenizer.pad_token', REWARDS),
    Mutant("too few scores let through", "if len(values) != len(completions):", "if False:", REWARDS),
    Mutant("a text loses its end, not its beginning",
           'tokenizer.truncation_side, "left"', 'tokenizer.truncation_side, "right"', REWARDS),
    Mutant("a classifier without a trained head scores",
           'if info["missing_keys"] and not may_lack:', "if False:", REWARDS),
    Mutant("a number outside its range let through", "if asked and not holds(number):", "if False:", BAD_INPUT),
    Mutant("weights that are NaN let through", "not weight.isfinite().all()", "False", BAD_INPUT),
    Mutant("tensors of another shape made up", 'in info["mismatched_keys"]:', "in []:", BAD_INPUT),
    Mutant("a tokenizer without words let through",
           "if len(tokenizer) <= len(tokenizer.all_special_ids):", "if False:", BAD_INPUT),
    Mutant("a reward that ends the program ends it", "except (Exception, SystemExit)", "except Exception", BAD_INPUT),
    Mutant("scores in the order of their lengths",
           "scores[i] = score", "scores[start + batch.index(i)] = score", REWARDS),
    # GRPO and RLOO
    Mutant("padding counts as text", "if position_ids is None and past_key_values is None and", "if False and", GROUPS),
    Mutant("the reference's positions count padding", "for model in models:", "for model in models[:1]:", GROUPS),
    Mutant("TRL's own price of KL", "        beta=args.kl_coef,\n", "", GROUPS),
    Mutant("PPO's epsilon for AdamW", '**shared | {"adam_epsilon": 1e-8}', "**shared", GROUPS),
    Mutant("half groups are let through", "or args.generation_batch_size % group_size:", "or False:", GROUPS),
    # The doctor
    Mutant("the doctor draws a random number",
           "        if state.is_world_process_zero and state.global_step == 0:",
           "        if torch.rand(1) < 2 and state.is_world_process_zero and state.global_step == 0:", DOCTOR),
    Mutant("the doctor repeats itself", "if true and name not in self.said:", "if true:", DOCTOR),
    Mutant("every rank has its doctor",
           "if state.is_world_process_zero and state.global_step == 0:", "if state.global_step == 0:", RANKS),
    Mutant("the doctor cannot be turned off", "if trainer.args.doctor:", "if True:", DOCTOR),
    Mutant("the doctor finds a plain function blind",
           "if not isinstance(model, RewardModel) or constant:", "if constant or model is None:", DOCTOR),
    Mutant("prompts are not swapped", "prompts[i:] + prompts[:i], completions)", "prompts, completions)", DOCTOR),
    Mutant("completions that are all cut off are a fault without a penalty too",
           "penalty = args.missing_eos_penalty is not None", "penalty = True", DOCTOR),
    Mutant("a critic is judged by its first rollouts", "count >= 8 and critic < -0.5", "critic < -0.5", DOCTOR),
    Mutant("negative KL is missed", "kl < -0.2 - 12.5 / n", "kl < -math.inf", DOCTOR),
    Mutant("a length that was at the limit from the start is a fault",
           "cut > 0.98 and cut - cut_first > max(0.1, 5 / n)", "cut > 0.98", DOCTOR),
    # Code for TRL's old trainer
    Mutant("an old name sets nothing",
           "setattr(self, now, value if given else getattr(self, now))", "pass", COMPAT),
    Mutant("a new name is lost to the old one's default",
           "setattr(self, now, value if given else getattr(self, now))", "setattr(self, now, value)", COMPAT),
    Mutant("old and new name may disagree",
           "if given and getattr(self, now) not in (known[now].default, value):", "if False:", COMPAT),
    Mutant("a rollout grows with its mini-batches", "share = batch // self.num_mini_batches", "share = batch", COMPAT),
    Mutant("a step is an optimiser's", "int(getattr(self, name)) * self.steps_per_rollout)",
           "int(getattr(self, name)))", COMPAT),
    Mutant("the value model is left aside",
           "if value_model is not None:\n            attach_critic(", "if False:\n            attach_critic(", COMPAT),
    Mutant("prompts are tokenised again",
           "return [prompt.ids for prompt in prompts], None, {}", "return super()._tokenize_prompts(prompts)", COMPAT),
    Mutant("an end token in a prompt is padding",
           "tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None",
           "tokenizer.pad_token_id", COMPAT),
    Mutant("the attention mask of prompts is ignored",
           'batch.pop("attention_mask", None) or [[', 'batch.pop("attention_mask", None) and None or [[', COMPAT),
    Mutant("the reference is loaded from the policy's folder",
           "grpo_trainer.create_model_from_path = lambda *_, **__: ref_model", "pass", COMPAT),
    Mutant("the reference is the policy itself",
           "ref_model = ref_model or copy.deepcopy(policy)", "ref_model = ref_model or policy", COMPAT),
    Mutant("samples are drawn as in training",
           "sampler.temperature, 0.01, self", "sampler.temperature, sampler.temperature, self", COMPAT),
    Mutant("training goes on at the temperature of samples", "sampler.temperature = before", "pass", COMPAT),
]  # fmt: skip


def copy_project(folder: Path) -> None:
    """The files that git knows or would take, into `folder`."""
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def find(mutant: Mutant, folder: Path) -> Path:
    """The one file that holds the mutant's text; SystemExit if that is not so."""
    found = [path for path in sorted((folder / "recipes").rglob("*.py")) if mutant.old in path.read_text()]
    if len(found) != 1 or found[0].read_text().count(mutant.old) != 1:
        raise SystemExit(
            f"mutant {mutant.fault!r}: its text stands in {len(found)} files, not once in one: {mutant.old}"
        )
    return found[0]


def is_caught(mutant: Mutant, folder: Path) -> bool:
    """Whether one of the mutant's tests fails on it, in a fork of this process."""
    path = find(mutant, folder)
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        child = os.fork()
        if not child:
            run_tests(mutant, folder)
        return wait(child) != 0
    finally:
        path.write_text(text)


def run_tests(mutant: Mutant, folder: Path) -> None:
    """In the fork: pytest on the mutant's tests until the first failure; never returns."""
    import pytest

    os.setsid()
    os.chdir(folder)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *mutant.tests.split()]))


def wait(child: int) -> int:
    """The fork's exit status; one that hangs is killed with what it started, which counts as a failure."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 1


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="those whose fault contains this text")
    parser.add_argument("--check", action="store_true", help="only look whether every text is found")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Try the mutants; prints each, and how many were caught. Returns 1 if one lives that is not marked equivalent."""
    args = make_parser().parse_args(argv)
    mutants = [mutant for mutant in MUTANTS if args.only in mutant.fault]
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True  # a mutant of the same size within a second would be read from the cache
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_project(folder)
        for mutant in mutants:
            find(mutant, folder)
        if args.check:
            return 0
        for library in ("datasets", "peft", "trl.trainer.grpo_trainer", "trl.trainer.reward_trainer"):
            importlib.import_module(library)
        survived = []
        for mutant in mutants:
            started = time.monotonic()
            caught = is_caught(mutant, folder)
            said = "caught" if caught else "equivalent" if mutant.equivalent else "SURVIVED"
            print(f"{said:10} {time.monotonic() - started:4.0f} s  {mutant.fault}", flush=True)
            if not caught:
                survived.append(mutant)
    print(f"{len(mutants)} tried, {len(mutants) - len(survived)} caught, {len(survived)} survived")
    for mutant in survived:
        print(f"survived: {mutant.fault}: {mutant.equivalent or 'no test fails on it'}")
    return int(any(not mutant.equivalent for mutant in survived))


if __name__ == "__main__":
    sys.exit(main())
