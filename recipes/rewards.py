"""Reward functions with TRL's signature: `f(prompts, completions, **columns) -> list[float]`, one number each.

Prompts and completions are strings, or lists of `{"role", "content"}` messages. A YAML maps each function's name to a
weight; a function of your own is named by file and function: `rewards: {my_rewards.py:no_shouting: 0.5}`.
"""

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

from trl_ppo.inputs import UserError, as_text, first_line


def word_count(completions, **_) -> list[float]:
    """The number of words (stretches without white space) of each completion."""
    return [float(len(as_text(completion).split())) for completion in completions]


def length_penalty(completions, **_) -> list[float]:
    """Minus the number of words: rewards short completions."""
    return [-count for count in word_count(completions)]


def repetition_penalty(completions, **_) -> list[float]:
    """Minus the share of a completion's word trigrams that it has had already, in [-1, 0]; 0 below four words."""
    return [-repeated_trigrams(as_text(completion)) for completion in completions]


def repeated_trigrams(text: str) -> float:
    """The share of a text's own word trigrams that repeat an earlier one; 0 for a text without trigrams."""
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def find_function(key: str, name: str):
    """The reward function called `name`: one of this file, `file.py:function` or `module:function`.

    Raises UserError, which names `key`, if there is none.
    """
    place, colon, function_name = name.rpartition(":")
    if not colon:
        here = {
            name: function
            for name, function in globals().items()
            if inspect.isfunction(function) and "completions" in inspect.signature(function).parameters
        }
        if name in here:
            return here[name]
        raise UserError(
            f"{key}: {name!r} is not a reward; give reward_model, {', '.join(here)}, or a function of your own as "
            "file.py:function"
        )
    try:
        function = getattr(
            _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place), function_name
        )
    except Exception as error:  # a file of the user's may fail in any way
        raise UserError(f"{key}: cannot import {name}: {type(error).__name__}: {first_line(error)}") from error
    if not callable(function):
        raise UserError(f"{key}: {name} is not a function")
    return function


def _load_file(path: Path):
    path = path.expanduser().resolve()
    if str(path) not in sys.modules:  # under its path, so that it shadows no other module
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[str(path)] = module
    return sys.modules[str(path)]
