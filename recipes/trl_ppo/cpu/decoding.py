"""Sampling on a CPU: `model.generate(..., custom_generate=sample)`.

The distribution is that of transformers' own loop, with its logits processors and stopping criteria. What is saved is
cost per token: a row leaves the batch when it has ended, the cache is written to and not copied, and a draw takes one
random number for a row, where `torch.multinomial` takes one for every word of the vocabulary.

Shapes: B prompts, P prompt tokens (left-padded), C sampled tokens, H the hidden size, V the vocabulary.
"""

from contextlib import nullcontext

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

COMPACT_AT = 1 / 8  # the share of rows that have ended at which the cache of the others is moved together


@torch.no_grad()
def sample(model, input_ids, logits_processor, stopping_criteria, generation_config, kept=None, **model_kwargs):
    """Prompts (B, P) → prompts and completions (B, P+C), padded on the right with `pad_token_id`.

    Takes what `generate` gives a decoding method. Logits processors and stopping criteria see the rows that go on,
    so they may not count on a row's place in the batch.

    The dict `kept`, if there is one, gets these `sequences` and the `states` (B, C, H) from which their words were
    drawn, which mean nothing after a row's end.
    """
    width, capacity = input_ids.size(1), stopping_criteria.max_length
    sequences, states = [None] * len(input_ids), None
    rows = torch.arange(len(input_ids))  # which of the prompts each row of `input_ids` goes on with
    ended = torch.zeros(len(rows), dtype=torch.bool)
    model_kwargs["past_key_values"] = preallocate(model_kwargs.get("past_key_values"), capacity)

    def keep(trunk, args, output):
        nonlocal states
        last = output.last_hidden_state[:, -1]
        states = last.new_zeros(len(sequences), capacity - width, last.size(1)) if states is None else states
        states[rows, input_ids.size(1) - width] = last

    with nullcontext() if kept is None else model.base_model.register_forward_hook(keep):
        while True:
            first = input_ids.size(1) == width
            model_inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=None if first else 1, is_first_iteration=first, **model_kwargs
            )
            outputs = model(**model_inputs, return_dict=True)
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            logits = logits_processor(input_ids, outputs.logits[:, -1].to(torch.float32, copy=True))
            words = draw(logits) if generation_config.do_sample else logits.argmax(1)
            input_ids = torch.cat([input_ids, words[:, None]], dim=1)
            just_ended = stopping_criteria(input_ids, None) & ~ended
            for row in just_ended.nonzero().squeeze(1).tolist():
                sequences[rows[row]] = input_ids[row]
            ended |= just_ended
            if ended.all():
                break
            if ended.float().mean() >= COMPACT_AT:
                going_on = (~ended).nonzero().squeeze(1)
                input_ids, rows, ended = input_ids[going_on], rows[going_on], ended[going_on]
                model_kwargs = {name: select(value, going_on) for name, value in model_kwargs.items()}
    sequences = torch.nn.utils.rnn.pad_sequence(sequences, True, float(generation_config._pad_token_tensor))
    if kept is not None:
        kept.update(sequences=sequences, states=states[:, : sequences.size(1) - width])
    return sequences


def draw(logits):
    """One word for each row, in proportion to exp(logits); (B, V) → (B,). Overwrites `logits`."""
    weights = logits.sub_(logits.amax(1, keepdim=True)).exp_()
    cumulative = torch.cumsum(weights, 1, out=weights)
    total = cumulative[:, -1:]
    if not total.isfinite().all():
        raise FloatingPointError("the policy's logits are not finite: it has diverged; lower learning_rate")
    threshold = torch.rand(len(logits), 1, device=logits.device) * total
    # The first word that is past the threshold: never one of weight 0, so rounding must not reach the total.
    threshold = threshold.minimum(torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)


def select(value, rows):
    """Those rows of what is kept between two tokens: of a cache, of a tensor with a row a prompt; the rest as it is."""
    if hasattr(value, "batch_select_indices"):
        value.batch_select_indices(rows)
    return value[rows] if isinstance(value, torch.Tensor) and value.ndim else value


def preallocate(cache, capacity):
    """The empty cache that `generate` has made, with memory for all tokens in the layers that keep all of them."""
    if type(cache) is DynamicCache:
        cache.layers = [PreallocatedLayer(capacity) if type(each) is DynamicLayer else each for each in cache.layers]
    return cache


class PreallocatedLayer(DynamicLayer):
    """Keys and values in memory for `capacity` tokens; a `DynamicLayer` copies all that it has for every token."""

    def __init__(self, capacity):
        super().__init__()
        self.capacity = capacity

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        rows, heads, _, size = key_states.shape
        self.memory = [states.new_empty(rows, heads, self.capacity, size) for states in (key_states, value_states)]

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.size(-2)
        for memory, states in zip(self.memory, (key_states, value_states), strict=True):
            memory[:, :, start:end] = states
        self.keys, self.values = (memory[:, :, :end] for memory in self.memory)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        length = self.get_seq_length()
        self.memory = [memory[indices] for memory in self.memory]
        self.keys, self.values = (memory[:, :, :length] for memory in self.memory)
