"""Continue a prompt with a model, or with a base model and its tuned one side by side; the text shows as it is made.

    python -m eval.predict --model runs/tuned --prompt "This film"
    python -m eval.predict --model runs/tuned --compare openai-community/gpt2 --file prompts.txt
    python -m eval.predict --model runs/summarize --title "A question" --post "My neighbour …" --temperature 0

A prompt comes from `--prompt`, from `--title` and `--post` (with `--subreddit`, in the form of the TL;DR dataset), or
from `--file`: a prompt per line, or the column `--prompt_column` of a `.jsonl`. With none of them the command asks
for prompts on a terminal, and reads one per line from what is piped into it. The model is a folder or Hub id, whole
or a LoRA adapter. Text goes to the model as it is; `--chat` wraps it in the tokenizer's conversation template.
Bad input ends in one line on stderr and exit status 2.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console

from command_line import OneLineParser
from data_prep.summarize_from_feedback import format_post
from eval.loading import at_least, check_language_model, load_model, load_tokenizer, set_stop_ids, stop_ids
from eval.streaming import Predictor, Prompt, encode_prompt, printable, show_beside, show_plainly
from trl_ppo.inputs import UserError


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="eval.predict", description="Continue a prompt with a model.")
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub id; a LoRA adapter's works too")
    add("--compare", metavar="BASE", help="show this model's text next to it")
    add("--prompt", action="append", help="the text to continue; may be given several times")
    add("--title", help="title of a post to summarise, with --post")
    add("--post", help="text of a post to summarise, with --title")
    add("--subreddit", help="where the post was made, without r/")
    add("--file", type=Path, help="a prompt per line, or a .jsonl with a column of them")
    add("--prompt_column", default="prompt", help="column of a .jsonl file (default prompt)")
    add("--chat", action="store_true", help="apply the tokenizer's conversation template")
    add("--max_new_tokens", type=at_least(1), help="default 64, fewer where the model has no more positions")
    add("--temperature", type=_zero_or_more, default=1.0, help="0 takes the likeliest token each time (default 1)")
    add("--top_p", type=_share, default=1.0, help="sample from the likeliest tokens of this total chance (default 1)")
    add("--seed", type=at_least(0, 2**32 - 1), default=0)
    return parser


def _zero_or_more(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or above and finite, not {text}")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text}")
    return number


# --- Prompts ----------------------------------------------------------------------------------------------------


def given_prompts(args) -> list[Prompt] | None:
    """The prompts that the options name, None if they name none; UserError for options that do not fit together."""
    if (args.title is None) != (args.post is None):
        raise UserError("--title and --post belong together; give both")
    if args.subreddit is not None and args.post is None:
        raise UserError(f"--subreddit {args.subreddit} needs --title and --post")
    sources = {"--prompt": args.prompt, "--title": args.title, "--file": args.file}
    named = [option for option, value in sources.items() if value is not None]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)}: give one of them")
    if args.file is not None:
        return read_prompts(args.file, args.prompt_column, args.chat)
    texts = args.prompt if args.post is None else [format_post(args.subreddit, args.title, args.post)]
    if texts is not None and not all(text.strip() for text in texts):
        raise UserError("--prompt is empty; give the text to continue")
    return texts


def read_prompts(file: Path, column: str, chat: bool) -> list[Prompt]:
    """Every prompt of a text file (a line each, blank ones skipped) or of a `.jsonl`; UserError if there is none."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines would cut at U+2028 too
    except (OSError, ValueError) as error:
        raise UserError(f"--file {file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"--file {file} holds no prompt")
    if file.suffix != ".jsonl":
        return [line.rstrip("\r") for _, line in numbered]
    return [_prompt_of_row(f"--file {file}, line {number}", line, column, chat) for number, line in numbered]


def _prompt_of_row(where: str, line: str, column: str, chat: bool) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or column not in row:
        raise UserError(f"{where} has no column {column!r} (--prompt_column names another)")
    prompt = row[column]
    if isinstance(prompt, list) and not chat:
        raise UserError(f"{where}: {column!r} is a conversation; --chat applies the tokenizer's template")
    is_conversation = isinstance(prompt, list) and prompt and all(isinstance(turn, dict) for turn in prompt)
    if not is_conversation and (not isinstance(prompt, str) or not prompt.strip()):
        raise UserError(f"{where}: {column!r} is not a text or is empty")
    return prompt


def piped_prompts() -> Iterator[str]:
    """The lines of stdin as prompts; UserError if there is none."""
    any_prompt = False
    for line in sys.stdin:
        if line.strip():
            any_prompt = True
            yield line.rstrip("\r\n")
    if not any_prompt:
        raise UserError("no prompt: give --prompt, --title and --post, or --file, or pipe in a prompt per line")


def asked_prompts() -> Iterator[str]:
    """What the user types, line by line, until an end of file or an interrupt."""
    print("A prompt per line; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if line.strip():
            yield line


# --- Models -----------------------------------------------------------------------------------------------------


def load_predictors(args) -> list[Predictor]:
    """The base model, where there is one, then the model; UserError before any loads if one of them cannot be used."""
    paths = {"base": args.compare, "tuned": args.model} if args.compare else {"model": args.model}
    for name, path in paths.items():
        check_language_model("--compare" if name == "base" else "--model", path)
    tokenizers = {name: load_tokenizer(path) for name, path in paths.items()}
    for name, path in paths.items():
        if args.chat and not tokenizers[name].chat_template:
            raise UserError(f"--chat: the tokenizer of {path} has no conversation template")
    models = {name: load_model(path) for name, path in paths.items()}
    predictors = []
    for name, model in models.items():
        eos = stop_ids([model.generation_config], tokenizers[name])
        set_stop_ids(model, tokenizers[name], eos)
        predictors.append(Predictor(name, model, tokenizers[name], eos))
    return predictors


def run(prompts: Iterable[Prompt], predictors: list[Predictor], args, typed: bool) -> list[dict[str, str]]:
    """Continue every prompt; where they are typed, one that cannot be used is said and passed over."""
    console = Console()
    completions = []
    known = len(prompts) if isinstance(prompts, list) else None
    for index, prompt in enumerate(prompts):
        seed = args.seed + index
        try:
            encoded = [encode_prompt(predictor, prompt, args) for predictor in predictors]
            if known != 1 and not typed:
                print(f"[prompt {index}] {printable(prompt if isinstance(prompt, str) else json.dumps(prompt))}")
            if len(predictors) > 1 and console.is_terminal:
                texts = show_beside(predictors, encoded, args, seed, console)
            else:
                texts = show_plainly(predictors, encoded, args, seed)
        except UserError as error:
            if not typed:
                raise UserError(f"prompt {index}: {error}" if known != 1 else str(error)) from error
            print(f"eval.predict: error: {error}", file=sys.stderr)
            continue
        completions.append({predictor.name: text for predictor, text in zip(predictors, texts, strict=True)})
    return completions


def main(argv: list[str] | None = None) -> list[dict[str, str]]:
    """Continue the prompts that the command line names; returns the completions, by model, one dict for each."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        prompts = given_prompts(args)
        typed = prompts is None and sys.stdin.isatty()
        predictors = load_predictors(args)
        if isinstance(prompts, list):  # a file is refused whole, before the first completion
            for index, prompt in enumerate(prompts):
                _check(predictors, prompt, args, index if len(prompts) > 1 else None)
        else:
            prompts = asked_prompts() if typed else piped_prompts()
        return run(prompts, predictors, args, typed)
    except UserError as error:
        parser.error(str(error))
    except UnicodeDecodeError as error:
        parser.error(f"what is piped in is not {error.encoding}: {error.reason}")
    except KeyboardInterrupt:
        parser.exit(130, "\neval.predict: interrupted\n")


def _check(predictors: list[Predictor], prompt: Prompt, args, index: int | None) -> None:
    try:
        for predictor in predictors:
            encode_prompt(predictor, prompt, args)
    except UserError as error:
        raise UserError(str(error) if index is None else f"prompt {index}: {error}") from error


if __name__ == "__main__":
    main()
