"""Rewards and judges: named on the command line, loaded, and asked for one finite score for each completion."""

import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from eval.generation import batches
from eval.loading import InputError, check_exists, first_line
from eval.prompts import Prompts

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
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
    """`NAME=SPEC` options by name, rewards first, in order; InputError for a malformed or repeated one."""
    specs: dict[str, RewardSpec] = {}
    for given, judge in [(given, False) for given in rewards] + [(given, True) for given in judges]:
        name, _, text = given.partition("=")
        spec = RewardSpec(name, text, judge)
        if not REWARD_NAME.fullmatch(name) or not text or text.startswith("#"):
            raise InputError(f"{spec.option} {given}: expected NAME=module:function or NAME=classifier[#LABEL]")
        if name in specs:
            raise InputError(f"{spec.option} {given}: the name {name!r} is taken by {specs[name].spec}")
        specs[name] = spec
    return specs


def load_rewards(specs: dict[str, RewardSpec]) -> dict[str, Reward]:
    """The reward functions by name, cheap ones first checked; InputError if one cannot be had."""
    functions = {name: load_function(spec) for name, spec in specs.items() if spec.path is None}
    for spec in specs.values():
        if spec.path is not None:
            check_exists(f"{spec.option} {spec.name}:", spec.path)
    return {name: functions.get(name) or load_classifier(spec) for name, spec in specs.items()}


def load_function(spec: RewardSpec) -> Reward:
    """`module:function`, imported."""
    module_name, _, function_name = spec.spec.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{spec.option} {spec.name}: cannot import {spec.spec}: {first_line(error)}") from error
    if not callable(function):
        raise InputError(f"{spec.option} {spec.name}: {spec.spec} is not a function")
    return function


def load_classifier(spec: RewardSpec) -> Reward:
    """`path[#LABEL]` as a RewardModel."""
    from rewards import RewardModel

    path, _, label = spec.spec.partition("#")
    try:
        return RewardModel(path, label=label or None)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{spec.option} {spec.name}: cannot use {spec.spec}: {first_line(error)}") from error


def score(name: str, reward: Reward, prompts: Prompts, completions: list[str], ids: list, batch_size: int) -> list:
    """The reward's score of every completion (n,); InputError unless it gives one finite number for each."""
    scores: list[float] = []
    for rows in batches(range(len(completions)), batch_size, f"score {name}"):
        part = slice(rows[0], rows[-1] + 1)
        columns = {key: values[part] for key, values in prompts.columns.items()}
        texts = completions[part]
        try:
            given = reward(prompts=prompts.texts[part], completions=texts, completion_ids=ids[part], **columns)
            given = [] if given is None else list(given)
        except Exception as error:  # a function of the user's, which may fail in any way
            raise InputError(
                f"reward {name} failed from sample {part.start} on: {type(error).__name__}: {first_line(error)}"
            ) from error
        if len(given) != len(texts):
            raise InputError(
                f"reward {name} returned {len(given)} scores for {len(texts)} completions, from sample {part.start}"
            )
        for index, value in enumerate(given, part.start):
            if not is_finite_number(value):
                raise InputError(f"reward {name} returned {value} for sample {index}; it must be a finite number")
            scores.append(float(value))
    return scores


def is_finite_number(value) -> bool:
    """Whether `value` converts to a finite float: TRL's None (no opinion) does not, as a mean needs every sample."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
