"""Check a reward model before it is trusted: judged pairs, length, spoilt texts, and what best-of-n makes of it.

    python -m eval.reward_model --reward reward=runs/tiny/reward --pairs data/toy_reviews/pairs --output runs/tiny/check

prints a verdict in words and a table, and writes `reward_check.json` and, rendered from it alone, `reward_check.md`:
accuracy beside what the longer text, the shorter text and a coin reach; accuracy in pairs of like length; how far the
score follows length; how often a spoilt text scores below the one that people chose; calibration. eval/README.md says
how to read it.

With `--base`, `--prompts` and `--judge` the reward also picks the best of n samples of a base model, and a judge that
training never saw says whether they are better. A reward or judge is `NAME=module:function` or
`NAME=classifier[#LABEL]`, as in `eval.compare`. Bad input ends in one line on stderr and exit status 2, and nothing is
written.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from command_line import OneLineParser
from eval.best_of_n import expected_best, measure_best_of_n
from eval.generation import generate
from eval.intervals import paired_difference
from eval.loading import at_least, load_model, positive
from eval.pairs import load_pairs
from eval.probes import PROBES, measure_reward, verdict
from eval.prompts import load_prompts, prepare
from eval.provenance import describe_model, describe_origin, describe_rewards
from eval.report import code, escape, markdown_table, readable, write_atomically
from eval.scores import load_rewards, parse_rewards, score
from eval.tables import Table, best_of_table, estimate_text, origin, source_text
from eval.targets import check_output
from trl_ppo.inputs import UserError

SCHEMA_VERSION = 1
LABELS = {
    "accuracy": "accuracy",
    "longer_wins": "accuracy of “the longer text wins”",
    "shorter_wins": "accuracy of “the shorter text wins”",
    "random": "accuracy of a coin",
    "beats_ruler": "accuracy − the better of longer and shorter wins",
    "like_length": "accuracy in pairs of like length",
    "length_correlation": "correlation of score with length",
    "log_loss": "log loss",
    "brier": "Brier score",
    "overconfidence": "overconfidence",
}
FIGURES_NOTE = (
    "Value and 95 % interval; ties count half. Length is in words of the answer; texts of like length differ by a "
    "tenth of the longer at most; the correlation is Spearman's over all texts. Log loss, Brier score and "
    "overconfidence are for reward models trained by the Bradley–Terry loss. Where pairs share prompts, the true "
    "intervals are wider."
)
PROBES_NOTE = (
    "The share of chosen texts that score above what the probe makes of them, ties half; 1 is best. n leaves out texts "
    "that the probe does not change."
)
BEST_OF_NOTE = (
    "Samples of the base, of which the reward picks one in n; expected over {samples_per_prompt} samples of each "
    "of the first {n_prompts} prompts."
)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="eval.reward_model", description="Check a reward model before it is trusted.")
    add = parser.add_argument
    add("--reward", required=True, metavar="NAME=SPEC", help="module:function or classifier[#LABEL]")
    add("--pairs", required=True, metavar="DATA", help="judged pairs (chosen, rejected, perhaps prompt)")
    add("--output", type=Path, required=True, help="folder for reward_check.json and reward_check.md")
    add("--n_pairs", type=at_least(2), default=1000, help="the first so many pairs (default 1000)")
    add("--split", default="test")
    add("--batch_size", type=at_least(1), default=64)
    add("--seed", type=at_least(0), default=0)
    add("--overwrite", action="store_true", help="replace the check already in --output")
    more = parser.add_argument_group("best-of-n, which needs the first three")
    add = more.add_argument
    add("--base", help="folder or Hub id of a language model")
    add("--prompts", help="folder, JSONL file or Hub id of its prompts")
    add("--prompt_column", default="prompt")
    add("--judge", action="append", default=[], metavar="NAME=SPEC", help="a reward that training never saw")
    add("--best_of", type=at_least(2), nargs="+", metavar="N", default=[4, 16], help="sizes (default 4 16)")
    add("--n_prompts", type=at_least(2), default=64, help="the first so many prompts (default 64)")
    add("--prompt_tokens", type=at_least(1), nargs=2, metavar=("MIN", "MAX"), help="cut prompts at random lengths")
    add("--max_prompt_tokens", type=at_least(1), help="leave out longer ones of the --n_prompts prompts")
    add("--max_new_tokens", type=at_least(1), default=24)
    add("--temperature", type=positive, default=1.0)
    return parser


def check(args, argv: list[str]) -> dict:
    """The results, ready for JSON; UserError for bad input, most of it before a model loads."""
    started = time.perf_counter()
    check_output(args.output, args.overwrite, "reward_check.json")
    specs = parse_rewards([args.reward], args.judge)
    name = next(iter(specs))
    given = {option: bool(getattr(args, option)) for option in ("base", "prompts", "judge")}
    if len({*given.values()}) > 1:
        missing = " and ".join(f"--{option}" for option, there in given.items() if not there)
        raise UserError(f"best-of-n needs --base, --prompts and --judge: give {missing} too, or none of them")
    pairs = load_pairs(args.pairs, args.split, args.n_pairs)
    sampler = plan_samples(args) if args.base else None
    rewards = load_rewards(specs)
    figures = measure_reward(name, rewards[name], pairs, args.batch_size, args.seed)
    found = pick_samples(args, rewards, name, *sampler[1:]) if sampler else None
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": " ".join([verdict(figures), *(judge_sentences(found) if found else [])]),
        "figures": figures,
        "best_of_n": found,
        "rewards": describe_rewards(specs),
        "pairs": {"source": args.pairs, "split": args.split, "n": len(pairs[1]), "n_prompts": figures["n_prompts"]},
        "base": sampler[0] if sampler else None,
        **describe_origin("eval.reward_model", argv, args.seed),
        "wall_seconds": time.perf_counter() - started,
    }


# --- Best-of-n ------------------------------------------------------------------------------------------------------


def plan_samples(args) -> tuple:
    """The base model's description, its tokenizer, the prompts, each N times, and the stop ids; no weights."""
    load = partial(load_prompts, args.prompts, args.split, args.prompt_column, args.n_prompts)
    config, tokenizer, prompts, eos = prepare("--base", args.base, load, args.prompt_tokens, args)
    return describe_model(args.base, config), tokenizer, prompts.repeat(max(args.best_of)), eos


def pick_samples(args, rewards: dict, name: str, tokenizer, prompts, eos: list[int]) -> dict:
    """Best-of-n of the base by the reward, and what every judge gains by it from the largest n."""
    largest = max(args.best_of)
    ids = generate(load_model(args.base), tokenizer, prompts.ids, eos, args, "base")
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    scores = {
        each: np.reshape(score(each, reward, prompts, texts, ids, args.batch_size), (-1, largest))
        for each, reward in rewards.items()
    }
    gains = {
        judge: paired_difference(*(expected_best(scores[name], values, n) for n in (1, largest)), seed=args.seed)
        for judge, values in scores.items()
        if judge != name
    }
    found = measure_best_of_n(scores, sorted({1, *args.best_of}), name, args.seed)
    return found | {"gains": gains, "at_equal_kl": None}


def judge_sentences(found: dict) -> list[str]:
    """What each judge says of the best of the most samples, in a sentence each."""
    sentences = []
    for judge, gain in found["gains"].items():
        verb = "gains" if gain["low"] > 0 else "loses" if gain["high"] < 0 else "shows no gain"
        what = f"The best of {found['points'][-1]['n']} by it {verb} by the judge {judge}"
        sentences.append(f"{what}: {estimate_text(gain, '+')} on {gain['n']} prompts.")
    return sentences


# --- The report -----------------------------------------------------------------------------------------------------


def tables(results: dict) -> list[Table]:
    """Every table of the report, from the results alone."""
    figures, probes = results["figures"], results["figures"]["probes"]
    rows = [_row(label, figures[key]) for key, label in LABELS.items()]
    spoilt = [[*_row(probe, probes[probe]), PROBES[probe]] for probe in PROBES if probes[probe]]
    bins = [
        [f"{b['from']} to {b['to']}", f"{b['confidence']:.3f}", estimate_text(b["accuracy"]), str(b["n"])]
        for b in figures["bins"]
    ]
    found = [
        Table("Figures", FIGURES_NOTE, ["figure", "value", "n"], rows),
        Table("Probes", PROBES_NOTE, ["probe", "chosen texts above it", "n", "what it is"], spoilt),
        Table("Calibration", "By the chance σ(|margin|).", ["chance", "mean", "accuracy", "n"], bins),
    ]
    if best := results["best_of_n"]:
        picked = best_of_table(results)
        found.append(Table(picked.title, BEST_OF_NOTE.format(**best), picked.header, picked.rows))
    return found


def _row(label: str, estimate: dict | None) -> list[str]:
    return [label, estimate_text(estimate), str(estimate["n"]) if estimate else "0"]


def render(results: dict) -> str:
    """The report as Markdown, from the results alone."""
    pairs = results["pairs"]
    facts = origin(results) | {name: source_text(reward) for name, reward in results["rewards"].items()}
    facts["pairs"] = f"{pairs['source']}, split {pairs['split']}, first {pairs['n']}, prompts {pairs['n_prompts']}"
    if results["base"]:
        facts["base"] = source_text(results["base"])
    blocks = [f"# Check of {escape(next(iter(results['rewards'])))}", readable(results["verdict"])]
    for table in tables(results):
        blocks += [f"## {escape(table.title)}", markdown_table(table), escape(table.note)]
    blocks += ["## Where this comes from", "\n".join(f"- {escape(name)}: {code(fact)}" for name, fact in facts.items())]
    return "\n\n".join(blocks) + "\n"


def main(argv: list[str] | None = None) -> dict:
    """Check one reward, write and print what was found; returns the results."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        results = check(args, argv)
    except UserError as error:
        parser.error(str(error))
    path = args.output / "reward_check.json"
    write_atomically(path, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomically(path.with_suffix(".md"), render(json.loads(path.read_text(encoding="utf-8"))))
    print(results["verdict"])
    for table in tables(results)[:2]:
        if table.title == "Probes":
            print("the share of chosen texts that score above what was made of them:")
        for label, value, n, *_ in table.rows:
            print(f"  {label:<50}{value:>26}   n = {n}")
    print(f"Report: {path.with_suffix('.md')}")
    return results


if __name__ == "__main__":
    main()
