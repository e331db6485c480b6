"""The figures of a comparison, each with n and a 95 % interval, from the two models' completions and scores."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from eval.intervals import (
    compare_pairs,
    compare_perplexities,
    distinct_ngrams,
    interval,
    over_runs,
    ratio,
    win_rate,
)
from eval.pairwise import Verdicts, measure_verdicts
from eval.prompts import Prompts
from rewards import repeated_trigrams, rouge

ROLES = ("base", "tuned")
ROUGE = ("rouge1", "rouge2", "rougeL")
DISTINCT = {"distinct_unigrams": 1, "distinct_bigrams": 2, "distinct_trigrams": 3}


@dataclass
class Samples:
    """One model's completions, one for each prompt: token ids, text, whether they ended in EOS, and what was measured.

    `base_logprobs` (n,) are the base's, in nats per completion, and so is `kl` (n,), log π_tuned − log π_base; `rouge`
    holds F-measures (n,) by ROUGE type where the data has references, `judged` a pairwise judge's verdicts by opponent.
    """

    ids: list[list[int]]
    texts: list[str]
    ended: list[bool]
    scores: dict[str, list[float]] = field(default_factory=dict)
    base_logprobs: list[float] = field(default_factory=list)
    kl: list[float] | None = None
    rouge: dict[str, list[float]] | None = None
    judged: dict[str, Verdicts] = field(default_factory=dict)

    def tokens(self) -> np.ndarray:
        """The completions' lengths in tokens (n,), EOS included."""
        return np.array([len(ids) for ids in self.ids], dtype=float)


def rouge_scores(references: list[str], texts: list[str]) -> dict[str, list[float]]:
    """F-measures of ROUGE-1, -2 and -L (Lin 2004), each (n,)."""
    return rouge(references, texts, ROUGE)


def measure(samples: dict[str, Samples], seed: int) -> dict:
    """All metrics, each as `{"base", "tuned", "difference"}` of estimates; see eval/intervals.py."""
    base, tuned = (samples[role] for role in ROLES)

    def compare(values: Callable[[Samples], Iterable], statistic=np.mean) -> dict:
        return compare_pairs(*(np.array(values(side), dtype=float) for side in (base, tuned)), statistic, seed)

    return {
        "rewards": {name: _compare_scores(base.scores[name], tuned.scores[name], seed) for name in base.scores},
        "kl": _tuned_alone(interval(tuned.kl, seed=seed)),
        "kl_per_token": _tuned_alone(ratio(tuned.kl, tuned.tokens(), seed)),
        "length": compare(Samples.tokens),
        "missing_eos": compare(lambda side: [not ended for ended in side.ended]),
        **{name: distinct_ngrams(base.texts, tuned.texts, size) for name, size in DISTINCT.items()},
        "self_repetition": compare(lambda side: [repeated_trigrams(text) for text in side.texts]),
        "perplexity": compare_perplexities(*((side.base_logprobs, side.tokens()) for side in (base, tuned)), seed),
        **{name: compare(lambda side, name=name: side.rouge[name]) for name in base.rouge or {}},
        **measure_verdicts(base.judged, tuned.judged, seed),
    }


def _compare_scores(base: list[float], tuned: list[float], seed: int) -> dict:
    positive = [np.array(scores) > 0 for scores in (base, tuned)]
    return {
        "mean": compare_pairs(base, tuned, seed=seed),
        "median": compare_pairs(base, tuned, np.median, seed),
        "share_positive": compare_pairs(*positive, seed=seed),
        "win_rate": _tuned_alone(win_rate(base, tuned, seed)),
    }


def _tuned_alone(estimate: dict) -> dict:
    """A metric that the base has not."""
    return {"base": None, "tuned": estimate, "difference": None}


def summarise_runs(runs: list[dict]) -> dict:
    """The metrics of several runs against one base, each tuned model's and difference's mean over the runs.

    The interval is over runs, not prompts, and `sd` the standard deviation over runs; the base is the same in all.
    """
    return _over_runs([run["metrics"] for run in runs])


def _over_runs(metrics: list[dict]) -> dict:
    if set(metrics[0]) != {"base", "tuned", "difference"}:
        return {name: _over_runs([each[name] for each in metrics]) for name in metrics[0]}

    def summarise(side: str) -> dict | None:
        values = [each[side]["mean"] for each in metrics if each[side] is not None and each[side]["mean"] is not None]
        return over_runs(values) if values else None

    return {"base": metrics[0]["base"], "tuned": summarise("tuned"), "difference": summarise("difference")}


def describe_samples(prompts: Prompts, samples: dict[str, Samples]) -> list[dict]:
    """All prompts with both models' completions and scores, by index."""

    def side(samples: Samples, index: int) -> dict:
        described = {
            "completion": samples.texts[index],
            "tokens": len(samples.ids[index]),
            "ended": samples.ended[index],
            "scores": {name: scores[index] for name, scores in samples.scores.items()},
            "kl": None if samples.kl is None else samples.kl[index],
            "base_logprob": samples.base_logprobs[index],
        }
        if samples.rouge is not None:
            described["rouge"] = {name: values[index] for name, values in samples.rouge.items()}
        if samples.judged:
            described["judged"] = {other: verdicts.wins[index] for other, verdicts in samples.judged.items()}
        return described

    return [
        {"index": index, "prompt": text}
        | ({} if prompts.references is None else {"reference": prompts.references[index]})
        | {role: side(samples[role], index) for role in ROLES}
        for index, text in enumerate(prompts.texts)
    ]
