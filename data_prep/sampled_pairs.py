"""Add summaries that a model wrote to synthetic pairs: the reference over the sample, under the source `sampled`.

    python -m eval.sample --model runs/scratch/qwen_sft --prompts data/reddit_titles/pairs --split train \
        --n_prompts 4000 --output runs/scratch/qwen_samples.jsonl
    python data_prep/sampled_pairs.py [--pairs data/reddit_titles/pairs] [--seed 0]
        [--samples runs/scratch/qwen_samples.jsonl] [--output data/reddit_titles/pairs_sampled]

`--pairs` holds `train` and `test` as `data_prep/summaries.py` writes them; `--samples` are rows of `prompt` and
`completion`, of which there may be several of a prompt. A sample is rejected because people wrote the reference, not
because anybody compared the two: some samples are good. Left out, and counted: a sample of a prompt that is not in the
pairs, one that is empty or repeats its reference. It takes seconds. You should see the rows of both files; samples of
test posts go into test, all others into train, among the pairs that stand there:

    <output>/{train,test}.jsonl  {"prompt", "chosen", "rejected", "source"}
"""

import random
from pathlib import Path

from dataset_files import Malformed, Parser, Reader, Source, folder, load_files, load_splits, normalise, text_of, write

SIDES = ("train", "test")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser("sampled_pairs.py", __doc__)
    parser.add_argument("--pairs", default="data/reddit_titles/pairs", help="folder of pairs")
    parser.add_argument("--samples", default="runs/scratch/qwen_samples.jsonl", help="JSONL of prompt, completion")
    parser.add_argument(
        "--output", type=folder, default=Path("data/reddit_titles/pairs_sampled"), help="where to write"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files")
    return parser


def add_samples(rows: dict[str, list[dict]], samples, reader: Reader) -> None:
    """Put each sample as a pair beside those of its prompt; `rows` are the pairs by side."""
    reference = {row["prompt"]: (side, row["chosen"]) for side in SIDES for row in rows[side]}

    def make(sample: dict) -> tuple[str, dict]:
        prompt, text = text_of(sample, "prompt"), text_of(sample, "completion")
        if prompt not in reference:
            raise Malformed("its prompt is not in --pairs")
        side, chosen = reference[prompt]
        if normalise(text) == normalise(chosen):
            raise Malformed("it repeats its reference")
        return side, {"prompt": prompt, "chosen": chosen, "rejected": f" {text.strip()}", "source": "sampled"}

    for side, row in reader.read("samples", samples, make):
        if reader.is_new(normalise(row["prompt"] + row["rejected"]), "samples"):
            rows[side].append(row)


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Write the two files; returns the number of rows of each."""
    args = make_parser().parse_args(argv)
    columns = ("prompt", "chosen", "rejected", "source")
    splits = load_splits(Source(args.pairs, "--pairs"), {side: (side,) for side in SIDES}, columns)
    if not Path(args.samples).is_file():
        raise SystemExit(f"--samples {args.samples}: no such file; `python -m eval.sample` writes one")
    samples = load_files(Source(args.samples, "--samples"), "json", [args.samples])
    rows = {side: [{name: row[name] for name in columns} for row in splits[side]] for side in SIDES}
    reader = Reader(args.seed, None)
    add_samples(rows, samples, reader)

    def fill(outbox) -> None:
        for side in SIDES:
            random.Random(f"{args.seed}/{side}").shuffle(rows[side])
            for row in rows[side]:
                outbox.add(".", side, row)

    return write(args.output, [f"./{side}.jsonl" for side in SIDES], fill, reader, f"--pairs {args.pairs}")


if __name__ == "__main__":
    main()
