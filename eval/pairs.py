"""How well a reward orders pairs that were judged: accuracy, and whether its margins mean the chances they imply.

Under the Bradley–Terry model, by which reward models are trained, a margin of m = r(chosen) − r(rejected) says that
the chosen text is preferred with chance σ(m). A reward that is not a reward model has an accuracy all the same; its
calibration says little.
"""

import numpy as np

from eval.intervals import interval
from eval.loading import InputError
from eval.prompts import Prompts, load_rows, texts_of
from eval.scores import Reward, score

BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def load_pairs(source: str, split: str, n: int) -> tuple[Prompts, list, list]:
    """The first `n` prompts (empty where there are none), chosen and rejected, as texts or lists of messages.

    InputError if there are not two rows, or one is empty.
    """
    where = f"--pairs {source}"
    rows = load_rows("--pairs", source, split, ["chosen", "rejected"])
    rows = rows.select(range(min(n, len(rows))))
    if len(rows) < 2:
        raise InputError(f"{where}: split {split} has {len(rows)} rows; an interval needs at least 2")
    chosen, rejected = (texts_of(where, rows, column, messages=True) for column in ("chosen", "rejected"))
    if "prompt" in rows.column_names:
        return Prompts(texts_of(where, rows, "prompt", messages=True), {}), chosen, rejected
    return Prompts([type(text)() for text in chosen], {}), chosen, rejected


def measure_pairs(
    name: str, reward: Reward, pairs: tuple[Prompts, list[str], list[str]], batch_size: int, seed: int
) -> dict:
    """The reward's accuracy and calibration over n pairs; see `calibrate`."""
    prompts, chosen, rejected = pairs
    none = [[]] * len(chosen)  # the texts are no model's: they have no token ids
    margins = np.subtract(
        score(name, reward, prompts, chosen, none, batch_size), score(name, reward, prompts, rejected, none, batch_size)
    )
    return calibrate(margins, seed)


def calibrate(margins: np.ndarray, seed: int = 0) -> dict:
    """Accuracy (ties half) and calibration of margins (n,), chosen minus rejected.

    `log_loss` is −log σ(m), `brier` is (1 − σ(m))². `overconfidence` is the mean chance that the reward gives to
    whichever text it prefers, minus how often it is right: 0 if calibrated. `bins` splits the pairs by that chance.
    """
    correct = (margins > 0) + 0.5 * (margins == 0)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    chance = np.where(margins >= 0, confidence, 1 - confidence)
    edges = np.digitize(confidence, BINS[1:-1])
    bins = [
        {
            "from": BINS[index],
            "to": BINS[index + 1],
            "n": int(inside.sum()),
            "confidence": float(confidence[inside].mean()),
            "accuracy": interval(correct[inside], seed=seed),
        }
        for index in range(len(BINS) - 1)
        if (inside := edges == index).sum() > 1
    ]
    return {
        "accuracy": interval(correct, seed=seed),
        "log_loss": interval(np.logaddexp(0, -margins), seed=seed),
        "brier": interval((1 - chance) ** 2, seed=seed),
        "overconfidence": interval(confidence - correct, seed=seed),
        "bins": bins,
    }
