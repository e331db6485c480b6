"""The guides' commands, run in their order, in a folder with a short demo's models; each is cut down to seconds."""

import csv
import importlib
import random
import shlex
from pathlib import Path

import pytest

import command_line
from conftest import ROOT
from data_prep import toy_reviews
from test_documentation import COMMAND, blocks
from test_recipes import run

GUIDES = ROOT / "recipes" / "guides"
SMALL = ["--per_device_train_batch_size", "8", "--disable_tqdm", "true"]
SHORT = {  # by the end of a program's name: what is put behind its options
    "_sft": [*SMALL, "--max_steps", "2", "--test_rows", "8", "--scratch_width", "32"],
    "_reward": [*SMALL, "--max_steps", "2", "--test_pairs", "8"],
    "_ppo": [*SMALL, "--total_episodes", "16", "--max_completion_length", "6"],
    "eval.compare": ["--n_prompts", "8", "--max_new_tokens", "6"],
    "eval.reward_model": ["--n_pairs", "8"],
    "eval.predict": ["--max_new_tokens", "6"],
}


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def after_the_demo(tmp_path_factory):
    """A folder with what `make demo` leaves, and with tables of a user's own."""
    folder, rng = tmp_path_factory.mktemp("checkout"), random.Random(0)
    reviews = [toy_reviews.make_review(rng, label) for label in ("positive", "negative") * 100]
    write_csv(folder / "reviews.csv", [{"review": review.text, "label": review.label} for review in reviews])
    pairs = [toy_reviews.make_pair(rng) for _ in range(200)]
    write_csv(folder / "pairs.csv", [{"better": pair["chosen"], "worse": pair["rejected"]} for pair in pairs])
    write_csv(folder / "prompts.csv", [{"start": toy_reviews.make_prompt(rng)} for _ in range(400)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        toy_reviews.main(["--train", "96", "--test", "24"])
        for stage in ("sft", "reward", "ppo"):
            run(f"sentiment_gpt2_{stage}", "--config", "tiny", *SHORT[f"_{stage}"])
        run_command(
            "python -m eval.compare --base runs/tiny/sft --tuned runs/tiny/ppo --prompts data/toy_reviews/prompts "
            "--reward reward_model=runs/tiny/reward --output runs/tiny/report"
        )
    return folder


def run_command(text: str) -> None:
    """A command of a guide, in this process and cut short."""
    words = shlex.split(text.replace("\\\n", " "))
    words = words[1:] if words[0] == "accelerate" else words  # launch …, or python …
    if words[1].startswith("recipes/"):
        stem = Path(words[1]).stem
        run(stem, *words[2:], *SHORT[f"_{stem.rpartition('_')[2]}"])
    elif words[:2] == ["python", "-m"]:
        importlib.import_module(words[2]).main([*words[3:], *SHORT.get(words[2], [])])
    else:
        importlib.import_module(words[1].removesuffix(".py").replace("/", ".")).main(words[2:])


@pytest.mark.parametrize("name", ["your_data", "your_reward", "read_a_report"])
def test_a_guides_commands_run_as_they_stand_and_leave_the_demos_models_alone(after_the_demo, name, monkeypatch):
    monkeypatch.chdir(after_the_demo)
    monkeypatch.syspath_prepend(after_the_demo)
    path = GUIDES / f"{name}.md"
    if code := blocks(path, "python"):
        Path("my_rewards.py").write_text(code[0])
    tiny = {each: each.read_bytes() for each in Path("runs/tiny").rglob("*.safetensors")}
    found = [command for block in blocks(path, "bash") for command in COMMAND.findall(block)]
    assert found
    for command in found:
        run_command(command)
    assert tiny == {each: each.read_bytes() for each in Path("runs/tiny").rglob("*.safetensors")}


def test_the_reward_that_reads_a_column_is_one():
    _, code = blocks(GUIDES / "your_reward.md", "python")
    exec(compile(code, "your_reward.md", "exec"), namespace := {})
    texts = [" it is Paris", " no idea"]
    assert namespace["contains_the_answer"](["?", "?"], texts, answer=["Paris", "Rome"], trainer_state=None) == [1, 0]


def test_the_commands_for_a_gpu_name_settings_that_the_recipes_have(after_the_demo, monkeypatch):
    monkeypatch.chdir(after_the_demo)
    [block] = blocks(GUIDES / "your_data.md", "sh")
    for command in COMMAND.findall(block):
        script, *options = shlex.split(command.replace("\\\n", " "))[2:]
        annotations = importlib.import_module(Path(script).stem).main.__annotations__
        first, training, _ = command_line.parse(ROOT / script, *annotations.values(), args=options)
        assert first.dataset_name.startswith("data/mine")
        assert training.output_dir.startswith("runs/mine")
