"""`decoding.sample` against transformers' own loop and against exact probabilities."""

import pytest
import torch
from scipy.stats import chisquare
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trl_ppo.cpu import decoding

PAD, EOS = 0, 1


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    torch.manual_seed(0)
    tokens = {"vocab_size": 40, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
    if request.param == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**tokens, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**tokens, **size, num_attention_heads=2, num_key_value_heads=1)).eval()


def left_padded(rows=16, width=7):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 40, (rows, width), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % width] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


class EndByContent:
    """Ends a row, whatever its place in the batch, with as many tokens as its last prompt token says."""

    def __init__(self, width):
        self.width = width

    def __call__(self, input_ids, scores):
        ending = input_ids[:, self.width - 1] % 13 == input_ids.size(1) - self.width
        scores[:, EOS] = torch.where(ending, 1e4, -1e4)
        return scores


def generate(model, do_sample, **kwargs):
    prompts = left_padded()
    torch.manual_seed(1)
    processors = [EndByContent(prompts["input_ids"].size(1))]
    return model.generate(**prompts, do_sample=do_sample, max_new_tokens=12, logits_processor=processors, **kwargs)


def test_greedy_decoding_is_that_of_transformers(model):
    """Rows that end at different tokens, prompts of different lengths: token for token the same."""
    ours = generate(model, False, custom_generate=decoding.sample)
    assert ours.tolist() == generate(model, False).tolist()
    ends = (ours == EOS).int().argmax(1)
    assert len(set(ends.tolist())) > 4


def test_rows_that_have_ended_leave_the_batch(model, monkeypatch):
    sizes = []
    forward = model.forward

    def watched(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    watched.__wrapped__ = forward  # generate reads the signature
    monkeypatch.setattr(model, "forward", watched)
    generate(model, True, custom_generate=decoding.sample)
    assert sizes[0] == 16
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= 4


def test_the_states_kept_are_those_of_a_pass_over_the_whole_completion(model):
    kept = {}
    sequences = generate(model, True, custom_generate=decoding.sample, kept=kept)
    states = kept["states"]
    assert kept["sequences"] is sequences
    prompts = left_padded()
    width = prompts["input_ids"].size(1)
    ends = (sequences[:, width:] == EOS).int().argmax(1).tolist()
    assert len(set(ends)) > 4  # rows leave at different tokens
    for row, end in enumerate(ends):
        tokens = sequences[row, : width + end][prompts["attention_mask"][row].argmax() :]
        whole = model.base_model(tokens[None]).last_hidden_state[0, -end - 1 :]
        torch.testing.assert_close(states[row, : end + 1], whole, rtol=1e-4, atol=1e-5)
    assert not model.base_model._forward_hooks


def test_a_seed_decides_what_is_sampled(model):
    first, again = (generate(model, True, custom_generate=decoding.sample) for _ in range(2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != generate(model, False).tolist()


def test_draws_follow_the_distribution():
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0))
    logits[[3, 11]] = -torch.inf  # the last one too: nothing may fall off the end
    torch.manual_seed(0)
    counts = torch.bincount(decoding.draw(logits.repeat(40_000, 1)), minlength=12)
    assert counts[[3, 11]].tolist() == [0, 0]
    possible = logits.isfinite()
    expected = logits.softmax(0)[possible] * 40_000
    expected = (expected / expected.sum() * 40_000).double()
    assert chisquare(counts[possible].double(), expected * counts.sum() / expected.sum()).pvalue > 0.001


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_draw_possible_words(monkeypatch, uniform):
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: torch.full(shape, uniform))
    logits = torch.randn(2000, 301, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 1, 299, 300]] = -torch.inf
    words = decoding.draw(logits.clone())
    assert words.min() >= 2
    assert words.max() <= 298


def test_a_threshold_that_rounding_has_raised_to_the_total_draws_a_possible_word(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: torch.ones(shape))
    logits = torch.randn(500, 301, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 1, 299, 300]] = -torch.inf
    words = decoding.draw(logits)
    assert words.min() >= 2
    assert words.max() <= 298


@pytest.mark.parametrize("do_sample", [False, True])
def test_what_follows_a_rows_end_is_padding(model, do_sample):
    """One row of sixteen ends at once: too few for it to leave the batch, so it goes on being fed."""
    prompts = left_padded()

    def end_first_row(input_ids, scores):
        scores[:, EOS] = torch.where(torch.arange(len(scores)) == 0, 1e4, -1e4)
        return scores

    torch.manual_seed(1)
    sequences = model.generate(
        **prompts,
        do_sample=do_sample,
        max_new_tokens=12,
        logits_processor=[end_first_row],
        custom_generate=decoding.sample,
    )
    completions = sequences[:, prompts["input_ids"].size(1) :]
    assert completions.shape == (16, 12)
    assert completions[0].tolist() == [EOS] + [PAD] * 11
    assert (completions[1:] != EOS).all()


def test_sampling_follows_the_model(model):
    """The first token of 20,000 samples, temperature and top-k included, against exact probabilities."""
    prompt = torch.tensor([[5, 6, 7]])
    logits = model(prompt).logits[0, -1].double() / 0.5
    logits[logits < logits.topk(10).values[-1]] = -torch.inf
    torch.manual_seed(0)
    drawn = model.generate(
        prompt.repeat(20_000, 1),
        attention_mask=torch.ones(20_000, 3, dtype=torch.long),
        do_sample=True,
        temperature=0.5,
        top_k=10,
        max_new_tokens=1,
        custom_generate=decoding.sample,
    )
    counts = torch.bincount(drawn[:, 3], minlength=40)
    assert (counts[~logits.isfinite()] == 0).all()
    probs = logits.softmax(0)[logits.isfinite()]
    assert chisquare(counts[logits.isfinite()].double(), (probs / probs.sum() * 20_000).detach()).pvalue > 0.001
