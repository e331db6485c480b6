"""Log-probabilities of given tokens on a CPU, tile by tile of the vocabulary: of N × V logits 256 MiB are held at most.

TRL's `fused_lm_head` does this in Triton on a GPU; elsewhere it falls back to a dozen passes over every tile, each into
memory of its own. Here a tile is written where the last one was, and passed over once in the backward pass.

Shapes: N tokens, H the hidden size, V the vocabulary.
"""

import torch
from torch import nn

TILE = 2048  # words of the vocabulary at a time: N × TILE stays in the cache of a CPU for a micro-batch's N
KEPT = 2**26  # logits of which the backward pass finds exp as it was, 256 MiB; those of other tiles it computes again
LOGIT_SCALES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def tiled_log_probs(hidden, weight, targets, temperature):
    """`TiledLogProbs`, which keeps what fits into `KEPT` if there will be a backward pass."""
    return TiledLogProbs.apply(hidden, weight, targets, temperature, KEPT if torch.is_grad_enabled() else 0)


class TiledLogProbs(torch.autograd.Function):
    """`hidden` (N, H), `weight` (V, H), `targets` (N,) → `(log_probs, entropy)` (N,) of softmax(hidden·weightᵀ/T).

    Products are taken in autocast's type or that of `hidden`, statistics and sums in float32. Only `log_probs` has a
    gradient: with g_i that of token i's log-probability and p_i its distribution,

        ∂/∂hidden_i = g_i/T · (weight[y_i] − p_i·weight),     ∂/∂weight = Σ_i g_i/T · (1[y_i] − p_i)ᵀ·hidden_i.

    The weights g_i/T are put on `hidden` and on the sum, both of size N·H, and not on p, so that exp is all that a tile
    of the backward pass needs; as many tiles as `kept` logits fill are spared even that. One backward pass only.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, kept):
        dtype = _product_dtype(hidden)
        scaled = (hidden.float() / temperature).to(dtype)
        tops, sums, dots = torch.empty(3, -(-len(weight) // TILE), len(hidden))
        num_kept = min(kept // max(len(hidden) * TILE, 1), len(tops))
        exps = torch.empty(num_kept + 1, len(hidden) * TILE)  # the last for those that are not kept
        for k, (_, words, logits) in enumerate(_tiles(scaled, weight)):
            logits = torch.mm(scaled, words.t(), out=logits).float()
            logits.sub_(torch.amax(logits, 1, out=tops[k])[:, None])
            exp = torch.exp(logits, out=_as_tile(exps[min(k, num_kept)], *logits.shape))
            torch.sum(exp, 1, out=sums[k])
            torch.sum(logits.mul_(exp), 1, out=dots[k])
        log_partial = tops + sums.log()  # of each tile's share in the partition function
        log_partition = log_partial.logsumexp(0)
        # The mean of −log p, from differences: logits may be large, and their entropy small.
        entropy = -((log_partial - log_partition).exp() * (tops - log_partition + dots / sums)).sum(0)
        target_logit = (scaled.float() * weight[targets].to(dtype).float()).sum(1)
        ctx.save_for_backward(hidden, weight, targets, log_partition, tops[:num_kept], exps[:num_kept])
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
        for k, (rows, words, memory) in enumerate(_tiles(scaled, weight)):
            if k < len(exps):
                probs = _as_tile(exps[k], *memory.shape).mul_((tops[k] - log_partition).exp_()[:, None])
            else:
                logits = torch.mm(scaled, words.t(), out=memory).float()
                probs = logits.sub_(log_partition[:, None]).exp_()
            # In float32: bfloat16 would round each tile's part of the sum.
            mean_word.addmm_(probs, words.float())
            if grad_weight is not None:
                _write_product(grad_weight[rows], probs.to(ctx.dtype).t(), weighted)
        grad_hidden = (weight[targets] - mean_word) * (grad[:, None] / ctx.temperature)
        if grad_weight is not None:
            grad_weight = grad_weight.index_add_(0, targets, weighted.float(), alpha=-1).to(weight.dtype)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def _product_dtype(hidden):
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _write_product(out, a, b):
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _as_tile(memory, num_tokens, num_words):
    return memory[: num_tokens * num_words].view(num_tokens, num_words)


def _tiles(scaled, weight):
    """For each tile: its rows of `weight`, what they hold in the type of `scaled`, and (N, tile) to write to."""
    memory = scaled.new_empty(len(scaled) * TILE)
    for start in range(0, len(weight), TILE):
        rows = slice(start, min(start + TILE, len(weight)))
        words = weight[rows].to(scaled.dtype)
        yield rows, words, _as_tile(memory, len(scaled), len(words))


def is_plain(config, lm_head):
    """Whether logits are hidden·weightᵀ and no more, with all of the weight on a CPU."""
    scales = (getattr(config, name, None) for name in LOGIT_SCALES)
    return (
        type(lm_head) is nn.Linear
        and lm_head.bias is None
        and lm_head.weight.device.type == "cpu"
        and not hasattr(lm_head.weight, "ds_id")  # partitioned by ZeRO-3
        and all(scale is None for scale in scales)
    )
