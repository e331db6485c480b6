"""Compare a base model with its tuned one on the same prompts, drawn with the same seeds.

    python -m eval.compare --base openai-community/gpt2 --tuned runs/tuned --prompts data/toy_reviews/prompts \\
        --reward lexicon=data_prep.toy_reviews:lexicon_score --reward judge=runs/reward#POSITIVE --output runs/eval

writes `results.json` and, rendered from it alone, `report.md`: every reward before and after, KL(tuned‖base),
completion length, missing EOS and distinct trigrams, each with n and a 95 % interval, and samples paired by index.

A reward is `NAME=module:function` (TRL's signature, `f(prompts, completions, **columns) -> list[float]`) or
`NAME=classifier`, a sequence classifier's folder or Hub id, with `#LABEL` to choose one of its labels.
Bad input ends in one line on stderr and exit status 2, and nothing is written.
"""

import argparse
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import torch
from tqdm import tqdm

from eval.intervals import compare_pairs, distinct_trigrams, interval
from eval.loading import (
    InputError,
    OneLineParser,
    at_least,
    check_exists,
    check_model,
    cut_after_eos,
    first_line,
    load_model,
    load_tokenizer,
    positions_of,
    positive,
    set_stop_ids,
    stop_ids,
)
from eval.report import SCHEMA_VERSION, print_table, write_atomically, write_report

ROOT = Path(__file__).resolve().parent.parent
ROLES = ("base", "tuned")
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
REWARD_NAME = re.compile(r"[\w.-]+")
WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin", "adapter_model*")
NOT_COLUMNS = {"prompts", "completion", "completions", "completion_ids"}  # names that a reward gets from elsewhere
LIBRARIES = ("trl", "transformers", "torch", "datasets", "peft", "scipy")

Reward = Callable[..., list[float]]


@dataclass
class Prompts:
    """The prompts used, as text (n,) and as token ids, and the other columns of their rows, each (n,)."""

    texts: list[str]
    columns: dict[str, list]
    ids: list[list[int]] = field(default_factory=list)


@dataclass
class Samples:
    """One model's completions, one for each prompt: token ids, text, whether they ended in EOS, scores by reward."""

    ids: list[list[int]]
    texts: list[str]
    ended: list[bool]
    scores: dict[str, list[float]] = field(default_factory=dict)
    kl: list[float] | None = None  # nats per sequence, against the base


# --------------------------------------------------------------------------------------------------------------
# Input
# --------------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="eval.compare", description="Compare a base model with its tuned one.")
    add = parser.add_argument
    add("--base", required=True, help="folder or Hub id of the model before tuning")
    add("--tuned", required=True, help="folder or Hub id of the tuned model; a LoRA adapter's works too")
    add("--prompts", required=True, help="folder, JSONL file or Hub id of the prompts")
    add("--reward", action="append", required=True, metavar="NAME=SPEC", help="module:function or classifier[#LABEL]")
    add("--output", type=Path, required=True, help="folder for results.json and report.md")
    add("--n_prompts", type=at_least(2), default=512, help="the first so many prompts (default 512)")
    add("--max_new_tokens", type=at_least(1), default=24)
    add("--temperature", type=positive, default=1.0)
    add("--seed", type=at_least(0), default=0)
    add("--batch_size", type=at_least(1), default=64)
    add("--prompt_column", default="prompt")
    add("--prompt_tokens", type=at_least(1), nargs=2, metavar=("MIN", "MAX"), help="cut prompts at random lengths")
    add("--split", default="test")
    add("--n_samples", type=at_least(0), default=5, help="samples shown in the report (default 5)")
    add("--overwrite", action="store_true", help="replace the results already in --output")
    return parser


def check_output(folder: Path, overwrite: bool) -> None:
    """InputError if the results cannot be written to `folder`, or would replace others unasked."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"--output {folder}: {existing} is not a folder that can be written to")
    if (folder / "results.json").exists() and not overwrite:
        raise InputError(f"--output {folder} already has a results.json; give another folder or --overwrite")


def load_prompts(source: str, split: str, column: str, n: int) -> Prompts:
    """The first `n` rows, in order, fewer if there are fewer; InputError if two non-empty texts cannot be had."""
    check_exists("--prompts", source)
    files = {"path": "json", "data_files": {split: source}} if Path(source).is_file() else {"path": source}
    try:
        rows = datasets.load_dataset(**files, split=split)
    except StopIteration as error:  # what datasets raises for a file without a single row
        raise InputError(f"--prompts {source}: split {split} is empty") from error
    except Exception as error:  # whatever a loader of foreign files may raise, its cause says more
        raise InputError(f"--prompts {source}: {first_line(error.__cause__ or error)}") from error
    if column not in rows.column_names:
        raise InputError(f"--prompts {source}: no column {column!r}; there are {', '.join(rows.column_names)}")
    rows = rows.select(range(min(n, len(rows))))
    if len(rows) < 2:
        raise InputError(f"--prompts {source}: split {split} has {len(rows)} rows; an interval needs at least 2")
    texts = list(rows[column])
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise InputError(f"--prompts {source}: {column!r} of row {index} is not a text or is empty")
    others = [name for name in rows.column_names if name != column and name not in NOT_COLUMNS]
    return Prompts(texts, {name: list(rows[name]) for name in others})


def cut_prompts(texts: list[str], tokenizer, low: int, high: int, seed: int) -> list[str]:
    """Each text's first k tokens as text, k uniform in low..high; text i's k depends on `seed` and i alone."""
    rng = np.random.default_rng(seed)
    lengths = [int(rng.integers(low, high + 1)) for _ in texts]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [tokenizer.decode(row[:length]) for row, length in zip(ids, lengths, strict=True)]


# --------------------------------------------------------------------------------------------------------------
# Rewards
# --------------------------------------------------------------------------------------------------------------


def parse_rewards(options: list[str]) -> dict[str, str]:
    """`NAME=SPEC` options as a dict, in order; InputError for a malformed or repeated one."""
    specs: dict[str, str] = {}
    for option in options:
        name, _, spec = option.partition("=")
        if not REWARD_NAME.fullmatch(name) or not spec or spec.startswith("#"):
            raise InputError(f"--reward {option}: expected NAME=module:function or NAME=classifier[#LABEL]")
        if name in specs:
            raise InputError(f"--reward {option}: the name {name!r} is taken by {specs[name]}")
        specs[name] = spec
    return specs


def load_rewards(specs: dict[str, str]) -> dict[str, Reward]:
    """The reward functions by name, cheap ones first checked; InputError if one cannot be had."""
    functions = {name: load_function(name, spec) for name, spec in specs.items() if FUNCTION.fullmatch(spec)}
    for name, spec in specs.items():
        if name not in functions:
            check_exists(f"--reward {name}:", spec.partition("#")[0])
    return {name: functions.get(name) or load_classifier(name, spec) for name, spec in specs.items()}


def load_function(name: str, spec: str) -> Reward:
    """`module:function`, imported."""
    module_name, _, function_name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"--reward {name}: cannot import {spec}: {first_line(error)}") from error
    if not callable(function):
        raise InputError(f"--reward {name}: {spec} is not a function")
    return function


def load_classifier(name: str, spec: str) -> Reward:
    """`path[#LABEL]` as a RewardModel."""
    from rewards import RewardModel

    path, _, label = spec.partition("#")
    try:
        return RewardModel(path, label=label or None)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--reward {name}: cannot use {spec}: {first_line(error)}") from error


def score(name: str, reward: Reward, prompts: Prompts, samples: Samples, batch_size: int) -> list[float]:
    """The reward's score of every sample (n,); InputError unless it gives one finite number for each."""
    scores: list[float] = []
    for rows in batches(len(prompts.texts), batch_size, f"score {name}"):
        columns = {key: values[rows] for key, values in prompts.columns.items()}
        texts = samples.texts[rows]
        given = reward(prompts=prompts.texts[rows], completions=texts, completion_ids=samples.ids[rows], **columns)
        given = [] if given is None else list(given)
        if len(given) != len(texts):
            raise InputError(
                f"reward {name} returned {len(given)} scores for {len(texts)} completions, from sample {rows.start}"
            )
        for index, value in enumerate(given, rows.start):
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


# --------------------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------------------


def check_vocabulary(models: dict, tokenizer, tuned_path: str) -> None:
    """InputError unless the base can score the tuned model's tokens: same count, same meaning."""
    base, tuned = (models[role].config.vocab_size for role in ROLES)
    if base != tuned:
        raise InputError(f"base has {base} tokens and tuned {tuned}: KL needs one vocabulary")
    if (Path(tuned_path) / "tokenizer.json").is_file():
        theirs = load_tokenizer(tuned_path).get_vocab()
        changed = next((token for token, index in tokenizer.get_vocab().items() if theirs.get(token) != index), None)
        if changed is not None:
            raise InputError(f"base and tuned number the token {changed!r} differently: KL needs one vocabulary")


def check_lengths(prompts: Prompts, models: dict, max_new_tokens: int) -> None:
    """InputError for a prompt without tokens, or one too long for the models' positions."""
    room = min(positions_of(models[role]) for role in ROLES)
    for index, ids in enumerate(prompts.ids):
        if not ids:
            raise InputError(f"prompt {index} has no tokens")
        if len(ids) + max_new_tokens > room:
            raise InputError(
                f"prompt {index} has {len(ids)} tokens; with {max_new_tokens} new ones that is over the models' "
                f"{room} positions (--prompt_tokens cuts prompts)"
            )


def generate(model, tokenizer, prompt_ids: list[list[int]], eos: list[int], settings, title: str) -> list[list[int]]:
    """One completion for each prompt, up to and including its first EOS; batch b is drawn with seed + b."""
    from scoring import pad_batch

    set_stop_ids(model, tokenizer, eos)
    completions: list[list[int]] = []
    for number, rows in enumerate(batches(len(prompt_ids), settings.batch_size, f"generate {title}")):
        batch = pad_batch(prompt_ids[rows], [[]] * len(prompt_ids[rows]), tokenizer.pad_token_id)
        torch.manual_seed(settings.seed + number)
        sequences = model.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            max_new_tokens=settings.max_new_tokens,
            do_sample=True,
            temperature=settings.temperature,
            top_k=0,
            top_p=1.0,
        )
        new_tokens = sequences[:, batch["input_ids"].size(1) :].tolist()
        completions += [cut_after_eos(ids, eos) for ids in new_tokens]
    return completions


def sequence_kl(
    models: dict, prompt_ids: list[list[int]], completion_ids: list[list[int]], pad_id: int, settings
) -> list[float]:
    """Σ_t log π_tuned(y_t) − log π_base(y_t) of each completion (n,), in nats, at the sampling temperature.

    Its mean over the tuned model's own samples estimates KL(tuned‖base) per sequence. Teaches both models to score,
    in place.
    """
    from scoring import add_scoring_forward, pad_batch

    for role in ROLES:
        add_scoring_forward(models[role], settings.temperature)
    log_ratios: list[float] = []
    for rows in batches(len(prompt_ids), settings.batch_size, "KL"):
        batch = pad_batch(prompt_ids[rows], completion_ids[rows], pad_id)
        width = batch.pop("completion_mask").size(1)
        with torch.no_grad():
            base, tuned = (log_probs(models[role], batch, width) for role in ROLES)
        log_ratios += (tuned - base).sum(1).tolist()
    return log_ratios


def log_probs(model, batch: dict[str, torch.Tensor], width: int) -> torch.Tensor:
    """The log-probabilities of the last `width` tokens (B, width) in float64, 0 where they are padding."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    return model(**inputs, num_completion_tokens=width).log_probs.double().cpu()


def batches(n: int, size: int, title: str) -> Iterator[slice]:
    """The slices of at most `size` rows that cover n rows, under a progress bar of rows."""
    with tqdm(total=n, desc=title, unit="sample") as bar:
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            yield rows
            bar.update(rows.stop - rows.start)


# --------------------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------------------


def measure(samples: dict[str, Samples], seed: int) -> dict:
    """All metrics, each as `{"base", "tuned", "difference"}` of estimates; see eval/intervals.py."""
    base, tuned = (samples[role] for role in ROLES)

    def compare(values: Callable[[Samples], Iterable], statistic=np.mean) -> dict:
        return compare_pairs(*(np.array(values(side), dtype=float) for side in (base, tuned)), statistic, seed)

    return {
        "rewards": {
            name: {
                "mean": compare(lambda side, name=name: side.scores[name]),
                "median": compare(lambda side, name=name: side.scores[name], np.median),
                "share_positive": compare(lambda side, name=name: [score > 0 for score in side.scores[name]]),
            }
            for name in base.scores
        },
        "kl": {"base": None, "tuned": interval(tuned.kl, seed=seed), "difference": None},
        "length": compare(lambda side: [len(ids) for ids in side.ids]),
        "missing_eos": compare(lambda side: [not ended for ended in side.ended]),
        "distinct_trigrams": distinct_trigrams(base.texts, tuned.texts),
    }


def describe_samples(prompts: Prompts, samples: dict[str, Samples]) -> list[dict]:
    """All prompts with both models' completions and scores, by index."""

    def side(samples: Samples, index: int) -> dict:
        return {
            "completion": samples.texts[index],
            "tokens": len(samples.ids[index]),
            "ended": samples.ended[index],
            "scores": {name: scores[index] for name, scores in samples.scores.items()},
            "kl": None if samples.kl is None else samples.kl[index],
        }

    return [
        {"index": index, "prompt": text, **{role: side(samples[role], index) for role in ROLES}}
        for index, text in enumerate(prompts.texts)
    ]


def describe_source(path: str) -> dict:
    """A model's path and, if it is a local folder, the SHA-256 over the names and contents of its weight files."""
    folder = Path(path)
    files = sorted({file for pattern in WEIGHT_FILES for file in folder.glob(pattern)}) if folder.is_dir() else []
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return {"path": path, "sha256": digest.hexdigest() if files else None}


def describe_hardware() -> dict:
    """The CPU's model, the threads torch uses, and the GPU's name or None."""
    try:
        cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        cpu = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    name = cpu[1] if cpu else platform.processor() or platform.machine()
    return {"cpu": name, "threads": torch.get_num_threads(), "gpu": gpu}


def git_commit(root: Path = ROOT) -> str | None:
    """The project's commit, with `-dirty` if anything differs from it; None if `root` is not a repository's top."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_run(args, argv: list[str], specs: dict[str, str], prompts: Prompts) -> dict:
    """What produced the results: command, settings, sources with hashes, versions, hardware, commit."""
    settings = ("n_prompts", "max_new_tokens", "temperature", "batch_size", "prompt_tokens", "n_samples")
    return {
        "command": f"python -m eval.compare {shlex.join(argv)}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": args.seed,
        "settings": {name: getattr(args, name) for name in settings} | {"dtype": "float32"},
        "prompts": {
            "source": args.prompts,
            "split": args.split,
            "column": args.prompt_column,
            "n": len(prompts.texts),
            "sha256": hashlib.sha256(json.dumps(prompts.texts).encode()).hexdigest(),
        },
        "models": {role: describe_source(getattr(args, role)) for role in ROLES},
        "rewards": {name: describe_source(spec.partition("#")[0]) | {"path": spec} for name, spec in specs.items()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "hardware": describe_hardware(),
        "git_commit": git_commit(),
    }


# --------------------------------------------------------------------------------------------------------------
# The comparison
# --------------------------------------------------------------------------------------------------------------


def compare(args, argv: list[str]) -> dict:
    """The results of one comparison, ready for JSON; InputError for whatever the user must mend."""
    started = time.perf_counter()

    # 1. Everything that can be wrong without a model.
    check_output(args.output, args.overwrite)
    specs = parse_rewards(args.reward)
    if args.prompt_tokens and args.prompt_tokens[0] > args.prompt_tokens[1]:
        raise InputError("--prompt_tokens {} {}: MIN is above MAX".format(*args.prompt_tokens))
    for role in ROLES:
        check_model(f"--{role}", getattr(args, role))
    prompts = load_prompts(args.prompts, args.split, args.prompt_column, args.n_prompts)
    tokenizer = load_tokenizer(args.base)
    if args.prompt_tokens:
        prompts.texts = cut_prompts(prompts.texts, tokenizer, *args.prompt_tokens, args.seed)
    prompts.ids = tokenizer(prompts.texts)["input_ids"]
    rewards = load_rewards(specs)

    # 2. Both models, which must be fit to be compared.
    models = {role: load_model(getattr(args, role)) for role in ROLES}
    check_vocabulary(models, tokenizer, args.tuned)
    check_lengths(prompts, models, args.max_new_tokens)
    eos = stop_ids(models.values(), tokenizer)

    # 3. Completions and their scores.
    samples: dict[str, Samples] = {}
    for role in ROLES:
        ids = generate(models[role], tokenizer, prompts.ids, eos, args, role)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        samples[role] = Samples(ids, texts, [row[-1] in eos for row in ids])
        for name, reward in rewards.items():
            samples[role].scores[name] = score(name, reward, prompts, samples[role], args.batch_size)
    samples["tuned"].kl = sequence_kl(models, prompts.ids, samples["tuned"].ids, tokenizer.pad_token_id, args)

    # 4. The figures.
    return {
        "schema_version": SCHEMA_VERSION,
        **describe_run(args, argv, specs, prompts),
        "metrics": measure(samples, args.seed),
        "samples": describe_samples(prompts, samples),
        "wall_seconds": time.perf_counter() - started,
    }


def main(argv: list[str] | None = None) -> dict:
    """Run one comparison, write `results.json` and `report.md`, print the table; returns the results."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        results = compare(args, argv)
    except InputError as error:
        parser.error(str(error))
    path = args.output / "results.json"
    write_atomically(path, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    report = write_report(path)
    print_table(results)
    print(f"Report: {report}")
    return results


if __name__ == "__main__":
    main()
