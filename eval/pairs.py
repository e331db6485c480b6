"""How well a reward orders pairs that were judged: accuracy, and whether its margins mean the chances they imply.

A reward that is not a reward model has an accuracy all the same; its calibration says little.
"""

import numpy as np

import preferences
from eval.intervals import interval
from eval.prompts import Prompts, texts_of
from eval.scores import Reward, score
from trl_ppo.inputs import UserError


def load_pairs(source: str, split: str, n: int) -> tuple[Prompts, list, list]:
    """The first `n` prompts (empty where there are none), chosen and rejected, as texts or lists of messages.

    UserError if there are not two rows, or one is empty.
    """
    where = f"--pairs {source}"
    rows = preferences.load_pairs(source, split, limit=n, key="--pairs")
    if len(rows) < 2:
        raise UserError(f"{where}: split {split} has {len(rows)} rows; an interval needs at least 2")
    chosen, rejected = (texts_of(where, rows, column, messages=True) for column in preferences.SIDES)
    return Prompts(list(rows["prompt"]), {}), chosen, rejected


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

    `log_loss` is −log σ(m), `brier` is (1 − σ(m))². `overconfidence` is the mean confidence, the chance that the reward
    gives to whichever text it prefers, minus how often it is correct: 0 if calibrated. `bins` splits the pairs by it.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    chance = np.where(margins >= 0, confidence, 1 - confidence)
    return {
        "accuracy": preferences.accuracy(margins),
        "log_loss": interval(np.logaddexp(0, -margins), seed=seed),
        "brier": interval((1 - chance) ** 2, seed=seed),
        "overconfidence": interval(confidence - preferences.correct(margins), seed=seed),
        "bins": preferences.calibration(margins),
    }
