"""Log-probabilities and values of completions, from one forward pass; for training and evaluation alike.

Shapes: B completions, P prompt tokens (left-padded), C completion tokens (right-padded); N of those B × C tokens are
not padding, H is the hidden size.
"""

import functools
import math
import types
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput
from trl.trainer.utils import add_fused_lm_head, flush_left, pad


@dataclass
class TokenLogprobs(ModelOutput):
    """What a forward pass says of the completion's tokens, all (B, C) and 0 where they are padding."""

    logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    state_values: torch.Tensor | None = None  # not `values`, which would hide the method of that name from DDP


def add_logprobs_forward(model, temperature=1.0, cast_lm_head_to_fp32=False):
    """Teach a causal LM `model(input_ids, attention_mask, num_completion_tokens=C)`, which returns `TokenLogprobs`.

    Any other call is unchanged, so that `generate` is too. Only the N hidden states that predict completion tokens
    reach the LM head, which never holds the logits of all of them (TRL's fused head). Values come from `model.critic`,
    if there is one, on the same hidden states. No prompt may be empty.
    """
    keep_4bit_differentiable(model)
    add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, outputs=("log_probs", "entropy"))
    fused_forward = model.forward
    model.completion_tokens = CompletionTokens  # cpu/ puts a faster one here

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, num_completion_tokens=None, **kwargs):
        if num_completion_tokens is None:
            return fused_forward(*args, **kwargs)
        tokens = self.completion_tokens(num_completion_tokens=num_completion_tokens, **kwargs)
        logprobs, entropy, states = tokens.logprobs(self, fused_forward)
        critic = getattr(self, "critic", None)
        values = None if critic is None else tokens.spread(critic(states, tokens))
        return TokenLogprobs(logprobs=tokens.spread(logprobs), entropy=tokens.spread(entropy), state_values=values)

    model.forward = types.MethodType(forward, model)
    return model


class CompletionTokens:
    """The N tokens of a left-padded batch's completions, and the hidden states that predict them.

    The batch is padded on the right for the pass: what a token attends to lies before it, so that attention needs no
    mask, and a row's position ids count from 0 as if it stood alone.
    """

    def __init__(self, input_ids, attention_mask, num_completion_tokens, **_):  # PEFT hands on a few arguments of None
        self.mask = attention_mask[:, -num_completion_tokens:].bool()
        self.targets = input_ids[:, -num_completion_tokens:][self.mask]
        self.attention_mask, self.ids = flush_left(attention_mask, input_ids)
        prompt_lengths = attention_mask[:, :-num_completion_tokens].sum(1)
        self.row, token = self.mask.nonzero(as_tuple=True)
        self.position = prompt_lengths[self.row] + token - 1

    def logprobs(self, model, fused_forward):
        """Log-probabilities and entropies (N,), and the hidden states (N, H) that they come from."""
        states = None

        def keep_predicting(module, args, output):
            nonlocal states
            states = output.last_hidden_state[self.row, self.position]
            output["last_hidden_state"] = states[None]
            return output

        with model.base_model.register_forward_hook(keep_predicting):
            fused = fused_forward(input_ids=self.ids, shift_labels=self.targets[None], fused_lm_head=True)
        return fused.log_probs[0], fused.entropy[0], states

    def states(self, trunk):
        """The hidden states (N, H) that another trunk gives."""
        return trunk(input_ids=self.ids, use_cache=False).last_hidden_state[self.row, self.position]

    def spread(self, per_token):
        """(N,) → (B, C), 0 where there is no token."""
        return per_token.new_zeros(self.mask.shape).masked_scatter(self.mask, per_token)


def pad_batch(prompt_ids, completion_ids, pad_token_id, sampler_logprobs=None):
    """Lists of token ids → `input_ids` and `attention_mask` (B, P+C), `completion_mask` (B, C).

    With the lists of log-probabilities that a sampler gave the completions (None where it gave none, which becomes
    NaN) also `sampler_logprobs` (B, C).
    """

    def stack(rows, value, side, dtype=torch.long):
        return pad([torch.as_tensor(row, dtype=dtype) for row in rows], padding_value=value, padding_side=side)

    def ones(rows):
        return [[1] * len(row) for row in rows]

    completion_mask = stack(ones(completion_ids), 0, "right")
    given = {}
    if sampler_logprobs is not None:
        rows = [[math.nan if logprob is None else logprob for logprob in row] for row in sampler_logprobs]
        given = {"sampler_logprobs": stack(rows, 0.0, "right", torch.float)}
    return given | {
        "input_ids": torch.cat(
            [stack(prompt_ids, pad_token_id, "left"), stack(completion_ids, pad_token_id, "right")], dim=1
        ),
        "attention_mask": torch.cat([stack(ones(prompt_ids), 0, "left"), completion_mask], dim=1),
        "completion_mask": completion_mask,
    }


def take_rows(batch, rows):
    """The given rows of a padded batch, without the columns that are padding in all of them."""
    batch = {name: tensor[rows] for name, tensor in batch.items()}
    width = batch["completion_mask"].size(1)
    longest = int(batch["completion_mask"].sum(1).max())
    left = int(batch["attention_mask"].argmax(1).min())
    end = batch["input_ids"].size(1) - (width - longest)
    return {
        name: tensor[:, left:end] if name in ("input_ids", "attention_mask") else tensor[:, :longest]
        for name, tensor in batch.items()
    }


def split_rollout(rollout, num_mini_batches, micro_batch_size, reduce):
    """Random mini-batches; in each, micro-batches of like length, trimmed, that know its number of tokens.

    `reduce` sums a tensor over ranks.
    """
    lengths, tokens = rollout["attention_mask"].sum(1), rollout["completion_mask"].sum(1)
    mini_batches = torch.randperm(len(lengths)).to(lengths.device).chunk(num_mini_batches)
    counts = reduce(torch.stack([tokens[rows].sum() for rows in mini_batches]).float())
    return [
        {**take_rows(rollout, micro_rows), "num_tokens": count}
        for rows, count in zip(mini_batches, counts, strict=True)
        for micro_rows in rows[lengths[rows].argsort()].split(micro_batch_size)
    ]


def keep_4bit_differentiable(model):
    """Keep bitsandbytes from repacking 4-bit weights in evaluation on a CPU: no gradient passes what it repacks."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
