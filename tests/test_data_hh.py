"""Properties of `data_prep/hh.py`, on small dialogues of our own and, where they exist, on real ones."""

import datasets
import pytest

from data_helpers import fails_in_one_line, files_under, left_out, rows_of, run, write_rows
from data_prep import hh

pytestmark = pytest.mark.usefixtures("own_cache")


def dialogue(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def pair(prompt: str, chosen: str = "yes", rejected: str = "no", before: tuple[str, ...] = ()) -> dict:
    return {side: dialogue(*before, prompt, text) for side, text in (("chosen", chosen), ("rejected", rejected))}


def prompts_of(folder, kind: str, side: str) -> list[str]:
    return [row["prompt"] for row in rows_of(folder / kind / f"{side}.jsonl")]


def make_source(folder, more: list[dict] = (), train: int = 20, test: int = 5):
    """A local folder of as many pairs, with more rows at the end of train; without a test file where `test` is 0."""
    write_rows(folder / "train.jsonl.gz", [pair(f"train {i}?") for i in range(train)] + list(more))
    if test:
        write_rows(folder / "test.jsonl.gz", [pair(f"test {i}?") for i in range(test)])
    return folder


def test_a_dialogue_becomes_anthropics_form_and_both_answers_follow_the_same_prompt(tmp_path):
    row = pair(" And blue? ", " Sky.\n", "Grass.", before=("What is red?", "Blood."))
    make_source(tmp_path / "in", more=[row], train=0)
    run(hh.main, "--source", tmp_path / "in", "--output", tmp_path / "out")
    (written,) = rows_of(tmp_path / "out" / "pairs" / "train.jsonl")
    assert written == {
        "prompt": "\n\nHuman: What is red?\n\nAssistant: Blood.\n\nHuman: And blue?\n\nAssistant:",
        "chosen": " Sky.",
        "rejected": " Grass.",
    }


def test_malformed_dialogues_are_counted_and_left_out(tmp_path, capsys):
    good, shared = pair("ok?"), dialogue("a?", "b")
    system = {"role": "system", "content": "s"}
    bad = [
        {"chosen": good["chosen"]},
        {"chosen": None, "rejected": good["rejected"]},
        {"chosen": "text", "rejected": good["rejected"]},
        {"chosen": ["a", "b"], "rejected": good["rejected"]},
        {"chosen": good["chosen"][-1:], "rejected": good["rejected"][-1:]},
        {"chosen": dialogue("x?", "b"), "rejected": dialogue("y?", "c")},
        {"chosen": shared, "rejected": dialogue("a?", " B ")},
        {"chosen": dialogue("a?", "b", "c?"), "rejected": dialogue("a?", "b", "d?")},
        {"chosen": dialogue("a?", " "), "rejected": shared},
        {"chosen": dialogue("", "b"), "rejected": dialogue("", "c")},
        {"chosen": [system, *shared], "rejected": [system, *dialogue("a?", "c")]},
        {"chosen": [{"role": "user"}, shared[1]], "rejected": shared},
    ]
    make_source(tmp_path / "in", more=bad)
    counts = run(hh.main, "--source", tmp_path / "in", "--output", tmp_path / "out")
    assert left_out(capsys.readouterr().out) == {"train: malformed": len(bad)}
    assert counts["pairs/train.jsonl"] == 20


def test_prompts_are_distinct_and_repeated_pairs_are_dropped_and_counted(tmp_path, capsys):
    more = [pair("train 0?"), pair("train 0?", "other", "answers"), pair("TRAIN  0?", "third", "answer")]
    make_source(tmp_path / "in", more)
    counts = run(hh.main, "--source", tmp_path / "in", "--output", tmp_path / "out")
    assert counts["pairs/train.jsonl"] == 22
    assert counts["prompts/train.jsonl"] == 20
    assert left_out(capsys.readouterr().out) == {
        "train: already in train": 1,
        "prompts/train: already in prompts/train": 2,
    }


def test_a_prompt_of_test_is_dropped_from_train_whatever_its_case_and_spaces(tmp_path, capsys):
    make_source(tmp_path / "in", [pair(" TEST   1? ", "other", "answers")])
    run(hh.main, "--source", tmp_path / "in", "--output", tmp_path / "out")
    assert left_out(capsys.readouterr().out) == {"train: also in test": 1}
    assert "\n\nHuman: test 1?\n\nAssistant:" in prompts_of(tmp_path / "out", "pairs", "test")
    assert not any("TEST" in prompt for prompt in prompts_of(tmp_path / "out", "pairs", "train"))


def test_a_source_of_one_split_is_parted_by_prompt(tmp_path, capsys):
    twice = [pair(f"train {i}?", "another", "pair") for i in range(20)]
    make_source(tmp_path / "in", twice, test=0)
    counts = run(hh.main, "--source", tmp_path / "in", "--output", tmp_path / "out", "--test_rows", 10)
    assert counts["pairs/test.jsonl"] == 10
    train, test = (set(prompts_of(tmp_path / "out", "pairs", side)) for side in ("train", "test"))
    assert train
    assert not train & test
    dropped = left_out(capsys.readouterr().out)["train: also in test"]
    assert counts["pairs/train.jsonl"] + 10 + dropped == 40


def test_a_split_called_anthropic_hh_is_train_and_a_tenth_is_held_out_where_rows_are_few(tmp_path):
    write_rows(tmp_path / "in" / "anthropic_hh.jsonl", [pair(f"{i}?") for i in range(40)])
    counts = run(hh.main, "--source", tmp_path / "in", "--output", tmp_path / "out")
    assert counts["pairs/test.jsonl"] == 4
    assert counts["pairs/train.jsonl"] == 36


def test_the_same_seed_writes_the_same_bytes_and_another_holds_out_other_rows(tmp_path):
    make_source(tmp_path / "in", test=0)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(hh.main, "--source", tmp_path / "in", "--output", tmp_path / name, "--seed", seed, "--test_rows", 8)
    first, second, other = (files_under(tmp_path / name) for name in "abc")
    assert len(first) == 4
    assert first == second
    assert first["pairs/test.jsonl"] != other["pairs/test.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--test_rows", "20"], "--test_rows"),
        (["--test_rows", "none"], "--test_rows"),
        (["--limit", "0"], "--limit"),
        (["--source", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_bad_arguments_are_refused_in_one_line_and_nothing_is_written(tmp_path, capsys, arguments, named):
    source = make_source(tmp_path / "in", test=0)
    message = fails_in_one_line(capsys, hh.main, "--source", source, "--output", tmp_path / "out", *arguments)
    assert named in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen": 1, "better": 2}, "'rejected', only ['better', 'chosen']"),
        ({"chosen": 1, "rejected": 2}, "pairs/train.jsonl, pairs/test.jsonl, prompts/train.jsonl"),
    ],
)
def test_a_missing_column_and_a_file_of_malformed_rows_are_one_line(tmp_path, capsys, row, expected):
    write_rows(tmp_path / "in" / "train.jsonl", [row] * 3)
    message = fails_in_one_line(capsys, hh.main, "--source", tmp_path / "in", "--output", tmp_path / "out")
    assert expected in message
    assert not (tmp_path / "out").exists()


def test_a_limited_hub_source_is_streamed_and_read_no_further_than_it_must(tmp_path, monkeypatch):
    read = []

    def rows():
        for i in range(100_000):
            read.append(i)
            yield pair(f"{i}?")

    def load_dataset(path, name, split, streaming):
        assert (path, split, streaming) == ("some-org/pairs", "anthropic_hh", True)
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, config_name: ["other", "anthropic_hh"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    arguments = ("--source", "some-org/pairs", "--limit", 50, "--seed", 3)
    counts = run(hh.main, *arguments, "--output", tmp_path / "a")
    assert len(read) < 2_000
    assert counts == {
        "pairs/train.jsonl": 45,
        "pairs/test.jsonl": 5,
        "prompts/train.jsonl": 45,
        "prompts/test.jsonl": 5,
    }
    run(hh.main, *arguments, "--output", tmp_path / "b")
    assert files_under(tmp_path / "a") == files_under(tmp_path / "b")


def test_a_stream_that_breaks_off_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def rows():
        yield from (pair(f"{i}?") for i in range(5))
        raise ConnectionError("lost")

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, config_name: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.IterableDataset.from_generator(rows))
    message = fails_in_one_line(capsys, hh.main, "--source", "a/b", "--limit", 50, "--output", tmp_path / "out")
    assert "lost" in message
    assert not (tmp_path / "out").exists()


def test_real_dialogues_keep_every_turn(shared_data, tmp_path):
    source = shared_data / "hh_rlhf"
    counts = run(hh.main, "--source", source, "--output", tmp_path / "out", "--limit", 200)
    assert counts["pairs/train.jsonl"] == counts["pairs/test.jsonl"] == 200
    train, test = (set(prompts_of(tmp_path / "out", "prompts", side)) for side in ("train", "test"))
    assert not train & test
    rows = rows_of(tmp_path / "out" / "pairs" / "train.jsonl")
    assert max(row["prompt"].count("\n\nHuman:") for row in rows) > 2
    for row in rows:
        assert row["prompt"].startswith("\n\nHuman: ")
        assert row["prompt"].endswith("\n\nAssistant:")
        assert row["chosen"].startswith(" ")
        assert row["chosen"] != row["rejected"]
