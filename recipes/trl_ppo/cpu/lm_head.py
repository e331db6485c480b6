"""Log-probabilities of given tokens on a CPU, tile by tile of the vocabulary: of N × V logits 256 MiB are held at most.

TRL's fused head does this in Triton on a GPU; elsewhere it falls back to a dozen passes over every tile, each into
memory of its own. Here tiles share one buffer, and the backward pass goes over each once.

Shapes: N tokens, H the hidden size, V the vocabulary.
"""

import torch
from torch import nn

from ..logprobs import CompletionTokens

TILE = 2048  # words of the vocabulary at a time: N × TILE stays in the cache of a CPU for a micro-batch's N
MAX_SAVED = 2**26  # exponentials (256 MiB) that the forward pass saves for the backward pass, which recomputes the rest
MAX_PADDING = 256  # tokens of padding in one pass of the trunk: a further pass costs about as much
LOGIT_SCALES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class PackedTokens(CompletionTokens):
    """`CompletionTokens` whose passes hold rows of like length, and whose LM head works in tiles.

    `states` (B, C, H), if given, are taken for the hidden states that predict the completion's tokens.
    """

    def __init__(self, *args, temperature, states=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature, self.known_states = temperature, states
        self.passes = pack(self.attention_mask.sum(1).tolist(), MAX_PADDING)

    def logprobs(self, model, fused_forward):
        lm_head = model.get_output_embeddings()
        if not is_plain_product(model.config, lm_head):
            return super().logprobs(model, fused_forward)
        states = self.states(model.base_model) if self.known_states is None else self.known_states[self.mask]
        return *tiled_logprobs(states, lm_head.weight, self.targets, self.temperature), states

    def states(self, trunk):
        # One lookup for all passes, since its gradient is as large as the vocabulary.
        embeddings = trunk.get_input_embeddings()(self.ids)
        return torch.cat([self._pass(trunk, embeddings, rows, longest) for rows, longest in self.passes])

    def _pass(self, trunk, embeddings, rows, longest):
        states = trunk(inputs_embeds=embeddings[rows, :longest], use_cache=False).last_hidden_state
        here = (self.row >= rows.start) & (self.row < rows.stop)
        return states[self.row[here] - rows.start, self.position[here]]


def pack(lengths, max_padding):
    """Consecutive rows with at most `max_padding` tokens of padding together, as (slice, longest) pairs."""
    passes, start = [], 0
    for stop in range(1, len(lengths) + 1):
        with_next = lengths[start : stop + 1]
        if stop == len(lengths) or max(with_next) * len(with_next) - sum(with_next) > max_padding:
            passes.append((slice(start, stop), max(lengths[start:stop])))
            start = stop
    return passes


def is_plain_product(config, lm_head):
    """Whether logits are hidden·weightᵀ and no more, with all of the weight on this CPU."""
    scales = (getattr(config, name, None) for name in LOGIT_SCALES)
    return (
        type(lm_head) is nn.Linear
        and "forward" not in vars(lm_head)  # as TRL replaces it for cast_lm_head_to_fp32
        and lm_head.bias is None
        and lm_head.weight.device.type == "cpu"
        and not hasattr(lm_head.weight, "ds_id")  # partitioned by ZeRO-3
        and all(scale is None for scale in scales)
    )


def tiled_logprobs(hidden, weight, targets, temperature):
    """`TiledLogprobs`, which saves exponentials only if there will be a backward pass."""
    return TiledLogprobs.apply(hidden, weight, targets, temperature, MAX_SAVED if torch.is_grad_enabled() else 0)


class TiledLogprobs(torch.autograd.Function):
    """`hidden` (N, H), `weight` (V, H), `targets` (N,) → `(logprobs, entropy)` (N,) of softmax(hidden·weightᵀ/T).

    Products are taken in autocast's type or that of `hidden`, statistics and sums in float32. Only `logprobs` has a
    gradient: with g_i that of token i's log-probability and p_i its distribution,

        ∂/∂hidden_i = g_i/T · (weight[y_i] − p_i·weight),     ∂/∂weight = Σ_i g_i/T · (1[y_i] − p_i)ᵀ·hidden_i.

    The factors g_i/T are put on `hidden` and on the sum, both of size N·H, and not on p, so that exp is all that a tile
    of the backward pass needs; it is saved for as many tiles as `max_saved` allows. One backward pass only.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, max_saved):
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        scaled = (hidden.float() / temperature).to(dtype)
        tops, sums, dots = torch.empty(3, -(-len(weight) // TILE), len(hidden))
        num_saved = min(max_saved // max(len(hidden) * TILE, 1), len(tops))
        exps = torch.empty(num_saved + 1, len(hidden) * TILE)  # the last for those that are not saved
        for k, (_, words, logits) in enumerate(_tiles(scaled, weight)):
            logits = torch.mm(scaled, words.t(), out=logits).float()
            logits.sub_(torch.amax(logits, 1, out=tops[k])[:, None])
            exp = torch.exp(logits, out=_as_tile(exps[min(k, num_saved)], *logits.shape))
            torch.sum(exp, 1, out=sums[k])
            torch.sum(logits.mul_(exp), 1, out=dots[k])
        log_partial = tops + sums.log()  # of each tile's share in the partition function
        log_partition = log_partial.logsumexp(0)
        # The mean of −log p, from differences: logits may be large, and their entropy small.
        entropy = -((log_partial - log_partition).exp() * (tops - log_partition + dots / sums)).sum(0)
        target_logit = (scaled.float() * weight[targets].to(dtype).float()).sum(1)
        ctx.save_for_backward(hidden, weight, targets, log_partition, tops[:num_saved], exps[:num_saved])
        ctx.temperature, ctx.dtype = temperature, dtype
        ctx.mark_non_differentiable(entropy)
        return target_logit - log_partition, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, log_partition, tops, exps = ctx.saved_tensors
        scaled = (hidden.float() / ctx.temperature).to(ctx.dtype)
        weighted = scaled * -grad[:, None].to(ctx.dtype)
        mean_word = torch.zeros_like(hidden, dtype=torch.float32)  # p·weight
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for k, (tile, words, buffer) in enumerate(_tiles(scaled, weight)):
            if k < len(exps):
                probs = _as_tile(exps[k], *buffer.shape).mul_((tops[k] - log_partition).exp_()[:, None])
            else:
                logits = torch.mm(scaled, words.t(), out=buffer).float()
                probs = logits.sub_(log_partition[:, None]).exp_()
            # In float32: bfloat16 would round each tile's part of the sum.
            mean_word.addmm_(probs, words.float())
            if grad_weight is not None:
                _write_product(grad_weight[tile], probs.to(ctx.dtype).t(), weighted)
        grad_hidden = (weight[targets] - mean_word) * (grad[:, None] / ctx.temperature)
        if grad_weight is not None:
            grad_weight = grad_weight.index_add_(0, targets, weighted.float(), alpha=-1).to(weight.dtype)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def _tiles(scaled, weight):
    """For each tile: its slice of the vocabulary, its words in the type of `scaled`, and (N, tile) to write to."""
    buffer = scaled.new_empty(len(scaled) * TILE)
    for start in range(0, len(weight), TILE):
        tile = slice(start, min(start + TILE, len(weight)))
        words = weight[tile].to(scaled.dtype)
        yield tile, words, _as_tile(buffer, len(scaled), len(words))


def _as_tile(memory, num_tokens, num_words):
    return memory[: num_tokens * num_words].view(num_tokens, num_words)


def _write_product(out, a, b):
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
