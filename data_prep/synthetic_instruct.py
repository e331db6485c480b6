"""Write instruction pairs as files for the length recipes: pairs for a reward model, prompts for PPO, answers for SFT.

    python data_prep/synthetic_instruct.py [--source Dahoas/synthetic-instruct-gptj-pairwise]
                                           [--output data/synthetic_instruct] [--seed 0] [--limit N] [--test_rows 500]

`--source` is a Hub id, or a local folder that holds `train`, and `test` if there is one, as `.jsonl`, `.jsonl.gz`,
`.csv` or `.parquet`, with the columns `prompt`, `chosen` and `rejected`, all text. 2,000 rows take about 3 seconds on
one core. You should see how many rows were left out and why, if any were, then the number of rows and one row of each
file:

    <output>/pairs/{train,test}.jsonl    {"prompt", "chosen", "rejected"}  the better answer and the other
    <output>/prompts/{train,test}.jsonl  {"prompt"}                        the distinct prompts of the pairs
    <output>/sft/{train,test}.jsonl      {"prompt", "completion"}          prompts with their distinct chosen answers

A prompt is "Human: …\\n\\nAssistant:"; an answer starts with the space that follows. The Hub's default has one split:
`--test_rows` rows of it are held out for test, or a tenth of the rows where that is less. No prompt is on both sides:
rows of train with a prompt of test are left out and counted, as are repeated and malformed rows.

With `--limit`, a Hub source is streamed: rows are drawn from its first ones through a buffer of 1,000.
The same seed and source write the same bytes.
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
    text_of,
    write,
)

SPLITS = {"train": ("train",), "test": ("test", "validation")}
COLUMNS = ("prompt", "chosen", "rejected")


def make_pair(row: dict) -> dict[str, str]:
    """A row of the source in the prompt's form; Malformed if a text is missing or the answers are the same."""
    prompt, chosen, rejected = (text_of(row, column).strip() for column in COLUMNS)
    if normalise(chosen) == normalise(rejected):
        raise Malformed("chosen equals rejected")
    return {"prompt": f"Human: {prompt}\n\nAssistant:", "chosen": f" {chosen}", "rejected": f" {rejected}"}


def make_parser() -> Parser:
    """The command line."""
    parser = Parser("synthetic_instruct.py", __doc__)
    parser.add_argument("--source", default="Dahoas/synthetic-instruct-gptj-pairwise", help="Hub id or local folder")
    parser.add_argument("--output", type=folder, default=Path("data/synthetic_instruct"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    parser.add_argument("--limit", type=count, help="read at most so many rows of each split")
    parser.add_argument("--test_rows", type=count, help="rows to hold out where there is no test split (500)")
    return parser


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Write the six files; returns the number of rows of each."""
    args = make_parser().parse_args(argv)
    splits = load_splits(Source(args.source), SPLITS, COLUMNS, optional=("test",), streaming=bool(args.limit))
    test_rows = held_out(splits, args.limit, args.test_rows)
    reader = Reader(args.seed, args.limit)

    def fill(outbox):
        for side, pair in reader.read_sides(splits, make_pair, lambda pair: [pair["prompt"]], test_rows):
            prompt, completion = pair["prompt"], pair["chosen"]
            outbox.add("pairs", side, pair)
            if reader.is_new(normalise(prompt), f"prompts/{side}"):
                outbox.add("prompts", side, {"prompt": prompt})
            if reader.is_new(normalise(prompt + completion), f"sft/{side}"):
                outbox.add("sft", side, {"prompt": prompt, "completion": completion})

    return write(
        args.output,
        both_sides(("pairs", "prompts", "sft")),
        fill,
        reader,
        f"--source {args.source}",
        "fix the rows left out or raise --limit",
    )


if __name__ == "__main__":
    main()
