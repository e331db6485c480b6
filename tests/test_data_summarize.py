"""Properties of `data_prep/summarize_from_feedback.py`, on small posts and, where they exist, on real ones."""

import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from conftest import ROOT
from data_helpers import fails_in_one_line, files_under, left_out, rows_of, run, write_rows
from data_prep import summarize_from_feedback as summarize

pytestmark = pytest.mark.usefixtures("own_cache")
KINDS = ("pairs", "sft", "prompts")


def comparison(post: str, choice: int = 0, **changes) -> dict:
    info = {"id": "1", "subreddit": "cats", "title": "My cat", "post": post}
    texts = (f" first of {post} ", f"second of {post}")
    return {"info": info, "summaries": [{"text": text} for text in texts], "choice": choice} | changes


def reference(post: str, **changes) -> dict:
    return {"prompt": summarize.format_post("cats", "My cat", post), "completion": f"reference of {post}"} | changes


@pytest.fixture
def sources(tmp_path, gpt2_path):
    """Makes the two source folders, with more rows in the splits that are named; returns the arguments."""

    def make(**more: list[dict]) -> list:
        for name, maker, file in (("pairs", comparison, "comparisons.{}.jsonl.gz"), ("tldr", reference, "{}.jsonl.gz")):
            for split, count in (("train", 12), ("validation", 4)):
                rows = [maker(f"{name} {split} post {i}") for i in range(count)]
                write_rows(tmp_path / name / file.format(split), rows + more.get(f"{name}_{split}", []))
        folders = ("--source", tmp_path / "pairs", "--tldr_source", tmp_path / "tldr")
        return [*folders, "--tokenizer", gpt2_path, "--output", tmp_path / "out"]

    return make


def posts_of(folder, kind: str, side: str) -> set[str]:
    return {row["prompt"].split("POST: ")[1].split("\n\nTL;DR:")[0] for row in rows_of(folder / kind / f"{side}.jsonl")}


# --- Form and cutting ---------------------------------------------------------------------------------------------


def test_a_post_takes_the_papers_form():
    assert (
        summarize.format_post("relationships", " Help \n", "\nFirst.\n\nSecond.\n")
        == "SUBREDDIT: r/relationships\n\nTITLE: Help\n\nPOST: First.\n\nSecond.\n\nTL;DR:"
    )


def test_a_subreddit_may_be_left_out_and_may_carry_its_prefix():
    assert summarize.format_post(None, "a", "b") == "TITLE: a\n\nPOST: b\n\nTL;DR:"
    assert summarize.format_post("r/cats", "a", "b") == summarize.format_post("/r/cats", "a", "b")
    assert summarize.format_post("r/cats", "a", "b") == summarize.format_post("cats", "a", "b")


def tokens(tokenizer, text: str) -> int:
    return len(tokenizer(text).input_ids)


def test_a_prompt_that_fits_exactly_is_complete(tokenizer):
    whole = summarize.format_post("cats", "t", "one\ntwo")
    room = tokens(tokenizer, whole)
    assert summarize.cut_post("cats", "t", "one\ntwo", tokenizer, room) == whole
    assert summarize.cut_post("cats", "t", "one\ntwo", tokenizer, room - 1) == summarize.format_post("cats", "t", "one")


@pytest.mark.parametrize("room", range(60, 140, 7))
def test_an_over_long_post_ends_at_the_last_newline_that_fits(tokenizer, room):
    lines = [f"this is line {i} of the story" for i in range(12)]
    cut = summarize.cut_post("cats", "t", "\n\n".join(lines), tokenizer, room)
    post = cut.split("POST: ")[1].split("\n\nTL;DR:")[0]
    kept = post.split("\n\n")
    assert kept == lines[: len(kept)], "whole lines, from the first on"
    assert tokens(tokenizer, cut) <= room
    longer = summarize.format_post("cats", "t", "\n\n".join(lines[: len(kept) + 1]))
    assert tokens(tokenizer, longer) > room, "one line more would have fitted"


@pytest.mark.parametrize("room", range(40, 56, 2))
def test_a_post_whose_first_line_is_too_long_ends_at_the_last_token_that_fits(tokenizer, room):
    post = "the story was so good that i watched it twice and then left early\nand a second line"
    cut = summarize.cut_post(None, "t", post, tokenizer, room)
    kept = cut.removeprefix("TITLE: t\n\nPOST: ").removesuffix("\n\nTL;DR:")
    assert post.startswith(kept)
    assert 0 < len(kept) < post.index("\n")
    assert tokens(tokenizer, cut) <= room
    ends = [end for _, end in tokenizer(post, return_offsets_mapping=True).offset_mapping]
    following = next(end for end in ends if len(post[:end].rstrip()) > len(kept))
    assert tokens(tokenizer, summarize.format_post(None, "t", post[:following])) > room


def test_title_and_tldr_stay_and_a_title_without_room_gives_none(tokenizer):
    frame = tokens(tokenizer, summarize.format_post("cats", "a title of some length", ""))
    cut = summarize.cut_post("cats", "a title of some length", "word " * 500, tokenizer, frame + 5)
    assert "TITLE: a title of some length\n\nPOST: word" in cut
    assert cut.endswith("\n\nTL;DR:")
    assert summarize.cut_post("cats", "a title of some length", "word " * 500, tokenizer, frame - 1) is None


def test_importing_the_form_loads_nothing():
    code = (
        "import sys; from data_prep.summarize_from_feedback import cut_post, format_post; "
        "print({'datasets', 'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


# --- Files --------------------------------------------------------------------------------------------------------


def test_the_choice_says_which_summary_is_chosen_and_references_serve_sft_and_prompts(sources, tmp_path):
    extra = [comparison("second is better", choice=1)]
    counts = run(summarize.main, *sources(pairs_train=extra))
    assert list(counts.values()) == [13, 4, 12, 4, 12, 4]
    for row in rows_of(tmp_path / "out" / "pairs" / "train.jsonl"):
        first, second = (row["chosen"], row["rejected"])
        if "second is better" in row["prompt"]:
            first, second = second, first
        post = row["prompt"].split("POST: ")[1].removesuffix("\n\nTL;DR:")
        assert (first, second) == (f" first of {post}", f" second of {post}")
    sft, prompts = (rows_of(tmp_path / "out" / kind / "test.jsonl") for kind in ("sft", "prompts"))
    assert [(row["prompt"], row["completion"]) for row in sft] == [(row["prompt"], row["reference"]) for row in prompts]
    assert all(row["completion"].startswith(" reference of tldr validation") for row in sft)


def test_a_post_of_any_test_file_stands_in_no_train_file_and_is_counted(sources, tmp_path, capsys):
    run(
        summarize.main,
        *sources(
            pairs_train=[comparison("TLDR  validation post 1")],
            tldr_train=[reference("pairs validation post 2"), reference("tldr validation post 0")],
        ),
    )
    train, test = (set.union(*(posts_of(tmp_path / "out", kind, side) for kind in KINDS)) for side in ("train", "test"))
    assert {"pairs validation post 2", "tldr validation post 1"} <= test
    assert not {post.casefold() for post in train} & {post.casefold() for post in test}
    assert len(train) == 24
    assert left_out(capsys.readouterr().out) == {"pairs/train: also in test": 1, "sft/train: also in test": 2}


def test_posts_that_differ_after_the_cut_alone_are_kept_apart_by_their_full_text(sources, tmp_path, capsys):
    long = "a line that stays\n" + "word " * 200
    arguments = sources(pairs_validation=[comparison(long + "end")], tldr_train=[reference(long + "end")])
    run(summarize.main, *arguments, "--max_prompt_tokens", 100)
    assert left_out(capsys.readouterr().out)["sft/train: also in test"] == 1


def test_malformed_comparisons_and_references_are_counted_and_left_out(sources, capsys):
    article = {"id": "1", "article": "news", "subreddit": None, "title": None, "post": None}
    bad = [
        comparison("a", info=article),
        comparison("b", info=None),
        comparison("c", choice=2),
        comparison("d", choice=True),
        comparison("e", choice=None),
        comparison("f", summaries=[{"text": "one"}]),
        comparison("g", summaries=[{"text": "same"}, {"text": " Same "}]),
        comparison("h", summaries=[{"text": ""}, {"text": "x"}]),
        comparison("  "),
        {"info": 1},
    ]
    worse = [reference("a", prompt="POST: a"), reference("b", completion=" "), reference("c", prompt=5), reference(" ")]
    counts = run(summarize.main, *sources(pairs_train=bad, tldr_validation=worse))
    reasons = left_out(capsys.readouterr().out)
    assert reasons == {"pairs/train: malformed": len(bad), "sft/test: malformed": len(worse)}
    assert counts["pairs/train.jsonl"] == 12
    assert counts["sft/test.jsonl"] == 4


def test_repeats_are_dropped_and_a_title_without_room_is_counted(sources, capsys):
    endless = reference("x", prompt=summarize.format_post("cats", "long " * 300, "x"))
    more = [reference("tldr train post 1"), reference("tldr train post 2", completion="another"), endless]
    counts = run(summarize.main, *sources(tldr_train=more))
    assert counts["sft/train.jsonl"] == 13
    assert counts["prompts/train.jsonl"] == 12
    assert left_out(capsys.readouterr().out) == {
        "prompts/train: already in prompts/train": 1,
        "sft/train: already in sft/train": 1,
        "sft/train: title and TL;DR: alone are over 512 tokens": 1,
    }


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(sources, tmp_path):
    arguments = sources()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(summarize.main, *arguments, "--output", tmp_path / name, "--seed", seed)
    first, second, other = (files_under(tmp_path / name) for name in "abc")
    assert len(first) == 6
    assert first == second
    assert first["pairs/train.jsonl"] != other["pairs/train.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tokenizer", "./nowhere"], "--tokenizer ./nowhere"),
        (["--tldr_source", "./nowhere"], "--tldr_source ./nowhere"),
        (["--source", "./nowhere"], "--source ./nowhere"),
        (["--max_prompt_tokens", "-1"], "--max_prompt_tokens"),
        (["--max_prompt_tokens", "3"], "would be empty"),
    ],
)
def test_bad_arguments_are_refused_in_one_line_and_nothing_is_written(sources, tmp_path, capsys, arguments, named):
    assert named in fails_in_one_line(capsys, summarize.main, *sources(), *arguments)
    assert not (tmp_path / "out").exists()


def test_a_missing_validation_file_is_named(sources, tmp_path, capsys):
    arguments = sources()
    (tmp_path / "pairs" / "comparisons.validation.jsonl.gz").unlink()
    assert "comparisons.validation" in fails_in_one_line(capsys, summarize.main, *arguments)


def test_a_copy_of_the_hubs_parquet_branch_is_read(sources, tmp_path):
    import datasets

    arguments = sources()
    run(summarize.main, *arguments)
    before = files_under(tmp_path / "out")
    for split, count in (("train", 12), ("validation", 4)):
        place = tmp_path / "pairs" / "comparisons" / split
        place.mkdir(parents=True)
        rows = [comparison(f"pairs {split} post {i}") for i in range(count)]
        datasets.Dataset.from_list(rows).to_parquet(place / "0000.parquet")
        (tmp_path / "pairs" / f"comparisons.{split}.jsonl.gz").unlink()
    run(summarize.main, *arguments)
    assert files_under(tmp_path / "out") == before


def test_real_posts_are_cut_to_the_tokens_that_were_asked_for(shared_data, tmp_path):
    counts = run(
        summarize.main,
        *("--source", shared_data / "summarize_from_feedback", "--tldr_source", shared_data / "tldr"),
        *("--tokenizer", shared_data / "tokenizers" / "qwen2.5", "--output", tmp_path / "out"),
        *("--limit", 60, "--max_prompt_tokens", 160),
    )
    assert min(counts.values()) > 30
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen2.5")
    train, test = (set.union(*(posts_of(tmp_path / "out", kind, side) for kind in KINDS)) for side in ("train", "test"))
    assert not train & test
    for kind in KINDS:
        prompts = [row["prompt"] for row in rows_of(tmp_path / "out" / kind / "train.jsonl")]
        lengths = [tokens(tokenizer, prompt) for prompt in prompts]
        assert max(lengths) <= 160
        assert max(lengths) > 140, "nothing was cut"
        for prompt in prompts:
            assert summarize.PROMPT.fullmatch(prompt)
            assert prompt.startswith("SUBREDDIT: r/")
