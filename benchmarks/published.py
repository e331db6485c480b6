"""Published PPO results, run again from Hub ids: ours beside the published figure, its judge and its source.

    python benchmarks/published.py --control notebook
    python benchmarks/published.py --control tldr --pairwise_judge http://localhost:8000/v1#my-judge --seeds 44413
    python benchmarks/published.py --control tldr_trl --dry_run
    python benchmarks/published.py --control imdb_frontier --replace openai-community/gpt2-large=models/gpt2-large

A control is a list of commands, the stages: data, recipes, then eval.compare. A stage that ended well leaves a file in
`runs/published/<control>/done`, and the next call does not run it again unless its command has changed; a recipe that
was stopped goes on from its last checkpoint. `--dry_run` prints the commands. The table is printed and written to
`runs/published/<control>/table.md`; what has no result stands there as *not yet run*. Win rates need
`--pairwise_judge`, as in eval.compare; another judge than the published one gives other win rates.
"""

import argparse
import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from seeds import ROOT, cell, run

from eval.machine import git_commit

SEEDS = (44413, 55513, 66613, 77713)  # of Huang et al.
TARGETS = (3, 6, 9, 12)  # nats
SFT, REWARD = (f"cleanrl/EleutherAI_pythia-1b-deduped__{stage}__tldr" for stage in ("sft", "reward"))
DISTILBERT, SIEBERT = "lvwerra/distilbert-imdb", "siebert/sentiment-roberta-large-english"
NOTEBOOK = "TRL's notebook gpt2-sentiment, n = 16"
HUANG = "arXiv:2403.17031 (quoted, not checked against its tables)"
TRL = "TRL's documentation of its PPO trainer, n = 1,000, a run of 1 M episodes"
DPO = "arXiv:2305.18290, figure 2"
HEADER = ["figure", "ours", "n", "KL, nats", "tokens", "published", "judge of the published", "source"]


class Row(NamedTuple):
    """A figure, the run it is of, and where ours stands: an estimate, or those of base and tuned model, in a JSON."""

    figure: str
    run: str
    file: str
    keys: tuple
    published: str
    judge: str
    source: str


# -- The controls: (name, command without the interpreter) of each stage, and rows -------------------------------------


def notebook(out, args):
    """The classifier's logit before and after PPO, for as many samples as the notebook shows, and for more."""
    stages, rows = [imdb_prompts(out), recipe(out, "ppo", "sentiment_gpt2_ppo")], []
    for n in sorted({16, args.n_prompts}):
        stages.append(reviews(out, f"report_{n}", f"--base lvwerra/gpt2-imdb --tuned {out}/ppo", DISTILBERT, n))
        for name, published in {"mean": "0.239 → 2.475", "median": "0.422 → 2.702"}.items():
            ours = f"{out}/ppo", f"{out}/report_{n}/results.json", ("metrics", "rewards", "reward_model", name)
            rows.append(Row(f"{name} reward, n = {n}", *ours, published, f"{DISTILBERT}, the reward", NOTEBOOK))
    return stages, rows


def tldr(out, args):
    """The reward model's accuracy and the policy's win rate over people's summaries, by seed."""
    sources = "--source openai/summarize_from_feedback --tldr_source trl-lib/tldr"
    data = f"data_prep/summarize_from_feedback.py {sources} --tokenizer EleutherAI/pythia-1b-deduped"
    stages, rows = [("data", f"{data} --output {out}/data")], []
    for seed in args.seeds:
        names = sft, reward, ppo = [f"{stage}_{seed}" for stage in ("sft", "reward", "ppo")]
        start, critic = f"--model_name_or_path {out}/{sft}", f"--value_model_path {out}/{reward}"
        options = "", f"{start} --dataset_name {out}/data/pairs", f"{start} --reward_model {out}/{reward} {critic}"
        for name, more in zip(names, options, strict=True):
            stem = f"qwen_summarize_{name.removesuffix(f'_{seed}')}"
            stages.append(recipe(out, name, stem, f"--config pythia --seed {seed} {more}"))
        stages.append(summaries(out, f"report_{seed}", f"{out}/{sft}", f"{out}/{ppo}", f"{out}/{reward}", args))
        right = f"{out}/{reward}", f"{out}/{reward}/reward_report.json", ("test", "accuracy")
        rows.append(Row(f"reward accuracy, seed {seed}", *right, "0.629", "people's choices", HUANG))
        won = f"{out}/{ppo}", f"{out}/report_{seed}/results.json", ("metrics", "judged_reference", "tuned")
        rows.append(Row(f"win rate, seed {seed}", *won, "0.618, 0.539, 0.222, 0.197 (four seeds)", "GPT-3.5", HUANG))
    return stages, rows


def tldr_trl(out, args):
    """The win rate over people's summaries before and after PPO."""
    stages = [recipe(out, "ppo", "qwen_summarize_ppo", "--config pythia_trl")]
    stages.append(summaries(out, "report", SFT, f"{out}/ppo", REWARD, args))
    won = f"{out}/ppo", f"{out}/report/results.json", ("metrics", "judged_reference")
    return stages, [Row("win rate", *won, "0.330 → 0.647", "gpt-4o-mini", TRL)]


def imdb_frontier(out, args):
    """The true reward of the policy of each KL target; its checkpoints, the points between, are in the reports."""
    large = "--model_name_or_path openai-community/gpt2-large"
    stages, rows = [imdb_prompts(out), recipe(out, "sft", "sentiment_gpt2_sft", large)], []
    for target in TARGETS:
        policy, options = f"ppo_{target}", f"--config dpo_frontier --model_name_or_path {out}/sft --kl_target {target}"
        stages.append(recipe(out, policy, "sentiment_gpt2_ppo", options))
        models = f"--base {out}/sft --sweep {out}/{policy}"
        stages.append(reviews(out, f"report_{target}", models, SIEBERT, args.n_prompts))
        keys = ("metrics", "rewards", "reward_model", "mean")
        ours = f"{out}/{policy}", f"{out}/report_{target}/results.json", keys
        rows.append(Row(f"mean logit, KL target {target}", *ours, "a curve, no numbers", f"{SIEBERT}, the reward", DPO))
    return stages, rows


CONTROLS = {control.__name__: control for control in (notebook, tldr, tldr_trl, imdb_frontier)}


def imdb_prompts(out):
    """Shuffled: the Hub's test reviews are sorted by label."""
    return "data", f"data_prep/imdb.py --source stanfordnlp/imdb --output {out}/data"


def recipe(out, name, stem, options=""):
    return name, f"recipes/{stem}.py {options} --output_dir {out}/{name}"


def reviews(out, name, models, classifier, n):
    models += f" --reward reward_model={classifier}#POSITIVE --max_new_tokens 16 --n_prompts {n}"
    return name, f"-m eval.compare {models} --prompts {out}/data/prompts --prompt_tokens 2 8 --output {out}/{name}"


def summaries(out, name, base, tuned, reward, args):
    """Nearly greedy, as either source has its summaries judged."""
    options = "--prompts trl-lib/tldr --split validation --reference_column completion --max_prompt_tokens 512"
    options += f" --temperature 0.01 --max_new_tokens 53 --n_prompts {args.n_prompts} --output {out}/{name}"
    options += f" --pairwise_judge {shlex.quote(args.pairwise_judge)}" if args.pairwise_judge else ""
    return name, f"-m eval.compare --base {base} --tuned {tuned} --reward reward_model={reward} {options}"


# -- Running them ------------------------------------------------------------------------------------------------------


def words_of(command, args):
    """The command as words; folders stand in for Hub ids, those of a recipe's YAML too."""
    words, local, more = shlex.split(command), dict(args.replace), []
    if words[0].startswith("recipes/"):
        stem = Path(words[0]).stem
        config = f"variants/{stem}/{words[2]}" if words[1] == "--config" else stem
        settings = yaml.safe_load((ROOT / "recipes" / f"{config}.yaml").read_text())
        named = {key: value for key, value in settings.items() if isinstance(value, str) and value in local}
        more = [word for key in named if f"--{key}" not in words for word in (f"--{key}", local[named[key]])]
        words = ["-m", "accelerate.commands.launch", "--config_file", args.accelerate_config, *words]
    for hub, folder in local.items():  # alone, or as in reward_model=ID#LABEL
        words = [re.sub(rf"(^|=){re.escape(hub)}(#|$)", rf"\1{folder}\2", word) for word in words]
    return words + more


def finish(name, command, out, args):
    """Run a stage, unless this very command has ended well before."""
    words, done = words_of(command, args), ROOT / out / "done" / f"{name}.json"
    if done.exists() and json.loads(done.read_text())["command"] == words:
        return
    print("python", shlex.join(words), flush=True)
    again = ["--overwrite"] if done.exists() and "eval.compare" in words else []
    if command.startswith("recipes/"):
        goes_on = not done.exists() and any((ROOT / out / name).glob("checkpoint-*"))
        again = ["--resume_from_checkpoint" if goes_on else "--overwrite_output_dir", "true"]
    started = time.monotonic()
    run(*words, *again)
    done.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": words, "seconds": time.monotonic() - started, "commit": git_commit()}
    done.write_text(json.dumps(content, indent=1) + "\n")


def line_of(row):
    """The cells of a row; *not yet run* where there is no result, or no judge to say."""
    content = read(row.file)
    ours = content
    for key in row.keys:
        ours = (ours or {}).get(key)
    estimates = [e for e in ([ours] if "mean" in ours else (ours["base"], ours["tuned"])) if e] if ours else []
    history = read(f"{row.run}/trainer_state.json").get("log_history", ())
    logged = [entry["objective/kl"] for entry in history if "objective/kl" in entry]
    length = content.get("metrics", {}).get("length")
    said = " → ".join(map(cell, estimates)) or "*not yet run*"
    n, kl = str(estimates[-1]["n"]) if estimates else "–", f"{logged[-1]:.2f}" if logged else "–"
    return [row.figure, said, n, kl, cell(length["tuned"]) if length else "–", row.published, row.judge, row.source]


def read(path):
    """A JSON's content; empty if it is not there."""
    return json.loads((ROOT / path).read_text()) if (ROOT / path).exists() else {}


def table(rows, out):
    """Markdown: a line a row, then what ours come from."""
    lines = [HEADER, ["---"] * len(HEADER), *map(line_of, rows)]
    made = {str(json.loads(path.read_text())["commit"]) for path in (ROOT / out / "done").glob("*.json")}
    text = "\n".join(" | ".join(["", *line, ""]).strip() for line in lines)
    return f"{text}\n\nCommits of ours: {', '.join(sorted(made)) or 'none'}. KL is that of the last rollouts logged.\n"


def pair(text):
    """An argparse type: what stands before and after the first `=`."""
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r}: write it as HUB_ID=FOLDER")
    return text.split("=", 1)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--control", choices=CONTROLS, required=True)
    add("--dry_run", action="store_true", help="print the commands and the table as it stands; run nothing")
    add("--pairwise_judge", metavar="JUDGE", help="of tldr and tldr_trl: URL#MODEL, causal LM, module:function")
    add("--n_prompts", type=int, default=1000, help="held-out prompts (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=SEEDS, help="of tldr (default: those of Huang et al.)")
    add("--replace", type=pair, nargs="+", default=[], metavar="HUB_ID=FOLDER", help="read from folders instead")
    add("--accelerate_config", default="accelerate_configs/single_gpu.yaml", help="(default: %(default)s)")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    out = f"runs/published/{args.control}"
    stages, rows = CONTROLS[args.control](out, args)
    for name, command in stages:
        if args.dry_run:
            print("python", shlex.join(words_of(command, args)))
        else:
            finish(name, command, out, args)
    text = table(rows, out)
    print(text)
    if not args.dry_run:
        (ROOT / out / "table.md").write_text(text)


if __name__ == "__main__":
    main()
