"""Write what a language model makes of prompts, one completion each, as JSONL.

    python -m eval.sample --model runs/scratch/qwen_sft --prompts data/reddit_titles/pairs --split train \
        --n_prompts 4000 --max_new_tokens 48 --output runs/scratch/qwen_samples.jsonl

Completions are sampled in batches at `--temperature`, nothing else shaping the distribution, one for each prompt that
is in the rows. Writes `{"prompt", "completion"}` a row when all are there. Bad input ends in one line on stderr
and exit status 2.
"""

import json
from pathlib import Path

from command_line import OneLineParser
from eval.generation import generate
from eval.loading import at_least, load_model, positive
from eval.prompts import load_prompts, prepare
from eval.report import write_atomically
from trl_ppo.inputs import UserError


def make_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser(prog="eval.sample", description="Write a model's completions of prompts.")
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub id; a LoRA adapter's works too")
    add("--prompts", required=True, help="folder, JSONL file or Hub id of the prompts")
    add("--output", type=Path, required=True, help="JSONL file to write")
    add("--n_prompts", type=at_least(2), default=512, help="of the first so many rows (default 512)")
    add("--split", default="test")
    add("--prompt_column", default="prompt")
    add("--max_prompt_tokens", type=at_least(1), help="leave out longer prompts")
    add("--max_new_tokens", type=at_least(1), default=48)
    add("--temperature", type=positive, default=1.0)
    add("--batch_size", type=at_least(1), default=64)
    add("--seed", type=at_least(0), default=0)
    add("--overwrite", action="store_true", help="replace the --output that is there")
    return parser


def sample(args) -> list[dict]:
    """The rows, written to `args.output`; UserError for bad input, before the model loads."""
    if args.output.exists() and not args.overwrite:
        raise UserError(f"--output {args.output} is there already; name another file, or give --overwrite")

    def load():
        prompts = load_prompts(args.prompts, args.split, args.prompt_column, args.n_prompts)
        return prompts.select({text: index for index, text in enumerate(prompts.texts)}.values())

    _, tokenizer, prompts, eos = prepare("--model", args.model, load, None, args)
    ids = generate(load_model(args.model), tokenizer, prompts.ids, eos, args, "sample")
    completions = tokenizer.batch_decode(ids, skip_special_tokens=True)
    pairs = zip(prompts.texts, completions, strict=True)
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    write_atomically(args.output, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{args.output}: {len(rows)} completions of {args.model}")
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    """Sample for the prompts that the command line names; returns the rows."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        return sample(args)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
