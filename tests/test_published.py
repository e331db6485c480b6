"""The published controls: every command fits its program, one control runs whole on tiny stand-ins, and the table."""

import json
import subprocess
from pathlib import Path

import pytest

import eval.compare
from benchmarks import published
from conftest import ROOT, SENTENCES
from data_prep import imdb, summarize_from_feedback
from test_recipes import arguments
from test_recipes import run as run_recipe

LAUNCH = 4  # words before the recipe
TINY = "--total_episodes 4 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --use_cpu true --bf16 false"
TINY += " --disable_tqdm true --logging_steps 1 --save_strategy no"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A project folder of its own, where the test runs."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.setattr(published, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", published.CONTROLS)
def test_every_command_of_a_control_fits_its_program_and_reads_what_an_earlier_one_has_written(name):
    args = published.make_parser().parse_args(["--control", name])
    stages, rows = published.CONTROLS[name]("runs/published", args)
    written = set()
    for stage, command in stages:
        words = published.words_of(command, args)
        output = Path(words[words.index("--output_dir" if "--output_dir" in words else "--output") + 1])
        assert output.name == stage
        read = {Path(word.split("=")[-1]) for word in words if "runs/published/" in word} - {output}
        assert read <= {
            *written,
            *(folder / "pairs" for folder in written),
            *(folder / "prompts" for folder in written),
        }
        if words[1] == "accelerate.commands.launch":
            assert Path(ROOT / words[3]).is_file()
            _, training, _ = arguments(ROOT / words[LAUNCH], *words[LAUNCH + 1 :])
            assert training.output_dir == str(output)
        elif words[1] == "eval.compare":
            assert eval.compare.make_parser().parse_args(words[2:]).n_prompts in (16, 1000)
        else:
            script = {"imdb.py": imdb, "summarize_from_feedback.py": summarize_from_feedback}[Path(words[0]).name]
            assert Path(script.make_parser().parse_args(words[1:]).output) == output
        written.add(output)
    assert rows
    for row in rows:
        assert {Path(row.run), Path(row.file).parent} <= written
        assert published.line_of(row)[1] == "*not yet run*"


def test_the_notebooks_control_runs_from_models_to_a_row_and_goes_on_from_what_is_finished(
    place, gpt2_path, bert_path, monkeypatch, own_cache, capsys
):
    reviews = [" ".join(SENTENCES[(i + k) % 6] for k in range(9)) for i in range(32)]
    labelled = place / "labelled"
    labelled.mkdir()
    (labelled / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in reviews))
    ran = []

    def run(*words):  # the programs themselves, in this process
        ran.append(words[LAUNCH] if words[1] == "accelerate.commands.launch" else words[1])
        if words[1] == "accelerate.commands.launch":
            run_recipe(Path(words[LAUNCH]).stem, *words[LAUNCH + 1 :], *TINY.split())
        elif words[1] == "eval.compare":
            eval.compare.main(list(words[2:]))
        else:
            folder = Path(words[words.index("--output") + 1]) / "prompts"
            folder.mkdir(parents=True)
            (folder / "test.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in reviews))

    def control(n):
        stand_ins = ["lvwerra/gpt2-imdb", gpt2_path, "lvwerra/distilbert-imdb", bert_path, "stanfordnlp/imdb", labelled]
        replace = [f"{hub}={folder}" for hub, folder in zip(stand_ins[::2], stand_ins[1::2], strict=True)]
        published.main(["--control", "notebook", "--n_prompts", str(n), "--replace", *replace])
        return [line.split(" | ") for line in Path("runs/published/notebook/table.md").read_text().splitlines()]

    monkeypatch.setattr(published, "run", run)
    rows = control(20)[2:6]
    assert ran == ["--source", "recipes/sentiment_gpt2_ppo.py", "eval.compare", "eval.compare"]
    results = json.loads(Path("runs/published/notebook/report_20/results.json").read_text())
    mean = results["metrics"]["rewards"]["reward_model"]["mean"]
    assert rows[2][1].startswith(f"{mean['base']['mean']:.3f} [")
    assert f" → {mean['tuned']['mean']:.3f} [" in rows[2][1]
    assert [row[2] for row in rows] == ["16", "16", "20", "20"]
    assert all(abs(float(row[3])) < 1 for row in rows)
    assert [row[5] for row in rows] == ["0.239 → 2.475", "0.422 → 2.702"] * 2
    ran.clear()
    assert control(20)[2:6] == rows
    assert not ran
    control(24)
    assert ran == ["eval.compare"]


def test_a_recipe_that_was_stopped_goes_on_and_one_with_another_command_starts_anew(place, monkeypatch):
    calls = []

    def run(*words):
        calls.append(words)
        Path("runs/published/tldr_trl/ppo/checkpoint-8").mkdir(parents=True, exist_ok=True)
        if len(calls) == 1:
            raise subprocess.CalledProcessError(2, words)

    monkeypatch.setattr(published, "run", run)
    with pytest.raises(subprocess.CalledProcessError):
        published.main(["--control", "tldr_trl"])
    published.main(["--control", "tldr_trl"])
    published.main(["--control", "tldr_trl", "--replace", "trl-lib/tldr=other"])
    fresh, resumed = ("--overwrite_output_dir", "true"), ("--resume_from_checkpoint", "true")
    recipes = [words for words in calls if words[1] == "accelerate.commands.launch"]
    assert [words[-2:] for words in recipes] == [fresh, resumed, fresh]
    assert "other" in recipes[-1]
    assert [words[-1] for words in calls if words[1] == "eval.compare"][-1] == "--overwrite"


def test_a_win_rate_stands_beside_the_published_one_with_its_judge(place, capsys):
    def estimate(mean):
        return {"mean": mean, "low": mean - 0.03, "high": mean + 0.03, "n": 1000}

    folder = place / "runs" / "published" / "tldr_trl"
    (folder / "report").mkdir(parents=True)
    (folder / "ppo").mkdir()
    judged = {"base": estimate(0.31), "tuned": estimate(0.62), "difference": estimate(0.31)}
    metrics = {"judged_reference": judged, "length": {"tuned": estimate(30.0)}}
    (folder / "report" / "results.json").write_text(json.dumps({"metrics": metrics}))
    history = [{"objective/kl": 0.0}, {"objective/kl": 11.5}, {"train_loss": 1.0}]
    (folder / "ppo" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    published.main(["--control", "tldr_trl", "--dry_run"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| win rate"))
    ours = "| win rate | 0.310 [0.280, 0.340] → 0.620 [0.590, 0.650] | 1000 | 11.50 | 30.000 [29.970, 30.030] |"
    assert row.startswith(f"{ours} 0.330 → 0.647 | gpt-4o-mini |")
    assert not (folder / "table.md").exists()
