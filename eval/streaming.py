"""One completion at a time, shown as it is made, for people who look at a model's text."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from eval.loading import positions_of
from trl_ppo.inputs import UserError, first_line

# What a terminal would obey instead of show: controls but for tab and line feed, and those that reorder text.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

Prompt = str | list[dict[str, str]]


@dataclass
class Predictor:
    """A model that is ready to continue prompts, with its tokenizer and the tokens it stops at."""

    name: str
    model: torch.nn.Module
    tokenizer: object
    eos: list[int]


def encode_prompt(predictor: Predictor, prompt: Prompt, args) -> torch.Tensor:
    """The prompt's token ids (1, P) on the model's device; UserError if it has none, or too many for the model."""
    tokenizer = predictor.tokenizer
    if args.chat:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program of its author's, and refuses turns in its own words
            raise UserError(f"the conversation template refused the prompt: {first_line(error)}") from error
    if re.search("[\ud800-\udfff]", prompt):
        raise UserError(
            f"the prompt {prompt!r:.60} is no text: it holds bytes that are not UTF-8, or half a surrogate pair"
        )
    # A template writes the special tokens itself.
    ids = tokenizer(prompt, add_special_tokens=not args.chat, return_tensors="pt")["input_ids"].long()
    if not ids.size(1):
        raise UserError("the prompt has no tokens")
    new_tokens(predictor, ids, args)
    return ids.to(predictor.model.device)


def new_tokens(predictor: Predictor, ids: torch.Tensor, args) -> int:
    """How many tokens to write after the prompt `ids` (1, P); UserError if the model has no positions for them."""
    positions = positions_of(predictor.model.config)
    wanted = min(64, positions - ids.size(1)) if args.max_new_tokens is None else args.max_new_tokens
    if wanted < 1 or ids.size(1) + wanted > positions:
        raise UserError(
            f"the prompt has {ids.size(1)} tokens; with {max(wanted, 1)} new ones (--max_new_tokens) that is over the "
            f"{positions} positions of the {predictor.name}"
        )
    return wanted


class Pieces(TextStreamer):
    """Hands the completion's text to `show` piece by piece, as it is made, without what a terminal would obey."""

    def __init__(self, tokenizer, show: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece that later tokens cannot change."""
        self.show(printable(text))


def printable(text: str) -> str:
    """`text` with the characters that a terminal would obey replaced by �."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def predict(predictor: Predictor, ids: torch.Tensor, args, seed: int, show: Callable[[str], None]) -> str:
    """One completion of the prompt `ids` (1, P), handed to `show` as it is made; UserError if generation fails."""
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    torch.manual_seed(seed)
    try:
        with torch.no_grad():
            sequence = predictor.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens(predictor, ids, args),
                streamer=Pieces(predictor.tokenizer, show),
                **(sampling if args.temperature else {"do_sample": False}),
            )
    except RuntimeError as error:  # no chances to draw from (NaN weights), or no memory
        raise UserError(f"the {predictor.name} cannot generate: {first_line(error)}") from error
    return predictor.tokenizer.decode(sequence[0, ids.size(1) :], skip_special_tokens=True)


def show_plainly(predictors: list[Predictor], encoded: list[torch.Tensor], args, seed: int) -> list[str]:
    """Stream each completion to stdout, under its model's name where there are two."""
    completions = []
    for predictor, ids in zip(predictors, encoded, strict=True):
        if len(predictors) > 1:
            print(f"[{predictor.name}]")
        completions.append(predict(predictor, ids, args, seed, lambda piece: print(piece, end="", flush=True)))
        print()
    return completions


def show_beside(predictors: list[Predictor], encoded: list[torch.Tensor], args, seed: int, console: Console) -> list:
    """Stream the completions into the columns of one table, base on the left."""
    shown = ["" for _ in predictors]

    def table() -> Table:
        grid = Table(*(predictor.name for predictor in predictors), expand=True)
        grid.add_row(*(Text(text) for text in shown))  # Text: square brackets are not rich's markup here
        return grid

    completions = []
    with Live(table(), console=console, vertical_overflow="visible", auto_refresh=False) as live:
        for column, (predictor, ids) in enumerate(zip(predictors, encoded, strict=True)):

            def show(piece: str, column: int = column) -> None:
                shown[column] += piece
                live.update(table(), refresh=True)

            completions.append(predict(predictor, ids, args, seed, show))
    return completions
