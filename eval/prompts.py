"""The prompts of a comparison: read from a dataset, cut to length where asked, checked before a model loads."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

import datasets

from eval.loading import check_language_model, generation_config, load_tokenizer, positions_of, stop_ids
from models_and_data import load_split, prompt_cutter
from trl_ppo.inputs import UserError

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
        return Prompts(at(self.texts), columns, self.ids and at(self.ids), self.references and at(self.references))

    def repeat(self, times: int) -> "Prompts":
        """Each of them `times` times in a row, without references."""

        def each(values: list) -> list:
            return [value for value in values for _ in range(times)]

        return Prompts(each(self.texts), {name: each(values) for name, values in self.columns.items()}, each(self.ids))

    def sha256(self) -> str:
        """A hash of the texts in their order."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()


def load_prompts(
    source: str, split: str, column: str, n: int, reference_column: str | None = None, shuffle: int | None = None
) -> Prompts:
    """The first `n` rows, in order or in one drawn from the seed `shuffle`; fewer if there are fewer.

    UserError if two non-empty texts cannot be had.
    """
    columns = [column] + ([reference_column] if reference_column else [])
    options = "--prompt_column" + (" and --reference_column" if reference_column else "")
    rows = load_split(source, split, columns, key="--prompts", advice=f"; name yours by {options}")
    rows = rows if shuffle is None else rows.shuffle(seed=shuffle)
    rows = rows.select(range(min(n, len(rows))))
    if len(rows) < 2:
        raise UserError(f"--prompts {source}: split {split} has {len(rows)} rows; an interval needs at least 2")
    texts = texts_of(f"--prompts {source}", rows, column)
    others = [name for name in rows.column_names if name != column and name not in NOT_COLUMNS]
    references = texts_of(f"--prompts {source}", rows, reference_column) if reference_column else None
    return Prompts(texts, {name: list(rows[name]) for name in others}, references=references)


def texts_of(where: str, rows: datasets.Dataset, column: str, messages: bool = False) -> list:
    """A column as texts (n,), or as lists of messages where they are allowed; UserError where a row's is empty."""
    texts = list(rows[column])
    allowed = (str, list) if messages else str
    for index, text in enumerate(texts):
        if not isinstance(text, allowed) or not text:
            raise UserError(f"{where}: {column!r} of row {index} is not a text or is empty")
    return texts


def fit_prompts(prompts: Prompts, tokenizer, cut: tuple[int, int] | None, most: int | None, seed: int) -> Prompts:
    """The prompts with their token ids, cut to a random length of `cut` or left out above `most` where asked."""
    if cut and cut[0] > cut[1]:
        raise UserError("--prompt_tokens {} {}: MIN is above MAX".format(*cut))
    if cut:
        prompts.texts = cut_prompts(prompts.texts, tokenizer, *cut, seed)
    prompts.ids = tokenizer(prompts.texts)["input_ids"]
    return leave_out_long(prompts, most) if most else prompts


def cut_prompts(texts: list[str], tokenizer, least: int, most: int, seed: int) -> list[str]:
    """Each text's first k tokens as text, as training draws them with the same seed."""
    return list(map(prompt_cutter(tokenizer, least, most, seed), texts))


def leave_out_long(prompts: Prompts, most: int) -> Prompts:
    """Those of at most `most` tokens, with a line that counts the others; UserError if fewer than two are left."""
    short = [index for index, ids in enumerate(prompts.ids) if len(ids) <= most]
    if len(short) < 2:
        raise UserError(
            f"--max_prompt_tokens {most}: {len(short)} of {len(prompts.ids)} prompts are as short; raise it"
        )
    if len(short) < len(prompts.ids):
        print(f"{len(prompts.ids) - len(short)} of {len(prompts.ids)} prompts have more than {most} tokens: left out")
    return prompts.select(short)


def check_lengths(prompts: Prompts, configs: Iterable, max_new_tokens: int) -> None:
    """UserError for a prompt without tokens, or one too long for the positions of one of the models."""
    room = min(positions_of(config) for config in configs)
    for index, ids in enumerate(prompts.ids):
        if not ids:
            raise UserError(f"prompt {index} has no tokens")
        if len(ids) + max_new_tokens > room:
            raise UserError(
                f"prompt {index} has {len(ids)} tokens; with {max_new_tokens} new ones that is over the models' "
                f"{room} positions (--prompt_tokens cuts prompts, --max_prompt_tokens leaves them out)"
            )


def prepare(option: str, path: str, load, cut: tuple[int, int] | None, args) -> tuple:
    """The configuration, tokenizer, prompts and stop ids for sampling from the model at `path`, which `option` names.

    `load()` gives the prompts. UserError for what is wrong, without the model's weights.
    """
    config = check_language_model(option, path)
    prompts, tokenizer = load(), load_tokenizer(path)
    prompts = fit_prompts(prompts, tokenizer, cut, args.max_prompt_tokens, args.seed)
    check_lengths(prompts, [config], args.max_new_tokens)
    return config, tokenizer, prompts, stop_ids([generation_config(path, config)], tokenizer)
