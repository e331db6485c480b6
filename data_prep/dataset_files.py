"""What the scripts of this folder share: arguments, reading of a Hub id or local files, and writing all files or none.

A script says how one row of its source becomes one row of its own, and raises `Malformed` where it cannot; `Reader`
counts those rows, keeps train and test apart and drops repeats; `write` puts the files in place once all are complete.
"""

import argparse
import csv
import filecmp
import gzip
import hashlib
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))  # a script is run by its path

from command_line import OneLineParser
from models_and_data import check_csv
from trl_ppo.inputs import UserError, looks_local

SUFFIXES = {"json": (".jsonl", ".jsonl.gz"), "parquet": (".parquet",), "csv": (".csv", ".csv.gz")}
SHUFFLE_BUFFER = 1_000  # rows of a streamed source that are held in memory to draw from
HELD_OUT_ROWS = 500


# --- Arguments ----------------------------------------------------------------------------------------------------


class Parser(OneLineParser):
    """The parser of a script, described by the first line of its docstring."""

    def __init__(self, prog: str, doc: str):
        super().__init__(prog=prog, description=doc.splitlines()[0])


def count(text: str) -> int:
    """An argument that is a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def share(text: str) -> float:
    """An argument that is a number between 0 and 1, neither included."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def folder(text: str) -> Path:
    """An argument that is a folder, or can become one."""
    path = Path(text).expanduser()
    blocker = next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None)
    if blocker:
        raise argparse.ArgumentTypeError(f"{text!r}: {blocker} is a file; name another folder")
    return path


# --- Loading ------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A Hub id or local folder, the option that named it, and the configuration of it that is wanted."""

    name: str
    option: str = "--source"
    config: str | None = None

    def error(self, message: str) -> SystemExit:
        """What to raise: one line that names the option and its value."""
        return SystemExit(f"{self.option} {self.name}: {message}")


def load(source: Source, function: str = "load_dataset", **arguments):
    """`datasets.load_dataset`, or another function of it, failing in one line."""
    import datasets  # here, so that importing this module stays free

    try:
        return getattr(datasets, function)(**arguments)
    except Exception as error:  # many kinds: connection, unknown id, broken gzip or JSON, unequal columns
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise source.error(
            f"cannot be loaded ({type(error).__name__}: {reason}); fix the files, or name another folder or Hub id"
        ) from None


def first_columns(source: Source, loader: str, path: str, separator: str = ",") -> list[str]:
    """The columns of a JSONL or CSV file, by its first line."""
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig" if loader == "csv" else "utf-8", newline="") as file:
            row = next(csv.reader(file, delimiter=separator)) if loader == "csv" else json.loads(next(file))
    except UnicodeDecodeError as error:
        raise source._replace(name=path).error(f"is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (OSError, ValueError, EOFError, csv.Error, StopIteration) as error:
        reason = str(error) or "the file is empty"
        what = "header" if loader == "csv" else "JSON object"
        raise source._replace(name=path).error(f"the first line is no {what} ({reason}); fix the file") from None
    if not isinstance(row, list if loader == "csv" else dict):
        raise source._replace(name=path).error(f"the first line is {row!r:.60}, no JSON object; fix the file")
    return list(row)


class JsonLines:
    """The rows of JSONL files whose lines are memory-mapped, each value of the type that it has in its line.

    `load_dataset("json")` would not do: told no types, it stops at a row of another type than the first ones; told to
    expect any type, it takes the text "9.9" for a number and the quotation marks off the text '"Yes."'.
    """

    def __init__(self, lines, source: Source, column_names: list[str]):
        self.lines, self.source, self.column_names = lines, source, column_names

    def __len__(self) -> int:
        return len(self.lines)

    def select(self, order: Sequence[int]) -> "JsonLines":
        return JsonLines(self.lines.select(order), self.source, self.column_names)

    def __iter__(self) -> Iterator[dict]:
        for line in self.lines:
            try:
                row = json.loads(line["text"] or "{}")
            except ValueError as error:
                raise self.source.error(f"{line['text'][:60]!r} is no JSON ({error}); fix the line") from None
            if not isinstance(row, dict):
                raise self.source.error(f"{line['text'][:60]!r} is no JSON object; fix the line")
            yield row


def load_files(source: Source, loader: str, paths: Sequence[str]):
    """Local files of one kind as a memory-mapped dataset. A value of JSONL keeps its type, a value of CSV is text."""
    import datasets

    datasets.disable_progress_bars()  # a local file takes a second or two
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # `load` says what went wrong, once
    options: dict[str, Any] = {"split": "train", "data_files": {"train": list(paths)}}
    named = source._replace(name=", ".join(paths))
    columns = first_columns(source, loader, paths[0]) if loader != "parquet" else []
    if loader == "json":
        return JsonLines(load(named, path="text", **options), named, columns)
    if loader == "csv":
        # A spreadsheet in a country of decimal commas writes semicolons.
        separator = next((each for each in ";\t" if len(columns) == 1 and each in columns[0]), ",")
        columns = first_columns(source, loader, paths[0], separator)
        try:
            for path in paths:
                check_csv(f"{source.option} {source.name}", path, separator)
        except UserError as error:
            raise SystemExit(str(error)) from None
        options["features"] = datasets.Features(dict.fromkeys(columns, datasets.Value("string")))
        options |= {"sep": separator, "keep_default_na": False, "na_filter": False}  # a review that says NA is a review
    return load(named, path=loader, **options)


def find_files(source: Source, split: str) -> tuple[str, list[str]] | None:
    """The loader and the files of a split in a local folder: of its own, or a copy of the Hub's repository.

    `load_dataset(folder)` would not do: it takes no notice of a split called unsupervised.
    """
    root = Path(source.name).expanduser()
    stem = f"{source.config}.{split}" if source.config else split
    places = [(root, stem), (root / "data", stem), (root / "plain_text", stem)]
    if source.config:
        places.append((root / source.config, split))
    for loader, suffixes in SUFFIXES.items():
        for place, name in places:
            paths = [
                str(path)
                for end in suffixes
                for path in place.glob(f"{name}*{end}")
                if path.name == name + end or path.name.startswith(name + "-")
            ]
            if paths := sorted(paths) or sorted(str(path) for path in (place / name).glob("*.parquet")):
                return ("parquet" if paths[0].endswith(".parquet") else loader), paths
    return None


def _load_local(source: Source, names: Sequence[str]):
    found = next((files for name in names if (files := find_files(source, name))), None)
    return found and load_files(source, *found)


def _load_hub(source: Source, names: Sequence[str], there: list[str], streaming: bool):
    name = next((name for name in names if name in there), None)
    arguments = {"path": source.name, "name": source.config, "split": name, "streaming": streaming}
    return name and load(source, **arguments)


def load_splits(
    source: Source,
    wanted: dict[str, Sequence[str]],
    columns: Sequence[str],
    optional: Sequence[str] = (),
    streaming: bool = False,
) -> dict[str, Any]:
    """The splits of a Hub id or local folder, checked for their columns: memory-mapped, or streamed from the Hub.

    `wanted` maps each split to the names that it may have in the source, the best first; a split in `optional` is left
    out of the result where the source has none of its names.

    Raises:
        SystemExit: no such folder, a split or column is missing, or the source cannot be loaded; one line.
    """
    path = Path(source.name).expanduser()
    is_path = path.exists() or looks_local(source.name)
    if is_path and not path.is_dir():
        raise source.error("no such folder; name a local folder or a Hub id")
    if is_path:
        found = {split: _load_local(source, names) for split, names in wanted.items()}
    else:
        about = {"path": source.name, "config_name": source.config}
        there = load(source, function="get_dataset_split_names", **about)
        found = {split: _load_hub(source, names, there, streaming) for split, names in wanted.items()}
    splits = {split: rows for split, rows in found.items() if rows is not None}
    missing = [split for split in wanted if split not in splits and split not in optional]
    if missing:
        names = " or ".join(f"{source.config}.{name}" if source.config else name for name in wanted[missing[0]])
        there = f"only {sorted(splits)}" if splits else "nor any other that is wanted"
        add = f"add {names} as .jsonl, .jsonl.gz, .csv or .parquet" if is_path else "name another Hub id or a folder"
        raise source.error(f"no split {missing[0]!r}, {there}; {add}")
    for split, rows in splits.items():
        check_columns(source, split, rows.column_names, columns)
    return splits


def check_columns(source: Source, split: str, there: Sequence[str] | None, wanted: Sequence[str]) -> None:
    """Exit in one line if a column is missing; a streamed dataset may not know its columns, its rows are then told."""
    for column in wanted:
        if there is not None and column not in there:
            raise source.error(f"split {split!r} has no column {column!r}, only {sorted(there)}; rename or add it")


# --- Reading ------------------------------------------------------------------------------------------------------


class Malformed(Exception):
    """A row cannot be used; the message says why."""


def text_of(row: dict, column: str) -> str:
    """The text of a column, as it stands; Malformed if it is no text or has no character but blanks."""
    text = row.get(column)
    if not isinstance(text, str):
        raise Malformed(f"{column} is {type(text).__name__}, not a string")
    if not text.strip():
        raise Malformed(f"{column} is empty")
    return text


def normalise(text: str) -> str:
    """The text in one case with single spaces: two texts that are the same then count as the same content."""
    return " ".join(text.casefold().split())


def _content(row: dict) -> str:
    """What makes a row a repeat of another: its texts, normalised, and its other values."""
    return json.dumps([normalise(value) if isinstance(value, str) else value for value in row.values()])


def digest(text: str) -> bytes:
    """16 bytes in place of a text, so that memory does not grow with the texts."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def row_count(rows, limit: int | None) -> int:
    """How many rows will be read; a source is streamed only under a limit."""
    return min(len(rows), limit or len(rows)) if hasattr(rows, "select") else limit


def held_out(splits: dict, limit: int | None, test_rows: int | None) -> int:
    """How many rows of train become test, where the source has no test split: 500, or a tenth where that is less."""
    total = row_count(splits["train"], limit)
    if "test" in splits:
        return 0
    if test_rows is None:
        return min(HELD_OUT_ROWS, max(total // 10, 1))
    if test_rows >= total:
        raise SystemExit(f"--test_rows {test_rows}: only {total} rows are read and train needs some; lower it")
    return test_rows


class Reader:
    """Yields rows in seeded order, and keeps count of what was left out and why."""

    def __init__(self, seed: int, limit: int | None):
        self.seed, self.limit = seed, limit
        self.seen: dict[bytes, str] = {}  # digest of a text → where it was first met
        self.reserved: set[bytes] = set()  # digests of the texts of test
        self.left_out: Counter[str] = Counter()
        self.first_fault: dict[str, str] = {}

    def read(self, split: str, rows, make: Callable[[dict], Any]) -> Iterator[Any]:
        """`make(row)` of the rows, in an order drawn by seed and split, without those that `make` finds malformed."""
        total = row_count(rows, self.limit)
        if hasattr(rows, "select"):
            order = random.Random(f"{self.seed}/{split}").sample(range(len(rows)), total)
            numbered = zip(order, rows.select(order), strict=True)
        else:
            drawn = rows.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER).take(total)
            numbered = enumerate(_guarded(drawn, split))
        for index, row in tqdm(numbered, desc=f"reading {split}", total=total):
            try:
                made = make(row)
            except Malformed as wrong:
                self.leave_out(f"{split}: malformed", f"row {index}: {wrong}")
                continue
            yield made

    def read_sides(
        self,
        splits: dict,
        make: Callable[[dict], dict],
        texts: Callable[[dict], Iterable[str]],
        test_rows: int = 0,
    ) -> Iterator[tuple[str, dict]]:
        """("test", row), then ("train", row): no text of a row stands on both sides, and no row stands twice.

        Without a test split, the first `test_rows` rows of train in its seeded order are test.
        """
        for split in ("test", "train"):
            taken = 0
            for row in self.read(split, splits[split], make) if split in splits else ():
                side = "test" if taken < test_rows else split
                if self.is_apart(side, texts(row)) and self.is_new(_content(row), side):
                    taken += 1
                    yield side, row

    def is_apart(self, side: str, texts: Iterable[str], name: str = "") -> bool:
        """Whether a row may stand on its side. Rows of test come first and reserve their texts; a row of train with
        one of them is left out and counted."""
        digests = {digest(normalise(text)) for text in texts}
        if side == "test":
            self.reserved |= digests
            return True
        if self.reserved.isdisjoint(digests):
            return True
        self.leave_out(f"{name or side}: also in test")
        return False

    def is_new(self, text: str, where: str) -> bool:
        """Whether a text was met for the first time; else it is counted as left out."""
        key = digest(text)
        if key not in self.seen:
            self.seen[key] = where
            return True
        self.leave_out(f"{where}: already in {self.seen[key]}")
        return False

    def leave_out(self, reason: str, fault: str | None = None) -> None:
        self.left_out[reason] += 1
        if fault:
            self.first_fault.setdefault(reason, fault)

    def report(self) -> list[str]:
        """One line for each reason to leave rows out."""
        lines = []
        for reason, rows in sorted(self.left_out.items()):
            first = f" (the first is {self.first_fault[reason]})" if reason in self.first_fault else ""
            lines.append(f"{reason}: {rows:,} rows left out{first}")
        return lines


def _guarded(rows: Iterable[dict], split: str) -> Iterator[dict]:
    """The rows of a stream; if it breaks off, one line says so."""
    try:
        yield from rows
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(f"reading {split} broke off ({type(error).__name__}: {reason}); run it again") from None


# --- Files --------------------------------------------------------------------------------------------------------


class Outbox:
    """The files to be, open in a temporary folder inside the output folder, with their counts and first rows."""

    def __init__(self, partial: str, names: Sequence[str], stack: ExitStack):
        self.partial = Path(partial)
        self.counts = dict.fromkeys(names, 0)
        self.samples: dict[str, str] = {}
        self.files = {}
        for name in names:
            (self.partial / name).parent.mkdir(exist_ok=True)
            self.files[name] = stack.enter_context((self.partial / name).open("w", encoding="utf-8", newline="\n"))

    def add(self, kind: str, side: str, row: dict) -> None:
        """Append a row to `<kind>/<side>.jsonl`."""
        name = f"{kind}/{side}.jsonl"
        line = json.dumps(row)
        self.files[name].write(line + "\n")
        self.counts[name] += 1
        self.samples.setdefault(name, line)

    def add_all(self, kind: str, side: str, rows: Iterable[dict]) -> None:
        for row in rows:
            self.add(kind, side, row)

    def move_to(self, output: Path) -> None:
        """Put every file in its place, with a line where that replaces other rows; call once they are closed."""
        for name in self.files:
            (output / name).parent.mkdir(exist_ok=True)
            if (output / name).is_file() and not filecmp.cmp(output / name, self.partial / name, shallow=False):
                print(f"{output / name}: replaced, it held other rows")
            os.replace(self.partial / name, output / name)


def both_sides(kinds: Sequence[str]) -> list[str]:
    """The names of the train and test file of each kind."""
    return [f"{kind}/{side}.jsonl" for kind in kinds for side in ("train", "test")]


def write(
    output: Path,
    names: Sequence[str],
    fill: Callable[[Outbox], None],
    reader: Reader | None = None,
    subject: str = "",
    advice: str = "give it more rows",
) -> dict[str, int]:
    """Let `fill` write the files, then move all of them into `output`; returns their row counts.

    Prints what the reader left out, and the count and first row of each file. Nothing is moved if anything fails.

    Raises:
        SystemExit: a file would be empty (the line begins with `subject` and ends in `advice`), or cannot be written.
    """
    made = [place for place in (output, *output.parents) if not place.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=output) as partial:
            with ExitStack() as stack:
                outbox = Outbox(partial, names, stack)
                fill(outbox)
            for line in reader.report() if reader else ():
                print(line)
            empty = [name for name, rows in outbox.counts.items() if not rows]
            if empty:
                raise SystemExit(f"{subject or f'--output {output}'}: {', '.join(empty)} would be empty; {advice}")
            outbox.move_to(output)
    except BaseException as error:
        for place in made:
            with suppress(OSError):  # it is not empty, or was never made
                place.rmdir()
        if not isinstance(error, OSError):
            raise
        raise SystemExit(f"--output {output}: cannot write ({error}); name another folder") from None
    for name, rows in outbox.counts.items():
        print(f"{output / name}: {rows:,} rows, such as {outbox.samples[name][:300]}")
    return outbox.counts
