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

`--good label=positive` makes pairs of texts that have a label: each with that label is chosen over one with another
label, and stands in one pair alone. `--good stars=4,5 --bad 1,2` says which labels are the better and which the worse
ones. Texts with any other label, with none, or without a partner are left out and counted. `--judge_share 0.3` keeps
that share of the train rows apart, and makes pairs of it in judge_pairs, for a judge that training never sees; it has
the same pairs of test.

Texts are written as they stand, so a completion needs the space between it and its prompt. No text of test stands in
train (of rows with a prompt, no prompt): such rows of train are left out and counted, as are repeated and malformed
rows. Every value of a CSV is text, in kept columns too. `--output` is data/mine by default. With `--seed` and
`--limit N`, N rows at most are drawn from train and from test; the same seed and source write the same bytes.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from dataset_files import (
    SUFFIXES,
    Malformed,
    Parser,
    Reader,
    Source,
    both_sides,
    check_columns,
    count,
    digest,
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
FEW_PAIRS = 100
TEST_NAME = re.compile(r"(test|validation|valid|dev|eval)(?![a-z])", re.IGNORECASE)


def column_map(text: str) -> tuple[str, str]:
    """An argument in the form wanted=yours."""
    return _two_sides(text, "wanted=yours")


def label_values(text: str) -> tuple[str, list[str]]:
    """An argument in the form column=value, or column=value,value."""
    column, values = _two_sides(text, "column=value")
    return column, values.split(",")


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
            hint = ", or make pairs of a label with --good" if kind == "pairs" else ""
            wants = ", ".join(dict.fromkeys(allowed))
            raise SystemExit(f"--columns {wanted}={yours}: {kind} has {wants}; name one{hint}")
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


def pair_up(rows: Iterable[tuple], column: str, good: list, bad: list | None, reader: Reader) -> Iterator[tuple]:
    """Pairs of texts of the same file: one whose `column` is in `good` over one where it is in `bad`, each text once.

    `rows` and the pairs are (kind, side, row); without `bad` every other label is. What has no label, one that is in
    neither, or no partner is counted as left out.

    Raises:
        SystemExit: no text has one of the labels of a side; one line with the labels that there are.
    """
    waiting: dict[tuple[str, str, bool], list[str]] = {}
    known: set[bytes] = set()
    labels: Counter[str] = Counter()
    for kind, side, row in rows:
        label = "" if row[column] is None else str(row[column]).strip()
        labels[label] += 1
        is_good = label in good
        if not label or not (is_good or bad is None or label in bad):
            reader.leave_out(f"{side}: {column} is {label or 'empty'}")
            continue
        text = digest(normalise(row["text"]))
        if text in known:
            reader.leave_out(f"{side}: the same text with another {column}")
            continue
        known.add(text)
        if others := waiting.get((kind, side, not is_good)):
            texts = row["text"], others.pop()
            chosen, rejected = texts if is_good else texts[::-1]
            yield kind, side, {"chosen": chosen, "rejected": rejected}
        else:
            waiting.setdefault((kind, side, is_good), []).append(row["text"])
    worse = [label for label in labels if label and label not in good] if bad is None else bad
    better, rejected = (sum(labels[label] for label in each) for each in (good, worse))
    absent = [label for label in [*good, *(bad or [])] if not labels[label]]
    if not better or not rejected or absent:
        there = ", ".join(sorted(filter(None, labels))[:8])
        asked = f"--good {column}={','.join(good)}" + (f" --bad {','.join(bad)}" if bad else "")
        wrong = f"no text has {', '.join(absent)}" if absent else "pairs need texts of both"
        raise SystemExit(f"{asked}: {wrong}; {column} has {there}")
    print(f"chosen: {better} texts with {', '.join(good)}; rejected: {rejected} with {', '.join(sorted(worse))}")
    for (_, side, _), texts in waiting.items():
        for _ in texts:
            reader.leave_out(f"{side}: no partner of another label")


def share_out(rows: Iterable[tuple[str, dict]], kind: str, judge_share: float | None, seed: int) -> Iterator[tuple]:
    """(kind, side, row): those of train are the judge's, "judge_pairs", with that chance; one text is always one's."""
    for side, row in rows:
        key = normalise(row.get("prompt") or row.get("text") or row["chosen"])
        for_judge = judge_share and side == "train" and random.Random(f"{seed}/{key}").random() < judge_share
        yield "judge_pairs" if for_judge else kind, side, row


def make_parser() -> Parser:
    """The command line."""
    parser = Parser("local_files.py", __doc__)
    parser.add_argument("--source", nargs="+", required=True, help="a file, files of one type, or a folder")
    parser.add_argument("--kind", choices=list(KINDS), required=True, help="what the rows are for")
    parser.add_argument("--columns", nargs="+", type=column_map, default=[], help="wanted=yours, e.g. text=review")
    parser.add_argument("--good", type=label_values, help="make pairs by a label: column=value,… of the better texts")
    parser.add_argument(
        "--bad", type=lambda text: text.split(","), help="labels of the worse ones (default: all others)"
    )
    parser.add_argument("--judge_share", type=share, help="of pairs' train rows: goes into judge_pairs instead")
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
    elif args.bad:
        raise SystemExit("--bad: needs --good; give it as column=value")
    if args.good and (both := sorted({*args.good[1]} & {*(args.bad or [])})):
        raise SystemExit(f"--bad {','.join(args.bad)}: {', '.join(both)} is in --good too; give each label once")
    kept_apart = args.output / "judge_pairs"
    if args.kind == "pairs" and not args.judge_share and kept_apart.exists():
        raise SystemExit(
            f"--output {args.output}: {kept_apart} holds texts that an earlier run kept apart from pairs; give "
            "--judge_share too, another --output, or remove it"
        )
    if args.judge_share and args.kind != "pairs":
        raise SystemExit("--judge_share: is for --kind pairs; leave it out")
    loader, sides = find_sides(args.source)
    splits = {side: load_files(Source(", ".join(files)), loader, files) for side, files in sides.items()}
    for side, split in splits.items() if args.good else ():
        check_columns(Source(", ".join(sides[side])), side, split.column_names, keep)
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
        rows = share_out(rows, args.kind, args.judge_share, args.seed)
        for kind, side, row in pair_up(rows, *args.good, args.bad, reader) if args.good else rows:
            outbox.add(kind, side, row)
            if args.judge_share and side == "test":  # the judge is tested on the same
                outbox.add("judge_pairs", side, row)

    counts = write(
        args.output,
        both_sides([args.kind, *(["judge_pairs"] if args.judge_share else [])]),
        fill,
        reader,
        f"--source {' '.join(args.source)}",
        "add rows or fix those left out",
    )
    for name, rows in counts.items():
        if "pairs/train" in name and rows < FEW_PAIRS:
            print(f"{name}: {rows} pairs are few for a reward model; a function may do better (see the guide)")
    return counts


if __name__ == "__main__":
    main()
