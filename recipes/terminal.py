"""What a recipe prints besides its results: `--help`, what is trained, the next command; and what it hides."""

import dataclasses
import logging
import math
import re
import shutil
import textwrap
import warnings

import yaml

# The tables in which transformers names weights that a file lacks or has too many: rows of `name | status`.
ROW = re.compile(r"^([\w.*{}, -]+?) *\| *(MISSING|UNEXPECTED|MISMATCH|CONVERSION)", re.MULTILINE)
COLOUR = re.compile(r"\x1b\[[\d;]*m")
NEW_HEAD = {  # of a classifier that is made of a language model: the one that is to be trained, and the old one
    "MISSING": re.compile(r"(score|classifier|pre_classifier|(\w+\.)?pooler)\."),
    "UNEXPECTED": re.compile(r"(lm_head|cls|lm_predictions|mask_predictions|vocab_\w+)\."),
}
PATHS = ("model_name_or_path", "reward_model", "judge", "dataset_name", "output_dir")
OPTIONS = {  # of `eval.compare`, by the settings that they have to follow
    "prompt_column": "--prompt_column",
    "prompt_tokens": "--prompt_tokens",
    "max_prompt_tokens": "--max_prompt_tokens",
    "max_completion_length": "--max_new_tokens",
    "temperature": "--temperature",
}
REPORT = re.compile(r"(?<=--output )\S+")
LIBRARIES = r"(transformers|trl|peft|accelerate|datasets|torch|huggingface_hub)\."


def hide_noise():
    """Hide, by name, what libraries say and nobody who runs a recipe can change; anything else still comes through.

    That is their warnings of what a later version of them will do, and transformers' table of a classifier's new head.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=LIBRARIES)
    logging.getLogger("transformers.modeling_utils").addFilter(_is_no_new_head)


def _is_no_new_head(record):
    text = COLOUR.sub("", record.getMessage())
    rows = ROW.findall(text) if " LOAD REPORT from: " in text else []
    return not rows or not all(status in NEW_HEAD and NEW_HEAD[status].match(name) for name, status in rows)


# --- --help ---------------------------------------------------------------------------------------------------------


def print_help(usage, shown, variants, values, classes):
    """The keys that are the project's own, with the values of the YAML `shown`, then what else that sets."""
    width = shutil.get_terminal_size().columns
    print(f"usage: {usage}\nDefaults: {shown}. All keys, TRL's and transformers' too: --help-all")
    print(f"Variants, for --config: {variants}\n")
    listed = set()
    for cls in classes:
        print(f"{(cls.__doc__ or cls.__name__).splitlines()[0]}")
        for field in own_fields(cls):
            listed.add(field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            default = values.get(field.name, default)
            said = "" if default is dataclasses.MISSING else f"(default: {_as_yaml(default)})"
            words = field.metadata.get("help"), said
            choices = "{" + ",".join(field.metadata["choices"]) + "} " if "choices" in field.metadata else ""
            text = f"  --{field.name} {choices} {' '.join(filter(None, words))}"
            print(textwrap.fill(text, width, subsequent_indent=" " * 6, break_on_hyphens=False))
        print()
    print(f"TRL's and transformers', as {shown} sets them:")
    for name, value in values.items():
        if name not in listed:
            print(f"  --{name} {_as_yaml(value)}")


def _as_yaml(value):
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def own_fields(cls):
    """The fields of a dataclass that it has not from one of TRL's or transformers', nor refuses."""
    theirs = [base for base in cls.__mro__ if base.__module__.split(".")[0] in ("trl", "transformers")]
    names = {name for base in theirs for name in getattr(base, "__dataclass_fields__", ())}
    names |= {*getattr(cls, "REFUSED", ())}
    return [field for field in dataclasses.fields(cls) if field.init and field.name not in names]


# --- Before and after training --------------------------------------------------------------------------------------


def announce(trainer):
    """Print what is about to be trained, on what, for how long and where it goes."""
    trainer.accelerator.print("\n".join(summary(trainer)))


def summary(trainer):
    """The lines of `announce`."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    critic = getattr(getattr(trainer, "policy", None), "critic", None)
    own = set() if critic is None else {*critic.parameters()}
    lines = [f"model       {_path(model)}: {_size(weight for weight in model.parameters() if weight not in own)}"]
    if critic is not None:
        kind = f"started from {args.value_model_path}" if args.value_model_path else "a value head on the model"
        lines.append(f"critic      {kind}: {_size(own)}")
    if getattr(trainer, "ref_model", None) is not None:
        lines.append("reference   a frozen copy")
    elif critic is not None:
        lines.append("reference   the model without its adapter")
    names, weights = (getattr(trainer, name, ()) for name in ("reward_func_names", "reward_weights"))
    for name, weight, function in zip(names, weights, getattr(trainer, "reward_funcs", ()), strict=True):
        model = getattr(getattr(function, "__wrapped__", function), "model", None)
        size = f": {_path(model)}: {_size(model.parameters())}" if model else ""
        lines += [f"reward      {name} × {weight:g}{size}"] if weight else []
    held_out = "" if trainer.eval_dataset is None else f", {len(trainer.eval_dataset):,} held out"
    lines.append(f"data        {len(trainer.train_dataset):,} rows{held_out}")
    lines.append(f"training    {_length(args, trainer)}")
    steps = _steps(args, trainer)
    if 2 * (warmup := args.get_warmup_steps(steps)) >= steps:
        said = f"{steps} steps, of which {warmup} warm up: it will learn little; raise num_train_epochs or max_steps"
        lines.append(f"note        {said}")
    return [*lines, f"result      {args.output_dir}"]


def _path(model):
    return model.config._name_or_path or "made from scratch"


def _size(weights):
    counts = [(_numel(weight), weight.requires_grad) for weight in weights]
    total, trained = sum(n for n, _ in counts), sum(n for n, trains in counts if trains)
    share = {0: "frozen", total: "all trained"}.get(trained, f"{trained / total:.2%} of them trained")
    return f"{total:,} parameters, {share}"


def _numel(weight):
    """Parameters in a tensor that ZeRO-3 has split over ranks, or that holds two of 4 bits in a byte."""
    numel = getattr(weight, "ds_numel", weight.numel())
    return 2 * weight.element_size() * numel if type(weight).__name__ == "Params4bit" else numel


def _length(args, trainer):
    """Episodes and rollouts, where completions are sampled; optimiser steps and their batch."""
    rollout = getattr(args, "generation_batch_size", None)
    if rollout and args.max_steps > 0:
        steps_per_rollout = args.num_iterations * args.steps_per_generation // args.gradient_accumulation_steps
        rollouts = math.ceil(args.max_steps / steps_per_rollout)
        return f"episodes {rollouts * rollout:,}, rollouts {rollouts:,} of {rollout:,}, steps {args.max_steps:,}"
    length = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    return f"{length} in batches of {_batch(args):,}"


def _steps(args, trainer):
    """Optimiser steps in all."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(len(trainer.train_dataset) * args.num_train_epochs / _batch(args))


def _batch(args):
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def _with_option(command, option, value):
    """The command with the option set to `value`, a list or None for without it."""
    command = re.sub(rf" {option}( (?!--)\S+)+", "", command)
    values = [] if value is None else value if isinstance(value, list) else [value]
    return " ".join([command, option, *map(str, values)]) if values else command


def next_command(text, theirs, given):
    """The command of evaluation that a YAML's header names, with this run's paths; None where it names none that fits.

    `text` is the YAML's, `theirs` what it sets, and `given` what is in effect.
    """
    header = "\n".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    found = re.search(r"python -m eval\.compare (?:[^\n\\]|\\\n)*", header)
    if not found or theirs.get("reward_label") != given.get("reward_label"):
        return None
    command = " ".join(found[0].replace("\\\n", " ").split())
    for key, option in OPTIONS.items():
        if key in theirs and theirs[key] != given[key]:
            command = _with_option(command, option, given[key])
    if "reward_model" in theirs.get("rewards", ()) and "reward_model" not in given["rewards"]:
        command = re.sub(r" --reward \w+=" + re.escape(str(theirs["reward_model"])) + r"\S*", "", command)
    if theirs.get("dataset_name") != given.get("dataset_name"):  # the YAML's judge was made for its own data
        command = re.sub(r" --judge \S+", "", command)
    moved = given["output_dir"] != theirs["output_dir"]  # the report of another run stays as it is
    added = [name for name in given.get("rewards", ()) if name not in theirs.get("rewards", ())]
    functions = [name if ":" in name else f"rewards:{name}" for name in added]
    rewards = "".join(f" --reward {name.rpartition(':')[2]}={name}" for name in functions)
    report = f"{given['output_dir'].rstrip('/')}_report"
    command = REPORT.sub(lambda path: (report if moved else path[0]) + rewards, command)
    swapped = {theirs[key]: given[key] for key in PATHS if key in theirs and isinstance(given[key], str)}
    paths = "|".join(map(re.escape, swapped))
    return re.sub(rf"(?<![\w./-])({paths})(?![\w./-])", lambda path: swapped[path[0]], command) if paths else command
