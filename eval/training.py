"""The curves of a training run, from the `trainer_state.json` that it left behind."""

import json
import math
import re
from pathlib import Path

MOST_POINTS = 400  # of a curve: more cannot be seen
CURVES = {  # in the order in which they are shown, where a run has them; with their titles
    "objective/scores": "score",
    "objective/kl": "KL, nats",
    "objective/rlhf_reward": "score minus β × KL",
    "objective/entropy": "entropy of a completion, nats",
    "objective/missing_eos": "share without EOS",
    "completions/mean_length": "length, tokens",
    "objective/kl_coef": "β, the price of a nat",
    "val/explained_variance": "explained variance of the critic",
    "policy/clipfrac_avg": "share of clipped tokens",
    "loss/policy_avg": "policy loss",
    "loss/value_avg": "value loss",
    "eval_accuracy": "held-out accuracy",
    "eval_loss": "held-out loss",
    "loss": "loss",
}
MOST_CURVES = 12
REWARD = re.compile(r"rewards/[^/]+(/mean)?")  # PPO's and TRL's own name of a reward function's mean


def read_curves(path: str) -> dict | None:
    """The curves of the run that made the model at `path`: `{"source", "curves": {name: [[step, value], …]}}`.

    From its `trainer_state.json`, or that of its latest checkpoint, or that of the run around it; None without one.
    """
    folder = Path(path)
    states = [folder / "trainer_state.json"]
    within = [(int(p.parent.name.rpartition("-")[2]), p) for p in folder.glob("checkpoint-*[0-9]/trainer_state.json")]
    states += [state for _, state in sorted(within, reverse=True)]
    for state in states:
        try:
            history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
            curves = _curves(history)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if curves:
            return {"source": str(state), "curves": curves}
    return None


def _curves(history: list[dict]) -> dict[str, list[list[float]]]:
    names = [name for name in CURVES if any(name in row for row in history)]
    rewards = sorted({name for row in history for name in row if REWARD.fullmatch(name)})
    rewards = rewards if len(rewards) > 1 else []  # a single one is the score
    found = {}
    for name in [*names[: MOST_CURVES - 4], *rewards][:MOST_CURVES]:
        points = [[row["step"], row[name]] for row in history if _is_number(row.get(name)) and "step" in row]
        if len(points) > 1:
            found[name] = points[:: math.ceil(len(points) / MOST_POINTS)]
    return found


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
