"""Log-probabilities in tiles against whole logits, and the tokens that they are of."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from trl_ppo.cpu import lm_head, use_tiles
from trl_ppo.cpu.lm_head import TiledLogprobs, is_plain_product, pack, tiled_logprobs
from trl_ppo.critic import ValueHead
from trl_ppo.logprobs import CompletionTokens, add_logprobs_forward


def random_head(n=37, hidden=16, vocab=5000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(n, hidden, generator=generator)
    weight = torch.randn(vocab, hidden, generator=generator)
    targets = torch.randint(vocab, (n,), generator=generator)
    targets[:3] = torch.tensor([0, vocab - 1, lm_head.TILE])  # both ends, and the first of a tile
    return states, weight, targets


def whole_logits(states, weight, targets, temperature):
    log_probs = (states @ weight.T / temperature).log_softmax(1)
    return log_probs.gather(1, targets[:, None]).squeeze(1), -(log_probs.exp() * log_probs).sum(1)


@pytest.mark.parametrize("kept", [0, 37 * lm_head.TILE, 10**9])  # tiles: none, one, all
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab", [300, lm_head.TILE, 5000])  # less than a tile, one, and a last one that is not full
def test_tiles_equal_whole_logits(vocab, temperature, kept):
    states, weight, targets = random_head(vocab=5000)
    weight, targets = weight[:vocab], targets % vocab
    expected = [x.double().requires_grad_() for x in (states, weight)]
    log_probs, entropy = whole_logits(*expected, targets, temperature)
    coefficients = torch.linspace(-1, 2, len(states))
    (log_probs * coefficients).sum().backward()

    given = [x.clone().requires_grad_() for x in (states, weight)]
    ours, our_entropy = TiledLogprobs.apply(*given, targets, temperature, kept)
    (ours * coefficients).sum().backward()
    torch.testing.assert_close(ours.double(), log_probs, rtol=0, atol=3e-5)
    torch.testing.assert_close(our_entropy.double(), entropy, rtol=0, atol=3e-5)
    for x, y in zip(given, expected, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=3e-5)


def test_large_logits_do_not_overflow():
    states, weight, targets = random_head()
    log_probs, entropy = tiled_logprobs(states * 100, weight, targets, 1.0)
    expected, expected_entropy = whole_logits((states * 100).double(), weight.double(), targets, 1.0)
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=1e-2)


def test_a_frozen_head_gets_no_gradient():
    states, weight, targets = random_head()
    tiled_logprobs(states.requires_grad_(), weight, targets, 1.0)[0].sum().backward()
    assert states.grad.abs().sum() > 0
    assert weight.grad is None


@pytest.mark.parametrize("kept", [0, lm_head.MAX_SAVED])
def test_autocast_takes_products_in_bfloat16_and_sums_in_float32(kept):
    states, weight, targets = random_head()
    given = [x.clone().requires_grad_() for x in (states, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        log_probs, _ = TiledLogprobs.apply(*given, targets, 1.0, kept)
    log_probs.sum().backward()
    expected = [x.clone().requires_grad_() for x in (states, weight)]
    exact, _ = whole_logits(*expected, targets, 1.0)
    exact.sum().backward()
    assert log_probs.dtype == torch.float32
    error = (log_probs - exact).abs().max()
    assert 1e-4 < error < 0.1  # bfloat16 has been at work, and not more
    for x, y in zip(given, expected, strict=True):
        assert x.grad.dtype == torch.float32
        assert nn.functional.cosine_similarity(x.grad.flatten(), y.grad.flatten(), dim=0) > 0.9999


@pytest.mark.parametrize("kept", [0, lm_head.MAX_SAVED])
def test_a_token_that_comes_often_is_summed_in_float32(kept):
    """300 steps of 1/256 on its row of a bfloat16 head: in bfloat16 the sum would stop growing at 1."""
    states, weight, targets = torch.full((300, 1), 1 / 256), torch.zeros(5000, 1), torch.full((300,), 7)
    weight = weight.bfloat16().requires_grad_()
    TiledLogprobs.apply(states.bfloat16(), weight, targets, 1.0, kept)[0].sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad[7].item() == pytest.approx(300 / 256, rel=0.01)


@pytest.mark.parametrize("kept", [0, 2])
def test_what_is_held_of_tokens_by_vocabulary_is_bounded(monkeypatch, kept):
    """The largest product that either pass writes is N × TILE; the backward pass skips those that were saved."""
    widths = []
    mm = torch.mm

    def watched(a, b, **kwargs):
        result = mm(a, b, **kwargs)
        widths.append(result.size(1))
        return result

    monkeypatch.setattr(torch, "mm", watched)
    monkeypatch.setattr(lm_head, "MAX_SAVED", kept * 37 * lm_head.TILE)
    states, weight, targets = random_head(vocab=3 * lm_head.TILE + 5)
    log_probs, _ = tiled_logprobs(states.requires_grad_(), weight.requires_grad_(), targets, 1.0)
    assert (
        sum(tensor.numel() for tensor in log_probs.grad_fn.saved_tensors)
        < lm_head.MAX_SAVED + 10 * states.numel() + weight.numel()
    )
    log_probs.sum().backward()
    assert len(widths) == 4 + 2 * 4 - kept
    assert max(widths) == lm_head.TILE


def test_without_gradients_nothing_is_kept(monkeypatch):
    kept = []
    monkeypatch.setattr(TiledLogprobs, "apply", lambda *args: kept.append(args[-1]))
    with torch.no_grad():
        tiled_logprobs(*random_head(), 1.0)
    tiled_logprobs(*random_head(), 1.0)
    assert kept == [0, lm_head.MAX_SAVED]


def small_gpt2(**config):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=64, **config)).eval()


@pytest.mark.parametrize("change", ["bias", "final_logit_softcapping", "logit_scale"])
def test_what_is_more_than_a_product_is_left_to_trl(change):
    model = small_gpt2()
    assert is_plain_product(model.config, model.lm_head)
    if change == "bias":
        model.lm_head.bias = nn.Parameter(torch.zeros(60))
    else:
        setattr(model.config, change, 2.0)
    assert not is_plain_product(model.config, model.lm_head)


def ragged_batch(rows=12, prompt=9, completion=14, seed=0):
    """Every row with padding of its own on both sides."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 60, (rows, prompt + completion), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : int(torch.randint(prompt, (1,), generator=generator))] = 0
        mask[row, prompt + int(torch.randint(1, completion + 1, (1,), generator=generator)) :] = 0
    return ids * mask, mask


@pytest.mark.parametrize("max_padding", [0, 20, 10**6])
def test_passes_by_length_change_nothing(monkeypatch, max_padding):
    """Against each row alone, without padding; gradients too."""
    monkeypatch.setattr(lm_head, "MAX_PADDING", max_padding)
    ids, mask = ragged_batch()
    model = use_tiles(add_logprobs_forward(small_gpt2()), temperature=1.0)
    scored = model(input_ids=ids, attention_mask=mask, num_completion_tokens=14)
    (scored.logprobs**2).sum().backward()

    alone, total = small_gpt2(), 0.0
    for row, row_mask, ours in zip(ids, mask, scored.logprobs, strict=True):
        real = row[row_mask.bool()][None]
        n = int(row_mask[9:].sum())
        log_probs = alone(real).logits[0, :-1].log_softmax(1).gather(1, real[0, 1:, None])[-n:, 0]
        torch.testing.assert_close(ours[:n], log_probs, rtol=0, atol=1e-5)
        assert (ours[n:] == 0).all()
        total = total + (log_probs**2).sum()
    total.backward()
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_trls_fused_head_and_the_tiles_say_the_same():
    """The fused head is what a GPU runs, and a CPU without `cpu/`; values of the critic included."""
    ids, mask = ragged_batch()
    model = add_logprobs_forward(small_gpt2(), temperature=0.7)
    model.critic = ValueHead(16)
    results, gradients = [], []
    for tiled in (False, True):
        if tiled:
            use_tiles(model, temperature=0.7)
        model.zero_grad()
        scored = model(input_ids=ids, attention_mask=mask, num_completion_tokens=14)
        ((scored.logprobs**2).sum() + (scored.state_values**2).sum()).backward()
        results.append(scored)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for name in ("logprobs", "entropy", "state_values"):
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=1e-5, msg=name)
        assert (results[0][name][mask[:, 9:] == 0] == 0).all()
    for fused, tiled in zip(*gradients, strict=True):
        torch.testing.assert_close(tiled, fused, rtol=1e-4, atol=1e-4)


def test_passes_hold_every_row_once_and_little_padding():
    lengths = torch.randint(4, 128, (40,), generator=torch.Generator().manual_seed(0)).sort().values.tolist()
    passes = pack(lengths, 256)
    assert [row for rows, _ in passes for row in range(40)[rows]] == list(range(40))
    assert 1 < len(passes) < 10
    for rows, longest in passes:
        assert longest == max(lengths[rows])
        assert sum(longest - length for length in lengths[rows]) <= 256


def test_tokens_know_where_they_are_predicted():
    ids = torch.tensor([[0, 7, 8, 9, 0], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    tokens = CompletionTokens(ids, mask, 2)
    assert tokens.ids.tolist() == [[7, 8, 9, 0, 0], [1, 2, 3, 4, 5]]
    assert tokens.targets.tolist() == [9, 4, 5]
    assert list(zip(tokens.row.tolist(), tokens.position.tolist(), strict=True)) == [(0, 1), (1, 2), (1, 3)]
    assert tokens.spread(torch.tensor([1.0, 2.0, 3.0])).tolist() == [[1.0, 0.0], [2.0, 3.0]]
