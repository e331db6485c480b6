"""Write toy movie reviews: a made-up language that a tiny GPT-2 learns in a minute, to try every recipe on a CPU.

    python data_prep/toy_reviews.py [--output data/toy_reviews] [--seed 0] [--train 8000] [--test 500]

needs no network and takes a few seconds. You should see the number of rows and one row of each of six files:

    <output>/sft/{train,test}.jsonl      {"text"}                whole reviews
    <output>/prompts/{train,test}.jsonl  {"prompt"}              the first 3 to 10 words of a neutral opening
    <output>/pairs/{train,test}.jsonl    {"chosen", "rejected"}  the more positive of two reviews, and the other

A review is a neutral opening and two to four opinions. 40 % are positive throughout, 40 % negative throughout and
20 % mixed. The opening is drawn before, and apart from, the label, so it says nothing about what follows: a language
model that has learnt these reviews continues a prompt positively about half of the time, and PPO has room to move it.
The same seed writes the same bytes. No text stands in both train and test.
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from dataset_files import Parser, count, folder, write

# --- The grammar --------------------------------------------------------------------------------------------------
# A template's {slot} is filled from SLOTS. Every opening has 7 to 10 words, whatever is drawn, and no opinion.

OPENINGS = (
    "{who} {watched} {this} {film} {with_whom} {when}",
    "{when} {who} {watched} {this} {film} {where}",
    "{who} {watched} {this} {film} {where} {when}",
    "{this} {film} is about a {kind} {person} {where_set}",
    "{this} {film} {follows} a {kind} {person} {who_does}",
    "{this} {country} {genre} {follows} a {kind} {person} {where_set}",
    "this {genre} is set {where_set} in the {decade}",
    "a {kind} {person} {does} in {this} {film}",
    "my {relative} {and_i} {watched} {this} {film} {when}",
    "my {relative} {told} me about {this} {film} {when}",
)

SLOTS = {
    "who": "i|we",
    "watched": "watched|saw|rented|streamed|borrowed|tried",
    "this": "this|the",
    "film": "film|movie",
    "with_whom": "with my {relative}|with two friends|with a neighbor|with some students|with the children",
    "and_i": "and i",
    "told": "told|asked|wrote",
    "relative": "brother|sister|mother|father|uncle|aunt|cousin|wife|husband|son|daughter|roommate|teacher|boss"
    "|grandfather|grandmother|nephew|niece",
    "when": "yesterday|today|last night|last week|last month|last friday|last sunday|on monday|on tuesday|on thursday"
    "|on saturday|this morning|this evening|last summer|last winter|in april|in june|in october|after dinner"
    "|after work|before bed|a week ago|two days ago",
    "where": "at home|at school|on television|on a plane|on a train|in a hotel|in the theater|in my room|at a festival"
    "|on my phone|in class|at the library",
    "where_set": "in paris|in london|in texas|in a village|in a castle|in the desert|in the mountains|on an island"
    "|on a farm|on a ship|at a hospital|at a bank|near the sea|near a lake|by a river|under the city",
    "kind": "young|tall|retired|rich|quiet|shy|blind|married|former|small|foreign|local|busy|careful|curious",
    "person": "sailor|baker|doctor|lawyer|farmer|soldier|teacher|painter|singer|thief|detective|nurse|pilot|king"
    "|queen|student|judge|priest|driver|chef|writer|banker|robot|ghost|spy|widow|dancer|boxer|clerk|monk",
    "follows": "follows|describes|shows",
    "who_does": "who {does}",
    "does": "finds a map|buys a house|moves to rome|loses a key|meets a stranger|writes a letter|leaves the army"
    "|adopts a dog|opens a shop|changes jobs|builds a boat|hides a diary|learns to swim|crosses the border"
    "|searches for gold|visits a prison|returns home|seeks a cure|trains a horse|steals a car",
    "country": "french|german|italian|spanish|british|swedish|russian|korean|japanese|indian|mexican|polish",
    "genre": "western|drama|comedy|thriller|mystery|musical|cartoon|documentary|romance|fantasy",
    "decade": "twenties|thirties|forties|fifties|sixties|seventies|eighties|nineties",
}


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ASPECTS = _listed(
    """
    plot acting music ending story cast script dialogue camerawork humor pace direction hero villain
    setting sound scenery editing twist beginning title action costume lighting finale
    """
)

_GOOD = _listed(
    """
    great wonderful excellent brilliant superb lovely beautiful clever funny perfect amazing
    fantastic charming
    """
)

_BAD = _listed(
    """
    bad terrible awful horrible poor dull boring ugly stupid weak clumsy dreadful lousy
    """
)


class Opinion(NamedTuple):
    """A clause of four or five words, and the words that make it positive or negative."""

    template: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]


# No negation and no word that is good in one clause and bad in another: counting words is then enough to judge.
OPINIONS = (
    Opinion("the {aspect} was {word}", _GOOD, _BAD),
    Opinion("the {aspect} was {degree} {word}", _GOOD, _BAD),
    Opinion("i found the {aspect} {word}", _GOOD, _BAD),
    Opinion(
        "i {word} the {aspect}",
        ("loved", "enjoyed", "liked", "adored", "admired", "praised"),
        ("hated", "disliked", "loathed", "despised", "detested", "regretted"),
    ),
    Opinion(
        "the {aspect} {word} me",
        ("delighted", "charmed", "thrilled", "impressed", "amazed", "pleased"),
        ("bored", "annoyed", "disappointed", "irritated", "disgusted", "upset"),
    ),
    Opinion(
        "the {aspect} was a {word}",
        ("treat", "delight", "joy", "pleasure", "triumph", "gem"),
        ("mess", "bore", "chore", "failure", "waste", "mistake"),
    ),
)
DEGREES = ("really", "very", "so", "quite", "truly", "rather")

POSITIVE = frozenset(word for opinion in OPINIONS for word in opinion.positive)
NEGATIVE = frozenset(word for opinion in OPINIONS for word in opinion.negative)

# How many opinions of each sign a mixed review may hold; a review of one sign holds as many in all.
MIXES = ((1, 1), (1, 2), (2, 1), (2, 2))


@dataclass(frozen=True)
class Review:
    """A review; `label` is 1 (positive throughout), 0 (negative throughout) or None (both)."""

    opening: str
    body: str
    label: int | None

    @property
    def text(self) -> str:
        return f"{self.opening} {self.body}"


def _fill(template: str, rng: random.Random) -> str:
    """Replace each {slot} by one of its values, and the slots inside that value likewise."""
    return re.sub(r"{(\w+)}", lambda slot: _fill(rng.choice(SLOTS[slot.group(1)].split("|")), rng), template)


def make_opening(rng: random.Random) -> str:
    """A neutral sentence of 7 to 10 words."""
    return _fill(rng.choice(OPENINGS), rng) + "."


def _clause(aspect: str, positive: bool, rng: random.Random) -> str:
    opinion = rng.choice(OPINIONS)
    word = rng.choice(opinion.positive if positive else opinion.negative)
    return opinion.template.format(aspect=aspect, word=word, degree=rng.choice(DEGREES))


def make_body(label: int | None, rng: random.Random) -> str:
    """Two to four opinions about different aspects, in one or more sentences."""
    positives, negatives = rng.choice(MIXES)
    signs = [True] * positives + [False] * negatives if label is None else [bool(label)] * (positives + negatives)
    rng.shuffle(signs)
    aspects = rng.sample(ASPECTS, len(signs))
    body = _clause(aspects[0], signs[0], rng)
    for before, sign, aspect in zip(signs, signs[1:], aspects[1:], strict=False):
        joint = ". " if rng.random() < 0.5 else " and " if sign == before else " but "
        body += joint + _clause(aspect, sign, rng)
    return body + "."


def make_review(rng: random.Random, label: int | str | None = "any") -> Review:
    """A review with the given label, or with one drawn 40/40/20 (positive, negative, mixed)."""
    opening = make_opening(rng)  # before the label, so that it cannot depend on it
    if label == "any":
        label = rng.choice((1, 1, 0, 0, None))
    return Review(opening, make_body(label, rng), label)


# --- What is read off a review ------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def opinion_signs(text: str) -> list[int]:
    """+1 for each positive and −1 for each negative word of the grammar, in order; whole words only."""
    return [1 if word in POSITIVE else -1 for word in _words(text) if word in POSITIVE or word in NEGATIVE]


def lexicon_score(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """Positive minus negative words of each completion, in TRL's reward signature.

    The share of positive completions is the share of scores above 0.
    """
    return [float(sum(opinion_signs(completion))) for completion in completions]


def make_prompt(rng: random.Random) -> str:
    """The first 3 to 10 words of an opening; it ends without a space, so a completion starts with one."""
    words = make_opening(rng).split(" ")
    return " ".join(words[: rng.randint(3, len(words))])


def cut(review: Review, rng: random.Random) -> str:
    """The review up to a random word, no earlier than where its label can be told: what a reward model meets when
    a completion runs out of length."""
    needed = {None: {1, -1}, 1: {1}, 0: {-1}}[review.label]
    words = review.text.split(" ")
    ends = range(1, len(words) + 1)
    earliest = next(end for end in ends if needed <= set(opinion_signs(" ".join(words[:end]))))
    return " ".join(words[: rng.randint(earliest, len(words))])


def make_pair(rng: random.Random) -> dict[str, str]:
    """Two unrelated reviews, each whole or cut, the more positive one chosen.

    Their openings differ: a reward model that compared only equal openings could give each a level of its own.
    """
    labels = rng.choice(((1, 0), (1, 0), (1, 0), (1, None), (None, 0)))
    reviews = [make_review(rng, label) for label in labels]
    chosen, rejected = (review.text if rng.random() < 0.5 else cut(review, rng) for review in reviews)
    return {"chosen": chosen, "rejected": rejected}


# --- Files --------------------------------------------------------------------------------------------------------


def distinct_rows(make_row: Callable[[], dict[str, str]], count: int, seen: set[str], name: str) -> list[dict]:
    """`count` rows of which no text stands in another row or in `seen`, to which their texts are added."""
    rows = []
    for _ in tqdm(range(count), desc=name):
        for _attempt in range(1000):
            row = make_row()
            if seen.isdisjoint(row.values()):
                break
        else:
            raise SystemExit(
                f"--train/--test: the grammar gave no new {name} after {len(rows):,} of {count:,}; ask for fewer rows"
            )
        seen.update(row.values())
        rows.append(row)
    return rows


def make_files(seed: int, train: int, test: int) -> dict[str, list[dict]]:
    """The rows of each file, by its path below the output folder."""
    makers = {
        "sft": lambda rng: {"text": make_review(rng).text},
        "prompts": lambda rng: {"prompt": make_prompt(rng)},
        "pairs": make_pair,
    }
    seen: set[str] = set()  # shared, so that what a reward model is tested on was not in SFT's train either
    files = {}
    for kind, maker in makers.items():
        rng = random.Random(f"{seed}/{kind}")
        rows = distinct_rows(lambda maker=maker, rng=rng: maker(rng), train + test, seen, kind)
        rng.shuffle(rows)  # short prompts run out, so late rows differ from early ones: both splits get both
        files[f"{kind}/train.jsonl"] = rows[:train]
        files[f"{kind}/test.jsonl"] = rows[train:]
    return files


def write_files(output: Path, files: dict[str, Iterable[dict]]) -> dict[str, int]:
    """Write `<kind>/<side>.jsonl` of each kind; returns the number of rows of each."""

    def fill(outbox):
        for name, rows in files.items():
            outbox.add_all(*name.removesuffix(".jsonl").split("/"), rows)

    return write(output, list(files), fill)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser("toy_reviews.py", __doc__)
    parser.add_argument("--output", type=folder, default=Path("data/toy_reviews"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    parser.add_argument("--train", type=count, default=8000, help="rows of each train file")
    parser.add_argument("--test", type=count, default=500, help="rows of each test file")
    return parser


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Write the six files; returns the number of rows of each."""
    args = make_parser().parse_args(argv)
    return write_files(args.output, make_files(args.seed, args.train, args.test))


if __name__ == "__main__":
    main()
