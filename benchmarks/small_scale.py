"""Does every recipe run on real data? Each YAML on models that fit a CPU, with its time and what came out.

    python data_prep/imdb.py
    python data_prep/hh.py
    python data_prep/summarize_from_feedback.py
    python data_prep/summaries.py --target title --output data/reddit_titles
    python data_prep/synthetic_instruct.py
    python benchmarks/small_scale.py --small_lm EleutherAI/pythia-14m

The `scratch` variants run as they are, in the order in which they need each other. Those that name models of the Hub
run with their own settings, except for models (the scratch ones, or `--small_lm` where 48 tokens of context are too
few), data (local) and length. Prints a Markdown table and writes it to `runs/small/table.md`; what is finished is not
run again.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LM, CLASSIFIER = "runs/scratch/sft", "runs/sentiment_gpt2_classifier_scratch"
INSTRUCT = "data/synthetic_instruct"
SCRATCH_SFT = "--config scratch"
# What a run ends with before and after, from the evaluations that PPO logs.
EVALUATED = {
    "score": "eval_objective/scores",
    "KL": "eval_objective/kl",
    "tokens": "eval_completions/mean_length",
    "no EOS": "eval_objective/missing_eos",
}
CPU = "--use_cpu true --bf16 false --report_to none --save_strategy no --gradient_checkpointing false"
PPO = f"{CPU} --eval_strategy steps --eval_on_start true --test_prompts 256"
SENTIMENT = (
    f"{PPO} --model_name_or_path {LM} --dataset_name data/imdb/prompts --prompt_column prompt --min_prompt_tokens 1 "
    "--prompt_tokens 2 8 --max_completion_length 24 --total_episodes 640 --per_device_train_batch_size 128 "
    "--gradient_accumulation_steps 1 --learning_rate 3e-4 --eval_steps 20 --logging_steps 20"
)


def jobs(small_lm, imdb):
    """(name, recipe, options, model) in an order in which each finds what it starts from."""
    classified = f"--reward_model {CLASSIFIER} --reward_label POSITIVE"
    lora_qwen = (
        f"{CPU} --model_name_or_path runs/scratch/qwen_sft --dtype float32 --max_length 448 "
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    )
    qwen_data = "data/summarize_from_feedback"
    qwen_ppo = (
        f"{PPO} --model_name_or_path runs/scratch/qwen_sft --dtype float32 --reward_dtype float32 --test_prompts 32 "
        f"--dataset_name {qwen_data}/prompts --dataset_test_split test --total_episodes 32 --eval_steps 8 "
        "--per_device_train_batch_size 8 --gradient_accumulation_steps 2 --learning_rate 1e-3 --log_completions false "
        "--max_prompt_tokens 400"
    )
    few = "--max_steps 3 --test_rows 20"
    gpt2, bert, qwen2 = "GPT-2 4.2 M from scratch", "BERT from scratch", "Qwen2 5 M from scratch"
    return [
        ("sentiment_gpt2_sft_scratch", "sentiment_gpt2_sft", SCRATCH_SFT, gpt2),
        ("sentiment_gpt2_reward_scratch", "sentiment_gpt2_reward", "", gpt2),
        ("sentiment_gpt2_classifier_scratch", "sentiment_gpt2_classifier", "", bert),
        ("sentiment_gpt2_ppo_scratch", "sentiment_gpt2_ppo", "--eval_strategy steps --eval_on_start true", gpt2),
        (
            "length_sft",
            "sentiment_gpt2_sft",
            f"{SCRATCH_SFT} --dataset_name {INSTRUCT}/sft --first_characters 800 --max_length 192 --max_steps 150 "
            "--output_dir runs/scratch/length_sft",
            gpt2,
        ),
        ("length_gpt2_large_reward_scratch", "length_gpt2_large_reward", "", gpt2),
        ("length_gpt2_large_ppo_scratch", "length_gpt2_large_ppo", "", gpt2),
        ("qwen_summarize_sft_scratch_pretrain", "qwen_summarize_sft", "", qwen2),
        ("qwen_summarize_sft_scratch", "qwen_summarize_sft", "", qwen2),
        ("qwen_summarize_reward_scratch", "qwen_summarize_reward", "", qwen2),
        ("qwen_summarize_ppo_scratch", "qwen_summarize_ppo", "", qwen2),
        (
            "sentiment_gpt2_sft",
            "sentiment_gpt2_sft",
            f"{CPU} --model_name_or_path {LM} --dataset_name data/imdb/sft --first_characters 300 --max_length 48 "
            "--max_steps 50",
            gpt2,
        ),
        *[
            (
                f"sentiment_gpt2_reward{name}",
                "sentiment_gpt2_reward",
                f"{CPU} --model_name_or_path {small_lm} --dataset_name {imdb} --max_length 128 --max_steps 100 "
                "--per_device_train_batch_size 16 --gradient_accumulation_steps 1 --learning_rate 5e-4",
                small_lm,
            )
            for name in ("", "_negative")
        ],
        (
            "sentiment_gpt2_classifier",
            "sentiment_gpt2_classifier",
            f"{CPU} --scratch_layers 2 --dataset_name data/imdb/pairs --max_length 128 --max_steps 100 "
            "--per_device_train_batch_size 32 --learning_rate 5e-4 --warmup_steps 50",
            bert,
        ),
        (
            "sentiment_gpt2_reward_hh",
            "sentiment_gpt2_reward",
            f"{CPU} --model_name_or_path {small_lm} --max_length 256 --learning_rate 1e-4 --train_pairs 800",
            small_lm,
        ),
        *[
            (f"sentiment_gpt2_ppo{name}", "sentiment_gpt2_ppo", f"{SENTIMENT} {reward}", gpt2)
            for name, reward in (
                ("", classified),
                ("_negative", "--reward_model runs/small/sentiment_gpt2_reward_negative"),
                ("_hh", "--reward_model runs/small/sentiment_gpt2_reward_hh"),
                ("_distilbert", classified),
                ("_roberta", classified),
                ("_bert", classified),
            )
        ],
        (
            "length_gpt2_large_reward",
            "length_gpt2_large_reward",
            f"{CPU} --model_name_or_path {small_lm} --max_length 256 --learning_rate 1e-4 --train_pairs 800",
            small_lm,
        ),
        (
            "length_gpt2_large_ppo",
            "length_gpt2_large_ppo",
            f"{PPO} --model_name_or_path runs/scratch/length_sft --max_prompt_tokens 96 --max_completion_length 96 "
            "--reward_model runs/scratch/length_reward --total_episodes 640 "
            '--rewards {"length_penalty":0.05,"reward_model":0.5} '
            "--per_device_train_batch_size 64 --gradient_accumulation_steps 1 --learning_rate 1e-3 --eval_steps 40",
            gpt2,
        ),
        *[
            (
                f"qwen_summarize_{stage}{kind}",
                f"qwen_summarize_{stage}",
                f"{options} {dtype}",
                qwen2,
            )
            for kind, dtype in (("", ""), ("_qlora", "--dtype bfloat16"))  # TRL trains QLoRA's own weights in bfloat16
            for stage, options in (
                (
                    "sft",
                    f"{lora_qwen} --dataset_name {qwen_data}/sft --dataset_test_split test {few}",
                ),
                ("reward", f"{lora_qwen} --max_steps 40 --learning_rate 1e-3"),
                ("ppo", f"{qwen_ppo} --reward_model runs/small/qwen_summarize_reward{kind}"),
            )
        ],
    ]


def run(name, recipe, options, folder):
    """Seconds and what the recipe printed; `result.json` in `folder` remembers both."""
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    variant = name.removeprefix(recipe).removeprefix("_")  # none where the name is the recipe's
    config = ["--config", variant] if variant and "--config" not in options else []
    command = [sys.executable, f"recipes/{recipe}.py", *config, "--overwrite_output_dir", "true"]
    own_folder = [] if "_scratch" in name or "--output_dir" in options else ["--output_dir", str(folder)]
    started = time.monotonic()
    done = subprocess.run([*command, *options.split(), *own_folder], cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    content = {"seconds": seconds, "said": outcome(done.stdout)}
    folder.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(content, indent=1) + "\n")
    return content


def outcome(printed):
    """The line with the recipe's figure; for PPO what its evaluations logged first and last."""
    lines = [line for line in printed.splitlines() if re.search(r"held-out loss|^test pairwise accuracy", line)]
    if lines:
        return lines[-1]
    folder = re.findall(r"(?:critic): (\S+)$", printed, re.MULTILINE)[-1]
    history = json.loads((ROOT / folder / "trainer_state.json").read_text())["log_history"]
    evaluations = [entry for entry in history if EVALUATED["score"] in entry]
    first, last = evaluations[0], evaluations[-1]
    return ", ".join(f"{name} {first[key]:.2f} → {last[key]:.2f}" for name, key in EVALUATED.items())


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--small_lm", default="EleutherAI/pythia-14m", help="a small causal LM of 256 positions or more"
    )
    parser.add_argument("--imdb", default="stanfordnlp/imdb", help="labelled reviews, a Hub id or folder")
    parser.add_argument("--only", nargs="+", help="names of rows, for a part of the table")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    rows = ["| YAML | model | seconds | result |", "|---|---|---|---|"]
    for name, recipe, options, model in jobs(args.small_lm, args.imdb):
        if args.only and name not in args.only:
            continue
        done = run(name, recipe, options, ROOT / "runs" / "small" / name)
        rows.append(f"| {name} | {Path(model).name} | {done['seconds']:.0f} | {done['said']} |")
        print(rows[-1], flush=True)
    (ROOT / "runs" / "small").mkdir(parents=True, exist_ok=True)
    (ROOT / "runs" / "small" / "table.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
