"""Handling of user input (texts or messages, paths, reward values), and the exception for invalid input.

This module imports nothing slow, so data preparation and command lines share it.
"""

import math
import re
import traceback
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: what is wrong, where, and what to do."""


class ScoreError(UserError):
    """A reward function returned what cannot be used. Each rank has its own samples, so it may be one rank's alone."""


LARGEST = 1e18  # of a score: float32 holds its square

# What a number must be, by its key ("*": every one), in every script: TRL and transformers take most of the rest.
RANGES = {
    "is not a finite number": (lambda x: abs(x) < math.inf, "*"),
    "must be positive": (
        lambda x: x > 0,
        "num_iterations num_mini_batches kl_horizon kl_target stop_epochs_at_kl score_clip value_learning_rate "
        "total_episodes temperature repetition_penalty max_completion_length max_length num_train_epochs save_steps "
        "eval_steps per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps lora_r "
        "lora_alpha reward_max_length reward_batch_size max_prompt_tokens test_prompts test_rows train_pairs "
        "test_pairs scratch_width scratch_heads scratch_vocab first_characters lam_length_alpha stop_at_kl "
        "ref_model_sync_steps early_stopping_patience",
    ),
    "must not be negative": (
        lambda x: x >= 0,
        "learning_rate adam_epsilon weight_decay max_grad_norm kl_coef vf_coef cliprange_value epsilon epsilon_high "
        "value_warmup_rollouts top_k reward_variance_coef scratch_layers min_prompt_tokens min_prompt_characters "
        "dataloader_num_workers",
    ),
    "must lie in [0, 1]": (lambda x: 0 <= x <= 1, "gamma lam lam_value lora_dropout min_p ref_model_mixup_alpha"),
    "must lie in [0, 1)": (lambda x: 0 <= x < 1, "adam_beta1 adam_beta2"),
    "must be above 0 and at most 1": (lambda x: 0 < x <= 1, "top_p"),
    "must lie in [0, 2**32)": (lambda x: 0 <= x < 2**32, "seed data_seed"),
}


def check_numbers(settings: dict, where: str = "") -> None:
    """ValueError for a number that is not finite, in lists and mappings too, or not what `RANGES` says of its key."""
    for key, value in settings.items():
        if isinstance(value, dict):
            check_numbers(value, f"{where}{key}: ")
        numbers = [x for x in (value if isinstance(value, list) else [value]) if type(x) in (int, float)]
        for said, (holds, keys) in RANGES.items():
            asked = keys == "*" or (key in keys.split() and not where)  # a reward may have a setting's name
            for number in numbers:
                if asked and not holds(number):
                    raise ValueError(f"{where}{key}: {number} {said}")


def first_line(error: BaseException) -> str:
    """The first line of the error's message, with the next where it ends in a colon; its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def not_finite(what, value, step) -> FloatingPointError:
    """The error for a loss or a gradient that is NaN or infinite, with what to change."""
    return FloatingPointError(
        f"{what} is {value} at step {step}; no step was taken: lower learning_rate or max_grad_norm, set score_norm: "
        "true or score_clip, or train in bf16 or float32 where it is fp16"
    )


def looks_local(path: str) -> bool:
    """Whether `path` can only be a folder on this machine: not of the Hub's form `name` or `org/name`."""
    path = str(path)
    return path.startswith((".", "/", "~", "runs/", "data/")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)


def as_text(text) -> str:
    """A string as it is; messages as their contents, one per line."""
    if isinstance(text, str):
        return text
    return "\n".join(_content(message) for message in text)


def is_messages(text) -> bool:
    """Whether `text` is a conversation: `[{"role": …, "content": …}, …]`."""
    return (
        isinstance(text, list) and text != [] and all(isinstance(m, dict) and {"role", "content"} <= {*m} for m in text)
    )


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


@contextmanager
def reward_failures(name: str, where: str = ""):
    """ScoreError, which names the reward function and the line of its code, for whatever it raises, SystemExit too."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)[:3]  # this one's, its caller's and the function's own
        frame = frames[-1]
        said = f"{type(error).__name__}: {first_line(error)} ({Path(frame.filename).name}, line {frame.lineno})"
        if isinstance(error, TypeError) and len(frames) < 3:  # it was not entered
            said = (
                f"{first_line(error)}; a reward is f(prompts, completions, **columns), and what it needs besides must "
                "be a column of the dataset"
            )
        raise ScoreError(f"reward function {name!r} failed{where}: {said}") from error


def finite_scores(name: str, values, prompts, completions, first: int = 0) -> list[float | None]:
    """What the reward function `name` returned, as Python floats, one for each completion; None stays None.

    Raises ScoreError for a number of values other than that of the completions, and for a value that is no number, NaN
    or beyond ±`LARGEST`; it names the function, and the sample by its index, counted from `first`, and its text.
    """
    if isinstance(values, str | bytes | dict | set) or not hasattr(values, "__iter__"):
        raise ScoreError(f"reward function {name!r} returned {type(values).__name__}, not a list of {len(completions)}")
    values = list(values)
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
    if not abs(number) <= LARGEST:  # NaN compares false
        prompt, completion = (repr(as_text(text)[:60]) for text in (prompt, completion))
        raise ScoreError(
            f"reward function {name!r} returned {value!r} for sample {index}: prompt {prompt}, completion {completion}"
        )
    return number
