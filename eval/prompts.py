"""The prompts of a comparison: read from a dataset, cut to length where asked, checked before a model loads."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np

from eval.loading import InputError, check_exists, first_line, positions_of

NOT_COLUMNS = {"prompts", "completion", "completions", "completion_ids"}  # names that a reward gets from elsewhere


@dataclass
class Prompts:
    """The prompts used, as text (n,) and as token ids, the other columns of their rows, and references, each (n,)."""

    texts: list[str]
    columns: dict[str, list]
    ids: list[list[int]] = field(default_factory=list)
    references: list[str] | None = None

    def first(self, n: int) -> "Prompts":
        """The first `n` of them."""
        return self.select(range(min(n, len(self.texts))))

    def select(self, indices: Iterable[int]) -> "Prompts":
        """Those at the given indices, in their order."""
        indices = list(indices)

        def at(values: list) -> list:
            return [values[index] for index in indices]

        columns = {name: at(values) for name, values in self.columns.items()}
        return Prompts(at(self.texts), columns, at(self.ids), self.references and at(self.references))

    def repeat(self, times: int) -> "Prompts":
        """Each of them `times` times in a row, without references."""

        def each(values: list) -> list:
            return [value for value in values for _ in range(times)]

        return Prompts(each(self.texts), {name: each(values) for name, values in self.columns.items()}, each(self.ids))

    def sha256(self) -> str:
        """A hash of the texts in their order."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()


def load_rows(option: str, source: str, split: str, columns: list[str]) -> datasets.Dataset:
    """The split of a folder, JSONL file or Hub dataset; InputError if it cannot be read or lacks one of `columns`."""
    check_exists(option, source)
    files = {"path": "json", "data_files": {split: source}} if Path(source).is_file() else {"path": source}
    try:
        rows = datasets.load_dataset(**files, split=split)
    except StopIteration as error:  # what datasets raises for a file without a single row
        raise InputError(f"{option} {source}: split {split} is empty") from error
    except Exception as error:  # whatever a loader of foreign files may raise, its cause says more
        raise InputError(f"{option} {source}: {first_line(error.__cause__ or error)}") from error
    for column in columns:
        if column not in rows.column_names:
            raise InputError(f"{option} {source}: no column {column!r}; there are {', '.join(rows.column_names)}")
    return rows


def load_prompts(source: str, split: str, column: str, n: int, reference_column: str | None = None) -> Prompts:
    """The first `n` rows, in order, fewer if there are fewer; InputError if two non-empty texts cannot be had."""
    rows = load_rows("--prompts", source, split, [column] + ([reference_column] if reference_column else []))
    rows = rows.select(range(min(n, len(rows))))
    if len(rows) < 2:
        raise InputError(f"--prompts {source}: split {split} has {len(rows)} rows; an interval needs at least 2")
    texts = texts_of(f"--prompts {source}", rows, column)
    others = [name for name in rows.column_names if name != column and name not in NOT_COLUMNS]
    references = texts_of(f"--prompts {source}", rows, reference_column) if reference_column else None
    return Prompts(texts, {name: list(rows[name]) for name in others}, references=references)


def texts_of(where: str, rows: datasets.Dataset, column: str, messages: bool = False) -> list:
    """A column as texts (n,), or as lists of messages where they are allowed; InputError where a row's is empty."""
    texts = list(rows[column])
    allowed = (str, list) if messages else str
    for index, text in enumerate(texts):
        if not isinstance(text, allowed) or not text:
            raise InputError(f"{where}: {column!r} of row {index} is not a text or is empty")
    return texts


def cut_prompts(texts: list[str], tokenizer, low: int, high: int, seed: int) -> list[str]:
    """Each text's first k tokens as text, k uniform in low..high; text i's k depends on `seed` and i alone."""
    rng = np.random.default_rng(seed)
    lengths = [int(rng.integers(low, high + 1)) for _ in texts]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [tokenizer.decode(row[:length]) for row, length in zip(ids, lengths, strict=True)]


def leave_out_long(prompts: Prompts, most: int) -> Prompts:
    """Those of at most `most` tokens, with a line that counts the others; InputError if fewer than two are left."""
    short = [index for index, ids in enumerate(prompts.ids) if len(ids) <= most]
    if len(short) < 2:
        raise InputError(
            f"--max_prompt_tokens {most}: {len(short)} of {len(prompts.ids)} prompts are as short; raise it"
        )
    if len(short) < len(prompts.ids):
        print(f"{len(prompts.ids) - len(short)} of {len(prompts.ids)} prompts have more than {most} tokens: left out")
    return prompts.select(short)


def check_lengths(prompts: Prompts, configs: Iterable, max_new_tokens: int) -> None:
    """InputError for a prompt without tokens, or one too long for the positions of one of the models."""
    room = min(positions_of(config) for config in configs)
    for index, ids in enumerate(prompts.ids):
        if not ids:
            raise InputError(f"prompt {index} has no tokens")
        if len(ids) + max_new_tokens > room:
            raise InputError(
                f"prompt {index} has {len(ids)} tokens; with {max_new_tokens} new ones that is over the models' "
                f"{room} positions (--prompt_tokens cuts prompts, --max_prompt_tokens leaves them out)"
            )
