"""Log-probabilities and values of completions, from one forward pass; for the trainer and the evaluation alike.

Shapes: B completions, P prompt tokens (left-padded), C completion tokens (right-padded).
"""

import functools
import inspect
import math
import types
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import ModelOutput
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model, pad


@dataclass
class ScoredTokens(ModelOutput):
    """What a scoring pass returns for the completion's tokens, all (B, C) and 0 where the attention mask is 0."""

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    state_values: torch.Tensor | None = None  # not `values`, which would hide the method of that name from DDP


class ValueHead(nn.Linear):
    """V(s_t) from the policy's own last hidden state; weights from N(0, 1/√(d+1)), bias 0 (Huang et al. 2024)."""

    def __init__(self, hidden_size, seed=0):
        super().__init__(hidden_size, 1)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            self.weight.copy_(torch.randn(1, hidden_size, generator=generator) / math.sqrt(hidden_size + 1))
            self.bias.zero_()

    def forward(self, hidden_states, **model_inputs):
        with torch.autocast(hidden_states.device.type, enabled=False):
            return super().forward(hidden_states.float()).squeeze(-1)


class ValueModel(nn.Module):
    """A critic of its own, initialised from a causal sequence classifier with one label, usually the reward model.

    Raises `ValueError` where the classifier is not causal (it would see the future), has several labels, or reads
    another vocabulary than the policy's.
    """

    def __init__(self, path, vocab_size, **init_kwargs):
        super().__init__()
        classifier = AutoModelForSequenceClassification.from_pretrained(path, **init_kwargs)
        head = getattr(classifier, "score", None)
        if head is None or head.out_features != 1:
            raise ValueError(f"value_model_path: '{path}' is not a causal sequence classifier with one label")
        if classifier.config.vocab_size != vocab_size:
            raise ValueError(
                f"value_model_path: '{path}' has a vocabulary of {classifier.config.vocab_size} tokens, the policy one "
                f"of {vocab_size}; the critic reads the policy's tokens, so train it with the policy's tokenizer"
            )
        self.trunk, self.head = classifier.base_model, head
        disable_dropout_in_model(self.trunk)

    def forward(self, hidden_states, **model_inputs):
        num_scored = hidden_states.size(1)
        own_states = self.trunk(**model_inputs, use_cache=False).last_hidden_state[:, -num_scored - 1 : -1]
        return self.head(own_states).squeeze(-1).float()


def add_scoring_forward(model, temperature=1.0):
    """Teach a causal LM to score completions: `model(input_ids, attention_mask, num_completion_tokens=C)`.

    That call returns `ScoredTokens`; any other call is unchanged, so that `generate` is too. Position ids come from
    the attention mask, so left padding changes no log-probability. Only the hidden states that predict completion
    tokens reach the LM head, which TRL applies in chunks: logits of the rollout × vocabulary are never held. Values
    come from `model.critic`, if there is one, on the same hidden states.
    """
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
    fused_forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, num_completion_tokens=None, **kwargs):
        if num_completion_tokens is None:
            return fused_forward(*args, **kwargs)
        return _score_completions(self, fused_forward, num_completion_tokens, *args, **kwargs)

    model.forward = types.MethodType(forward, model)
    return model


def _score_completions(model, fused_forward, num_completion_tokens, input_ids, attention_mask, **_):
    hidden_states = None

    def keep_completion(module, args, output):
        nonlocal hidden_states
        hidden_states = output.last_hidden_state[:, -num_completion_tokens - 1 : -1]
        output["last_hidden_state"] = hidden_states
        return output

    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "position_ids" in inspect.signature(model.base_model.forward).parameters:
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    completion = slice(-num_completion_tokens, None)
    labels = input_ids[:, completion].masked_fill(attention_mask[:, completion] == 0, -100)
    hook = model.base_model.register_forward_hook(keep_completion)
    try:
        scored = fused_forward(**inputs, shift_labels=labels, fused_lm_head=True)
    finally:
        hook.remove()
    critic = getattr(model, "critic", None)
    values = None if critic is None else critic(hidden_states, **inputs) * attention_mask[:, completion]
    return ScoredTokens(log_probs=scored.log_probs, entropy=scored.entropy, state_values=values)


def pad_batch(prompt_ids, completion_ids, pad_token_id):
    """Lists of token ids → `input_ids` and `attention_mask` (B, P+C), `completion_mask` (B, C)."""

    def stack(rows, value, side):
        return pad([torch.as_tensor(row, dtype=torch.long) for row in rows], padding_value=value, padding_side=side)

    def ones(rows):
        return [[1] * len(row) for row in rows]

    completion_mask = stack(ones(completion_ids), 0, "right")
    return {
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
