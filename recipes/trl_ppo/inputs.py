"""Handling of user input (texts or messages, paths, reward values), and the exception for invalid input.

This module imports nothing slow, so data preparation and command lines share it.
"""

import math
import re


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: what is wrong, where, and what to do."""


class ScoreError(UserError):
    """A reward function returned what cannot be used. Each rank has its own samples, so it may be one rank's alone."""


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def looks_local(path: str) -> bool:
    """Whether `path` can only be a folder on this machine: not of the Hub's form `name` or `org/name`."""
    path = str(path)
    return path.startswith((".", "/", "~", "runs/", "data/")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)


def as_text(text) -> str:
    """A string as it is; messages as their contents, one per line."""
    if isinstance(text, str):
        return text
    return "\n".join(_content(message) for message in text)


def _content(message) -> str:
    content = message.get("content") or ""  # None next to a tool call
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)  # [{"type": "text", "text": …}, …]


def join(prompt, completion):
    """Prompt + completion as one text: both strings, or both messages; a mixture becomes a string."""
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompt + completion
    if isinstance(prompt, list):
        return [*prompt, {"role": "assistant", "content": completion}]
    return prompt + as_text(completion)


def check_lengths(prompt_ids, max_completion_length, config, vllm_max_model_length=None):
    """UserError for a prompt without tokens, and for one that leaves its completion too few positions."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    positions = min(own, vllm_max_model_length or math.inf)
    if not all(prompt_ids):
        raise UserError("prompt: one has no tokens; leave out empty prompts")
    longest = max(map(len, prompt_ids))
    if longest + max_completion_length > positions:
        raise UserError(
            f"max_completion_length: {max_completion_length} after a prompt of {longest} tokens is more than "
            f"the {positions} positions of {'the policy' if positions == own else 'vllm_max_model_length'}; lower it, "
            "or cut the prompts"
        )


def finite_scores(name: str, values, prompts, completions, first: int = 0) -> list[float | None]:
    """What the reward function `name` returned, as Python floats, one for each completion; None stays None.

    Raises ScoreError for a number of values other than that of the completions, and for a value that is NaN, infinite
    or no number; it names the function, and the sample by its index, counted from `first`, and the start of its text.
    """
    try:
        values = list(values)
    except TypeError as error:
        kind = type(values).__name__
        raise ScoreError(f"reward function {name!r} returned {kind}, not a list of {len(completions)}") from error
    if len(values) != len(completions):
        raise ScoreError(f"reward function {name!r} returned {len(values)} values for {len(completions)} completions")
    return [_finite(name, first + i, value, prompts[i], completions[i]) for i, value in enumerate(values)]


def _finite(name, index, value, prompt, completion) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf"):  # NaN compares false
        prompt, completion = (repr(as_text(text)[:60]) for text in (prompt, completion))
        raise ScoreError(
            f"reward function {name!r} returned {value!r} for sample {index}: prompt {prompt}, completion {completion}"
        )
    return number
