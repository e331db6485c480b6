"""Write IMDB's movie reviews as the files that the sentiment recipes train on.

    python data_prep/imdb.py [--source stanfordnlp/imdb] [--output data/imdb] [--seed 0] [--limit N]
                             [--snippets_per_review 6]

`--source` is a Hub id, or a local folder that holds `train`, `test` and `unsupervised` as `.jsonl`, `.jsonl.gz` or
`.parquet`, with the columns `text` and `label` (1 positive, 0 negative, -1 unlabelled). It takes about 20 seconds on
one core, the download aside. You should see how many rows were left out and why, if any were, then the number of rows
and one row of each file:

    <output>/sft/{train,test}.jsonl             {"text"}                whole reviews; train includes unsupervised
    <output>/prompts/{train,test}.jsonl         {"prompt"}              first 30 words of reviews over 200 characters
    <output>/pairs/{train,test}.jsonl           {"chosen", "rejected"}  whole reviews, each used at most once
    <output>/snippets/{train,test}.jsonl        {"chosen", "rejected"}  6 to 40 words out of a review
    <output>/judge_snippets/{train,test}.jsonl  {"chosen", "rejected"}  the same, from reviews that no snippet is from

Chosen is positive, rejected negative. Snippets are what a reward model meets in PPO: pieces of reviews. The train ones
come from every second labelled review of train and the judge's from the others, so that a judge trained on them
measures a policy by data which its reward model never saw; both have the same test rows. Left out, and counted: rows
whose text or label is malformed, repeated texts, and reviews of test that stand in train or unsupervised too.

The same seed and source write the same bytes. The order is shuffled: IMDB is sorted by label, so that the first rows
of a file, or of `--limit`, would be all of one kind.
"""

import argparse
import gzip
import hashlib
import json
import os
import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

SPLITS = ("train", "unsupervised", "test")  # test last: what stands in the others is dropped from it
KINDS = ("sft", "prompts", "pairs", "snippets", "judge_snippets")
LOADERS = {"json": (".jsonl", ".jsonl.gz"), "parquet": (".parquet",)}
PROMPT_WORDS = 30
PROMPT_MIN_CHARACTERS = 200
SNIPPET_WORDS = (6, 40)


class Review(NamedTuple):
    """A cleaned review."""

    text: str
    label: int


# --- Reading ------------------------------------------------------------------------------------------------------


def find_files(folder: Path) -> tuple[str, dict[str, list[str]]]:
    """The loader of a local folder, and the files of each split that it holds.

    `load_dataset(folder)` would not do: it takes no notice of a split called unsupervised.
    """
    for loader, suffixes in LOADERS.items():
        for place in (folder, folder / "plain_text"):  # a copy of the Hub's repository keeps them in plain_text/
            files = {
                split: sorted(
                    str(path)
                    for end in suffixes
                    for path in place.glob(f"{split}*{end}")
                    if path.name == split + end or path.name.startswith(split + "-")
                )
                for split in SPLITS
            }
            if any(files.values()):
                return loader, {split: paths for split, paths in files.items() if paths}
    raise SystemExit(f"--source {folder}: holds no .jsonl, .jsonl.gz or .parquet file called train, test, unsupervised")


def load(source: str, **arguments):
    """`datasets.load_dataset`, failing in one line."""
    import datasets  # here, so that importing this module stays free

    try:
        return datasets.load_dataset(**arguments)
    except Exception as error:  # many kinds: connection, unknown id, broken gzip or JSON, unequal columns
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise SystemExit(
            f"--source {source}: cannot be loaded ({type(error).__name__}: {reason}); "
            "mend the files, or name another folder or Hub id"
        ) from None


def json_features(path: str):
    """The columns of the first row, each of any type: else one row of another type stops, or is cast, unnoticed."""
    import datasets

    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8") as file:
            columns = list(json.loads(next(file)))
    except (OSError, ValueError, StopIteration) as error:
        reason = str(error) or "the file is empty"
        raise SystemExit(f"--source {path}: the first line is no JSON object ({reason}); mend the file") from None
    return datasets.Features({column: datasets.Json() for column in columns})


def load_folder(folder: Path) -> dict:
    """The splits of a local folder."""
    import datasets

    loader, files = find_files(folder)
    datasets.disable_progress_bars()  # a local file takes a second or two
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # `load` says what went wrong, once
    return {
        split: load(
            ", ".join(paths),
            path=loader,
            data_files={split: paths},
            split=split,
            features=json_features(paths[0]) if loader == "json" else None,
        )
        for split, paths in files.items()
    }


def load_splits(source: str) -> dict:
    """The three splits of a Hub id or local folder as memory-mapped datasets, checked for their columns."""
    folder = Path(source).expanduser()
    is_path = folder.exists() or source.startswith(("/", ".", "~")) or source.count("/") > 1
    if is_path and not folder.is_dir():
        raise SystemExit(f"--source {source}: no such folder; name a local folder or a Hub id")
    splits = load_folder(folder) if is_path else load(source, path=source)
    for split in SPLITS:
        if split not in splits:
            raise SystemExit(f"--source {source}: no split {split!r}, only {sorted(splits)}; add {split}.jsonl")
        columns = splits[split].column_names
        for column in ("text", "label"):
            if column not in columns:
                raise SystemExit(
                    f"--source {source}: split {split!r} has no column {column!r}, only {columns}; rename or add it"
                )
    return splits


def clean(text: str) -> str:
    """The text without `<br />`, on one line, with single spaces."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text, flags=re.IGNORECASE).split())


def fault(row: dict) -> str | None:
    """What is wrong with a row, or None."""
    text, label = row["text"], row["label"]
    if not isinstance(text, str):
        return f"text is {type(text).__name__}, not a string"
    if not clean(text):
        return "text is empty"
    if isinstance(label, bool) or not isinstance(label, int) or label not in (-1, 0, 1):
        return f"label is {label!r}, not -1, 0 or 1"
    return None


class Reader:
    """Yields each split's good reviews in seeded order, and keeps count of what it left out and why."""

    def __init__(self, splits: dict, seed: int, limit: int | None):
        self.splits, self.seed, self.limit = splits, seed, limit
        self.seen: dict[bytes, str] = {}  # digest of a text → the split it was first met in
        self.left_out: Counter[str] = Counter()
        self.first_fault: dict[str, str] = {}

    def read(self, split: str) -> Iterator[Review]:
        rows = self.splits[split]
        count = min(len(rows), self.limit or len(rows))
        order = random.Random(f"{self.seed}/{split}").sample(range(len(rows)), count)
        for index, row in zip(order, tqdm(rows.select(order), desc=f"reading {split}"), strict=True):
            wrong = fault(row)
            if wrong:
                self.left_out[f"{split}: malformed"] += 1
                self.first_fault.setdefault(f"{split}: malformed", f"row {index}: {wrong}")
                continue
            review = Review(clean(row["text"]), row["label"])
            if self._is_new(review.text, split):
                yield review

    def _is_new(self, text: str, split: str) -> bool:
        # Digests, not texts: memory must not grow with the reviews.
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest not in self.seen:
            self.seen[digest] = split
            return True
        self.left_out[f"{split}: already in {self.seen[digest]}"] += 1
        return False

    def report(self) -> list[str]:
        """One line for each reason to leave rows out."""
        lines = []
        for reason, count in sorted(self.left_out.items()):
            first = f" (the first is {self.first_fault[reason]})" if reason in self.first_fault else ""
            lines.append(f"{reason}: {count:,} rows left out{first}")
        return lines


# --- Making rows --------------------------------------------------------------------------------------------------


def make_prompt(text: str) -> str | None:
    """The review's first 30 words, or None if it is too short to cut."""
    return " ".join(text.split()[:PROMPT_WORDS]) if len(text) > PROMPT_MIN_CHARACTERS else None


def make_snippet(text: str, rng: random.Random) -> str | None:
    """6 to 40 consecutive words, half of the time the review's first; None if the review is shorter than that."""
    words = text.split()
    if len(words) < SNIPPET_WORDS[0]:
        return None
    length = min(rng.randint(*SNIPPET_WORDS), len(words))
    start = 0 if rng.random() < 0.5 else rng.randint(0, len(words) - length)
    return " ".join(words[start : start + length])


def make_snippets(reviews: list[Review], per_review: int, rng: random.Random, name: str) -> list[Review]:
    """Snippets with the labels of the reviews that they come from."""
    drawn = (
        review._replace(text=make_snippet(review.text, rng))
        for review in tqdm(reviews, desc=name)
        for _ in range(per_review)
    )
    return [snippet for snippet in drawn if snippet.text]


def make_pairs(reviews: list[Review], rng: random.Random) -> list[dict[str, str]]:
    """Each positive text over a negative one, matched at random; the more numerous label's surplus is not used."""
    positive = [review.text for review in reviews if review.label == 1]
    negative = [review.text for review in reviews if review.label == 0]
    rng.shuffle(positive)
    rng.shuffle(negative)
    return [{"chosen": good, "rejected": bad} for good, bad in zip(positive, negative, strict=False)]


# --- Files --------------------------------------------------------------------------------------------------------


class Outbox:
    """The files to be, open in a temporary folder inside the output folder, with their counts and first rows."""

    def __init__(self, partial: str, stack: ExitStack):
        self.partial = Path(partial)
        self.counts: dict[str, int] = {}
        self.samples: dict[str, str] = {}
        self.files = {}
        for name in (f"{kind}/{side}.jsonl" for kind in KINDS for side in ("train", "test")):
            (self.partial / name).parent.mkdir(exist_ok=True)
            self.files[name] = stack.enter_context((self.partial / name).open("w", encoding="utf-8", newline="\n"))
            self.counts[name] = 0

    def add(self, kind: str, split: str, row: dict[str, str]) -> None:
        name = f"{kind}/{split}.jsonl"
        line = json.dumps(row)
        self.files[name].write(line + "\n")
        self.counts[name] += 1
        self.samples.setdefault(name, line)

    def add_all(self, kind: str, split: str, rows: list[dict[str, str]]) -> None:
        for row in rows:
            self.add(kind, split, row)

    def move_to(self, output: Path) -> None:
        """Put every file in its place; call once they are closed."""
        for name in self.files:
            (output / name).parent.mkdir(exist_ok=True)
            os.replace(self.partial / name, output / name)


def fill(outbox: Outbox, reader: Reader, seed: int, snippets_per_review: int) -> None:
    """Read the splits and write all rows. Only labelled reviews are kept in memory: their pairs need matching."""
    labelled: dict[str, list[Review]] = {"train": [], "test": []}
    for split in SPLITS:
        side = "test" if split == "test" else "train"
        for review in reader.read(split):
            outbox.add("sft", side, {"text": review.text})
            if split == "unsupervised":
                continue
            prompt = make_prompt(review.text)
            if prompt:
                outbox.add("prompts", side, {"prompt": prompt})
            if review.label != -1:
                labelled[side].append(review)
    # Every second review, in the seeded order: by row number, a source that alternates labels would break this.
    sources = {
        ("snippets", "train"): labelled["train"][0::2],
        ("judge_snippets", "train"): labelled["train"][1::2],
        ("snippets", "test"): labelled["test"],
    }
    for side, reviews in labelled.items():
        outbox.add_all("pairs", side, make_pairs(reviews, random.Random(f"{seed}/pairs/{side}")))
    for (kind, side), reviews in sources.items():
        rng = random.Random(f"{seed}/{kind}/{side}")
        per_review = snippets_per_review if side == "train" else 1
        pairs = make_pairs(make_snippets(reviews, per_review, rng, f"cutting {kind}/{side}"), rng)
        outbox.add_all(kind, side, pairs)
        if side == "test":
            outbox.add_all("judge_snippets", side, pairs)


class _Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, without the usage."""

    def error(self, message: str):
        raise SystemExit(f"{self.prog}: {message}; see --help")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _folder(text: str) -> Path:
    path = Path(text).expanduser()
    blocker = next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None)
    if blocker:
        raise argparse.ArgumentTypeError(f"{text!r}: {blocker} is a file; name another folder")
    return path


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="imdb.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--source", default="stanfordnlp/imdb", help="Hub id or local folder")
    parser.add_argument("--output", type=_folder, default=Path("data/imdb"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    parser.add_argument("--limit", type=_count, help="read at most so many rows of each split, drawn at random")
    parser.add_argument("--snippets_per_review", type=_count, default=6, help="in train; the test files hold one")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Write the ten files; returns the number of rows of each."""
    args = parse_arguments(argv)
    reader = Reader(load_splits(args.source), args.seed, args.limit)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=args.output) as partial:
            with ExitStack() as stack:
                outbox = Outbox(partial, stack)
                fill(outbox, reader, args.seed, args.snippets_per_review)
            for line in reader.report():
                print(line)
            empty = [name for name, count in outbox.counts.items() if not count]
            if empty:
                raise SystemExit(
                    f"--source {args.source}: {', '.join(empty)} would be empty; "
                    "each split needs reviews of both labels, some over 200 characters: mend it or raise --limit"
                )
            outbox.move_to(args.output)
    except OSError as error:
        raise SystemExit(f"--output {args.output}: cannot write ({error}); name another folder") from None
    for name, count in outbox.counts.items():
        print(f"{args.output / name}: {count:,} rows, such as {outbox.samples[name][:300]}")
    return outbox.counts


if __name__ == "__main__":
    main()
