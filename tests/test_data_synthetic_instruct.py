"""Properties of `data_prep/synthetic_instruct.py`, on small pairs and, where they exist, on real ones."""

import pytest

from data_helpers import fails_in_one_line, files_under, left_out, rows_of, run, write_rows
from data_prep import synthetic_instruct

pytestmark = pytest.mark.usefixtures("own_cache")


def pair(prompt: str, chosen: str = "long answer", rejected: str = "short") -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": "us"}


def prepare(tmp_path, rows: list, *arguments) -> dict[str, int]:
    write_rows(tmp_path / "in" / "train.jsonl", rows)
    return run(synthetic_instruct.main, "--source", tmp_path / "in", "--output", tmp_path / "out", *arguments)


def test_prompt_and_answers_take_their_form_and_sft_holds_the_chosen_one(tmp_path):
    prepare(tmp_path, [pair(" What is red? ", " A colour.\n", "Blood"), pair("x")])
    pairs, prompts, sft = (
        [row for side in ("train", "test") for row in rows_of(tmp_path / "out" / kind / f"{side}.jsonl")]
        for kind in ("pairs", "prompts", "sft")
    )
    prompt = "Human: What is red?\n\nAssistant:"
    assert {"prompt": prompt, "chosen": " A colour.", "rejected": " Blood"} in pairs
    assert {"prompt": prompt} in prompts
    assert {"prompt": prompt, "completion": " A colour."} in sft


def test_texts_that_read_as_json_stay_the_texts_that_they_are(tmp_path):
    texts = ["9.9", "[1, 2]", '"Header"', "true", "null", '{"a": 1}']
    prepare(tmp_path, [pair(f"prompt {i}", text) for i, text in enumerate(texts)])
    written = [row for side in ("train", "test") for row in rows_of(tmp_path / "out" / "pairs" / f"{side}.jsonl")]
    assert sorted(row["chosen"] for row in written) == sorted(f" {text}" for text in texts)


def test_malformed_and_repeated_rows_are_counted_and_one_prompt_with_two_answers_is_one_prompt(tmp_path, capsys):
    bad = [pair(" "), pair("a", None), pair("a", 5), pair("a", "same", " SAME"), {"prompt": "a"}, pair(["a"])]
    good = [pair(f"prompt {i}") for i in range(30)]
    more = [pair("prompt 3"), pair("prompt 4", "another"), pair("prompt 5", rejected="another")]
    counts = prepare(tmp_path, good + bad + more, "--test_rows", 1, "--seed", 1)
    assert sum(counts[f"pairs/{side}.jsonl"] for side in ("train", "test")) == 32
    assert sum(counts[f"prompts/{side}.jsonl"] for side in ("train", "test")) == 30
    assert sum(counts[f"sft/{side}.jsonl"] for side in ("train", "test")) == 31
    assert left_out(capsys.readouterr().out) == {
        "train: malformed": len(bad),
        "train: already in train": 1,
        "prompts/train: already in prompts/train": 2,
        "sft/train: already in sft/train": 1,
    }


def test_no_prompt_is_held_out_and_trained_on(tmp_path):
    prepare(tmp_path, [pair(f"prompt {i % 20}", f"answer {i}") for i in range(100)], "--test_rows", 12)
    for kind in ("pairs", "prompts", "sft"):
        train, test = (
            {row["prompt"] for row in rows_of(tmp_path / "out" / kind / f"{s}.jsonl")} for s in ("train", "test")
        )
        assert train
        assert test
        assert not train & test


def test_the_same_seed_writes_the_same_bytes_and_a_limit_holds(tmp_path):
    rows = [pair(f"prompt {i}") for i in range(50)]
    counts = prepare(tmp_path, rows, "--limit", 20)
    first = files_under(tmp_path / "out")
    assert counts["pairs/train.jsonl"] + counts["pairs/test.jsonl"] == 20
    prepare(tmp_path, rows, "--limit", 20)
    assert files_under(tmp_path / "out") == first
    prepare(tmp_path, rows, "--limit", 20, "--seed", 9)
    assert files_under(tmp_path / "out") != first


def test_a_line_that_is_no_json_is_one_line_and_earlier_files_stay(tmp_path, capsys):
    prepare(tmp_path, [pair(f"prompt {i}") for i in range(5)])
    before = files_under(tmp_path / "out")
    (tmp_path / "in" / "train.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": oops\n')
    output = ("--output", tmp_path / "out")
    message = fails_in_one_line(capsys, synthetic_instruct.main, "--source", tmp_path / "in", *output)
    assert "train.jsonl" in message
    assert "oops" in message
    assert files_under(tmp_path / "out") == before


def test_a_missing_column_is_named_with_those_there_are(tmp_path, capsys):
    write_rows(tmp_path / "in" / "train.jsonl", [{"prompt": "a", "better": "b", "rejected": "c"}])
    output = ("--output", tmp_path / "out")
    message = fails_in_one_line(capsys, synthetic_instruct.main, "--source", tmp_path / "in", *output)
    assert "'chosen'" in message
    assert "better" in message
    assert not (tmp_path / "out").exists()


def test_real_instruction_pairs_give_every_file(shared_data, tmp_path):
    source = shared_data / "instruct_pairs"
    counts = run(synthetic_instruct.main, "--source", source, "--output", tmp_path / "out", "--limit", 200)
    assert counts["pairs/test.jsonl"] > 190
    assert counts["pairs/train.jsonl"] > 100
    for kind in ("pairs", "prompts", "sft"):
        rows = {side: rows_of(tmp_path / "out" / kind / f"{side}.jsonl") for side in ("train", "test")}
        train, test = ({row["prompt"] for row in rows[side]} for side in ("train", "test"))
        assert not train & test
        assert all(prompt.startswith("Human: ") and prompt.endswith("\n\nAssistant:") for prompt in train | test)
