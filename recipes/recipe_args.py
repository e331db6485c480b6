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
import fcntl
import functools
import importlib.util
import json
import os
import pkgutil
import random
import re
import sys
import tempfile
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from requests import RequestException
from safetensors import SafetensorError
from trl import ScriptArguments, TrlParser

import terminal
from trl_ppo.inputs import ScoreError, UserError, check_numbers, first_line, is_messages, looks_local
from trl_ppo.settings import PPOSettings

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


# --- YAML + command line → dataclasses ----------------------------------------------------------------------------


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
        main(script_args, training_args, model_args)
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


# Settings of TRL's removed PPO trainers that have another name now.
RENAMED = {
    "num_ppo_epochs": "num_iterations",
    "ppo_epochs": "num_iterations",
    "batch_size": "per_device_train_batch_size",
    "local_rollout_forward_batch_size": "per_device_train_batch_size",
    "response_length": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "stop_token": "generation_kwargs",
    "stop_token_id": "generation_kwargs",
    "sft_model_path": "model_name_or_path",
    "reward_model_path": "reward_model",
    "cliprange": "epsilon",
    "init_kl_coef": "kl_coef",
    "exp_name": "run_name",
    "num_sample_generations": "eval_steps",
}


def _unknown(what, name, known) -> str:
    dashes = "--" if name.startswith("--") else ""
    now = dashes + RENAMED.get(name.removeprefix("--").replace("-", "_"), "")
    if now in known:
        return f"unknown {what} {name}: it is called {now} now"
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown {what} {name}" + (f"; did you mean {close[0]}?" if close else "; --help-all lists those there are")


# --- What recipes take besides TRL's settings -----------------------------------------------------------------------


def _option(help, default=None):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(kw_only=True)
class OutputArguments(ScriptArguments):
    """TRL's `ScriptArguments`, and what every recipe takes that writes to `output_dir`."""

    overwrite_output_dir: bool = _option("Train into a folder that holds a run; its checkpoints are set aside.", False)

    CHECKPOINT_FILES: ClassVar[tuple] = ()  # what a checkpoint must hold besides Trainer's files
    dry_run: ClassVar[bool] = False  # what has it claims no folder

    def claim_output_dir(self, training_args, model_args) -> None:
        """Take `output_dir` for this run alone, and put the checkpoint to resume from, or None, into `training_args`.

        UserError for a folder that cannot be written to, that another run is writing to, that a model is read from, or
        that holds a run already.
        """
        from trl_ppo.checkpoints import checkpoint_to_resume, numbered, set_aside  # torch waits until here

        folder, main = Path(training_args.output_dir), training_args.process_index == 0
        for key in ("model_name_or_path", "reward_model", "value_model_path"):
            given = [getattr(args, key, None) for args in (self, training_args, model_args)]
            paths = [path for value in given for path in (value if isinstance(value, list) else [value])]
            if any(path and folder.resolve() == Path(path).resolve() for path in paths):
                raise UserError(f"output_dir: '{folder}' is where {key} is read from; give another folder")
        if self.dry_run:
            return
        if main:
            lock_folder(folder)
        given = training_args.resume_from_checkpoint
        if main and str(given).lower() == "true" and not numbered(folder):
            self._refuse_a_run(folder, [])  # before it says that there is nothing to resume from
        training_args.resume_from_checkpoint = checkpoint_to_resume(given, training_args, self.CHECKPOINT_FILES)
        if not main or training_args.resume_from_checkpoint is not None:
            return
        self._refuse_a_run(folder, numbered(folder))
        set_aside(numbered(folder))

    def _refuse_a_run(self, folder, checkpoints) -> None:
        there = [name for name in ("config.json", "adapter_config.json") if (folder / name).exists()]
        there += [path.name for path in checkpoints]
        if there and not self.overwrite_output_dir:
            goes_on = "--resume_from_checkpoint true to go on with it, " if checkpoints else ""
            raise UserError(
                f"output_dir: '{folder}' holds a run already ({there[-1]}); give {goes_on}another output_dir, or "
                "--overwrite_output_dir true"
            )


_LOCKS: dict[Path, int] = {}  # folder → its descriptor; the lock on it ends with this process, however that ends


def lock_folder(folder: Path) -> None:
    """Make `folder` and lock it; UserError if it cannot be written to, or another run has locked it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: '{folder}' cannot be made: {error.strerror}; give another folder") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"output_dir: '{folder}' cannot be written to; give another folder, or the right to write")
    if folder not in _LOCKS:
        _LOCKS[folder] = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(_LOCKS[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"output_dir: another run is writing to '{folder}' (after Ctrl-C until its rollout ends); wait, or give "
            "another folder"
        ) from error
    except OSError:  # a file system without locks
        pass


@dataclasses.dataclass(kw_only=True)
class RecipeArguments(OutputArguments):
    """What every recipe that can train an adapter takes."""

    merge_adapter: bool = _option("With use_peft: write adapter and base as one model to output_dir/merged.", False)

    def check(self, model_args) -> None:
        """UserError for what does not go together, and for folders that do not exist."""
        if self.merge_adapter and not model_args.use_peft:
            raise UserError("merge_adapter: true, but use_peft is false, so there is no adapter; set use_peft: true")
        if (model_args.load_in_4bit or model_args.load_in_8bit) and not model_args.use_peft:
            raise UserError("load_in_4bit, load_in_8bit: quantised weights cannot be trained; set use_peft: true")
        if re.fullmatch(r"[\w.]+", modules := str(model_args.lora_target_modules)):
            model_args.lora_target_modules = None if modules == "None" else [modules]  # TRL would make it a regex
        check_path("dataset_name", self.dataset_name)
        if model_args.model_name_or_path is not None:  # none where a model is made from scratch
            check_path("model_name_or_path", model_args.model_name_or_path)


@dataclasses.dataclass(kw_only=True)
class PPOArguments(RecipeArguments):
    """What the PPO recipes take: the rewards with their weights, and which prompts."""

    rewards: dict[str, float] = dataclasses.field(
        metadata={
            "help": "Each reward and its weight, which may be negative; 0 logs it only. A reward is reward_model, a "
            "function of recipes/rewards.py, or one of your own as file.py:function."
        }
    )
    algorithm: str = dataclasses.field(
        default="ppo",
        metadata={
            "help": "ppo, or TRL's own grpo or rloo on the same prompts and rewards, with kl_coef as their β and the "
            "settings that they share.",
            "choices": ["ppo", "grpo", "rloo"],
        },
    )
    group_size: int = _option("Completions of each prompt under grpo and rloo.", 8)
    reward_model: list[str] | str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "The sequence classifier that rewards call reward_model: Hub id or folder; or a list of them, of "
            "which the lowest score counts."
        },
    )
    reward_variance_coef: float | None = _option("With several: the mean score minus this × their variance counts.")
    preference_as_reward: bool = _option("Its score becomes the chance to beat a completion of the reference.", False)
    judge: str | None = _option(
        "A classifier that training never optimises, logged as rewards/judge; load_best_model_at_end goes by it."
    )
    early_stopping_patience: int | None = _option(
        "Evaluations in a row that find nothing better after which training ends; needs load_best_model_at_end."
    )
    reward_label: str | None = _option("Which of its labels counts, if it has several.")
    reward_max_length: int = _option("Tokens that it reads; longer texts lose their beginning.", 512)
    reward_dtype: str = _option("Of its weights.", "float32")
    reward_batch_size: int = _option("Texts that it scores at a time.", 64)
    dry_run: bool = _option("Check all, train one step and print some of its completions; save nothing.", False)
    prompt_column: str = _option("Column to take prompts from.", "prompt")
    prompt_tokens: list[int] | None = dataclasses.field(
        default=None, metadata={"help": "Cut each prompt to a random number of tokens: least and most."}
    )
    min_prompt_characters: int = _option("Leave out shorter texts.", 1)
    min_prompt_tokens: int = _option("The same in tokens, before they are cut.", 1)
    max_prompt_tokens: int | None = _option("Leave out longer ones.")
    test_prompts: int = _option("Held-out prompts to evaluate on, from the first on.", 512)

    SETTINGS: ClassVar[type] = PPOSettings
    CHECKPOINT_FILES: ClassVar[tuple] = ("critic.safetensors", "ppo_state.json")

    def check(self, training_args, model_args) -> None:
        """UserError for rewards that cannot be had, and for what does not go together; loads no model."""
        from rewards import check_signature, find_function  # light, but it may import a file of the user's

        super().check(model_args)
        if self.algorithm != "ppo":
            self.CHECKPOINT_FILES = ()
        if training_args.reward_weights is not None:
            raise UserError("reward_weights: give each reward its weight in rewards: {name: weight}")
        if (cut := self.prompt_tokens) and not (len(cut) == 2 and 0 < cut[0] <= cut[1]):
            raise UserError(f"prompt_tokens: {cut} must be two numbers, the least and the most, as in [2, 8]")
        if not self.rewards:
            raise UserError("rewards: is empty; name at least one, as in rewards: {reward_model: 1.0}")
        if self.preference_as_reward and "reward_model" not in self.rewards:
            raise UserError("preference_as_reward: true, but rewards: does not name reward_model; add it, or set false")
        if self.reward_variance_coef is not None and len(self.reward_models) < 2:
            raise UserError("reward_variance_coef: is for several classifiers; list them in reward_model")
        for name in self.rewards:
            if name != "reward_model":
                check_signature("rewards", name, find_function("rewards", name))
            elif not self.reward_models:
                raise UserError("rewards: reward_model has a weight, but reward_model: names no classifier")
        for path in self.reward_models if "reward_model" in self.rewards else ():
            self._check_classifier("reward_model", path)
        if self.judge is not None:
            self._check_judge(training_args)
        if self.early_stopping_patience is not None and not training_args.load_best_model_at_end:
            raise UserError("early_stopping_patience: goes by the best checkpoint; set load_best_model_at_end: true")

    def claim_output_dir(self, training_args, model_args) -> None:
        """As that of every recipe; a dry run leaves the folder alone, and takes one step with one that goes again."""
        super().claim_output_dir(training_args, model_args)
        if self.dry_run:
            self._folder = tempfile.TemporaryDirectory(prefix="dry_run_")
            short = {"output_dir": self._folder.name, "max_steps": 1, "logging_strategy": "no"}
            silent = {"save_strategy": "no", "load_best_model_at_end": False, "report_to": [], "eval_on_start": False}
            silent |= {"eval_delay": 2, "resume_from_checkpoint": None}  # held-out prompts are loaded, that is all
            shown = {"log_completions": True, "num_completions_to_print": 4}
            for name, value in (short | silent | shown).items():
                setattr(training_args, name, value)

    def _check_judge(self, training_args) -> None:
        """The judge is another model than the one that is optimised; the best checkpoint is then the one it prefers."""
        if self.judge in self.reward_models:
            raise UserError(f"judge: {self.judge!r} is the reward model, which is optimised; give another classifier")
        self._check_classifier("judge", self.judge)
        if training_args.metric_for_best_model == "objective/scores":
            training_args.metric_for_best_model = "rewards/judge"

    def _check_classifier(self, key: str, path: str) -> None:
        from transformers.utils import find_adapter_config_file

        from trl_ppo.reward_model import label_index

        config = check_model(key, path, "SequenceClassification")
        is_classifier = "Classification" in str(config.architectures)  # and no adapter, whose labels are its own
        if is_classifier and find_adapter_config_file(path) is None:
            label_index(path, config.id2label, self.reward_label)

    @property
    def reward_models(self) -> list[str]:
        """Those of `reward_model`: none, one, or an ensemble."""
        given = self.reward_model or []
        return given if isinstance(given, list) else [given]

    def load_rewards(self, training_args, model_args) -> list:
        """The reward functions, in the order of `rewards`, and the judge, whose weights go into `training_args`."""
        from rewards import find_function

        training_args.reward_weights = list(self.rewards.values())
        functions = [
            find_function("rewards", name)
            if name != "reward_model"
            else self._load_reward_model(training_args, model_args)
            for name in self.rewards
        ]
        if self.judge is not None:
            functions.append(self._load_classifier(self.judge))
            functions[-1].__name__ = "judge"  # by which its scores are logged
            training_args.reward_weights.append(0.0)
        return functions

    def callbacks(self) -> list:
        """What the trainer calls besides its own: transformers' early stopping, where it is asked for."""
        from transformers import EarlyStoppingCallback

        patience = None if self.dry_run else self.early_stopping_patience
        return [] if patience is None else [EarlyStoppingCallback(patience)]

    def _load_classifier(self, path: str):
        from trl_ppo import RewardModel

        settings = {"label": self.reward_label, "max_length": self.reward_max_length, "dtype": self.reward_dtype}
        return RewardModel(path, batch_size=self.reward_batch_size, **settings)

    def _load_reward_model(self, training_args, model_args):
        from trl import get_quantization_config

        from rewards import ensemble, preference, reference_sampler

        models = [self._load_classifier(path) for path in self.reward_models]
        if len(models) > 1:
            reward = ensemble(models, self.reward_variance_coef)
        else:
            reward = models[0]
            reward.__name__ = "reward_model"  # as the YAML has it, whatever its folder is called
        if not self.preference_as_reward:
            return reward
        path, quantization = model_args.model_name_or_path, get_quantization_config(model_args)
        return preference(reward, reference_sampler(path, training_args, quantization))


def init_kwargs(training_args, model_args) -> dict[str, Any]:
    """How to load the model: the YAML's `model_init_kwargs`, and TRL's settings of its own for the same."""
    return (training_args.model_init_kwargs or {}) | {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
    }


def fit_out(trainer) -> None:
    """What every stage but PPO adds to its trainer: short lines, a card that names the base, 4 bits that train."""
    from trl_ppo.callbacks import StageProgress, complete_card, show_lines
    from trl_ppo.logprobs import keep_4bit_differentiable

    show_lines(trainer, StageProgress)
    complete_card(trainer)
    keep_4bit_differentiable(trainer.model)


# --- Paths and data -----------------------------------------------------------------------------------------------


def check_path(key: str, path: str | None) -> None:
    """UserError, which names `key` and what to do, if `path` is missing, or can only be local and does not exist."""
    if path is None:
        raise UserError(f"{key}: is missing; give a Hub id or a folder")
    if not looks_local(path) or Path(path).expanduser().exists():
        return
    made_by = {f"data/{script.stem}": script.name for script in sorted(HERE.parent.glob("data_prep/*.py"))}
    folder = max((name for name in made_by if Path(path).as_posix().startswith(name)), key=len, default=None)
    advice = f"make it with: python data_prep/{made_by[folder]}" if folder else "make it first, or give a Hub id"
    raise UserError(f"{key}: {path!r} does not exist: {advice}")


def check_model(key: str, path: str | None, head: str | None = None):
    """The configuration of the model at `path`, or of an adapter's base; UserError if it cannot be had.

    With `head`, "CausalLM" or "SequenceClassification", its weights' names and its tokenizer are checked as well.
    """
    from transformers import AutoConfig, AutoTokenizer  # here and below: they take seconds, and --help need not wait

    check_path(key, path)
    try:
        if (Path(path) / "adapter_config.json").is_file():
            from peft import PeftConfig

            base = PeftConfig.from_pretrained(path).base_model_name_or_path
            check_path(f"{key}'s base model", base)
            return AutoConfig.from_pretrained(base)
        if head is None:
            return AutoConfig.from_pretrained(path)
        from trl_ppo.loading import check_tokenizer, load_skeleton

        model = load_skeleton(path, f"{key}: ", head)
        check_tokenizer(model, AutoTokenizer.from_pretrained(path))
        return model.config
    except UserError:
        raise
    except Exception as error:  # a user's folder may be wrong in any way
        raise UserError(f"{key}: {path!r}: no model can be loaded from there: {first_line(error)}") from error


LOADERS = {".csv": "csv", ".parquet": "parquet"}  # of single files; others are JSONL


def load_split(path: str, split: str, columns=(), config: str | None = None, key: str = "dataset_name"):
    """One split of a Hub dataset, of a local folder of {train,test}.jsonl[.gz] (or csv, parquet), or of one such file.

    Raises:
        UserError: no such path, split or column (with those there are), no rows, unreadable data, no way to the Hub, or
            a value of `columns` that is neither text nor messages.
    """
    import datasets

    check_path(key, path)
    where = f"{key}: {path!r}"
    files = {"path": path, "name": config}
    if Path(path).is_file():
        files = {"path": LOADERS.get(Path(path).suffix, "json"), "data_files": {split: path}}
    try:
        dataset = datasets.load_dataset(**files, split=split)
    except ConnectionError as error:
        raise UserError(f"{where}: {first_line(error)}; connect, or give the path of a local folder") from error
    except StopIteration as error:  # what datasets raises for a file without a single row
        raise UserError(f"{where}: split {split!r} has no rows") from error
    except Exception as error:  # a file of the user's may be wrong in any way
        cause = f": {first_line(error.__cause__)}" if error.__cause__ else ""
        raise UserError(f"{where}: {first_line(error)}{cause}") from error
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        there = ", ".join(dataset.column_names)
        raise UserError(f"{where}: split {split!r} has no column {', '.join(missing)}; it has {there}")
    if not len(dataset):
        raise UserError(f"{where}: split {split!r} has no rows")
    for column in columns:
        for row, text in enumerate(dataset[column]):
            if not isinstance(text, str) and not is_messages(text):
                raise UserError(f"{where}: {column!r} of row {row} is {text!r:.60}: not a text, nor a list of messages")
    return dataset


def load_prompts(args: PPOArguments, split: str, tokenizer, seed: int, limit: int | None = None):
    """A dataset with the column `prompt`, texts or messages: those of the wanted length, cut where asked.

    Raises:
        UserError: as `load_split`; or no prompt is left.
    """
    column = args.prompt_column
    data = load_split(args.dataset_name, split, [column], args.dataset_config)
    if any(isinstance(text, list) for text in data[column]):
        if args.prompt_tokens:
            raise UserError(f"prompt_tokens: {args.prompt_tokens}: {column!r} holds messages, which cannot be cut")
        if tokenizer.chat_template is None:
            raise UserError(f"dataset_name: {column!r} holds messages, but the tokenizer has no chat template")

    def num_tokens(text):
        if isinstance(text, str):
            return len(tokenizer(text)["input_ids"])
        return len(tokenizer.apply_chat_template(text, add_generation_prompt=True)["input_ids"])

    def fits(row):
        text = row[column]
        if len(text) < args.min_prompt_characters:
            return False
        if args.min_prompt_tokens == 1 and args.max_prompt_tokens is None:
            return True
        return args.min_prompt_tokens <= num_tokens(text) <= (args.max_prompt_tokens or float("inf"))

    kept = data.filter(fits, desc="Filtering prompts")
    if not len(kept):
        raise UserError(f"dataset_name: no prompt of split {split!r} is as long as min_prompt_… and max_prompt_… want")
    if len(kept) < len(data):
        print(f"{split}: {len(data) - len(kept)} of {len(data)} prompts are too short or too long and left out")
    kept = kept.select(range(min(len(kept), limit or len(kept))))
    cut = prompt_cutter(tokenizer, *args.prompt_tokens, seed) if args.prompt_tokens else lambda text: text
    return kept.map(lambda row: {"prompt": cut(row[column])}, desc="Cutting prompts", load_from_cache_file=False)


def prompt_cutter(tokenizer, least: int, most: int, seed: int):
    """A function that cuts texts, one after the other, to their first k tokens; k uniform in least..most."""
    rng = random.Random(seed)

    def cut(text: str) -> str:
        return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][: rng.randint(least, most)])

    return cut


def merge_adapter(folder, dtype="auto") -> str:
    """Write the model that a LoRA adapter and its base make together to `folder`/merged, with its tokenizer.

    The base is loaded again, so that weights which were quantised for training are merged at full precision. Returns
    the new folder; it loads with plain `AutoModelForCausalLM`, or as a sequence classifier if the adapter is one.
    """
    from peft import AutoPeftModelForCausalLM, PeftConfig
    from transformers import AutoTokenizer

    from trl_ppo.reward_model import load_classifier

    merged = Path(folder) / "merged"
    if PeftConfig.from_pretrained(folder).task_type == "SEQ_CLS":
        model, tokenizer = load_classifier(folder, dtype)
    else:
        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    model.merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    return str(merged)
