"""YAML and command line → dataclasses, with one-line error messages that say how to fix them.

    run(main, __file__)

calls a recipe's `main` with the dataclasses that its annotations name. `parse` reads the YAML next to the script
(`recipes/x.yaml` for `recipes/x.py`), or the one that `--config` names instead: a path, or the name of a variant in
`recipes/variants/x/`. `--key value` wins over either. Each YAML key must be a field of one of the dataclasses, and its
value must have the field's type.

TRL's and transformers' classes take seconds to import. So a recipe imports the packages, which wait, takes each class
from them where it is used, and writes "trl.SFTConfig" in quotes: `--help` then imports none of them.
"""

import argparse
import dataclasses
import difflib
import functools
import importlib.util
import json
import os
import pkgutil
import re
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from requests import RequestException
from safetensors import SafetensorError
from trl import TrlParser

import terminal
from trl_ppo.inputs import ScoreError, UserError, check_numbers, first_line
from trl_ppo.settings import RENAMED

HERE = Path(__file__).resolve().parent
LIBRARIES = {  # words in a RuntimeError of torch's that is no bug, and what they mean
    "inline_container": "a file could not be written to its end; is the disk full? ",
    "gloo": "another rank ended, or cannot be reached: ",
}


@contextmanager
def one_line_errors():
    """Ends the program with one line on stderr and status 2 for what the user can put right; also a decorator.

    Such are our own errors, what a library refuses before training, and a server that does not answer. Any other error
    keeps its traceback: it may be a bug. Rank 0 speaks for all, but for a reward function's values, which are each
    rank's own.
    """
    try:
        yield
    except (ValueError, TypeError, ImportError, FloatingPointError, FileNotFoundError, RequestException) as error:
        ours = isinstance(error, UserError | FloatingPointError | FileNotFoundError | RequestException)
        if not ours and not (library := _refused_by(error)):
            raise
        if os.environ.get("RANK", "0") == "0" or isinstance(error, ScoreError):
            print(first_line(error) if ours else f"{library}: {first_line(error)}", file=sys.stderr)
        raise SystemExit(2) from error
    except (OSError, SafetensorError, RuntimeError) as error:  # this machine's, so each rank speaks for itself
        what = next((meaning for sign, meaning in LIBRARIES.items() if sign in str(error)), "")
        if isinstance(error, RuntimeError) and not what:
            raise
        print(what + first_line(error), file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None


def _refused_by(error) -> str | None:
    """The library whose own code raised the error before training; None where ours did, and in training."""
    frames = traceback.extract_tb(error.__traceback__)
    library = re.search(r"[/\\](?:site|dist)-packages[/\\](\w+)", frames[-1].filename)
    return library[1] if library and all(frame.name != "train" for frame in frames) else None


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before it, and which takes no abbreviated options."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        """Called by argparse."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class _Parser(TrlParser):
    def error(self, message):
        raise UserError(re.sub(r"^argument (--\w+)[^:]*: ", r"\1: ", message))


def run(main, script: str):
    """Call a recipe's `main`; a mistake of the user's is one line. At the end, the next command that the YAML names."""
    with one_line_errors():
        terminal.hide_noise()
        script_args, training_args, model_args = parse(script, *main.__annotations__.values())
        path, _ = _choose_config(Path(script), sys.argv[1:])
        text, values = path.read_text(encoding="utf-8"), _read_yaml(path, path)  # now: after training it may be gone
        try:
            main(script_args, training_args, model_args)
        except KeyboardInterrupt:
            saved = any(Path(training_args.output_dir).glob("checkpoint-*"))
            goes_on = "--resume_from_checkpoint true goes on from the last checkpoint"
            print("stopped by Ctrl-C;", goes_on if saved else "nothing was saved (--save_steps does)", file=sys.stderr)
            raise SystemExit(130) from None
        given = vars(script_args) | vars(training_args) | vars(model_args)
        command = terminal.next_command(text, values, given)
        if command and os.environ.get("RANK", "0") == "0" and not given.get("dry_run"):
            print(f"next: {command}")


def parse(script: str, *dataclass_types, args: list[str] | None = None) -> tuple:
    """One instance of each dataclass, from the script's YAML and the command line (default `sys.argv[1:]`).

    A dataclass may be given by its name, "trl.SFTConfig". `--help` shows the keys of those that are the project's own,
    and of their class attribute `SETTINGS`; `--help-all` shows all but those in an attribute `REFUSED` (key → advice).

    Raises:
        SystemExit: status 0 after `--help`; status 2, after one line on stderr, for a mistake in file or command line.
    """
    with one_line_errors():
        return _parse(Path(script), dataclass_types, sys.argv[1:] if args is None else list(args))


def _parse(script, dataclass_types, args):
    path, args = _choose_config(script, args)
    shown = path.resolve().relative_to(Path.cwd()) if path.resolve().is_relative_to(Path.cwd()) else path
    usage = f"{script.name} [--config variant or file.yaml] [--key value …]"
    if {"-h", "--help"} & {*args}:
        own = [cls for cls in dataclass_types if not isinstance(cls, str) and terminal.own_fields(cls)]
        own += [cls.SETTINGS for cls in own if hasattr(cls, "SETTINGS")]
        terminal.print_help(usage, shown, _variants(script), _read_yaml(path, shown), own)
        raise SystemExit(0)
    dataclass_types = [pkgutil.resolve_name(cls) if isinstance(cls, str) else cls for cls in dataclass_types]
    args = ["--help" if arg == "--help-all" else arg for arg in args]
    parser = _Parser(dataclass_types, allow_abbrev=False, usage=usage, description=f"Defaults: {shown}")
    refused = {key for cls in dataclass_types for key in getattr(cls, "REFUSED", ())}
    hints = {name: hint for cls in dataclass_types for name, hint in _hints(cls)}
    listed = [name for name in hints if name not in refused]
    for action in parser._actions:
        if action.dest in refused:
            action.help = argparse.SUPPRESS
        elif not action.help:
            action.help = "(default: %(default)s)"  # argparse shows none without a text
        if action.dest == "output_dir":  # transformers would invent one
            action.required = True
        hint = hints.get(action.dest)
        kinds = {hint, *get_args(hint)}
        if any(dict in (kind, get_origin(kind)) for kind in kinds) or {str, list[str]} <= kinds:
            action.type = functools.partial(_as_in_yaml, hint=hint)
    choices = {action.dest: action.choices for action in parser._actions if action.choices}
    values = _read_yaml(path, shown)
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{shown}: {_unknown('key', str(key), listed)}")
        values[key] = value = _fit(f"{shown}: {key}", value, hints[key])
        if key in choices and value is not None and value not in choices[key]:
            raise UserError(f"{shown}: {key}: {value!r} is not one of {', '.join(map(str, choices[key]))}")
    for key in _given_as_null(args, hints):
        values[key] = None
    words = {word.split("=")[0] for word in args}
    for name in ("save", "eval"):  # who asks for steps wants them, whatever the YAML says
        if f"--{name}_steps" in words and f"--{name}_strategy" not in words:
            values[f"{name}_strategy"] = "steps"
    parser.set_defaults_with_config(**{k: v for k, v in values.items() if v is not None or k != "output_dir"})
    try:
        *outputs, rest = parser.parse_args_into_dataclasses(args, True, look_for_args_file=False)
        for output in outputs:
            check_numbers(vars(output))
            if getattr(output, "hub_token", None):
                raise UserError("hub_token: training_args.bin would hold it; set HF_TOKEN in the environment instead")
            check_report_to(getattr(output, "report_to", ()))
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:  # from a `__post_init__`
        if isinstance(error, UserError):
            raise
        raise UserError(f"{shown}{' and the command line' if args else ''}: {first_line(error)}") from error
    if rest:
        raise UserError(_unknown("option", rest[0].split("=")[0], [f"--{key}" for key in listed]))
    return tuple(outputs)


def _choose_config(script, args):
    """The YAML to read, and the words of the command line that do not choose it."""
    chooser = _Parser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--config", action="append", default=[])
    chosen, args = chooser.parse_known_args(args)
    if len(chosen.config) > 1:
        raise UserError(f"--config: give one file, not {len(chosen.config)} ({', '.join(chosen.config)})")
    return _find_config(script, *chosen.config), args


def _given_as_null(args: list[str], hints) -> list[str]:
    """The keys that the command line sets to null, of those that may be; their words are taken out of `args`."""
    keys = []
    for i in reversed(range(len(args))):
        words = args[i].split("=", 1) if "=" in args[i] else args[i : i + 2]
        key = words[0].removeprefix("--").replace("-", "_")
        if words[0].startswith("--") and words[1:] == ["null"] and type(None) in get_args(hints.get(key)):
            del args[i : i + (1 if "=" in args[i] else 2)]
            keys.append(key)
    return keys


def check_report_to(names) -> None:
    """UserError for a logger that is not installed, with how to install it."""
    for name in {*names} & {"comet_ml", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"}:
        if not any(map(importlib.util.find_spec, (name, f"{name}X"))):  # tensorboardX does as well
            raise UserError(f"report_to: {name} is not installed; pip install {name}, or set report_to: none")


def _find_config(script: Path, config: str | None = None) -> Path:
    """The YAML to read: a path as given, or a variant by its name; without either the one next to the script."""
    named, default = script.parent / "variants" / script.stem / f"{config}.yaml", script.with_suffix(".yaml")
    for path in [Path(config).expanduser(), named] if config else [default]:
        if path.is_file() and path.resolve().parent.name != "accelerate_configs":
            return path
    if config and (HERE.parent / "accelerate_configs" / f"{Path(config).stem}.yaml").is_file():
        raise UserError(
            f"--config: {config} is one of accelerate's: accelerate launch --config_file accelerate_configs/"
            f"{Path(config).stem}.yaml recipes/{script.name} …; variants of {script.name}: {_variants(script)}"
        )
    raise UserError(f"--config: {config or default} does not exist; variants of {script.name}: {_variants(script)}")


def _variants(script: Path) -> str:
    return ", ".join(sorted(path.stem for path in (script.parent / "variants" / script.stem).glob("*.yaml"))) or "none"


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently keep the last; reads 1e-5 as a number."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "-+0123456789")


def _read_yaml(path: Path, shown) -> dict:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{shown}: line {error.problem_mark.line + 1}: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{shown}: not YAML: {first_line(error)}") from error
    if values is None:  # nothing but comments
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{shown}: not a mapping of keys to values but a {type(values).__name__}")
    return values


def _hints(cls):
    """(name, type hint) of what can be set. A default of None counts as a value of the type, annotated or not."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.init:
            yield field.name, hints[field.name] if field.default is not None else Union[hints[field.name], None]  # noqa: UP007


def _fit(where: str, value, hint):
    """`value` as pydantic's strict mode takes it for JSON: 1 for a float and "steps" for an enum, but no true for 1."""
    if isinstance(value, float) and value.is_integer():  # 1e3 for an int
        value = int(value)
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        faults = error.errors()
        said = faults[0]["msg"].replace("Input should", "should")
        takes_text = any(fault["type"] in ("string_type", "enum", "literal_error") for fault in faults)
        quoted = '"no"' if isinstance(value, bool) else f'"{value}"'
        advice = f": quote it, as in {quoted}" if takes_text and isinstance(value, bool | int | float) else ""
        raise UserError(f"{where}: {value!r} {said}{advice}") from None


def _as_in_yaml(text: str, hint):
    """A mapping, or what may be a list, on the command line."""
    try:
        return _fit("", yaml.load(text, _Loader), hint)
    except (UserError, yaml.YAMLError) as error:
        said = " ".join(str(error).removeprefix(": ").split())
        form = "{name: value}" if get_origin(hint) is dict else "[one, another]"
        raise argparse.ArgumentTypeError(f"{said}; write it as '{form}'") from None


def _unknown(what, name, known) -> str:
    dashes = "--" if name.startswith("--") else ""
    now = dashes + RENAMED.get(name.removeprefix("--").replace("-", "_"), "")
    if now in known:
        return f"unknown {what} {name}: it is called {now} now"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"unknown {what} {name}" + (f"; did you mean {close[0]}?" if close else "; --help-all lists those there are")
