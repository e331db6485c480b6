"""Says in one line each, once in a run, what looks wrong with it and which setting to change; changes nothing.

It reads on the main process what the trainer has kept anyway: nothing is sent between ranks, no random number is drawn.
"Healthy" are the sentiment variants `tiny` and `scratch`: 20 and 50 rollouts of 128 completions of up to 24 tokens.
"""

import math
from statistics import fmean, median

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from .reward_model import RewardModel

SAYS = {  # what is wrong, and what to change
    "ratio": "log-probabilities of update and rollout differ before the first step (approxkl {:.3f}, should be 0): "
    "look for dropout that is on, or a layer that computes otherwise in training",
    "reference": "KL is {:.3f} nats per token before the first step, should be 0: the reference is not the policy; "
    "take one model_name_or_path for both, and merge a trained adapter",
    "sampling": "sampled tokens have a mean −log p of {:.2f}, the entropy is {:.2f}: they are not sampled from what is "
    "scored; set top_k: 0, top_p: 1.0, no min_p, no repetition_penalty",
    "no end": "no completion has an end token, so missing_eos_penalty is the same for all: raise max_completion_length "
    "({}), or set generation_kwargs: {{eos_token_id: …}}",
    "other end": "{:.0%} of the completions contain {!r}, which is no end token here: if it ends an answer, set "
    "generation_kwargs: {{eos_token_id: {}}}",
    "constant": "every score of the first rollout is {:.4g}, nothing can be learnt from that: check rewards",
    "idle reward": "reward {} is {:.4g} for every completion of the first rollout and has no say: see what it seeks",
    "score clip": "{:.0%} of the scores lie beyond ±{:g} and count the same: raise score_clip, or set score_norm: true",
    "blind": "reward {} is the same with the prompts swapped: raise reward_max_length, or train it on prompts",
    "length reward": "reward {} is little but length (correlation {:.2f}): train it on pairs of like length",
    "clipped": "{:.0%} of the tokens are clipped in a rollout's updates: lower learning_rate or num_iterations",
    "jump": "a rollout's updates move the policy by an approxkl of {:.2g}, healthy is 0.001 to 0.05: lower "
    "learning_rate or num_iterations, or set stop_epochs_at_kl: 0.1",
    "KL": "KL is {:.1f} nats, above 0.8 per token: raise kl_coef ({:.3g}), set kl_target, or lower learning_rate",
    "KL target": "KL is {:.1f} nats, kl_target {:g}: kl_coef ({:.3g}) does not hold it; lower learning_rate",
    "negative KL": "KL is {:.2f} nats and cannot be below 0: completions are not sampled from the policy that scores "
    "them; check top_k, top_p, and that the sampler gets the new weights",
    "kl_coef": "kl_coef went from {:g} to {:.3g}: raise kl_horizon, or choose a kl_target within reach",
    "entropy": "entropy fell from {:.2f} to {:.2f} nats per token, samples hardly vary: raise kl_coef",
    "critic": "explained variance is still {:.1f} after {} rollouts, worse than no critic: raise vf_coef or "
    "value_learning_rate, or set value_model_path",
    "limit": "{:.0%} of the completions are cut off at max_completion_length, at first {:.0%}: set missing_eos_penalty",
    "short": "completions went from {:.1f} to {:.1f} tokens: see whether the reward pays for that; raise kl_coef",
    "repetition": "only {:.0%} of a completion's trigrams are new in it: add repetition_penalty to rewards",
    "same": "only {:.0%} of the completions differ from each other: raise kl_coef or temperature, lower learning_rate",
    "gradient": "gradient norms stay above {:.3g}, max_grad_norm is {:g}: raise it, or set score_norm: true",
    "still": "KL is {:.4f} nats after {} rollouts, the policy hardly moves: raise learning_rate, or lower kl_coef",
    "no gain": "score {:.3g} after {} rollouts, {:.3g} at first, for {:.1f} nats of KL: check rewards and their signs",
}


class Doctor(TrainerCallback):
    """Looks at the first rollout of a `PPOTrainer` before its first step, then at each row of the log."""

    def __init__(self, trainer):
        self.trainer, self.said, self.rollouts = trainer, set(), {}  # rollout → metric → what the log says of it

    def on_train_begin(self, args, state, control, **kwargs):
        """Called at the start; a resumed run brings its log along."""
        for row in state.log_history:
            self._keep(args, row)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Called before each optimiser step; before the first one the policy still is the reference."""
        if state.is_world_process_zero and state.global_step == 0:
            self._say([*look_at_policy(self.trainer), *look_at_scores(self.trainer)])

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Called with each row of the log."""
        if state.is_world_process_zero:
            texts = text_metrics(self.trainer._rollout) if "objective/kl" in logs else {}
            self._keep(args, logs | texts | {"step": state.global_step})
            self._say(look_at_rollouts([*self.rollouts.values()], args))

    def _keep(self, args, row):
        rollout = self.rollouts.setdefault((row["step"] - 1) // args.steps_per_rollout, {})
        for name, value in row.items():
            if isinstance(value, float):
                rollout.setdefault(name, []).append(value)

    def _say(self, found):
        for name, true, *numbers in found:
            if true and name not in self.said:
                self.said.add(name)
                tqdm.write(f"doctor ({name}): {SAYS[name].format(*numbers)}")  # above the progress bar, if there is one


def look_at_policy(trainer):
    """`(name, whether it holds, numbers)` of what the first rollout says of the policy, before the first step."""
    args, rollout, metrics = trainer.args, trainer._rollout, trainer._metrics["train"]

    def mean(name):  # over this rank's share
        total, count = metrics[name].sums.tolist() if name in metrics else (math.nan, 1)
        return total / count

    mask = rollout["completion_mask"].bool()
    kl, noise = mean("objective/kl") * len(mask) / mask.sum().item(), mean("policy/approxkl_avg")
    first = trainer._buffered_inputs[: args.gradient_accumulation_steps]  # the mini-batch that entropy was logged for
    surprise = -torch.cat([each["old_logprobs"][each["completion_mask"].bool()] for each in first])
    said, entropy = surprise.mean().item(), mean("policy/entropy_avg")
    error = surprise.std().item() / math.sqrt(len(surprise))
    # 0.005 nats is a log-probability that is 10 % off: dropout of 0.1 is above, rounding (float32: 1e-7) far below.
    yield "ratio", noise > 0.005, noise
    yield "reference", noise <= 0.005 < abs(kl), kl
    # E[−log p] is the entropy if p is what was sampled from; chance is five standard errors off in 1 of 10⁶ runs.
    far = abs(said - entropy) > max(5 * error, 0.05 * entropy)
    yield "sampling", far and max(noise, abs(kl)) <= 0.005, said, entropy
    penalty = args.missing_eos_penalty is not None  # without one, completions that are all cut off are healthy
    yield "no end", penalty and mean("objective/missing_eos") == 1, args.max_completion_length
    tokenizer, ids = trainer._tokenizer, rollout["input_ids"][:, -mask.size(1) :]
    known = {*trainer.eos_token_ids, tokenizer.pad_token_id, tokenizer.unk_token_id}
    for token in sorted({*tokenizer.all_special_ids} - known):
        share = ((ids == token) & mask).any(1).float().mean().item()
        yield "other end", share > 0.5, share, tokenizer.decode([token]), token


def look_at_scores(trainer):
    """The same of the scores: over all ranks, but for what needs the main process's own texts."""
    args, rollout, names = trainer.args, trainer._rollout, trainer.reward_func_names
    rewards = torch.tensor([[*trainer._logs["rewards"][name]] for name in names])
    scores = (rewards * trainer.reward_weights.cpu()[:, None]).nansum(0)
    constant = scores.max() - scores.min() <= 1e-6 * max(1, scores.abs().max())
    yield "constant", constant, scores[0]
    lowest, highest = rewards.nan_to_num().aminmax(dim=1)
    for name, weight, low, high, own in zip(names, trainer.reward_weights, lowest, highest, rewards, strict=True):
        yield "idle reward", weight != 0 and not constant and low == high, name, own[0]
    limit = math.inf if args.score_clip is None or args.score_norm else args.score_clip
    beyond = (scores.abs() >= limit).float().mean().item()
    yield "score clip", beyond > 0.9, beyond, limit
    lengths = rollout["completion_mask"].sum(1).cpu()
    prompts, completions = first_texts(trainer, 8)  # enough to see whether a model reads its prompts
    for name, func, own in zip(names, trainer.reward_funcs, rewards[:, : len(lengths)], strict=True):
        model = getattr(func, "__wrapped__", None)
        if not isinstance(model, RewardModel) or constant:  # a plain function may well read the completion alone
            continue
        told, swapped = torch.tensor([model(prompts[i:] + prompts[:i], completions) for i in (0, 1)])
        other = torch.tensor([a != b for a, b in zip(prompts, prompts[1:] + prompts[:1], strict=True)])
        apart = (told - swapped).abs()[other].median() if other.any() else math.nan  # a short text may be read whole
        yield "blind", apart < 1e-3 * told.std(), name
        r = torch.corrcoef(torch.stack([own, lengths.float()]))[0, 1].item()
        # 16 pairs that have nothing to do with each other reach 0.9 in 1 of 10⁶ runs.
        yield "length reward", len(own) >= 16 and lengths.float().std() >= 1 and abs(r) > 0.9, name, r


def first_texts(trainer, n):
    """The first n prompts and completions of this rank's rollout."""
    rollout, decode = trainer._rollout, trainer._tokenizer.decode
    width = rollout["completion_mask"].size(1)
    rows = [*zip(rollout["input_ids"][:n], rollout["attention_mask"][:n].bool(), strict=True)]
    halves = (slice(None, -width), slice(-width, None))
    return [[decode(ids[half][m[half]], skip_special_tokens=True) for ids, m in rows] for half in halves]


def text_metrics(rollout, n=64):
    """Of this rank's first n completions: the share that differ, and the mean share of trigrams that differ in one."""
    rows = zip(rollout["input_ids"][:n], rollout["completion_mask"][:n].bool(), strict=True)
    texts = [tuple(ids[-len(mask) :][mask].tolist()) for ids, mask in rows]
    trigrams = [[*zip(text, text[1:], text[2:], strict=False)] for text in texts if len(text) > 2]
    new = [len({*each}) / len(each) for each in trigrams]
    return {"texts/different": len({*texts}) / len(texts), "texts/new_trigrams": fmean(new) if new else math.nan}


def look_at_rollouts(rows, args):
    """The same of the log so far: `rows` has for each rollout {metric: [its values]}. Nothing holds for a NaN."""

    def middle(name, rows):  # the median, so that one rollout alone says nothing
        values = [fmean(row[name]) for row in rows if name in row]
        return median(values) if values else math.nan

    def now(name, n=3):
        return middle(name, rows[-n:]) if len(rows) >= n else math.nan

    count, first = len(rows), {name: fmean(values) for name, values in rows[0].items()}
    moved, clipped = now("policy/approxkl_avg", 1), now("policy/clipfrac_avg", 1)
    # Healthy: at most 0.27 clipped and 0.064 moved, in the first rollout.
    yield "clipped", clipped > 0.5, clipped
    yield "jump", moved > 0.5, moved
    kl, length, beta = now("objective/kl"), now("completions/mean_length"), now("objective/kl_coef")
    target, n = args.kl_target, args.generation_batch_size
    # Healthy: at most 1.33 × kl_target. Without one: 0.34 nats a token; twice that, and no small sum.
    yield "KL target", target is not None and kl > 3 * (target or 0), kl, target, beta
    yield "KL", target is None and kl > max(20, 0.8 * length), kl, beta
    # The mean of n estimates k1 of a KL of K has a standard error of about √(2K/n): K less five of these is ≥ −12.5/n.
    yield "negative KL", kl < -0.2 - 12.5 / n, kl
    yield "kl_coef", target and (beta < args.kl_coef / 10 or beta > args.kl_coef * 10), args.kl_coef, beta
    before, entropy = first.get("policy/entropy_avg", math.nan), now("policy/entropy_avg")
    yield "entropy", entropy < 0.2 * before, before, entropy  # healthy: 0.6 and more of the first rollout's
    critic = now("val/explained_variance")  # healthy: −2.1 at first, above −0.3 from the third rollout on
    yield "critic", count >= 8 and critic < -0.5, critic, count
    cut, cut_first = now("objective/missing_eos"), first.get("objective/missing_eos", math.nan)
    # Healthy: 0.70 and at most 0.94; or 1.00 from the start on. And no handful of a small rollout.
    yield "limit", cut > 0.98 and cut - cut_first > max(0.1, 5 / n), cut, cut_first
    length_first = first.get("completions/mean_length", math.nan)
    yield "short", length <= 2 < length_first / 4, length_first, length
    new, different = now("texts/new_trigrams"), now("texts/different")
    yield "repetition", new < 0.5, new
    yield "same", length > 2 and different <= max(0.1, 1 / min(n, 64)), different  # one or two tokens differ little
    norms = [min(row["grad_norm"]) for row in rows[-5:] if "grad_norm" in row]
    small = args.max_grad_norm > 0 and len(norms) == 5 and min(norms) > 10 * args.max_grad_norm
    yield "gradient", small, min(norms, default=0), args.max_grad_norm  # healthy: 0.2 to 0.7, and max_grad_norm 1
    held = args.learning_rate > 0 and not args.sync_ref_model and count - args.value_warmup_rollouts >= 20
    yield "still", held and abs(kl) < 0.01, kl, count  # healthy: 0.4 nats after the first rollout
    score, score_first = middle("objective/scores", rows[-10:]), middle("objective/scores", rows[:3])
    yield "no gain", count >= 20 and kl > 1 and score <= score_first, score, count, score_first, kl
