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

import random
import re
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from dataset_files import (
    Malformed,
    Outbox,
    Parser,
    Reader,
    Source,
    both_sides,
    count,
    folder,
    load_splits,
    text_of,
    write,
)

SPLITS = ("train", "unsupervised", "test")  # test last: what stands in the others is dropped from it
KINDS = ("sft", "prompts", "pairs", "snippets", "judge_snippets")
PROMPT_WORDS = 30
PROMPT_MIN_CHARACTERS = 200
SNIPPET_WORDS = (6, 40)


class Review(NamedTuple):
    """A cleaned review."""

    text: str
    label: int


def clean(text: str) -> str:
    """The text without `<br />`, on one line, with single spaces."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text, flags=re.IGNORECASE).split())


def make_review(row: dict) -> Review:
    """A row of the source, cleaned; Malformed if its text or label is none."""
    text, label = clean(text_of(row, "text")), row.get("label")
    if not text:
        raise Malformed("text is empty")
    if isinstance(label, bool) or not isinstance(label, int) or label not in (-1, 0, 1):
        raise Malformed(f"label is {label!r}, not -1, 0 or 1")
    return Review(text, label)


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


def fill(outbox: Outbox, reader: Reader, splits: dict, snippets_per_review: int) -> None:
    """Read the splits and write all rows. Only labelled reviews are kept in memory: their pairs need matching."""
    labelled: dict[str, list[Review]] = {"train": [], "test": []}
    for split in SPLITS:
        side = "test" if split == "test" else "train"
        for review in reader.read(split, splits[split], make_review):
            if not reader.is_new(review.text, split):
                continue
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
        outbox.add_all("pairs", side, make_pairs(reviews, random.Random(f"{reader.seed}/pairs/{side}")))
    for (kind, side), reviews in sources.items():
        rng = random.Random(f"{reader.seed}/{kind}/{side}")
        per_review = snippets_per_review if side == "train" else 1
        pairs = make_pairs(make_snippets(reviews, per_review, rng, f"cutting {kind}/{side}"), rng)
        outbox.add_all(kind, side, pairs)
        if side == "test":
            outbox.add_all("judge_snippets", side, pairs)


def make_parser() -> Parser:
    parser = Parser("imdb.py", __doc__)
    parser.add_argument("--source", default="stanfordnlp/imdb", help="Hub id or local folder")
    parser.add_argument("--output", type=folder, default=Path("data/imdb"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    parser.add_argument("--limit", type=count, help="read at most so many rows of each split, drawn at random")
    parser.add_argument("--snippets_per_review", type=count, default=6, help="in train; the test files hold one")
    return parser


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Write the ten files; returns the number of rows of each."""
    args = make_parser().parse_args(argv)
    splits = load_splits(Source(args.source), {split: (split,) for split in SPLITS}, ("text", "label"))
    reader = Reader(args.seed, args.limit)
    return write(
        args.output,
        both_sides(KINDS),
        lambda outbox: fill(outbox, reader, splits, args.snippets_per_review),
        reader,
        f"--source {args.source}",
        "each split needs reviews of both labels, some over 200 characters: fix it or raise --limit",
    )


if __name__ == "__main__":
    main()
