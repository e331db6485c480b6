"""Compare a base model with its tuned one on the same prompts, drawn with the same seeds.

    python -m eval.compare --base openai-community/gpt2 --tuned runs/tuned --prompts data/toy_reviews/prompts \\
        --reward lexicon=data_prep.toy_reviews:lexicon_score --judge other=runs/judge#POSITIVE --output runs/eval

writes `results.json` and, rendered from it alone, `report.md` and `report.html`: every reward before and after, KL,
length, repetition, perplexity, ROUGE where there are references, each with n and a 95 % interval; pictures, samples.

`--runs` compares several tuned models with the base and puts them in one table, mean ± over runs; `--sweep` does so
with the checkpoints of one run; `--best_of` adds best-of-n of the base; `--pairs` measures how well the rewards order
judged pairs; `--pairwise_judge` asks a model which completion is better. eval/README.md explains each figure.

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

from command_line import OneLineParser
from eval.best_of_n import compare_at_equal_kl, measure_best_of_n
from eval.generation import CompletionLog, generate, sequence_logprobs
from eval.loading import (
    at_least,
    check_language_model,
    check_vocabulary,
    generation_config,
    load_model,
    load_tokenizer,
    positive,
    stop_ids,
)
from eval.metrics import Samples, describe_samples, measure, rouge_scores, summarise_runs
from eval.pairs import load_pairs, measure_pairs
from eval.pairwise import PairwiseJudge, Verdicts
from eval.prompts import Prompts, check_lengths, fit_prompts, load_prompts
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
from trl_ppo import cpu_folder
from trl_ppo.inputs import UserError
from trl_ppo.logprobs import add_logprobs_forward

JUDGE_SETTINGS = {"temperature": 0, "max_tokens": 512}


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
    sources: dict[str, dict]  # by path: the models' hashes
    few: Prompts | None  # the prompts of best-of-n, each N times
    logs: dict[str, CompletionLog]  # "base", "best_of", and "tuned/…" by the target's name
    judge: PairwiseJudge | None


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(
        prog="eval.compare",
        description="Compare a base model with its tuned one, or any model with another: --base one --tuned other.",
    )
    add = parser.add_argument
    add("--base", required=True, help="folder or Hub id of the model before tuning")
    tuned = parser.add_mutually_exclusive_group(required=True)
    tuned.add_argument("--tuned", help="folder or Hub id of the tuned model; a LoRA adapter's works too")
    tuned.add_argument(
        "--runs", nargs="+", metavar="RUN", help="several seeds of one recipe, averaged too; files are skipped"
    )
    tuned.add_argument("--sweep", type=Path, metavar="RUN", help="every checkpoint of one run, and its final model")
    add("--prompts", required=True, help="folder, JSONL or text file, or Hub id of the prompts")
    add("--reward", action="append", required=True, metavar="NAME=SPEC", help="module:function or classifier[#LABEL]")
    add("--judge", action="append", default=[], metavar="NAME=SPEC", help="a reward that training never saw")
    add("--output", type=Path, required=True, help="folder for results.json, report.md and report.html")
    add("--n_prompts", type=at_least(2), default=512, help="the first so many prompts (default 512)")
    add("--max_new_tokens", type=at_least(1), default=24, help="tokens of a completion, at most (default 24)")
    add("--temperature", type=positive, default=1.0, help="of sampling, for both models (default 1)")
    add("--seed", type=at_least(0), default=0, help="of sampling and of the intervals (default 0)")
    add("--batch_size", type=at_least(1), default=64, help="prompts at a time (default 64)")
    add("--prompt_column", default="prompt", help="column of the prompts (default prompt)")
    add("--reference_column", help="column of reference texts, for ROUGE")
    add("--prompt_tokens", type=at_least(1), nargs=2, metavar=("MIN", "MAX"), help="cut prompts at random lengths")
    add("--shuffle", action="store_true", help="draw them by --seed: for a dataset sorted by label, such as IMDB")
    add("--max_prompt_tokens", type=at_least(1), help="leave out longer ones of the --n_prompts prompts")
    add("--split", default="test")
    add("--best_of", type=at_least(1), nargs="+", metavar="N", help="also best-of-N of the base by the first reward")
    add("--best_of_prompts", type=at_least(2), default=64, help="the first so many prompts for it (default 64)")
    add("--pairs", metavar="DATA", help="judged pairs (chosen, rejected, perhaps prompt): how well rewards order them")
    add("--n_pairs", type=at_least(2), default=1000, help="the first so many pairs (default 1000)")
    add(
        "--pairwise_judge",
        metavar="JUDGE",
        help="says which completion is better: URL#MODEL, causal LM, module:function",
    )
    add("--judge_prompt", type=Path, metavar="FILE", help="its prompt, with {prompt}, {a} and {b} (default: for TL;DR)")
    add("--judge_concurrency", type=at_least(1), default=8, help="questions to a server at a time (default 8)")
    add("--judge_timeout", type=positive, default=120.0, help="seconds that a server's reply may take (default 120)")
    add("--judge_key_env", default="OPENAI_API_KEY", metavar="NAME", help="environment variable with a server's key")
    add("--judge_settings", type=json_object, default=JUDGE_SETTINGS, help="JSON that a server gets with each question")
    add("--n_samples", type=at_least(0), default=5, help="samples shown in report.md (default 5)")
    add("--overwrite", action="store_true", help="replace the results already in --output")
    return parser


def json_object(text: str) -> dict:
    """An argparse type: a JSON object."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object such as {json.dumps(JUDGE_SETTINGS)}, not {text}")
    return found


# --- Before a model loads ---------------------------------------------------------------------------------------


def make_plan(args) -> Plan:
    """Everything that can be wrong without a model's weights; UserError for what is."""
    targets = find_targets(args)
    for folder in [args.output, *(run_folder(args, target.name) for target in targets)]:
        check_output(folder, args.overwrite)
    specs = parse_rewards(args.reward, args.judge)
    configs = {args.base: check_language_model("--base", args.base)}
    option = "--runs" if args.runs else "--sweep" if args.sweep else "--tuned"
    for target in targets:
        configs[target.path] = check_language_model(option, target.path)
    shuffle = args.seed if args.shuffle else None
    prompts = load_prompts(args.prompts, args.split, args.prompt_column, args.n_prompts, args.reference_column, shuffle)
    pairs = load_pairs(args.pairs, args.split, args.n_pairs) if args.pairs else None
    tokenizer = load_tokenizer(args.base)
    for target in targets:
        check_vocabulary(configs[args.base], configs[target.path], tokenizer, target.path)
    prompts = fit_prompts(prompts, tokenizer, args.prompt_tokens, args.max_prompt_tokens, args.seed)
    check_lengths(prompts, configs.values(), args.max_new_tokens)
    eos = stop_ids([generation_config(path, config) for path, config in configs.items()], tokenizer)
    sources = {path: describe_model(path, config) for path, config in configs.items()}
    few = prompts.first(args.best_of_prompts).repeat(max(args.best_of)) if args.best_of else None
    logs = {
        "base": completion_log(args, "base", sources[args.base], prompts, eos),
        **({"best_of": completion_log(args, "best_of", sources[args.base], few, eos)} if few else {}),
        **{
            f"tuned/{each.name}": completion_log(args, f"tuned/{each.name}", sources[each.path], prompts, eos)
            for each in targets
        },
    }
    if args.judge_prompt and not args.pairwise_judge:
        raise UserError("--judge_prompt: there is no --pairwise_judge to ask")
    size = configs[args.base].get_text_config().vocab_size
    for log in logs.values():
        if any(max(ids) >= size for ids in log.ids.values()):
            raise UserError(f"{log.path}: holds token ids that the models of {size} tokens have not; delete the file")
    judge = PairwiseJudge(args) if args.pairwise_judge else None
    rewards = load_rewards(specs)
    return Plan(targets, configs, specs, rewards, prompts, tokenizer, eos, pairs, sources, few, logs, judge)


def completion_log(args, name: str, source: dict, prompts: Prompts, eos: list[int]) -> CompletionLog:
    """The file of a model's completions; its fingerprint is all that decides them. UserError if it has another."""
    versions = describe_versions()
    fingerprint = {
        "model": source,
        **{setting: getattr(args, setting) for setting in ("max_new_tokens", "temperature", "seed", "batch_size")},
        "n": len(prompts.ids),
        "prompts": hashlib.sha256(json.dumps(prompts.ids).encode()).hexdigest(),
        "eos": eos,
        "device": describe_hardware()["gpu"] or "cpu",
        **{library: versions[library] for library in ("torch", "transformers")},
    }
    return CompletionLog(args.output / "completions" / f"{name}.jsonl", fingerprint, args.overwrite)


# --- The comparison ---------------------------------------------------------------------------------------------


def compare(args, argv: list[str]) -> dict[Path, dict]:
    """The results by the folder they belong in, the summary of several runs last; UserError for bad input."""
    started = time.perf_counter()
    plan = make_plan(args)

    # 1. The base, once for all.
    base_model = load_with_logprobs(args.base, args.temperature)
    base = draw(base_model, plan, args, "base", plan.logs["base"])
    base.base_logprobs = total_logprobs(base_model, plan, base, args, "base")
    base.judged = judge_samples(plan, base, {"reference": plan.prompts.references}, "base")
    picks = draw_best_of(base_model, plan, args) if args.best_of else None

    # 2. Each tuned model, and its results.
    run = describe_run(args, argv, plan, SCHEMA_VERSION)
    if plan.pairs:
        run["pairs"] = {"source": args.pairs, "split": args.split, "rewards": measure_all_pairs(plan, args)}
    described, results = [], {}
    for target in plan.targets:
        tuned = draw_tuned(base_model, plan, target, args)
        others = {"base": base.texts, "reference": plan.prompts.references}
        tuned.judged = judge_samples(plan, tuned, others, target.name)
        metrics = measure({"base": base, "tuned": tuned}, args.seed)
        described.append({"name": target.name, "step": target.step, "model": plan.sources[target.path]})
        described[-1]["metrics"] = metrics
        results[run_folder(args, target.name)] = {  # a sweep's last model, its final one, replaces those before it
            **run,
            "kind": "comparison",
            "models": run["models"] | {"tuned": plan.sources[target.path]},
            "metrics": metrics,
            "best_of_n": best_of_n(picks, tuned, plan, args) if picks else None,
            "sweep": described if args.sweep else None,
            "training": read_curves(str(args.sweep or target.path)),
            "samples": describe_samples(plan.prompts, {"base": base, "tuned": tuned}),
        }

    # 3. What they cost.
    if args.runs:
        together = {"kind": "runs", "runs": described, "over_runs": summarise_runs(described)}
        results[args.output] = run | together | {"best_of_n": best_of_n(picks, None, plan, args) if picks else None}
    cost = {"wall_seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory()}
    cost["pairwise"] = plan.judge.describe() if plan.judge else None
    cost["resumed"] = sum(log.resumed for log in plan.logs.values())
    return {folder: result | cost for folder, result in results.items()}


def run_folder(args, name: str) -> Path:
    """Where the results of one tuned model go: a folder of its own where there are several."""
    return args.output / "runs" / name if args.runs else args.output


def load_with_logprobs(path: str, temperature: float) -> torch.nn.Module:
    """The model, which generates as always and gives completions' log-probabilities at the sampling temperature too."""
    model = add_logprobs_forward(load_model(path), temperature)
    if (cpu := cpu_folder(model.device)) is not None:
        cpu.use_tiles(model, temperature)
    return model


def draw(model, plan: Plan, args, name: str, log: CompletionLog) -> Samples:
    """One model's completions of all prompts, scored by every reward."""
    prompts = plan.prompts
    ids = generate(model, plan.tokenizer, prompts.ids, plan.eos, args, name, log)
    texts = plan.tokenizer.batch_decode(ids, skip_special_tokens=True)
    samples = Samples(ids, texts, [row[-1] in plan.eos for row in ids])
    for reward_name, reward in plan.rewards.items():
        samples.scores[reward_name] = score(reward_name, reward, prompts, texts, ids, args.batch_size)
    if prompts.references is not None:
        samples.rouge = rouge_scores(prompts.references, texts)
    return samples


def draw_tuned(base, plan: Plan, target: Target, args) -> Samples:
    """The tuned model's completions with their KL to the base; the model is let go."""
    model = load_with_logprobs(target.path, args.temperature)
    samples = draw(model, plan, args, target.name, plan.logs[f"tuned/{target.name}"])
    own = total_logprobs(model, plan, samples, args, target.name)
    samples.base_logprobs = total_logprobs(base, plan, samples, args, "base")
    samples.kl = np.subtract(own, samples.base_logprobs).tolist()
    return samples


def total_logprobs(model, plan: Plan, samples: Samples, args, title: str) -> list[float]:
    """Each completion's log-probability (n,), in nats, by the model."""
    pad_id = plan.tokenizer.pad_token_id
    return sequence_logprobs(model, plan.prompts.ids, samples.ids, pad_id, args, title).tolist()


def judge_samples(plan: Plan, samples: Samples, others: dict[str, list[str] | None], title: str) -> dict[str, Verdicts]:
    """The pairwise judge's verdicts on the samples against each other set of texts; none without a judge."""
    if plan.judge is None:
        return {}
    judge, prompts = plan.judge, plan.prompts.texts
    return {
        name: judge.compare(prompts, samples.texts, texts, f"{title} against {name}")
        for name, texts in others.items()
        if texts is not None
    }


def draw_best_of(model, plan: Plan, args) -> dict[str, np.ndarray]:
    """Every reward's scores (prompts, N) of N samples of the base for each of the first prompts."""
    few = plan.few
    ids = generate(model, plan.tokenizer, few.ids, plan.eos, args, "best-of-n", plan.logs["best_of"], stream=1)
    texts = plan.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return {
        name: np.reshape(score(name, reward, few, texts, ids, args.batch_size), (-1, max(args.best_of)))
        for name, reward in plan.rewards.items()
    }


def measure_all_pairs(plan: Plan, args) -> dict[str, dict]:
    """Every reward's accuracy and calibration over the judged pairs."""
    rewards = plan.rewards.items()
    return {name: measure_pairs(name, reward, plan.pairs, args.batch_size, args.seed) for name, reward in rewards}


def best_of_n(picks: dict[str, np.ndarray], tuned: Samples | None, plan: Plan, args) -> dict:
    """Best-of-n at every size asked for, compared with the tuned model, if there is one, on the same prompts."""
    reward = next(iter(plan.specs))
    sizes = sorted({1, *args.best_of})
    found = measure_best_of_n(picks, sizes, reward, args.seed) | {"at_equal_kl": None}
    if tuned is not None:
        kl = float(np.mean(tuned.kl[: len(picks[reward])]))
        compared = {
            name: compare_at_equal_kl(
                picks[reward], np.array(tuned.scores[name][: len(values)]), kl, sizes, args.seed, values
            )
            for name, values in picks.items()
        }
        found["at_equal_kl"] = compared[reward]
        found["judges"] = {name: each for name, each in compared.items() if plan.specs[name].judge}
    return found


def main(argv: list[str] | None = None) -> dict:
    """Run one comparison, write its results and reports, print the table; returns the results, of several together."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        results = compare(args, argv)
    except UserError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "\neval.compare: interrupted; the same command goes on from what is already written\n")
    for folder, result in results.items():
        text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(folder / "results.json", text)
        reports = write_report(folder / "results.json")
    print_table(result)
    print(f"Report: {' '.join(map(str, reports))}")
    return result


if __name__ == "__main__":
    main()
