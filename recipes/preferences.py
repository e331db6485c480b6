"""Preference pairs: loading, tokenizing, and evaluating a reward model on them.

A pair is `chosen` over `rejected`, each a text or a list of messages, with or without a `prompt` that both follow. The
margin of a pair is score(chosen) − score(rejected). Under the Bradley–Terry model, by which reward models are trained,
a margin m means that the chosen text wins with probability σ(m).
"""

import json
from pathlib import Path

import numpy as np

from models_and_data import load_split
from rewards import word_count
from trl_ppo.inputs import UserError, join

SIDES = ("chosen", "rejected")
LIKE_LENGTH = 0.1  # of the longer text's words: texts that differ by no more are of like length
BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the chance that a margin implies


def load_pairs(path, split, config=None, limit=None, key="dataset_name"):
    """The first pairs of one split, with the columns `prompt` (empty where there is none), `chosen` and `rejected`."""
    pairs = load_split(path, split, SIDES, config, key)
    pairs = pairs.select(range(min(len(pairs), limit or len(pairs))))
    if "prompt" not in pairs.column_names:
        pairs = pairs.map(lambda row: {"prompt": type(row["chosen"])()}, desc="Empty prompts")
    return pairs.select_columns(["prompt", *SIDES])


def join_prompts(pairs):
    """Pairs as whole texts or conversations: `chosen` and `rejected`, each after its prompt, which stays as well."""
    return pairs.map(lambda row: {side: join(row["prompt"], row[side]) for side in SIDES}, desc="Joining prompts")


def tokenize_pairs(pairs, tokenizer, max_length):
    """Whole pairs as token ids, as `RewardModel` makes them when it scores.

    TRL's own tokenisation leaves out pairs that are too long, and wants an end token, which BERT has not.
    """
    from trl_ppo.reward_model import encode  # here: it imports TRL, which an evaluation's report need not wait for

    return pairs.map(
        lambda batch: {f"{side}_ids": encode(tokenizer, batch[side], max_length=max_length) for side in SIDES},
        batched=True,
        remove_columns=pairs.column_names,
        desc="Tokenizing pairs",
    )


def check_length(path, config, max_length):
    """UserError for more positions than the model has: they would be an IndexError in the middle of training."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and max_length > positions:
        raise UserError(f"max_length: {max_length} is more than the {positions} positions of {path}; lower it")


def correct(margins):
    """1 for each pair that is ordered as the data says, ½ for a tie; (n,) → (n,)."""
    return (margins > 0) + 0.5 * (margins == 0)


def accuracy(margins):
    """Pairwise accuracy, a tie counting half, and its 95 % interval (Wilson 1927), as `{"mean", "low", "high", "n"}`.

    With ties the interval is that of the nearest whole number of correct pairs.
    """
    from scipy.stats import binomtest  # here and below: it takes a second, and --help need not wait

    share = float(correct(margins).mean())
    interval = binomtest(round(share * len(margins)), len(margins)).proportion_ci(method="wilson")
    return {"mean": share, "low": float(interval.low), "high": float(interval.high), "n": len(margins)}


def calibration(margins):
    """Accuracy by confidence, the chance σ(|margin|) that the model gives to the text which it prefers.

    Returns a list of `{"from", "to", "n", "confidence", "accuracy"}`, `confidence` being the mean of its bin and
    `accuracy` as above; bins of fewer than two pairs are left out.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    bin_of = np.digitize(confidence, BINS[1:-1])
    return [
        {
            "from": BINS[k],
            "to": BINS[k + 1],
            "n": int(inside.sum()),
            "confidence": float(confidence[inside].mean()),
            "accuracy": accuracy(margins[inside]),
        }
        for k in range(len(BINS) - 1)
        if (inside := bin_of == k).sum() > 1
    ]


def against_length(scores, words):
    """What length alone says of the pairs, and how much of the scores it explains; both are (2, n), chosen first.

    `longer_wins` and `shorter_wins` are the accuracies of taking the longer or the shorter text, `like_length` is the
    reward model's among pairs of like length (None if there are none), and `length_correlation` is Spearman's between
    score and words over all 2n texts, with Fisher's interval.
    """
    longer = words[0] - words[1]
    alike = np.abs(longer) <= LIKE_LENGTH * words.max(0)
    return {
        "longer_wins": accuracy(longer),
        "shorter_wins": accuracy(-longer),
        "like_length": accuracy((scores[0] - scores[1])[alike]) if alike.any() else None,
        "length_correlation": correlation(np.ravel(scores), np.ravel(words)),
    }


def correlation(x, y):
    """Spearman's rank correlation and its 95 % interval, as `accuracy` gives them; None where one does not vary."""
    from scipy.stats import pearsonr, rankdata

    x, y = rankdata(x), rankdata(y)
    if not (np.ptp(x) and np.ptp(y)):
        return {"mean": None, "low": None, "high": None, "n": len(x)}
    found = pearsonr(x, y)
    low, high = found.confidence_interval()
    return {"mean": float(found.statistic), "low": float(low), "high": float(high), "n": len(x)}


def report(reward_model, folder, dataset=None, **pairs_of):
    """Print and write how well the saved model orders sets of whole pairs, `report(model, folder, train=…, test=…)`.

    `dataset` is where the pairs are, for the command that it prints next.

    Writes `reward_report.json` (accuracy, mean margin, calibration, and what length has to do with it) and
    `reward_report.svg` (margins and calibration of the last set) into `folder`, and returns the former.
    """
    results = {}
    for name, pairs in pairs_of.items():
        scores = np.array([reward_model.score(pairs[side]) for side in SIDES])
        margins = scores[0] - scores[1]
        words = np.array([word_count(pairs[side]) for side in SIDES])
        if "prompt" in pairs.column_names:
            words -= word_count(pairs["prompt"])
        results[name] = {"accuracy": accuracy(margins), "mean_margin": float(margins.mean())}
        results[name]["calibration"] = calibration(margins)
        results[name] |= against_length(scores, words)
        print(
            "{0} pairwise accuracy {mean:.3f} [{low:.3f}, {high:.3f}], n = {n}".format(name, **accuracy(margins))
            + f"; the longer text wins {results[name]['longer_wins']['mean']:.3f}"
        )
    label = f"#{reward_model.label}" if reward_model.model.config.num_labels > 1 else ""
    check = f"python -m eval.reward_model --reward reward={folder}{label}"
    print(f"before you trust it: {check} --pairs {dataset or '…'} --output {str(folder).rstrip('/')}_check")
    (Path(folder) / "reward_report.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(margins, results[name]["calibration"], Path(folder) / "reward_report.svg")
    return results


def draw(margins, bins, path):
    """Histogram of the margins, and accuracy against confidence, as one SVG."""
    from matplotlib.figure import Figure  # here, since it takes a second to import

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(margins, bins=40)
    left.axvline(0, color="black", linewidth=0.8)
    left.set(xlabel="score(chosen) − score(rejected)", ylabel="pairs", title=f"margins, n = {len(margins)}")
    right.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8)
    right.plot([b["confidence"] for b in bins], [b["accuracy"]["mean"] for b in bins], marker="o")
    right.set(xlabel="confidence: σ(|margin|)", ylabel="accuracy", title="calibration", ylim=(0, 1.02))
    figure.savefig(path)
