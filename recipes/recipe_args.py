"""YAML and command line → dataclasses, and every mistake in them one line on stderr that says what to do.

    script_args, training_args = parse(__file__, ScriptArguments, PPOConfig)

reads the YAML beside the script (`recipes/x.yaml` for `recipes/x.py`), or another one in its place by `--config`;
`--key value` wins over either. A YAML key is a field of one of the dataclasses, and its value fits the field's type.
"""

import argparse
import dataclasses
import difflib
import os
import re
import sys
import types
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import yaml
from trl import ScriptArguments, TrlParser

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake in what the user gave; its message is one line that names it."""


@contextmanager
def one_line_errors():
    """Ends the program with one line on stderr and status 2 for what the user can mend; also a decorator.

    That is `UserError`, a missing file or model, and a ValueError that the recipes' own code raised. Any other error,
    among them a ValueError from inside a library, keeps its traceback: it may be a bug. Rank 0 speaks for all, unless
    it is a ValueError, which may be one rank's alone (a reward that is NaN).
    """
    try:
        yield
    except Exception as error:
        if not _can_be_mended(error):
            raise
        rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
        if rank == 0 or isinstance(error, ValueError):  # every rank reads the same settings, but has its own samples
            print(_model_asked_for(error) + _first_line(error), file=sys.stderr)
        raise SystemExit(2) from error


def _can_be_mended(error) -> bool:
    if isinstance(error, (UserError, FileNotFoundError)):
        return True
    if isinstance(error, OSError):
        return error.errno is None  # transformers and datasets say so that a model or the Hub is out of reach
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    return isinstance(error, ValueError) and Path(frame.tb_frame.f_code.co_filename).resolve().parent == HERE


def _model_asked_for(error) -> str:
    """`name: ` of the model that could not be loaded: transformers' own message may leave it out."""
    frame, name = error.__traceback__, None
    while frame and not name:
        name = frame.tb_frame.f_locals.get("pretrained_model_name_or_path")
        frame = frame.tb_next
    return f"{name}: " if isinstance(error, OSError) and name and str(name) not in _first_line(error) else ""


def _first_line(error) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


# --- YAML + command line → dataclasses ----------------------------------------------------------------------------


class _Parser(TrlParser):
    def error(self, message):  # argparse would print the usage, hundreds of lines
        raise UserError(re.sub(r"^argument (--\w+)[^:]*: ", r"\1: ", message))


def parse(script: str, *dataclass_types, args: list[str] | None = None) -> tuple:
    """One instance of each dataclass, from the script's YAML and the command line.

    A dataclass leaves keys out of `--help` by naming them in class attributes `REFUSED` (key → advice) or `hidden`.

    Args:
        script: the script's `__file__`.
        dataclass_types: their fields are the known keys.
        args: the command line; default `sys.argv[1:]`.

    Raises:
        SystemExit: status 0 after `--help`; status 2, after one line on stderr, for a mistake in file or command line.
    """
    with one_line_errors():
        return _parse(Path(script), dataclass_types, sys.argv[1:] if args is None else list(args))


def _parse(script, dataclass_types, args):
    config, args = _take_config(args)
    path = _find_config(script, config)
    try:
        shown = path.resolve().relative_to(Path.cwd())
    except ValueError:
        shown = path
    usage = f"{script.name} [--config other.yaml] [--key value …]"
    parser = _Parser(dataclass_types, allow_abbrev=False, usage=usage, description=f"Defaults: {shown}")
    hidden = {key for cls in dataclass_types for name in ("REFUSED", "hidden") for key in getattr(cls, name, ())}
    known = {field.name: hint for cls in dataclass_types for field, hint in _fields(cls)}
    _describe(parser, hidden)
    parser.set_defaults_with_config(**_checked_values(shown, _read_yaml(path, shown), parser, known, hidden))
    try:
        *outputs, rest = parser.parse_args_into_dataclasses(args, True, look_for_args_file=False)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:  # from a `__post_init__`
        origin = f"{shown} and the command line" if args else shown
        raise UserError(f"{origin}: {_first_line(error)}") from error
    if rest:
        raise UserError(_unknown("option", rest[0].split("=")[0], [f"--{key}" for key in known if key not in hidden]))
    return tuple(outputs)


def _take_config(args):
    """The value of `--config value` or `--config=value` (None without), and the other arguments."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append")
    namespace, rest = parser.parse_known_args(args)
    if len(namespace.config or []) > 1:
        raise UserError(f"--config: give one file, not {len(namespace.config)} ({', '.join(namespace.config)})")
    return (namespace.config or [None])[0], rest


def _find_config(script: Path, config: str | None) -> Path:
    """The YAML to read: `config` as given, else by that name in the script's folder; the same-stem one without."""
    beside = script.with_suffix(".yaml")
    tried = [Path(config).expanduser(), script.parent / config] if config else [beside]
    for path in tried:
        if path.is_file():
            return path
    there = sorted(path.name for path in script.parent.glob(f"{script.stem}*.yaml"))
    raise UserError(f"--config: {config or beside} does not exist; beside the script: {', '.join(there) or 'none'}")


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path, shown) -> dict:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{shown}: line {error.problem_mark.line + 1}: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{shown}: not YAML: {_first_line(error)}") from error
    if values is None:  # nothing but comments
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{shown}: not a mapping of keys to values but a {type(values).__name__}")
    return values


def _fields(cls):
    """(field, type hint) of what can be set. A default of None counts as a value of the type, annotated or not."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.init:
            hint = hints[field.name]
            yield field, hint if field.default is not None else Union[hint, None]  # noqa: UP007


def _describe(parser, hidden):
    """Every key in --help with its default, documented or not, but those hidden."""
    for action in parser._actions:
        if action.dest in hidden:
            action.help = argparse.SUPPRESS
        elif not action.help:
            action.help = "(default: %(default)s)"  # argparse shows none without a text


def _checked_values(shown, values, parser, known, hidden) -> dict:
    choices = {action.dest: action.choices for action in parser._actions if action.choices}
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{shown}: {_unknown('key', str(key), [name for name in known if name not in hidden])}")
        checked[key] = value = _fitted(f"{shown}: {key}", value, known[key])
        if key in choices and value is not None and value not in choices[key]:
            raise UserError(f"{shown}: {key}: {value!r} is not one of {_listed(choices[key])}")
    return checked


def _unknown(what, name, known) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown {what} {name}" + (f"; did you mean {close[0]}?" if close else "; --help lists those there are")


# --- Does a YAML value fit a type hint? ---------------------------------------------------------------------------


def _fitted(where, value, hint):
    try:
        return _fit(value, hint)
    except TypeError:
        advice = ""
        if _allows_str(hint) and isinstance(value, (bool, int, float)):  # YAML reads no, off, 1e3 … as such
            advice = ': quote it, as in "no"' if isinstance(value, bool) else f': quote it, as in "{value}"'
        raise UserError(f"{where}: {value!r} is not {_name(hint)}{advice}") from None


def _fit(value, hint):
    """`value`, or the number that a string stands for where `hint` wants one; TypeError where it does not fit.

    YAML 1.1 reads 1e-5 as a string. A hint that says nothing about YAML values (a class, Any) accepts everything.
    """
    kind = get_origin(hint) or hint
    if kind in (Union, types.UnionType):
        return _fit_union(value, get_args(hint))
    if kind in (float, int):
        return _number(value, kind)
    if kind is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    elif kind is type(None):
        fits = value is None
    elif isinstance(kind, type) and issubclass(kind, Enum):
        fits = value in [member.value for member in kind]
    elif kind in (bool, str, dict):
        fits = isinstance(value, kind)
    elif kind is list:
        if isinstance(value, list):
            return [_fit(item, get_args(hint)[0]) for item in value] if get_args(hint) else value
        fits = False
    else:
        fits = True
    if not fits:
        raise TypeError
    return value


def _fit_union(value, hints):
    for hint in hints:
        try:
            return _fit(value, hint)
        except TypeError:
            continue
    raise TypeError


def _number(value, kind):
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or (kind is int and not number.is_integer()):
        raise TypeError
    if isinstance(value, int):
        return value
    return int(number) if kind is int else number


def _allows_str(hint) -> bool:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType, Literal) else (hint,)
    return any(o is str or isinstance(o, str) or (isinstance(o, type) and issubclass(o, Enum)) for o in options)


def _name(hint) -> str:
    """`a float`, `one of no, steps, epoch`, `a list of str or a str` …"""
    kind = get_origin(hint) or hint
    if kind in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        enums = [option for option in options if isinstance(option, type) and issubclass(option, Enum)]
        return " or ".join(_name(option) for option in enums or options)
    if kind is Literal:
        return f"one of {_listed(get_args(hint))}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {_listed(member.value for member in kind)}"
    if kind is list:
        return "a list" + (f" of {get_args(hint)[0].__name__}" if get_args(hint) else "")
    names = {dict: "a mapping", int: "an int", bool: "true or false"}
    return names.get(kind, f"a {getattr(kind, '__name__', kind)}")


def _listed(choices) -> str:
    return ", ".join(str(choice) for choice in choices)


# --- What recipes take beside TRL's settings ------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class RecipeArguments(ScriptArguments):
    """TRL's `ScriptArguments`, and what every recipe that can train an adapter takes."""

    merge_adapter: bool = dataclasses.field(
        default=False,
        metadata={"help": "With use_peft: write adapter and base as one model too, to output_dir/merged."},
    )

    def check(self, model_args) -> None:
        """UserError for what does not go together."""
        if self.merge_adapter and not model_args.use_peft:
            raise UserError("merge_adapter: true, but use_peft is false, so there is no adapter; set use_peft: true")


def check_weights(training_args, rewards: list[str]) -> None:
    """UserError unless there is a weight for each of the recipe's rewards: without any, all would count alike."""
    weights = training_args.reward_weights
    if weights is None or len(weights) != len(rewards):
        raise UserError(f"reward_weights: {weights} is not a number for each of {', '.join(rewards)}")


# --- Paths and data -----------------------------------------------------------------------------------------------


def require_path(key: str, value: str, kind: str = "model") -> str:
    """`value`, unless it can only be a local path and there is none: then UserError naming `key` and the mend."""
    from rewards import looks_local  # not above: it imports torch, and --help need not wait for that

    path = Path(value).expanduser()
    if path.exists() or not looks_local(value):
        return value
    raise UserError(f"{key}: {value!r} does not exist: {_mend(path, kind)}")


def _mend(path: Path, kind: str) -> str:
    if kind != "dataset":
        return "train it first or give a Hub id"
    made_by = {f"data/{script.stem}": script for script in sorted(HERE.parent.glob("data_prep/*.py"))}
    for folder in sorted(made_by, key=len, reverse=True):
        if path.as_posix().startswith(folder):
            return f"make it with: python data_prep/{made_by[folder].name}"
    return "give a local folder or a Hub id"


def load_split(path: str, split: str, columns=(), config: str | None = None, streaming: bool = False):
    """One split of a Hub dataset, or of a local folder of {train,test}.jsonl[.gz] (or csv, parquet).

    Raises:
        UserError: no such path, split or column (with those there are), no rows, unreadable data, or no way to the Hub.
    """
    import datasets  # takes a second to import

    require_path("dataset_name", path, kind="dataset")
    where = f"dataset {path!r}"
    try:
        dataset = datasets.load_dataset(path, config, split=split, streaming=streaming)
        first = next(iter(dataset))
    except StopIteration:
        raise UserError(f"{where}: split {split!r} has no rows") from None
    except ConnectionError as error:
        raise UserError(f"{where}: {_first_line(error)}; connect, or give the path of a local folder") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = f": {_first_line(error.__cause__)}" if error.__cause__ else ""
        raise UserError(f"{where}: {_first_line(error)}{cause}") from error
    missing = [column for column in columns if column not in first]
    if missing:
        raise UserError(f"{where}: split {split!r} has no column {_listed(missing)}; it has {_listed(first)}")
    return dataset


def load_prompts(script_args, split: str, tokenizer, limit: int | None = None):
    """The first prompts of a split, those longer than `max_prompt_tokens` left out with a line that counts them.

    Raises:
        UserError: as `load_split`; or no prompt is short enough.
    """
    data = load_split(script_args.dataset_name, split, ["prompt"], script_args.dataset_config)
    most = script_args.max_prompt_tokens

    def is_short(row):
        text = row["prompt"]
        if not isinstance(text, str):  # messages
            return len(tokenizer.apply_chat_template(text, add_generation_prompt=True)["input_ids"]) <= most
        return len(tokenizer(text)["input_ids"]) <= most

    short = data.filter(is_short, desc="Filtering prompts")
    if not len(short):
        raise UserError(f"max_prompt_tokens: {most}: every prompt of split {split!r} is longer; raise it")
    if len(short) < len(data):
        print(f"{split}: {len(data) - len(short)} of {len(data)} prompts are longer than {most} tokens and left out")
    return short.select(range(min(len(short), limit or len(short))))
