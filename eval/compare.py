"""Compare a base model with its tuned one on the same prompts, drawn with the same seeds.

    python -m eval.compare --base openai-community/gpt2 --tuned runs/tuned --prompts data/toy_reviews/prompts \\
        --reward lexicon=data_prep.toy_reviews:lexicon_score --judge other=runs/judge#POSITIVE --output runs/eval

writes `results.json` and, rendered from it alone, `report.md` and `report.html`: every reward before and after, KL,
length, repetition, perplexity, ROUGE where there are references, each with n and a 95 % interval; pictures, samples.

`--runs` compares several tuned models with the base and puts them in one table, mean ± over runs; `--sweep` does so
with the checkpoints of one run; `--best_of` adds best-of-n of the base; `--pairs` measures how well the rewards order
judged pairs. eval/README.md explains each figure.

A reward is `NAME=module:function` (TRL's signature, `f(prompts, completions, **columns) -> list[float]`) or
`NAME=classifier`, a sequence classifier's folder or Hub id, with `#LABEL` to choose one of its labels. A judge is a
reward that training never saw. Completions are kept in `completions/` as they come: the same command, run again after
a stop, goes on from them. Bad input ends in one line on stderr and exit status 2, and no results are written.
"""

import argparse
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from eval.best_of_n import compare_at_equal_kl, measure_best_of_n
from eval.generation import CompletionLog, generate, sequence_logprobs
from eval.loading import (
    InputError,
    OneLineParser,
    at_least,
    check_model,
    check_vocabulary,
    generation_config,
    load_model,
    load_tokenizer,
    positive,
    stop_ids,
)
from eval.metrics import Samples, describe_samples, measure, rouge_scores, summarise_runs
from eval.pairs import load_pairs, measure_pairs
from eval.prompts import Prompts, check_lengths, cut_prompts, load_prompts
from eval.provenance import (
    describe_hardware,
    describe_model,
    describe_run,
    describe_versions,
    peak_memory,
)
from eval.report import SCHEMA_VERSION, print_table, write_atomically, write_report
from eval.scores import Reward, RewardSpec, load_rewards, parse_rewards, score
from eval.targets import Target, check_output, find_targets
from eval.training import read_curves


@dataclass
class Plan:
    """What a comparison needs besides the models' weights, all of it checked."""

    targets: list[Target]
    configs: dict[str, object]  # by path, the base's too
    specs: dict[str, RewardSpec]
    rewards: dict[str, Reward]
    prompts: Prompts
    tokenizer: object
    eos: list[int]
    pairs: tuple | None


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="eval.compare", description="Compare a base model with its tuned one.")
    add = parser.add_argument
    add("--base", required=True, help="folder or Hub id of the model before tuning")
    tuned = parser.add_mutually_exclusive_group(required=True)
    tuned.add_argument("--tuned", help="folder or Hub id of the tuned model; a LoRA adapter's works too")
    tuned.add_argument("--runs", nargs="+", metavar="RUN", help="several tuned models, in one table; files are skipped")
    tuned.add_argument("--sweep", type=Path, metavar="RUN", help="every checkpoint of one run, and its final model")
    add("--prompts", required=True, help="folder, JSONL file or Hub id of the prompts")
    add("--reward", action="append", required=True, metavar="NAME=SPEC", help="module:function or classifier[#LABEL]")
    add("--judge", action="append", default=[], metavar="NAME=SPEC", help="a reward that training never saw")
    add("--output", type=Path, required=True, help="folder for results.json, report.md and report.html")
    add("--n_prompts", type=at_least(2), default=512, help="the first so many prompts (default 512)")
    add("--max_new_tokens", type=at_least(1), default=24)
    add("--temperature", type=positive, default=1.0)
    add("--seed", type=at_least(0), default=0)
    add("--batch_size", type=at_least(1), default=64)
    add("--prompt_column", default="prompt")
    add("--reference_column", help="column of reference texts, for ROUGE")
    add("--prompt_tokens", type=at_least(1), nargs=2, metavar=("MIN", "MAX"), help="cut prompts at random lengths")
    add("--split", default="test")
    add("--best_of", type=at_least(1), nargs="+", metavar="N", help="also best-of-N of the base by the first reward")
    add("--best_of_prompts", type=at_least(2), default=64, help="the first so many prompts for it (default 64)")
    add("--pairs", metavar="DATA", help="judged pairs (chosen, rejected, perhaps prompt): how well rewards order them")
    add("--n_pairs", type=at_least(2), default=1000, help="the first so many pairs (default 1000)")
    add("--n_samples", type=at_least(0), default=5, help="samples shown in report.md (default 5)")
    add("--overwrite", action="store_true", help="replace the results already in --output")
    return parser


# --- Before a model loads ---------------------------------------------------------------------------------------


def make_plan(args) -> Plan:
    """Everything that can be wrong without a model's weights; InputError for what is."""
    targets = find_targets(args)
    for folder in [args.output, *(run_folder(args, target.name) for target in targets)]:
        check_output(folder, args.overwrite)
    specs = parse_rewards(args.reward, args.judge)
    if args.prompt_tokens and args.prompt_tokens[0] > args.prompt_tokens[1]:
        raise InputError("--prompt_tokens {} {}: MIN is above MAX".format(*args.prompt_tokens))
    configs = {args.base: check_model("--base", args.base)}
    option = "--runs" if args.runs else "--sweep" if args.sweep else "--tuned"
    for target in targets:
        configs[target.path] = check_model(option, target.path)
    prompts = load_prompts(args.prompts, args.split, args.prompt_column, args.n_prompts, args.reference_column)
    pairs = load_pairs(args.pairs, args.split, args.n_pairs) if args.pairs else None
    tokenizer = load_tokenizer(args.base)
    for target in targets:
        check_vocabulary(configs[args.base], configs[target.path], tokenizer, target.path)
    if args.prompt_tokens:
        prompts.texts = cut_prompts(prompts.texts, tokenizer, *args.prompt_tokens, args.seed)
    prompts.ids = tokenizer(prompts.texts)["input_ids"]
    check_lengths(prompts, configs.values(), args.max_new_tokens)
    eos = stop_ids([generation_config(path, config) for path, config in configs.items()], tokenizer)
    return Plan(targets, configs, specs, load_rewards(specs), prompts, tokenizer, eos, pairs)


# --- The comparison ---------------------------------------------------------------------------------------------


def compare(args, argv: list[str]) -> dict[Path, dict]:
    """The results by the folder they belong in, the summary of several runs last; InputError for what to mend."""
    started = time.perf_counter()
    plan = make_plan(args)

    # 1. The base, once for all.
    models = {"base": load_scorer(args.base, args.temperature)}
    base = draw(models["base"], plan, args, "base", args.base)
    base.base_logprobs = score_tokens(models["base"], plan, base, args, "base")
    picks = draw_best_of(models["base"], plan, args) if args.best_of else None

    # 2. Each tuned model beside it.
    compared = []
    for target in plan.targets:
        models["tuned"] = load_scorer(target.path, args.temperature)
        tuned = draw(models["tuned"], plan, args, f"tuned/{target.name}" if args.runs else target.name, target.path)
        tuned.base_logprobs = score_tokens(models["base"], plan, tuned, args, "base")
        own = score_tokens(models.pop("tuned"), plan, tuned, args, target.name)
        tuned.kl = (np.array(own) - np.array(tuned.base_logprobs)).tolist()
        described = {"name": target.name, "step": target.step}
        described["model"] = describe_model(target.path, plan.configs[target.path])
        described["metrics"] = measure({"base": base, "tuned": tuned}, args.seed)
        compared.append((described, tuned))

    # 3. The figures.
    run = describe_run(args, argv, plan, SCHEMA_VERSION)
    if plan.pairs:
        rewards = plan.rewards.items()
        measured = {name: measure_pairs(name, each, plan.pairs, args.batch_size, args.seed) for name, each in rewards}
        run["pairs"] = {"source": args.pairs, "split": args.split, "rewards": measured}
    results = {}
    for described, tuned in compared if args.runs else compared[-1:]:
        folder = run_folder(args, described["name"])
        results[folder] = {
            **run,
            "kind": "comparison",
            "models": {"base": run["models"]["base"], "tuned": described["model"]},
            "metrics": described["metrics"],
            "best_of_n": best_of_n(picks, tuned, plan, args) if picks else None,
            "sweep": [each for each, _ in compared] if args.sweep else None,
            "training": read_curves(str(args.sweep or described["model"]["path"])),
            "samples": describe_samples(plan.prompts, {"base": base, "tuned": tuned}),
        }
    if args.runs:
        runs = [each for each, _ in compared]
        results[args.output] = run | {"kind": "runs", "runs": runs, "over_runs": summarise_runs(runs)}
    cost = {"wall_seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory()}
    return {folder: result | cost for folder, result in results.items()}


def run_folder(args, name: str) -> Path:
    """Where the results of one tuned model go: a folder of its own where there are several."""
    return args.output / "runs" / name if args.runs else args.output


def load_scorer(path: str, temperature: float) -> torch.nn.Module:
    """The model, which generates as always and scores completions at the sampling temperature too."""
    from scoring import add_scoring_forward

    return add_scoring_forward(load_model(path), temperature)


def draw(model, plan: Plan, args, name: str, path: str) -> Samples:
    """One model's completions of all prompts, scored by every reward."""
    prompts = plan.prompts
    log = completion_log(plan, args, name, path, prompts.ids)
    ids = generate(model, plan.tokenizer, prompts.ids, plan.eos, args, name, log)
    texts = plan.tokenizer.batch_decode(ids, skip_special_tokens=True)
    samples = Samples(ids, texts, [row[-1] in plan.eos for row in ids])
    for reward_name, reward in plan.rewards.items():
        samples.scores[reward_name] = score(reward_name, reward, prompts, texts, ids, args.batch_size)
    if prompts.references is not None:
        samples.rouge = rouge_scores(prompts.references, texts)
    return samples


def score_tokens(model, plan: Plan, samples: Samples, args, title: str) -> list[float]:
    """Each completion's log-probability (n,), in nats, by the model."""
    pad_id = plan.tokenizer.pad_token_id
    return sequence_logprobs(model, plan.prompts.ids, samples.ids, pad_id, args, title).tolist()


def draw_best_of(model, plan: Plan, args) -> dict[str, np.ndarray]:
    """Every reward's scores (prompts, N) of N samples of the base for each of the first prompts."""
    total, few = max(args.best_of), plan.prompts.first(args.best_of_prompts)
    repeated = few.repeat(total)
    log = completion_log(plan, args, "best_of", args.base, repeated.ids)
    ids = generate(model, plan.tokenizer, repeated.ids, plan.eos, args, "best-of-n", log, stream=1)
    texts = plan.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return {
        name: np.reshape(score(name, reward, repeated, texts, ids, args.batch_size), (len(few.texts), total))
        for name, reward in plan.rewards.items()
    }


def best_of_n(picks: dict[str, np.ndarray], tuned: Samples, plan: Plan, args) -> dict:
    """Best-of-n at every size asked for, and the tuned model beside it on the same prompts."""
    reward = next(iter(plan.specs))
    sizes = sorted({1, *args.best_of})
    n = len(picks[reward])
    kl = float(np.mean(tuned.kl))
    at_equal = compare_at_equal_kl(picks[reward], np.array(tuned.scores[reward][:n]), kl, sizes, args.seed)
    return measure_best_of_n(picks, sizes, reward, args.seed) | {"at_equal_kl": at_equal}


def completion_log(plan: Plan, args, name: str, path: str, prompt_ids: list[list[int]]) -> CompletionLog:
    """The file of this model's completions; its fingerprint is all that decides them."""
    versions = describe_versions()
    fingerprint = {
        "model": describe_model(path, plan.configs[path]),
        "prompts": hashlib.sha256(json.dumps(prompt_ids).encode()).hexdigest(),
        **{setting: getattr(args, setting) for setting in ("max_new_tokens", "temperature", "seed", "batch_size")},
        "eos": plan.eos,
        "device": describe_hardware()["gpu"] or "cpu",
        **{library: versions[library] for library in ("torch", "transformers")},
    }
    return CompletionLog(args.output / "completions" / f"{name}.jsonl", fingerprint, args.overwrite)


def main(argv: list[str] | None = None) -> dict:
    """Run one comparison, write its results and reports, print the table; returns the results, of several together."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        results = compare(args, argv)
    except InputError as error:
        parser.error(str(error))
    for folder, result in results.items():
        text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(folder / "results.json", text)
        reports = write_report(folder / "results.json")
    print_table(result)
    print(f"Report: {' '.join(map(str, reports))}")
    return result


if __name__ == "__main__":
    main()
