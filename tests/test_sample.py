"""`eval.sample`: completions of a dataset's prompts as JSONL, on a small random model."""

import pytest

from conftest import SENTENCES
from data_helpers import fails_in_one_line, rows_of, run, write_rows
from eval import sample


@pytest.fixture
def arguments(qwen2_path, tmp_path):
    rows = [{"prompt": sentence, "chosen": "x"} for sentence in [*SENTENCES, *SENTENCES[:3]]]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    prompts = ["--prompts", tmp_path / "data", "--split", "train"]
    return ["--model", qwen2_path, *prompts, "--max_new_tokens", 5, "--output", tmp_path / "new" / "samples.jsonl"]


def test_each_prompt_gets_one_completion_of_the_wanted_length_at_most(arguments, tokenizer, tmp_path):
    sample.main([*map(str, arguments), "--batch_size", "4"])
    rows = rows_of(tmp_path / "new" / "samples.jsonl")
    assert [row["prompt"] for row in rows] == sorted(SENTENCES, key=SENTENCES.index)
    assert len({row["completion"] for row in rows}) > 1
    assert all(len(tokenizer(row["completion"])["input_ids"]) <= 5 * 4 for row in rows)  # a byte may decode to U+FFFD


def test_the_seed_decides_and_a_file_that_is_there_is_kept(arguments, tmp_path, capsys):
    first = run(sample.main, *arguments)
    assert "--overwrite" in fails_in_one_line(capsys, sample.main, *arguments)
    assert run(sample.main, *arguments, "--overwrite") == first
    assert run(sample.main, *arguments, "--overwrite", "--seed", 1) != first


def test_a_prompt_without_room_for_its_completion_is_refused(arguments, tmp_path, capsys):
    message = fails_in_one_line(capsys, sample.main, *arguments, "--max_new_tokens", 60)
    assert "positions" in message
    assert not (tmp_path / "new").exists()
