"""Rewards and judges: named on the command line, loaded, and asked for one finite score for each completion."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eval.generation import batches
from eval.prompts import Prompts
from models_and_data import check_path
from rewards import find_function
from trl_ppo import RewardModel
from trl_ppo.inputs import UserError, finite_scores, first_line, reward_failures

FUNCTION = re.compile(r"[\w./~-]+:[A-Za-z_]\w*")
REWARD_NAME = re.compile(r"[\w.-]+")

Reward = Callable[..., list[float]]


@dataclass(frozen=True)
class RewardSpec:
    """A reward as the command line names it; a judge is one that training never saw."""

    name: str
    spec: str
    judge: bool = False

    @property
    def option(self) -> str:
        """The option that named it."""
        return "--judge" if self.judge else "--reward"

    @property
    def path(self) -> str | None:
        """The classifier's folder or Hub id, None for a function."""
        return None if FUNCTION.fullmatch(self.spec) else self.spec.partition("#")[0]


def parse_rewards(rewards: list[str], judges: list[str] = ()) -> dict[str, RewardSpec]:
    """`NAME=SPEC` options by name, rewards first, in order; UserError for a malformed or repeated one."""
    specs: dict[str, RewardSpec] = {}
    for given, judge in [(given, False) for given in rewards] + [(given, True) for given in judges]:
        name, _, text = given.partition("=")
        spec = RewardSpec(name, text, judge)
        if not REWARD_NAME.fullmatch(name) or not text or text.startswith("#"):
            forms = "NAME=folder or Hub id of a classifier[#LABEL], NAME=module:function or NAME=file.py:function"
            raise UserError(f"{spec.option} {given}: expected {forms}, with a name of your choice")
        if name in specs:
            raise UserError(f"{spec.option} {given}: the name {name!r} is taken by {specs[name].spec}")
        same = next((other.name for other in specs.values() if judge > other.judge and is_same(spec, other)), None)
        if same is not None:
            raise UserError(f"{spec.option} {given}: is the reward {same!r} itself; give another, or none")
        specs[name] = spec
    return specs


def is_same(one: RewardSpec, other: RewardSpec) -> bool:
    """Whether two specs name one function, or one label of one folder."""
    if None in (one.path, other.path):
        return one.spec == other.spec
    labels = [spec.spec.partition("#")[2] for spec in (one, other)]
    return labels[0] == labels[1] and Path(one.path).resolve() == Path(other.path).resolve()


def load_rewards(specs: dict[str, RewardSpec]) -> dict[str, Reward]:
    """The reward functions by name, cheap ones first checked; UserError if one cannot be had."""
    functions = {
        name: find_function(f"{spec.option} {name}", spec.spec) for name, spec in specs.items() if spec.path is None
    }
    for spec in specs.values():
        if spec.path is not None:
            check_path(f"{spec.option} {spec.name}", spec.path)
    return {name: functions.get(name) or load_classifier(spec) for name, spec in specs.items()}


def load_classifier(spec: RewardSpec) -> Reward:
    """`path[#LABEL]` as a RewardModel."""
    path, _, label = spec.spec.partition("#")
    try:
        return RewardModel(path, label=label or None)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{spec.option} {spec.name}: cannot use {spec.spec}: {first_line(error)}") from error


def score(name: str, reward: Reward, prompts: Prompts, completions: list[str], ids: list, batch_size: int) -> list:
    """The reward's score of every completion (n,); UserError unless it gives one finite number for each."""
    scores: list[float] = []
    for rows in batches(range(len(completions)), batch_size, f"score {name}"):
        part = slice(rows[0], rows[-1] + 1)
        columns = {key: values[part] for key, values in prompts.columns.items()}
        texts = completions[part]
        with reward_failures(name, f" from sample {part.start} on"):
            given = reward(prompts=prompts.texts[part], completions=texts, completion_ids=ids[part], **columns)
        for index, value in enumerate(finite_scores(name, given, prompts.texts[part], texts, part.start), part.start):
            if value is None:  # TRL's "no opinion"; a mean needs every sample
                raise UserError(f"reward function {name!r} returned None for sample {index}, not a finite number")
            scores.append(value)
    return scores
