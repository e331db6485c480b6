"""Write posts and their titles or summaries as the files of a small model's summarisation, from scratch to PPO.

    python data_prep/summaries.py [--source trl-lib/tldr] [--target title] [--output data/reddit_tldr] [--seed 0]
        [--limit N] [--max_words 200] [--max_summary_words 32] [--pairs_per_post 2] [--echoes 0]
    python data_prep/summaries.py --target title --output data/reddit_titles
    python data_prep/summaries.py --source knkarthick/dialogsum --output data/dialogsum

`--source` is a Hub id, or a local folder that holds `train` and `test` or `validation` as `.jsonl`, `.jsonl.gz`,
`.parquet` or `.csv`: the columns `prompt` (ending in `TL;DR:` or `TITLE:`) and `completion`, or DialogSum's `dialogue`
and `summary`. `--target title` takes the title out of a prompt of the form of Stiennon et al. 2020 and makes it what is
to be written. Posts of more than `--max_words` words and summaries of more than `--max_summary_words` are left out: the
models are small, and a post that is cut may lose what its summary is of. Ten thousand posts take about 3 seconds on one
core. You should see how many rows were left out and why, then the number of rows and one row of each file:

    <output>/pretrain/{train,test}.jsonl     {"text"}                  a post and its summary, for language modelling
    <output>/sft/{train,test}.jsonl          {"prompt", "completion"}  the same posts
    <output>/pairs/{train,test}.jsonl        {"prompt", "chosen", "rejected", "source"}  for the reward model
    <output>/judge_pairs/{train,test}.jsonl  the same, for the judge
    <output>/prompts/{train,test}.jsonl      {"prompt", "reference"}   for PPO and the evaluation

Of the posts of train 70 % are the language model's (pretrain and sft), 12 % the reward model's, 12 % the judge's and
6 % PPO's; which one a post is in depends on its text and the seed alone, so it is the same at any source and limit.
All files of test hold the source's test posts (its validation's where it has no test), and none of these is in train.

Chosen is the reference. Rejected is made from it, so all these pairs are synthetic; `source` says how:

    other      another post's summary, the next longer or shorter one
    lead       the post's first words, as many as the reference has
    shuffled   the reference's words in another order
    truncated  the reference broken off, n words shorter
    repeated   the reference with its last words said again, n words longer

`--echoes 0.5` adds a row to pretrain's train for half of the posts: 30 to 80 words of it, and the same once more. A
small model that only reads posts does not learn to copy, which a summary needs; predicting an echo teaches it.

Each post has `--pairs_per_post` of them, drawn at random; beginning and end look like the reference's, but for
truncated. In words the longer text is chosen as often as not, so that length alone teaches a reward model nothing.

`--comparisons` adds real ones, such as `data/summarize_from_feedback/pairs`, under the source `comparison`: a Hub id
or folder with the columns `prompt`, `chosen` and `rejected`. A post of theirs is the reward model's or the judge's, and
left out elsewhere. `data_prep/sampled_pairs.py` adds summaries that a model wrote. The same seed and source write the
same bytes.
"""

import random
import re
from pathlib import Path

from dataset_files import (
    Malformed,
    Outbox,
    Parser,
    Reader,
    Source,
    both_sides,
    count,
    digest,
    folder,
    load_splits,
    normalise,
    share,
    text_of,
    write,
)
from summarize_from_feedback import PROMPT

SPLITS = {"test": ("test", "validation"), "train": ("train",)}  # test first: its posts are kept out of train
SHARES = {"sft": 0.70, "pairs": 0.12, "judge_pairs": 0.12, "prompts": 0.06}
KINDS = ("pretrain", *SHARES)
PAIRS = ("pairs", "judge_pairs")
END = re.compile(r"(?<=\w)[.!?…]+$")
CUE = re.compile(r"(?:SUBREDDIT: .*?\n\n)?(?:TITLE: .*?\n\n)?(?:POST: )?(.*?)\s*(?:TL;DR|TITLE):\s*", re.DOTALL)


# --- Rows ---------------------------------------------------------------------------------------------------------


def one_line(text: str) -> str:
    return " ".join(text.split())


def make_row(row: dict, target: str = "summary") -> dict:
    """A row of the source as `prompt`, `post` (its text alone) and `summary`; Malformed if it is none."""
    if "dialogue" in row:
        prompt, summary = f"{text_of(row, 'dialogue').strip()}\n\nTL;DR:", text_of(row, "summary")
    else:
        prompt, summary = text_of(row, "prompt").rstrip(), text_of(row, "completion")
    if target == "title" and not prompt.endswith("TITLE:"):  # such a row has its title as completion already
        parts = PROMPT.fullmatch(prompt)
        if not parts:
            raise Malformed("prompt is not in the form SUBREDDIT:, TITLE:, POST:, TL;DR:")
        subreddit, summary, post = parts.groups()
        prompt = (f"SUBREDDIT: r/{subreddit}\n\n" if subreddit else "") + f"POST: {post.strip()}\n\nTITLE:"
    post = post_of(prompt)
    if not one_line(summary):
        raise Malformed("summary or title is empty")
    return {"prompt": prompt, "post": post, "summary": one_line(summary)}


def post_of(prompt: str) -> str:
    """The text of the post or dialogue in a prompt; Malformed if there is none."""
    parts = CUE.fullmatch(prompt)
    if not parts or not parts[1]:
        raise Malformed("prompt holds no post, or does not end in TL;DR: or TITLE:")
    return parts[1]


def make_comparison(row: dict) -> dict:
    """A comparison with its `prompt`, `post`, `chosen` and `rejected`; Malformed if it is none."""
    prompt = text_of(row, "prompt").rstrip()
    chosen, rejected = (one_line(text_of(row, side)) for side in ("chosen", "rejected"))
    if normalise(chosen) == normalise(rejected):
        raise Malformed("chosen equals rejected")
    return {"prompt": prompt, "post": post_of(prompt), "chosen": chosen, "rejected": rejected}


def share_of(post: str, seed: int, shares: dict[str, float]) -> str:
    """Which of the shares a post belongs to, drawn by its text and the seed."""
    return random.Random(f"{seed}/{normalise(post)}").choices(list(shares), list(shares.values()))[0]


# --- Rejected summaries -------------------------------------------------------------------------------------------


def dress(words: list[str], like: str) -> str:
    """The words as a text that begins with a capital and ends in a mark where `like` does."""
    text = END.sub("", " ".join(words))
    mark = END.search(like)
    text = text[:1].upper() + text[1:] if like[:1].isupper() else text
    return text + (mark[0] if mark else "")


def change(source: str, post: str, summary: str, other: str, rng: random.Random) -> str | None:
    """The summary spoilt in the way `source`, or None if it is too short for that or would stay the same."""
    words = END.sub("", summary).split()
    if source == "other":
        changed = other
    elif len(words) < 4:
        return None
    elif source == "lead":
        changed = dress(post.split()[: len(words)], summary)
    elif source == "shuffled":
        changed = dress(rng.sample(words, len(words)), summary)
    else:
        n = rng.randint(len(words) // 4, len(words) * 3 // 4)  # words less, or more: as many pairs with each
        last = words[-rng.randint(2, min(4, len(words))) :]
        longer = words + (last * n)[:n]
        changed = " ".join(words[: len(words) - n]) if source == "truncated" else dress(longer, summary)
    return changed if normalise(changed) != normalise(summary) else None


def neighbours(rows: list[dict], rng: random.Random) -> list[str]:
    """For each row another one's summary, the next longer or shorter by characters with equal chance."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]["summary"]), rng.random()))
    found = [""] * len(rows)
    for rank, index in enumerate(order):
        step = rng.choice((-1, 1))
        while rank + step in range(len(order)) and rows[order[rank + step]]["summary"] == rows[index]["summary"]:
            step += step // abs(step)
        found[index] = rows[order[max(0, min(rank + step, len(order) - 1))]]["summary"]
    return found


def make_pairs(rows: list[dict], per_post: int, rng: random.Random) -> list[dict]:
    """`per_post` pairs of each row, in random order: its summary over spoilt ones, each in a way of its own."""
    ways = ("other", "lead", "shuffled", "truncated", "repeated")
    pairs = []
    for row, other in zip(rows, neighbours(rows, rng), strict=True):
        for source in rng.sample(ways, min(per_post, len(ways))):
            rejected = change(source, row["post"], row["summary"], other, rng)
            if rejected:
                pairs.append(as_pair(row["prompt"], row["summary"], rejected, source))
    rng.shuffle(pairs)
    return pairs


def as_pair(prompt: str, chosen: str, rejected: str, source: str) -> dict:
    return {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}", "source": source}


def echo(post: str, rng: random.Random) -> str:
    """A stretch of the post of 30 to 80 words, or all of a shorter one, twice in a row."""
    words = post.split()
    length = min(len(words), rng.randint(30, 80))
    start = rng.randint(0, len(words) - length)
    stretch = " ".join(words[start : start + length])
    return f"{stretch} {stretch}"


# --- Files --------------------------------------------------------------------------------------------------------


def fill(outbox: Outbox, reader: Reader, splits: dict, comparisons: dict, args) -> None:
    """Read all of test before any of train, comparisons before summaries, and write all rows."""
    compared: set[bytes] = set()  # posts with a real comparison, which no other file may hold
    for side in SPLITS:
        pairs: dict[str, list[dict]] = {kind: [] for kind in PAIRS}
        rows: dict[str, list[dict]] = {kind: [] for kind in SHARES}
        if side in comparisons:
            name = f"comparisons/{side}"
            for row in reader.read(name, comparisons[side], make_comparison):
                texts = normalise(" ".join(row.values()))
                if reader.is_apart(side, [row["post"]], name) and reader.is_new(texts, name):
                    compared.add(digest(normalise(row["post"])))
                    kinds = PAIRS if side == "test" else [share_of(row["post"], args.seed, dict.fromkeys(PAIRS, 1.0))]
                    for kind in kinds:
                        pairs[kind].append(as_pair(row["prompt"], row["chosen"], row["rejected"], "comparison"))
        for row in reader.read(side, splits[side], lambda row: make_row(row, args.target)):
            if keep(row, side, reader, compared, args):
                for kind in SHARES if side == "test" else [share_of(row["post"], args.seed, SHARES)]:
                    rows[kind].append(row)
        echoes = random.Random(f"{args.seed}/echoes")
        for row in rows["sft"]:
            outbox.add("pretrain", side, {"text": f"{row['prompt']} {row['summary']}"})
            if side == "train" and echoes.random() < args.echoes:
                outbox.add("pretrain", side, {"text": echo(row["post"], echoes)})
            outbox.add("sft", side, {"prompt": row["prompt"], "completion": f" {row['summary']}"})
        for row in rows["prompts"]:
            outbox.add("prompts", side, {"prompt": row["prompt"], "reference": f" {row['summary']}"})
        for kind in PAIRS:
            rng = random.Random(f"{args.seed}/{side if side == 'test' else kind}")  # both have the same pairs of test
            pairs[kind] += make_pairs(rows[kind], args.pairs_per_post, rng)
            rng.shuffle(pairs[kind])
            outbox.add_all(kind, side, pairs[kind])


def keep(row: dict, side: str, reader: Reader, compared: set[bytes], args) -> bool:
    """Whether a row is short enough and its post is new; else it is counted as left out."""
    words, most = len(row["post"].split()), args.max_words
    if words > most or len(row["summary"].split()) > args.max_summary_words:
        what = f"post of over {most} words" if words > most else f"summary of over {args.max_summary_words} words"
        reader.leave_out(f"{side}: {what}")
        return False
    if digest(normalise(row["post"])) in compared:
        reader.leave_out(f"{side}: the post stands in --comparisons")
        return False
    return reader.is_apart(side, [row["post"]]) and reader.is_new(normalise(row["post"]), side)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser("summaries.py", __doc__)
    parser.add_argument("--source", default="trl-lib/tldr", help="posts and summaries: Hub id or local folder")
    parser.add_argument("--target", choices=("summary", "title"), default="summary", help="what is to be written")
    parser.add_argument("--comparisons", help="real comparisons of summaries: Hub id or local folder")
    parser.add_argument("--output", type=folder, default=Path("data/reddit_tldr"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    parser.add_argument("--limit", type=count, help="read at most so many rows of each split, drawn at random")
    parser.add_argument("--max_words", type=count, default=200, help="of a post; longer ones are left out")
    parser.add_argument("--max_summary_words", type=count, default=32, help="of a summary; longer ones are left out")
    parser.add_argument("--pairs_per_post", type=count, default=2, help="at most 5")
    parser.add_argument("--echoes", type=share, default=0.0, help="share of posts of which a stretch is repeated")
    return parser


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Write the ten files; returns the number of rows of each."""
    args = make_parser().parse_args(argv)
    splits = load_splits(Source(args.source), SPLITS, ())
    compared = Source(args.comparisons or "", "--comparisons")
    columns = ("prompt", "chosen", "rejected")
    comparisons = load_splits(compared, SPLITS, columns, optional=("test",)) if args.comparisons else {}
    reader = Reader(args.seed, args.limit)
    return write(
        args.output,
        both_sides(KINDS),
        lambda outbox: fill(outbox, reader, splits, comparisons, args),
        reader,
        f"--source {args.source}",
        "fix the rows left out, or raise --limit, --max_words or --max_summary_words",
    )


if __name__ == "__main__":
    main()
