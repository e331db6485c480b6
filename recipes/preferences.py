"""Pairs of texts of which one is preferred: loading, tokenizing, and what a reward model makes of them.

A pair is `chosen` over `rejected`, each a text or a list of messages, with or without a `prompt` that both follow.
"""

import json
from pathlib import Path

import numpy as np
from scipy.stats import binomtest
from transformers import AutoConfig

from recipe_args import UserError, load_split
from rewards import SCORE_OFFSET, encode, join

SIDES = ("chosen", "rejected")


def load_pairs(path, split, config=None):
    """The pairs of one split as whole texts or conversations: columns `chosen` and `rejected`, the prompt joined on."""
    pairs = load_split(path, split, SIDES, config)
    if "prompt" not in pairs.column_names:
        return pairs.select_columns(SIDES)
    return pairs.map(
        lambda row: {side: join(row["prompt"], row[side]) for side in SIDES},
        remove_columns=[name for name in pairs.column_names if name not in SIDES],
        desc="Joining prompts",
    )


def tokenize_pairs(pairs, tokenizer, max_length):
    """Token ids as `RewardModel` makes them when it scores: TRL's own tokenisation wants an EOS that BERT lacks."""
    return pairs.map(
        lambda batch: {f"{side}_ids": encode(tokenizer, batch[side], max_length=max_length) for side in SIDES},
        batched=True,
        remove_columns=pairs.column_names,
        desc="Tokenizing pairs",
    )


def check_length(path, max_length):
    """UserError for more positions than the model has: they would be an IndexError in the middle of training."""
    positions = getattr(AutoConfig.from_pretrained(path).get_text_config(), "max_position_embeddings", None)
    if positions and max_length > positions:
        raise UserError(f"max_length: {max_length} is more than the {positions} positions of {path}; lower it")


def margins(reward_model, pairs):
    """score(chosen) − score(rejected) of each pair, (n,)."""
    chosen, rejected = (np.array(reward_model.score(pairs[side])) for side in SIDES)
    return chosen - rejected


def accuracy(margins):
    """The share of pairs ordered rightly, a tie being wrong, and its 95 % interval (Wilson 1927), as a dict."""
    right = binomtest(int((margins > 0).sum()), len(margins))
    interval = right.proportion_ci(method="wilson")
    return {"accuracy": right.statistic, "low": float(interval.low), "high": float(interval.high), "n": right.n}


def calibration(margins, bins=10):
    """How often the likelier side was chosen, by how likely the model says it is: σ(|margin|) (Bradley–Terry).

    Returns a list of `{"predicted", "observed", "n"}`, means over equal-width bins of [½, 1]; empty ones are left out.
    """
    predicted = 1 / (1 + np.exp(-np.abs(margins)))
    bin_of = np.minimum(((predicted - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        {
            "predicted": float(predicted[bin_of == b].mean()),
            "observed": float((margins[bin_of == b] > 0).mean()),
            "n": int((bin_of == b).sum()),
        }
        for b in range(bins)
        if (bin_of == b).any()
    ]


def report(reward_model, folder, **pairs_of):
    """Print and write what the saved model makes of each set of pairs, `report(model, folder, train=…, test=…)`.

    Writes `reward_report.json` (accuracy with its interval, mean margin, calibration) and `reward_report.svg` (margins
    and calibration of the last set) into `folder`, and returns the former.
    """
    results = {}
    for name, pairs in pairs_of.items():
        gaps = margins(reward_model, pairs)
        results[name] = {**accuracy(gaps), "mean_margin": float(gaps.mean()), "calibration": calibration(gaps)}
        print("{0} pairwise accuracy {accuracy:.3f} [{low:.3f}, {high:.3f}], n = {n}".format(name, **results[name]))
    (Path(folder) / "reward_report.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(gaps, results[name]["calibration"], Path(folder) / "reward_report.svg")
    return results


def draw(gaps, calibration, path):
    """Histogram of the margins, and observed against predicted share, as one SVG."""
    from matplotlib.figure import Figure  # here, since it takes a second to import

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(gaps, bins=40)
    left.axvline(0, color="black", linewidth=0.8)
    left.set(xlabel="score(chosen) − score(rejected)", ylabel="pairs", title=f"margins, n = {len(gaps)}")
    right.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8)
    right.plot([b["predicted"] for b in calibration], [b["observed"] for b in calibration], marker="o")
    right.set(xlabel="predicted: σ(|margin|)", ylabel="observed", title="calibration", ylim=(0, 1.02))
    figure.savefig(path)


def center_scores(reward_model, texts, folder):
    """Let the saved model's mean score of `texts` be 0: writes the offset that `RewardModel` subtracts from then on.

    Without texts the offset is 0, also where an earlier run into the same folder wrote another.
    """
    reward_model.score_offset = 0.0
    if texts:
        reward_model.score_offset = float(np.mean(reward_model.score(texts)))
        print(f"scores centred: less {reward_model.score_offset:.3f}, the mean over n = {len(texts)} reference texts")
    content = {"score_offset": reward_model.score_offset, "n": len(texts)}
    (Path(folder) / SCORE_OFFSET).write_text(json.dumps(content) + "\n")
