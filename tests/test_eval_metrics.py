"""eval/: figures held to a library's, to enumeration, or to what their definition implies."""

import itertools
import math

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy import special, stats
from transformers import AutoModelForCausalLM

from eval import best_of_n, generation, intervals, loading, metrics, pairs
from rewards import repeated_trigrams
from test_eval import settings
from trl_ppo.logprobs import add_logprobs_forward

REFERENCES = ["the cat sat on the mat", "a b c", "running dogs"]
TEXTS = ["the cat was on the mat", "x y z", "the dog runs"]


def sums_ratio(a, b, axis=-1):
    return a.sum(axis=axis) / b.sum(axis=axis)


def close_ends(ours: dict, theirs, tolerance: float = 0.1):
    """Whether both ends agree, in parts of the interval's width: two sets of resamples differ by chance."""
    width = theirs.high - theirs.low
    return (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high), abs=tolerance * width)


# --- Intervals against SciPy's bootstrap ------------------------------------------------------------------------


def test_a_ratio_of_sums_has_scipys_interval_of_that_statistic():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 30, 200).astype(float)
    nats = tokens * rng.normal(0.3, 0.2, 200)
    ours = intervals.ratio(nats, tokens)
    theirs = stats.bootstrap((nats, tokens), sums_ratio, paired=True, vectorized=True, rng=3, method="BCa")
    assert ours["mean"] == pytest.approx(nats.sum() / tokens.sum())
    assert close_ends(ours, theirs.confidence_interval)


def test_a_paired_difference_has_scipys_interval_of_that_statistic():
    rng = np.random.default_rng(1)
    base = rng.exponential(1, 150)
    tuned = base + rng.normal(0.2, 0.3, 150)
    theirs = stats.bootstrap((tuned - base,), np.mean, rng=3, n_resamples=9999).confidence_interval
    assert close_ends(intervals.paired_difference(base, tuned), theirs)


def test_perplexities_have_scipys_intervals_and_a_paired_difference():
    rng = np.random.default_rng(2)
    tokens = rng.integers(5, 20, (2, 120)).astype(float)
    logprobs = -tokens * rng.normal(2, 0.4, (2, 120))
    ours = intervals.compare_perplexities((logprobs[0], tokens[0]), (logprobs[1], tokens[1]), seed=0)

    def perplexity(logprobs, tokens, axis=-1):
        return np.exp(-sums_ratio(logprobs, tokens, axis))

    def difference(a, b, c, d, axis=-1):
        return perplexity(c, d, axis) - perplexity(a, b, axis)

    for index, role in enumerate(("base", "tuned")):
        sample = (logprobs[index], tokens[index])
        theirs = stats.bootstrap(sample, perplexity, paired=True, vectorized=True, rng=3, method="BCa")
        assert close_ends(ours[role], theirs.confidence_interval)
    all_four = (logprobs[0], tokens[0], logprobs[1], tokens[1])
    theirs = stats.bootstrap(all_four, difference, paired=True, vectorized=True, rng=3, method="percentile")
    assert close_ends(ours["difference"], theirs.confidence_interval)
    assert ours["difference"]["mean"] == pytest.approx(ours["tuned"]["mean"] - ours["base"]["mean"])


def test_the_mean_over_runs_has_students_t_interval_and_one_run_has_none():
    values = [1.2, 1.5, 0.9, 1.4]
    ours = intervals.over_runs(values)
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (ours["low"], ours["high"]) == pytest.approx(expected)
    assert ours["sd"] == pytest.approx(np.std(values, ddof=1))
    assert intervals.over_runs([1.2]) == {"mean": 1.2, "low": None, "high": None, "n": 1, "sd": None}


# --- Single figures ---------------------------------------------------------------------------------------------


def test_a_tie_is_half_a_win():
    assert intervals.win_rate([0, 0, 0, 0], [1, 0, -1, 2])["mean"] == (1 + 0.5 + 0 + 1) / 4
    same = np.random.default_rng(0).normal(size=50)
    assert intervals.win_rate(same, same) == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 50}


def test_rouge_on_known_pairs_is_what_its_definition_gives():
    found = metrics.rouge_scores(REFERENCES, TEXTS)
    assert found["rouge1"] == pytest.approx([5 / 6, 0, 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2) * 2])
    assert found["rouge2"] == pytest.approx([3 / 5, 0, 0])
    assert found["rougeL"][0] == pytest.approx(5 / 6)  # the cat … on the mat


def test_rouge_is_the_librarys_with_stemming():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    found = metrics.rouge_scores(REFERENCES, TEXTS)
    for index, (reference, text) in enumerate(zip(REFERENCES, TEXTS, strict=True)):
        for name, score in scorer.score(reference, text).items():
            assert found[name][index] == score.fmeasure


def test_repetition_is_the_share_of_a_texts_trigrams_that_came_before():
    assert repeated_trigrams("a b c a b c") == pytest.approx(1 / 4)
    assert repeated_trigrams("no no no no no") == pytest.approx(2 / 3)
    assert repeated_trigrams("all words differ here") == 0
    assert repeated_trigrams("too short") == 0


@pytest.mark.parametrize(("size", "share"), [(1, 3 / 6), (2, 3 / 5), (3, 3 / 4)])
def test_distinct_ngrams_count_each_kind_once_over_all_texts(size, share):
    estimate = intervals.distinct_ngrams(["a b c a b c", ""], ["", ""], size)["base"]
    assert estimate["mean"] == pytest.approx(share)


@pytest.mark.parametrize("path", ["gpt2_path", "llama_path"])
def test_perplexity_is_that_of_the_models_own_loss(path, request, tokenizer):
    path = request.getfixturevalue(path)
    prompt, completion = tokenizer("the movie was")["input_ids"], tokenizer("good and i loved it")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    labels = torch.tensor([[-100] * len(prompt) + completion])
    with torch.no_grad():
        loss = model(torch.tensor([prompt + completion]), labels=labels).loss.item()
    scorer = add_logprobs_forward(loading.load_model(path), 1.0)
    logprobs = generation.sequence_logprobs(scorer, [prompt] * 2, [completion] * 2, 0, settings(), "")
    found = intervals.compare_perplexities(*[(logprobs, np.array([len(completion)] * 2))] * 2, seed=0)
    assert found["base"]["mean"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_log_probabilities_need_the_memory_of_one_batch_and_do_not_depend_on_it(gpt2_path):
    rng = np.random.default_rng(0)
    prompts, completions = ([rng.integers(2, 200, n).tolist() for n in rng.integers(1, 25, 23)] for _ in range(2))
    scorer = add_logprobs_forward(loading.load_model(gpt2_path), 1.0)
    shapes = []
    scorer.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    together = generation.sequence_logprobs(scorer, prompts, completions, 0, settings(batch_size=5), "")
    assert [rows for rows, _ in shapes] == [5, 5, 5, 5, 3]
    tokens = sum(map(len, prompts)) + sum(map(len, completions))
    padded = sum(rows * width for rows, width in shapes)
    assert padded < 1.5 * tokens  # 1.61 in the order given
    alone = generation.sequence_logprobs(scorer, prompts, completions, 0, settings(batch_size=1), "")
    assert together == pytest.approx(alone, abs=1e-4)


# --- Best-of-n --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 7))
def test_the_expected_best_is_the_mean_over_every_choice_of_n_samples(n):
    rng = np.random.default_rng(n)
    picked, other = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    for row in range(3):
        chosen = [max(choice, key=lambda i: picked[row, i]) for choice in itertools.combinations(range(6), n)]
        assert best_of_n.expected_best(picked, picked, n)[row] == pytest.approx(np.mean(picked[row, chosen]))
        assert best_of_n.expected_best(picked, other, n)[row] == pytest.approx(np.mean(other[row, chosen]))


def test_the_kl_of_best_of_n_is_never_above_the_bound_and_reaches_it_as_ties_vanish():
    for n in (2, 4, 16, 64):
        gaps = []
        for kinds in (2, 30, 3000):  # equally likely completions with different rewards, lowest first
            below = (np.arange(kinds + 1) / kinds) ** n
            chances = np.diff(below)
            chances = chances[chances > 0]
            gaps.append(best_of_n.kl_bound(n) - (chances * np.log(chances * kinds)).sum())
        assert all(gap >= -1e-9 for gap in gaps)
        assert gaps == sorted(gaps, reverse=True)
        assert gaps[-1] < 0.03


def test_at_the_kl_of_a_whole_n_the_tuned_model_is_compared_with_that_n():
    picked = np.random.default_rng(0).normal(size=(40, 16))
    for n in (1, 2, 4, 8):
        found = best_of_n.compare_at_equal_kl(picked, picked[:, 0], best_of_n.kl_bound(n), [1, 16], 0)
        assert found["best_of_n"]["mean"] == pytest.approx(best_of_n.expected_best(picked, picked, n).mean())
        assert found["equal_kl"]


def test_a_tuned_model_loses_wins_or_cannot_be_told_from_best_of_n():
    rng = np.random.default_rng(1)
    picked = rng.normal(size=(60, 8))
    best = best_of_n.expected_best(picked, picked, 4)
    shifts = {"behind": -1, "level": 0, "ahead": 1}
    for verdict, shift in shifts.items():
        tuned = best + shift + rng.normal(0, 0.1, 60)
        found = best_of_n.compare_at_equal_kl(picked, tuned, best_of_n.kl_bound(4), [8], 0)
        assert found["verdict"] == verdict
    sentence = best_of_n.verdict_sentence(
        best_of_n.compare_at_equal_kl(picked, best - 1, best_of_n.kl_bound(4), [8], 0), "x"
    )
    assert "By x, best-of-n at the same KL (n ≈ 4) is ahead of the tuned model: " in sentence


def test_beyond_the_largest_n_there_is_no_equal_kl_and_the_sentence_says_so():
    picked = np.random.default_rng(2).normal(size=(60, 8))
    found = best_of_n.compare_at_equal_kl(picked, picked.max(1) - 1, 20.0, [8], 0)
    assert not found["equal_kl"]
    assert found["best_of_n"]["mean"] == pytest.approx(picked.max(1).mean())
    assert "best-of-8 is ahead of the tuned model" in best_of_n.verdict_sentence(found, "x")
    assert "Best-of-8 stays within 1.20 nats of the base; the tuned model is 20.00" in best_of_n.distance_sentence(
        found
    )


def test_a_judge_compares_what_the_reward_picked():
    rng = np.random.default_rng(3)
    picked, values = rng.normal(size=(2, 60, 8))
    found = best_of_n.compare_at_equal_kl(picked, values.mean(1) + 1, 20.0, [8], 0, values)
    chosen = values[np.arange(60), picked.argmax(1)]
    assert found["best_of_n"]["mean"] == pytest.approx(chosen.mean())
    assert found["verdict"] == "ahead"


# --- Judged pairs -----------------------------------------------------------------------------------------------


def drawn_margins(n: int = 4000, scale: float = 1.0) -> np.ndarray:
    """Margins of a calibrated reward, times `scale`: a pair is judged as the sigmoid of its margin says."""
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 1.5, n)
    agreed = rng.random(n) < special.expit(margins)
    return scale * np.where(agreed, margins, -margins)


def test_a_reward_whose_margins_are_log_odds_is_calibrated_and_one_that_doubles_them_overconfident():
    honest, doubled, halved = (pairs.calibrate(drawn_margins(scale=scale)) for scale in (1, 2, 0.5))
    assert honest["overconfidence"]["low"] < 0 < honest["overconfidence"]["high"]
    assert doubled["overconfidence"]["low"] > 0.05
    assert halved["overconfidence"]["high"] < -0.05
    assert honest["accuracy"] == doubled["accuracy"] == halved["accuracy"]
    for name in ("log_loss", "brier"):
        assert honest[name]["mean"] < min(doubled[name]["mean"], halved[name]["mean"])
    for each in honest["bins"]:
        assert each["from"] <= each["confidence"] <= each["to"]
        assert each["accuracy"]["mean"] == pytest.approx(each["confidence"], abs=0.05)
    assert sum(each["n"] for each in honest["bins"]) == 4000


def test_pair_figures_follow_their_definitions_and_huge_margins_do_not_overflow():
    margins = np.array([2.0, -1.0, 0.0, 0.5])
    found = pairs.calibrate(margins)
    chance = special.expit(margins)
    assert found["accuracy"]["mean"] == (1 + 0 + 0.5 + 1) / 4
    assert found["log_loss"]["mean"] == pytest.approx(-np.log(chance).mean())
    assert found["brier"]["mean"] == pytest.approx(((1 - chance) ** 2).mean())
    extreme = pairs.calibrate(np.array([1e4, -1e4, 1e4]))
    assert np.isfinite(extreme["log_loss"]["mean"])
