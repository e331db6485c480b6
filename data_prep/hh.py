"""Write Anthropic's helpful-and-harmless dialogues as pairs for a reward model and as prompts for PPO.

    python data_prep/hh.py [--source allenai/preference-datasets-tulu] [--output data/hh] [--seed 0] [--limit N]
                           [--test_rows 500]

`--source` is a Hub id whose split is `anthropic_hh` (or `train`, and `test`), or a local folder that holds `train`, and
`test` if there is one, as `.jsonl`, `.jsonl.gz` or `.parquet`. Its columns are `chosen` and `rejected`, each a list of
{"role", "content"} that takes turns between user and assistant; the two share every turn but the last. 8,000 rows take
about 5 seconds on one core. You should see how many rows were left out and why, if any were, then the number of rows
and one row of each file:

    <output>/pairs/{train,test}.jsonl    {"prompt", "chosen", "rejected"}  people preferred the first answer
    <output>/prompts/{train,test}.jsonl  {"prompt"}                        the distinct prompts of the pairs

A prompt is all the shared turns in the form of Bai et al. 2022, "\\n\\nHuman: …\\n\\nAssistant:"; an answer starts with
the space that follows. Where the source has no test split, `--test_rows` rows are held out for it, or a tenth of the
rows where that is less. No prompt is on both sides: rows of train with a prompt of test are left out and counted, as
are repeated and malformed rows.

With `--limit`, a Hub source is streamed: rows are drawn from its first ones through a buffer of 1,000 per shuffle.
The same seed and source write the same bytes. Some of these texts are offensive: they were written to find harm.
"""

from pathlib import Path

from dataset_files import (
    Malformed,
    Parser,
    Reader,
    Source,
    both_sides,
    count,
    folder,
    held_out,
    load_splits,
    normalise,
    write,
)

SPLITS = {"train": ("train", "anthropic_hh"), "test": ("test", "validation")}
SPEAKERS = {"user": "Human", "assistant": "Assistant"}


def check_turns(name: str, turns: object) -> None:
    """Malformed unless these are messages with text, by user and assistant in turn, the assistant's last."""
    if not isinstance(turns, list) or len(turns) < 2:
        raise Malformed(f"{name} is no list of two or more messages")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise Malformed(f"{name}: message {number} has no text as content")
        if not turn["content"].strip():
            raise Malformed(f"{name}: message {number} is empty")
        expected = list(SPEAKERS)[(len(turns) - number) % 2]
        if turn.get("role") != expected:
            raise Malformed(f"{name}: message {number} is by {turn.get('role')!r}, not {expected!r}")


def format_prompt(turns: list[dict[str, str]]) -> str:
    """Turns up to the user's last one, and the name of the assistant, who is to speak."""
    said = (f"\n\n{SPEAKERS[turn['role']]}: {turn['content'].strip()}" for turn in turns)
    return "".join(said) + "\n\nAssistant:"


def make_pair(row: dict) -> dict[str, str]:
    """A row of the source as prompt, chosen and rejected text; Malformed if it is no preference between answers."""
    sides = ("chosen", "rejected")
    for name in sides:
        check_turns(name, row.get(name))
    prompt, other = (format_prompt(row[name][:-1]) for name in sides)
    chosen, rejected = (" " + row[name][-1]["content"].strip() for name in sides)
    if prompt != other:
        raise Malformed("chosen and rejected do not share their prompt turns")
    if normalise(chosen) == normalise(rejected):
        raise Malformed("chosen equals rejected")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def make_parser() -> Parser:
    """The command line."""
    parser = Parser("hh.py", __doc__)
    parser.add_argument("--source", default="allenai/preference-datasets-tulu", help="Hub id or local folder")
    parser.add_argument("--output", type=folder, default=Path("data/hh"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    parser.add_argument("--limit", type=count, help="read at most so many rows of each split")
    parser.add_argument("--test_rows", type=count, help="rows to hold out where there is no test split (500)")
    return parser


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Write the four files; returns the number of rows of each."""
    args = make_parser().parse_args(argv)
    source = Source(args.source)
    splits = load_splits(source, SPLITS, ("chosen", "rejected"), optional=("test",), streaming=bool(args.limit))
    test_rows = held_out(splits, args.limit, args.test_rows)
    reader = Reader(args.seed, args.limit)

    def fill(outbox):
        for side, pair in reader.read_sides(splits, make_pair, lambda pair: [pair["prompt"]], test_rows):
            outbox.add("pairs", side, pair)
            if reader.is_new(normalise(pair["prompt"]), f"prompts/{side}"):
                outbox.add("prompts", side, {"prompt": pair["prompt"]})

    return write(
        args.output,
        both_sides(("pairs", "prompts")),
        fill,
        reader,
        f"--source {args.source}",
        "fix the rows left out or raise --limit",
    )


if __name__ == "__main__":
    main()
