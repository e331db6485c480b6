"""Log-probabilities and values of completions, from one forward pass; for the trainer and the evaluation alike.

Shapes: B completions, P prompt tokens (left-padded), C completion tokens (right-padded); N of those B × C tokens are no
padding, H is the hidden size.
"""

import functools
import math
import types
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.activations import NewGELUActivation
from transformers.utils import ModelOutput
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model, pad

from lm_head import is_plain, tiled_log_probs

PADDING_PER_PASS = 256  # tokens; on a CPU, where a pass of its own costs about as much


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

    def forward(self, states, rows=None):
        """The policy's states (N, H) → values (N,)."""
        with torch.autocast(states.device.type, enabled=False):
            return super().forward(states.float()).squeeze(-1)


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
        fuse_gelu(self.trunk)

    def forward(self, states, rows):
        """`CompletionRows` → values (N,), from states of its own."""
        return self.head(rows.states(self.trunk)).squeeze(-1).float()


def fuse_gelu(model):
    """One kernel for GPT-2's GELU, which transformers writes out in eight and keeps six tensors of for the gradient."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def add_scoring_forward(model, temperature=1.0):
    """Teach a causal LM to score completions: `model(input_ids, attention_mask, num_completion_tokens=C)`.

    That call returns `ScoredTokens`; any other call is unchanged, so that `generate` is too. Only the N hidden states
    that predict completion tokens reach the LM head, which is applied in tiles: of N × vocabulary logits 256 MiB are
    held at most. Values come from `model.critic`, if there is one, on the same hidden states. No prompt may be empty.

    `states` (B, C, H), if given, are taken for the hidden states that predict the completion's tokens, which spares the
    trunk's pass; on a CPU and for plain logits alone.
    """
    fuse_gelu(model)
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
    fused_forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, num_completion_tokens=None, **kwargs):
        if num_completion_tokens is None:
            return fused_forward(*args, **kwargs)
        return _score_completions(self, fused_forward, temperature, num_completion_tokens, *args, **kwargs)

    model.forward = types.MethodType(forward, model)
    return model


def _score_completions(
    model, fused_forward, temperature, num_completion_tokens, input_ids, attention_mask, states=None, **_
):
    lm_head = model.get_output_embeddings()
    is_tiled = is_plain(model.config, lm_head)
    rows = CompletionRows(input_ids, attention_mask, num_completion_tokens, PADDING_PER_PASS if is_tiled else None)
    if is_tiled:
        states = rows.states(model.base_model) if states is None else states[rows.mask]
        log_probs, entropy = tiled_log_probs(states, lm_head.weight, rows.targets, temperature)
    else:
        log_probs, entropy, states = _score_fused(model, fused_forward, rows)
    critic = getattr(model, "critic", None)
    values = None if critic is None else rows.spread(critic(states, rows))
    return ScoredTokens(log_probs=rows.spread(log_probs), entropy=rows.spread(entropy), state_values=values)


def _score_fused(model, fused_forward, rows):
    """Log-probs, entropy (N,) and states (N, H) by TRL's fused head: on a GPU, and for scaled or capped logits."""
    states = None

    def keep_predicting(module, args, output):
        nonlocal states
        states = rows.select(output.last_hidden_state)
        output["last_hidden_state"] = states[None]
        return output

    with model.base_model.register_forward_hook(keep_predicting):
        scored = fused_forward(input_ids=rows.ids, shift_labels=rows.targets[None], fused_lm_head=True)
    return scored.log_probs[0], scored.entropy[0], states


class CompletionRows:
    """A left-padded batch with its padding on the right, and the N states in it that predict a completion's token.

    What a token attends to lies before it, so padding on the right needs no mask: attention is plainly causal, which
    has kernels that skip half of the work, and a row's position ids count from 0 as if it stood alone.
    """

    def __init__(self, input_ids, attention_mask, num_completion_tokens, max_padding=None):
        width = input_ids.size(1)
        left_padding = attention_mask.argmax(1, keepdim=True)
        self.ids = input_ids.gather(1, (torch.arange(width, device=input_ids.device) + left_padding) % width)
        self.mask = attention_mask[:, -num_completion_tokens:].bool()
        self.targets = input_ids[:, -num_completion_tokens:][self.mask]
        self.row, token = self.mask.nonzero(as_tuple=True)
        prompt_lengths = attention_mask[:, :-num_completion_tokens].sum(1)
        self.position = prompt_lengths[self.row] + token - 1
        self.lengths = attention_mask.sum(1).tolist()
        self.passes = [slice(0, len(input_ids))] if max_padding is None else _passes(self.lengths, max_padding)

    def states(self, trunk):
        """The last hidden states (N, H) of `trunk`, which is run on a few rows of like length at a time."""
        # Once for all passes: the gradient of each lookup is as large as the vocabulary.
        embeddings = trunk.get_input_embeddings()(self.ids)
        return torch.cat([self._pass(trunk, embeddings, rows) for rows in self.passes])

    def _pass(self, trunk, embeddings, rows):
        longest = max(self.lengths[rows])
        states = trunk(inputs_embeds=embeddings[rows, :longest], use_cache=False).last_hidden_state
        here = (self.row >= rows.start) & (self.row < rows.stop)
        return states[self.row[here] - rows.start, self.position[here]]

    def select(self, states):
        """(B, width, H) → (N, H)."""
        return states[self.row, self.position]

    def spread(self, per_token):
        """(N,) → (B, C), 0 where there is no token."""
        return per_token.new_zeros(self.mask.shape).masked_scatter(self.mask, per_token)


def _passes(lengths, max_padding):
    """Consecutive rows, as slices, with at most `max_padding` tokens of padding in each."""
    slices, start = [], 0
    for stop in range(1, len(lengths) + 1):
        with_next = lengths[start : stop + 1]
        if stop == len(lengths) or max(with_next) * len(with_next) - sum(with_next) > max_padding:
            slices.append(slice(start, stop))
            start = stop
    return slices


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
