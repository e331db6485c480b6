"""Estimates with 95 % intervals. Each is a dict `{"mean", "low", "high", "n"}` of plain numbers, ready for JSON.

`mean` holds the value of the statistic, which may also be a median or a share. `n` is the number of samples. A value
that cannot be computed is None, never NaN.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats
from scipy.special import expit

CONFIDENCE = 0.95
N_RESAMPLES = 2000
NEWTON_STEPS = 30  # of at most 1 each, in log-odds: e^−30 is a share of 0
RESAMPLED_VALUES = 4_000_000  # values drawn at a time: bounds the memory of a bootstrap whatever n is

Statistic = Callable[..., np.ndarray]  # np.mean, np.median: takes an array and `axis`


def interval(values: Sequence[float], statistic: Statistic = np.mean, seed: int = 0) -> dict:
    """`statistic` of `values` (n,) with its percentile bootstrap interval; ValueError if n < 2 or not finite."""
    values = _checked(values)
    return _bootstrap((values,), statistic, float(statistic(values)), seed)


def paired_difference(
    base: Sequence[float], tuned: Sequence[float], statistic: Statistic = np.mean, seed: int = 0
) -> dict:
    """`statistic(tuned) - statistic(base)`, both (n,), resampled together because row i of both has one prompt.

    For the median this is the difference of the two medians, not the median of the differences.
    """
    base, tuned = _checked(base), _checked(tuned)
    if len(base) != len(tuned):
        raise ValueError(f"paired samples differ in number: {len(base)} and {len(tuned)}")

    def difference(base: np.ndarray, tuned: np.ndarray, axis: int = -1) -> np.ndarray:
        return statistic(tuned, axis=axis) - statistic(base, axis=axis)

    return _bootstrap((base, tuned), difference, float(difference(base, tuned)), seed)


def compare_pairs(base: Sequence[float], tuned: Sequence[float], statistic: Statistic = np.mean, seed: int = 0) -> dict:
    """The estimates `{"base", "tuned", "difference"}` of one metric over the same prompts."""
    return {
        "base": interval(base, statistic, seed),
        "tuned": interval(tuned, statistic, seed),
        "difference": paired_difference(base, tuned, statistic, seed),
    }


def win_rate(base: Sequence[float], tuned: Sequence[float], seed: int = 0) -> dict:
    """The share of prompts on which the tuned model's score is above the base's, ties counting half."""
    base, tuned = _checked(base), _checked(tuned)
    return interval((tuned > base) + 0.5 * (tuned == base), seed=seed)


def ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> dict:
    """Σ numerators / Σ denominators, both (n,) and resampled together: nats per token over all tokens, say."""
    return _bootstrap_of_sums((_checked(numerators), _checked(denominators)), lambda a, b: a / b, seed)


def compare_perplexities(base: tuple[np.ndarray, np.ndarray], tuned: tuple[np.ndarray, np.ndarray], seed: int) -> dict:
    """`{"base", "tuned", "difference"}` of exp(−Σ logprobs / Σ tokens), each given as (logprobs (n,), tokens (n,))."""

    def perplexity(logprobs: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return np.exp(-logprobs / tokens)

    def difference(base_sum, base_tokens, tuned_sum, tuned_tokens) -> np.ndarray:
        return perplexity(tuned_sum, tuned_tokens) - perplexity(base_sum, base_tokens)

    base, tuned = (tuple(_checked(values) for values in side) for side in (base, tuned))
    return {
        "base": _bootstrap_of_sums(base, perplexity, seed),
        "tuned": _bootstrap_of_sums(tuned, perplexity, seed),
        "difference": _bootstrap_of_sums((*base, *tuned), difference, seed),
    }


def length_controlled(wins: Sequence[float], longer: Sequence[float], seed: int = 0) -> dict:
    """The win rate at equal length, of `wins` (n,), each 1, ½ or 0, and how much longer (n,) the winner-to-be is.

    σ(α) of the logistic regression of a win on tanh(d / sd(d)), d being `longer`: the length-controlled win rate of
    AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475) without its term for the difficulty of each prompt. The slope
    has a standard normal prior, since a judge that goes by length alone has no finite one. None where all d are equal.
    """
    wins, longer = _checked(wins), _checked(longer)
    if not np.ptp(longer):
        return {"mean": None, "low": None, "high": None, "n": len(wins)}
    x = np.tanh(longer / np.std(longer))
    return _bootstrap((wins, x), _win_rate_at_0, float(_win_rate_at_0(wins, x)), seed)


def _win_rate_at_0(wins: np.ndarray, x: np.ndarray, axis: int = -1) -> np.ndarray:
    """σ(α) at the most likely α + βx, β ~ N(0, 1), by Newton's method along the last axis; an α of ±∞ is cut off."""
    alpha, beta = np.zeros((2, *wins.shape[:-1]))
    for _ in range(NEWTON_STEPS):
        chance = expit(alpha[..., None] + beta[..., None] * x)
        weight, error = chance * (1 - chance), wins - chance
        by_alpha, by_beta = error.sum(-1), (error * x).sum(-1) - beta
        aa, ab, bb = weight.sum(-1), (weight * x).sum(-1), (weight * x * x).sum(-1) + 1
        steps = np.array([bb * by_alpha - ab * by_beta, aa * by_beta - ab * by_alpha]) / (aa * bb - ab * ab)
        steps = np.clip(steps, -1, 1)  # far from the solution Newton's own step can be far too long
        alpha, beta = alpha + steps[0], beta + steps[1]
        if np.abs(steps).max() < 1e-9:
            break
    return expit(alpha)


def over_runs(values: Sequence[float]) -> dict:
    """The mean over independent runs (k,) with Student's t interval and the standard deviation over runs, `sd`."""
    values = np.asarray(values, dtype=float)
    k, mean = len(values), float(np.mean(values))
    if k < 2:
        return {"mean": mean, "low": None, "high": None, "n": k, "sd": None}
    sd = float(np.std(values, ddof=1))
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, k - 1)) * sd / k**0.5
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "n": k, "sd": sd}


def distinct_ngrams(base: Sequence[str], tuned: Sequence[str], size: int) -> dict:
    """The share of distinct word n-grams, n = `size`, in each set of texts (n texts each, paired), and its difference.

    Distinct over all, counted over the n texts together; words are split at white space (Li et al. 2016). The share
    falls as the number of texts grows, so compare it at equal numbers only.

    The interval is a delete-one jackknife's. A bootstrap would be wrong here: a text drawn twice brings every one of
    its n-grams twice, so all resamples lie below the estimate. Deleting a text repeats nothing, and by the
    Efron–Stein inequality the jackknife's variance errs on the wide side.
    """
    shares = {"base": _ngram_shares(base, size), "tuned": _ngram_shares(tuned, size)}
    estimates = {name: _jackknife(share, left_out, 0.0) for name, (share, left_out) in shares.items()}
    (base_share, base_out), (tuned_share, tuned_out) = shares["base"], shares["tuned"]
    estimates["difference"] = _jackknife(tuned_share - base_share, tuned_out - base_out, -1.0)
    return estimates


def ngrams(text: str, size: int) -> list[tuple[str, ...]]:
    """The text's word n-grams in order, n = `size`, repeats included."""
    words = text.split()
    return list(zip(*(words[start:] for start in range(size)), strict=False))


def _checked(values: Sequence[float]) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"an interval needs at least two samples, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("an interval needs finite samples")
    return values


def _bootstrap(samples: tuple[np.ndarray, ...], statistic: Statistic, value: float, seed: int) -> dict:
    n = len(samples[0])
    result = stats.bootstrap(
        samples,
        statistic,
        paired=len(samples) > 1,
        vectorized=True,
        n_resamples=N_RESAMPLES,
        batch=max(1, RESAMPLED_VALUES // n),
        confidence_level=CONFIDENCE,
        method="percentile",  # unlike BCa, defined for ties, constants and medians
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return {"mean": value, "low": float(low), "high": float(high), "n": n}


def _bootstrap_of_sums(samples: tuple[np.ndarray, ...], of_sums: Statistic, seed: int) -> dict:
    """A function of the samples' sums, with its paired bootstrap interval."""

    def statistic(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        return of_sums(*(np.sum(sample, axis=axis) for sample in samples))

    return _bootstrap(samples, statistic, float(statistic(*samples)), seed)


def _ngram_shares(texts: Sequence[str], size: int) -> tuple[float, np.ndarray]:
    """The share of distinct n-grams over all n texts, and (n,) the share with text i left out; NaN for 0/0."""
    shared = -1
    owner: dict[tuple[str, ...], int] = {}  # n-gram → the only text that has it, or `shared`
    totals = np.zeros(len(texts))
    for index, text in enumerate(texts):
        found = ngrams(text, size)
        totals[index] = len(found)
        for ngram in found:
            owner[ngram] = index if owner.get(ngram, index) == index else shared
    owners = np.array([index for index in owner.values() if index != shared], dtype=int)
    owned = np.bincount(owners, minlength=len(texts))  # distinct n-grams that leave together with text i
    with np.errstate(invalid="ignore"):
        share = np.float64(len(owner)) / totals.sum()
        return float(share), (len(owner) - owned) / (totals.sum() - totals)


def _jackknife(value: float, left_out: np.ndarray, lowest: float) -> dict:
    """`value` ± Student's t times the jackknife's standard error, within [lowest, 1]; None where undefined."""
    n = len(left_out)
    if np.isnan(value):
        return {"mean": None, "low": None, "high": None, "n": n}
    if np.isnan(left_out).any():  # all the n-grams are in one text: no spread can be estimated
        return {"mean": value, "low": None, "high": None, "n": n}
    error = np.sqrt((n - 1) * np.var(left_out))
    reach = stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * error
    low, high = max(lowest, value - reach), min(1.0, value + reach)
    return {"mean": value, "low": float(low), "high": float(high), "n": n}
