"""Write Reddit posts, their reference summaries and comparisons of summaries as the files of the TL;DR recipes.

    python data_prep/summarize_from_feedback.py [--source openai/summarize_from_feedback] [--tldr_source trl-lib/tldr]
        [--output data/summarize_from_feedback] [--tokenizer Qwen/Qwen2.5-0.5B] [--max_prompt_tokens 512]
        [--seed 0] [--limit N]

`--source` is a Hub id with a configuration `comparisons`, or a local folder that holds `comparisons.train` and
`comparisons.validation` (columns `info`, `summaries`, `choice`); `--tldr_source` is a Hub id or a local folder that
holds `train` and `validation` (columns `prompt`, `completion`), each as `.jsonl`, `.jsonl.gz` or `.parquet`. A thousand
rows take about 2 seconds on one core. You should see how many rows were left out and why, if any were, then the number
of rows and one row of each file; the source's validation becomes test:

    <output>/pairs/{train,test}.jsonl    {"prompt", "chosen", "rejected"}  for the reward model, from --source
    <output>/sft/{train,test}.jsonl      {"prompt", "completion"}          posts and references, from --tldr_source
    <output>/prompts/{train,test}.jsonl  {"prompt", "reference"}           the distinct prompts of sft

A prompt has the form of Stiennon et al. 2020, "SUBREDDIT: r/…\\n\\nTITLE: …\\n\\nPOST: …\\n\\nTL;DR:"; a summary starts
with the space that follows. A prompt over `--max_prompt_tokens` tokens of `--tokenizer` loses the end of its post: from
the last newline that leaves it short enough, else from the last such token; title and TL;DR: stay. A post of a test
file stands in no train file of any kind: such rows of train are left out and counted, as are repeated and malformed
rows.

Check who judged in your source (`worker`): people did in OpenAI's, and copies exist in which a model did, with its own
taste for length and tone. OpenAI's comparisons hold news articles too, which have no post: they count as malformed.
Where `datasets` refuses the Hub's copy as a script, download its Parquet branch (refs/convert/parquet) and name that
folder. With `--limit`, Hub sources are streamed: rows are drawn from their first ones through a buffer of 1,000.
The same seed and sources write the same bytes.
"""

import bisect
import re
from pathlib import Path

from dataset_files import (
    Malformed,
    Parser,
    Reader,
    Source,
    both_sides,
    count,
    folder,
    load_splits,
    normalise,
    text_of,
    write,
)

SPLITS = {"test": ("validation",), "train": ("train",)}  # test first: what stands in it is left out of train
PROMPT = re.compile(r"(?:SUBREDDIT: r/(.*?)\n\n)?TITLE: (.*?)\n\nPOST: (.*?)\n\nTL;DR:\s*", re.DOTALL)


def format_post(subreddit: str | None, title: str, post: str) -> str:
    """A prompt in the form of Stiennon et al. 2020; without a subreddit it starts with the title."""
    name = (subreddit or "").strip().removeprefix("/").removeprefix("r/")
    head = f"SUBREDDIT: r/{name}\n\n" if name else ""
    return f"{head}TITLE: {title.strip()}\n\nPOST: {post.strip()}\n\nTL;DR:"


def cut_post(subreddit: str | None, title: str, post: str, tokenizer, max_tokens: int) -> str | None:
    """`format_post` of as much of the post as leaves at most `max_tokens` tokens; None if not even one token does.

    An over-long post ends before a newline, the last one that leaves few enough tokens; if none does, after the last
    such token (Stiennon et al. 2020, appendix on data). `tokenizer` is a fast one, and adds what it adds to a prompt.
    """

    def prompt(end: int) -> str:
        return format_post(subreddit, title, post[:end])

    def too_long(end: int) -> bool:
        return len(tokenizer(prompt(end)).input_ids) > max_tokens

    post = post.strip()
    if not too_long(len(post)):
        return prompt(len(post))
    newlines = [match.start() for match in re.finditer(r"\n+", post)]
    ends = tokenizer(post, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    for places in (newlines, [end for _, end in ends]):
        fitting = bisect.bisect_left(places, True, key=too_long)  # lengths grow with the post, but for a merged token
        if fitting:
            return prompt(places[fitting - 1])
    return None


def make_pair(row: dict) -> dict:
    """A comparison with its subreddit, title, post, chosen and rejected summary; Malformed if it is none."""
    info, summaries, choice = (row.get(column) for column in ("info", "summaries", "choice"))
    if not isinstance(info, dict):
        raise Malformed(f"info is {type(info).__name__}, not an object")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(s, dict) for s in summaries):
        raise Malformed("summaries are not two objects")
    if type(choice) is not int or choice not in (0, 1):
        raise Malformed(f"choice is {choice!r}, not 0 or 1")
    parts = {part: text_of(info, part) for part in ("subreddit", "title", "post")}
    chosen, rejected = (text_of(summaries[index], "text").strip() for index in (choice, 1 - choice))
    if normalise(chosen) == normalise(rejected):
        raise Malformed("chosen equals rejected")
    return parts | {"chosen": f" {chosen}", "rejected": f" {rejected}"}


def make_reference(row: dict) -> dict:
    """A prompt taken apart into subreddit, title and post, with its summary; Malformed if it is none."""
    parts = PROMPT.fullmatch(text_of(row, "prompt"))
    if not parts:
        raise Malformed("prompt is not in the form SUBREDDIT:, TITLE:, POST:, TL;DR:")
    subreddit, title, post = parts.groups()
    if not title.strip() or not post.strip():
        raise Malformed("title or post is empty")
    completion = " " + text_of(row, "completion").strip()
    return {"subreddit": subreddit, "title": title, "post": post, "completion": completion}


def load_tokenizer(name: str):
    """A fast tokenizer by Hub id or folder; one line if there is none."""
    from transformers import AutoTokenizer  # here, so that importing this module stays free

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # many kinds: no such folder or id, no connection, broken files
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(f"--tokenizer {name}: cannot be loaded ({reason}); name another folder or Hub id") from None
    if not tokenizer.is_fast:
        raise SystemExit(f"--tokenizer {name}: has no fast version, so posts cannot be cut at a token; name another")
    return tokenizer


def fill(outbox, reader: Reader, sources: dict[str, dict], tokenizer, max_tokens: int) -> None:
    """Read both sources, all of test before any of train, and write all rows."""
    makers = {"pairs": make_pair, "sft": make_reference}
    for side, kind in ((side, kind) for side in SPLITS for kind in makers):
        name = f"{kind}/{side}"
        for row in reader.read(name, sources[kind][side], makers[kind]):
            parts = [row.pop(part) for part in ("subreddit", "title", "post")]
            if not reader.is_apart(side, [parts[-1]], name):
                continue
            prompt = cut_post(*parts, tokenizer, max_tokens)
            if prompt is None:
                reader.leave_out(f"{name}: title and TL;DR: alone are over {max_tokens} tokens")
            elif reader.is_new(normalise(" ".join((kind, prompt, *row.values()))), name):
                outbox.add(kind, side, {"prompt": prompt, **row})
                if kind == "sft" and reader.is_new(normalise(prompt), f"prompts/{side}"):
                    outbox.add("prompts", side, {"prompt": prompt, "reference": row["completion"]})


def make_parser() -> Parser:
    """The command line."""
    parser = Parser("summarize_from_feedback.py", __doc__)
    parser.add_argument("--source", default="openai/summarize_from_feedback", help="comparisons: Hub id or folder")
    parser.add_argument("--tldr_source", default="trl-lib/tldr", help="posts and references: Hub id or folder")
    parser.add_argument("--output", type=folder, default=Path("data/summarize_from_feedback"), help="where to write")
    parser.add_argument("--tokenizer", default="Qwen/Qwen2.5-0.5B", help="Hub id or folder; counts a prompt's tokens")
    parser.add_argument("--max_prompt_tokens", type=count, default=512, help="longer posts are cut")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    parser.add_argument("--limit", type=count, help="read at most so many rows of each split")
    return parser


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Write the six files; returns the number of rows of each."""
    args = make_parser().parse_args(argv)
    pairs, tldr = Source(args.source, config="comparisons"), Source(args.tldr_source, "--tldr_source")
    streaming = bool(args.limit)
    sources = {
        "pairs": load_splits(pairs, SPLITS, ("info", "summaries", "choice"), streaming=streaming),
        "sft": load_splits(tldr, SPLITS, ("prompt", "completion"), streaming=streaming),
    }
    tokenizer = load_tokenizer(args.tokenizer)
    reader = Reader(args.seed, args.limit)
    return write(
        args.output,
        both_sides(("pairs", "sft", "prompts")),
        lambda outbox: fill(outbox, reader, sources, tokenizer, args.max_prompt_tokens),
        reader,
        f"--source {args.source}, --tldr_source {args.tldr_source}",
        "fix the rows left out, or raise --limit or --max_prompt_tokens",
    )


if __name__ == "__main__":
    main()
