"""Write your own CSV, JSONL or Parquet files as the files that the recipes train on.

    python data_prep/local_files.py --source reviews.csv --kind sft --columns text=review
    python data_prep/local_files.py --source reviews.csv --kind pairs --columns text=review --good label=positive
    python data_prep/local_files.py --source answers.jsonl --kind pairs \\
        --columns prompt=question chosen=better rejected=worse --keep topic --output data/answers

`--source` is a file, several files of one type, or a folder of them: .csv, .jsonl (each also as .gz) or .parquet. Files
whose names start with the word test, validation, valid, dev or eval become test, all others train; where none does,
the share `--test_share` (default 0.1) of the rows is held out. `--columns` says which of your columns is which, as
wanted=yours; a column that has the wanted name already needs no mention. `--keep` adds columns of yours under their own
names. You should see how many rows were left out and why, if any were, then the number of rows and one row of each
file:

    <output>/<kind>/{train,test}.jsonl    sft      {"text"}, or {"prompt", "completion"} where those are named or there
                                          pairs    {"chosen", "rejected"}, and "prompt" where it is named or there
                                          prompts  {"prompt"}

`--good label=positive` makes pairs of texts that have a label: each with that label is chosen over another without it,
and stands in one pair alone. What has no partner is left out and counted.

Texts are written as they stand, so a completion needs the space between it and its prompt. No text of test stands in
train (of rows with a prompt, no prompt): such rows of train are left out and counted, as are repeated and malformed
rows. Every value of a CSV is text, in kept columns too. `--output` is data/mine by default. With `--seed` and
`--limit N`, N rows at most are drawn from train and from test; the same seed and source write the same bytes.
"""

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dataset_files import (
    SUFFIXES,
    Malformed,
    Parser,
    Reader,
    Source,
    check_columns,
    count,
    folder,
    load_files,
    normalise,
    row_count,
    share,
    text_of,
    write,
)

KINDS = {
    "sft": [("text",), ("prompt", "completion")],
    "pairs": [("prompt", "chosen", "rejected"), ("chosen", "rejected")],
    "prompts": [("prompt",)],
}
LABELLED = [("text",)]  # what pairs are made of with --good
TEST_NAME = re.compile(r"(test|validation|valid|dev|eval)(?![a-z])", re.IGNORECASE)


def column_map(text: str) -> tuple[str, str]:
    """An argument in the form wanted=yours."""
    return _two_sides(text, "wanted=yours")


def label_value(text: str) -> tuple[str, str]:
    """An argument in the form column=value."""
    return _two_sides(text, "column=value")


def _two_sides(text: str, form: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not (left and equals and right):
        raise argparse.ArgumentTypeError(f"{text!r} is not in the form {form}")
    return left, right


def loader_of(path: Path) -> str | None:
    """The loader for a file's name, or None."""
    return next((loader for loader, ends in SUFFIXES.items() if path.name.lower().endswith(ends)), None)


def find_sides(names: list[str]) -> tuple[str, dict[str, list[str]]]:
    """The loader of the files, and those of train and of test, in the order of their names."""
    paths = []
    for name in names:
        path = Path(name).expanduser()
        there = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [file for file in there if file.is_file() and loader_of(file)]
        if not found:
            wrong = "no such file or folder" if not path.exists() else "is, or holds, no .csv, .jsonl or .parquet file"
            raise Source(name).error(f"{wrong}; name your data")
        paths += found
    loaders = {loader_of(path) for path in paths}
    if len(loaders) > 1:
        raise Source(" ".join(names)).error(f"holds files of types {', '.join(sorted(loaders))}; name one type of them")
    sides: dict[str, list[str]] = {"train": [], "test": []}
    for path in dict.fromkeys(paths):
        sides["test" if TEST_NAME.match(path.name) else "train"].append(str(path))
    if not sides["train"]:
        raise Source(" ".join(names)).error(f"holds {', '.join(sides['test'])} alone, which is test; add a train file")
    return loaders.pop(), {side: files for side, files in sides.items() if files}


def choose_columns(kind: str, forms, mapped: dict[str, str], keep: list[str], there: list[str]) -> dict[str, str]:
    """Wanted column → the user's, for the first of the kind's forms that the columns make up.

    Raises:
        SystemExit: a column does not exist, or is asked for that this kind does not have; one line with those there.
    """
    allowed = [column for form in forms for column in form]
    for wanted, yours in mapped.items():
        if wanted not in allowed:
            raise SystemExit(f"--columns {wanted}={yours}: {kind} has {', '.join(dict.fromkeys(allowed))}; name one")
        if yours not in there:
            raise SystemExit(f"--columns {wanted}={yours}: no column {yours!r}, only {there}; name one of them")
    for column in keep:
        if column not in there or column in allowed:
            wrong = "would hide the column of that name" if column in there else f"no such column, only {there}"
            raise SystemExit(f"--keep {column}: {wrong}; leave it out or rename it")
    for form in forms:
        if set(mapped) <= set(form) and all(mapped.get(column, column) in there for column in form):
            return {column: mapped.get(column, column) for column in form} | {column: column for column in keep}
    needed = " or ".join(" and ".join(form) for form in forms)
    raise SystemExit(f"--columns: {kind} needs {needed}, but there is only {there}; say which with wanted=yours")


def make_row(row: dict, columns: dict[str, str], keep: list[str]) -> dict:
    """A row under the wanted names; Malformed if a text is missing, or the answers of a pair are the same."""
    made = {wanted: row.get(yours) if wanted in keep else text_of(row, yours) for wanted, yours in columns.items()}
    if "chosen" in made and normalise(made["chosen"]) == normalise(made["rejected"]):
        raise Malformed(f"{columns['chosen']} equals {columns['rejected']}")
    try:
        json.dumps(made)
    except (TypeError, ValueError) as error:
        raise Malformed(f"a kept value cannot be written as JSON ({error})") from None
    return made


def pair_up(rows: Iterable[tuple[str, dict]], column: str, good: str, reader: Reader) -> Iterator[tuple[str, dict]]:
    """Pairs of texts of the same side: one whose `column` is `good` over one where it is not, each text once.

    What has no partner is counted as left out.

    Raises:
        SystemExit: no text has that label, or all have it; one line with the labels that there are.
    """
    waiting: dict[tuple[str, bool], list[str]] = {}
    labels = set()
    for side, row in rows:
        labels.add(label := str(row[column]))
        is_good = label == good
        if others := waiting.get((side, not is_good)):
            texts = row["text"], others.pop()
            chosen, rejected = texts if is_good else texts[::-1]
            yield side, {"chosen": chosen, "rejected": rejected}
        else:
            waiting.setdefault((side, is_good), []).append(row["text"])
    if good not in labels or len(labels) == 1:
        there = ", ".join(sorted(labels)[:8])
        raise SystemExit(f"--good {column}={good}: pairs need texts with it and without; {column} has {there}")
    for (side, _), texts in waiting.items():
        for _ in texts:
            reader.leave_out(f"{side}: no partner of another label")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser("local_files.py", __doc__)
    parser.add_argument("--source", nargs="+", required=True, help="a file, files of one type, or a folder")
    parser.add_argument("--kind", choices=list(KINDS), required=True, help="what the rows are for")
    parser.add_argument("--columns", nargs="+", type=column_map, default=[], help="wanted=yours, e.g. text=review")
    parser.add_argument("--good", type=label_value, help="make pairs of labelled texts: the label of the better ones")
    parser.add_argument("--keep", nargs="+", default=[], help="further columns of yours to write")
    parser.add_argument("--output", type=folder, default=Path("data/mine"), help="folder to write to")
    parser.add_argument("--test_share", type=share, default=0.1, help="of the rows, where no file is called test")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    parser.add_argument("--limit", type=count, help="read at most so many rows of train, and of test")
    return parser


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Write the two files; returns the number of rows of each."""
    args = make_parser().parse_args(argv)
    if len(dict(args.columns)) < len(args.columns):
        raise SystemExit("--columns: names one of them twice; name each once")
    forms, keep = KINDS[args.kind], args.keep
    if args.good:
        if args.kind != "pairs" or keep:
            raise SystemExit("--good: is for --kind pairs alone, and without --keep; leave one of them out")
        forms, keep = LABELLED, [args.good[0]]
    loader, sides = find_sides(args.source)
    splits = {side: load_files(Source(", ".join(files)), loader, files) for side, files in sides.items()}
    for side, split in splits.items():
        check_columns(Source(", ".join(sides[side])), side, split.column_names, [args.good[0]] if args.good else [])
    chosen = [choose_columns(args.kind, forms, dict(args.columns), keep, s.column_names) for s in splits.values()]
    columns = chosen[0]
    if chosen[-1] != columns:
        raise SystemExit(f"--source: train has {list(columns)}, test {list(chosen[-1])}; give both the same columns")
    total = row_count(splits["train"], args.limit)
    test_rows = 0 if "test" in splits else max(1, round(total * args.test_share))
    keys = [column for column in columns if column not in keep]
    keys = ["prompt"] if "prompt" in keys else keys
    reader = Reader(args.seed, args.limit)

    def fill(outbox):
        rows = reader.read_sides(
            splits,
            lambda row: make_row(row, columns, keep),
            lambda row: [row[column] for column in keys],
            test_rows,
        )
        for side, row in pair_up(rows, *args.good, reader) if args.good else rows:
            outbox.add(args.kind, side, row)

    return write(
        args.output,
        [f"{args.kind}/train.jsonl", f"{args.kind}/test.jsonl"],
        fill,
        reader,
        f"--source {' '.join(args.source)}",
        "add rows or fix those left out",
    )


if __name__ == "__main__":
    main()
