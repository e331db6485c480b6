"""eval.compare over several models, with best-of-n, references and pairs, and when it is stopped and run again."""

import json
import shutil

import datasets
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from eval import compare, generation, intervals, training
from test_eval import PROMPTS, changed_copy

COMPLETIONS = "completions"


def letters(prompts, completions, **columns):
    return [len(completion) - 10.5 for completion in completions]


def vowels(prompts, completions, **columns):
    return [float(sum(letter in "aeiou" for letter in completion)) for completion in completions]


def fails(prompts, completions, **columns):
    raise KeyError("no such thing")


@pytest.fixture(autouse=True, scope="module")
def quiet_datasets(tmp_path_factory):
    """Datasets cached for these tests alone, without progress bars."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of prompts with references, and of judged pairs with and without prompts."""
    folder = tmp_path_factory.mktemp("data")
    written = {
        "prompts": [{"prompt": p, "summary": f"{p} very good"} for p in PROMPTS],
        "pairs": [{"chosen": "a" * (5 + i), "rejected": "b" * (5 + 2 * (i % 3))} for i in range(9)],
        "chats": [{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": ""}]}] * 3,
        "hollow": [{"chosen": "a", "rejected": ""}] * 3,
    }
    for name, rows in written.items():
        (folder / name).mkdir()
        (folder / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def run_folder(gpt2_path, tmp_path_factory):
    """A training run: two checkpoints and a final model ever further from the base, and its curves."""
    folder = tmp_path_factory.mktemp("runs") / "ppo"
    for name, noise in {"checkpoint-10": 0.01, "checkpoint-9": 0.005, "": 0.05}.items():
        changed_copy(gpt2_path, folder / name, noise)
    history = [{"step": step, "objective/scores": step / 10, "objective/kl": 0.1} for step in range(1, 1001)]
    history[3]["objective/kl"] = None
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*history, {"step": 1000, "note": "x"}]}))
    return folder


@pytest.fixture
def run(gpt2_path, data, tmp_path):
    """Compares in this process; returns the results and their folder."""

    def run(*options, output=None):
        output = output or tmp_path / "out"
        argv = ["--base", gpt2_path, "--prompts", str(data / "prompts"), "--output", str(output)]
        argv += ["--reward", f"letters={__name__}:letters", "--max_new_tokens", "6", "--batch_size", "5", *options]
        return compare.main(argv), output

    return run


@pytest.fixture
def unrendered(monkeypatch):
    """Results without reports, which take longer than the comparison of such small models."""
    monkeypatch.setattr(compare, "write_report", lambda path: [path])


def figures(results: dict) -> dict:
    """What two runs of the same command share: all but when and how long, and where to."""
    return {name: results[name] for name in ("metrics", "samples", "best_of_n", "sweep", "pairs")}


# --- Stopped and run again --------------------------------------------------------------------------------------


def stop_after(monkeypatch, batches: int) -> list:
    """Lets the given number of batches be drawn, then stops as Ctrl-C would; returns the batches drawn."""
    drawn = []
    sample = generation._sample

    def stopping(*args, **kwargs):
        if len(drawn) == batches:
            raise KeyboardInterrupt
        drawn.append(args)
        return sample(*args, **kwargs)

    monkeypatch.setattr(generation, "_sample", stopping)
    return drawn


@pytest.mark.parametrize("batches", [1, 3, 4, 7])
def test_a_run_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(batches, run, run_folder, tmp_path, unrendered):
    options = ["--tuned", str(run_folder), "--best_of", "2", "--best_of_prompts", "4"]
    unbroken, _ = run(*options, output=tmp_path / "unbroken")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, batches)
        with pytest.raises(SystemExit, match="130"):
            run(*options)
    assert not (tmp_path / "out" / "results.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        drawn = stop_after(patch, 99)
        results, _ = run(*options)
    assert len(drawn) == 8 - batches  # 3 of the base, 2 of best-of-n, 3 of the tuned model
    assert results["resumed"] > 0
    assert figures(results) == figures(unbroken)


@pytest.mark.parametrize("torn", [b'{"index": 3, "ids": [1', b"\x00\xff\n", b'{"index": 3}'])
def test_a_torn_line_of_completions_is_made_again(torn, run, run_folder, tmp_path, unrendered):
    options = ["--tuned", str(run_folder)]
    unbroken, _ = run(*options, output=tmp_path / "unbroken")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(SystemExit, match="130"):
            run(*options)
    file = tmp_path / "out" / COMPLETIONS / "base.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-2]) + torn)  # the second batch lacks its end
    results, _ = run(*options)
    assert figures(results) == figures(unbroken)
    rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert sorted(row["index"] for row in rows) == list(range(len(PROMPTS)))
    assert [row["completion"] for row in sorted(rows, key=lambda row: row["index"])] == [
        sample["base"]["completion"] for sample in results["samples"]
    ]


@pytest.mark.parametrize("change", [["--seed", "1"], ["--temperature", "0.5"], ["--n_prompts", "7"], ["tuned"]])
def test_completions_made_otherwise_are_refused_before_a_model_loads_and_replaced_when_asked(
    change, run, run_folder, tmp_path, capsys, unrendered
):
    shutil.copytree(run_folder, tmp_path / "model")
    options = ["--tuned", str(tmp_path / "model")]
    _, output = run(*options)
    (output / "results.json").unlink()
    if change == ["tuned"]:
        changed_copy(str(run_folder), tmp_path / "model", 0.2)
        change = []
    before = {path: path.read_bytes() for path in output.rglob("*.jsonl")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "load_model", lambda path: pytest.fail("a model was loaded"))
        with pytest.raises(SystemExit):
            run(*options, *change)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--overwrite" in error
    assert (change[0].removeprefix("--").removesuffix("_prompts") if change else "model") in error
    assert {path: path.read_bytes() for path in output.rglob("*.jsonl")} == before
    again, _ = run(*options, *change, "--overwrite")
    fresh, _ = run(*options, *change, output=tmp_path / "fresh")
    assert figures(again) == figures(fresh)


def test_batches_hold_prompts_of_like_length_and_no_more_than_asked(run, run_folder, unrendered):
    with pytest.MonkeyPatch.context() as patch:
        drawn = stop_after(patch, 99)
        run("--tuned", str(run_folder))
    lengths = [[len(ids) for ids in args[2]] for args in drawn]
    assert max(map(len, lengths)) == 5
    one_model = [length for batch in lengths[: len(lengths) // 2] for length in batch]
    assert one_model == sorted(one_model, reverse=True)
    assert len(set(one_model)) > 1


# --- Checkpoints, runs, best-of-n -------------------------------------------------------------------------------


def test_a_sweep_compares_every_checkpoint_in_order_and_the_final_model(run, run_folder, tmp_path):
    swept, output = run("--sweep", str(run_folder))
    assert [each["name"] for each in swept["sweep"]] == ["step-9", "step-10", "final"]
    alone, _ = run("--tuned", str(run_folder), output=tmp_path / "alone")
    assert swept["metrics"] == swept["sweep"][-1]["metrics"] == alone["metrics"]
    kls = [each["metrics"]["kl"]["tuned"]["mean"] for each in swept["sweep"]]
    assert abs(kls[0]) < abs(kls[-1])
    assert "step-9" in (output / "report.md").read_text()


def test_training_curves_come_from_the_runs_state_thinned_and_without_what_is_no_number(run_folder, run):
    found = training.read_curves(str(run_folder))
    assert set(found["curves"]) == {"objective/scores", "objective/kl"}
    points = found["curves"]["objective/scores"]
    assert 200 <= len(points) <= training.MOST_POINTS
    assert all(value == pytest.approx(step / 10) for step, value in points)
    assert run("--tuned", str(run_folder))[0]["training"] == found


def test_the_state_of_the_latest_checkpoint_stands_in_for_the_runs(run_folder, tmp_path):
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        history = [{"step": s, "objective/kl": float(step)} for s in (1, 2)]
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert training.read_curves(str(tmp_path))["curves"]["objective/kl"] == [[1, 10.0], [2, 10.0]]
    (tmp_path / "trainer_state.json").write_text("{")
    assert training.read_curves(str(tmp_path))["curves"]["objective/kl"] == [[1, 10.0], [2, 10.0]]
    assert training.read_curves("nobody/nothing") is None


def test_several_rewards_have_curves_of_their_own_by_trls_names_and_ours(tmp_path):
    for names, shown in ((["rewards/a", "rewards/b"], 2), (["rewards/a/mean", "rewards/a/std"], 0)):
        rows = [{"step": step, "objective/kl": 1.0, **dict.fromkeys(names, float(step))} for step in (1, 2)]
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
        curves = training.read_curves(str(tmp_path))["curves"]
        assert [name for name in curves if name.startswith("rewards/")] == names[:shown]


def test_several_runs_share_a_table_with_the_mean_over_runs_and_have_reports_of_their_own(run, run_folder, tmp_path):
    table = tmp_path / "table.md"
    table.write_text("not a run")
    runs = [str(run_folder), str(run_folder / "checkpoint-9"), str(run_folder / "checkpoint-10"), str(table)]
    together, output = run("--runs", *runs, "--best_of", "2", "--best_of_prompts", "3")
    assert [each["name"] for each in together["runs"]] == ["ppo", "checkpoint-9", "checkpoint-10"]
    means = [each["metrics"]["rewards"]["letters"]["mean"]["tuned"]["mean"] for each in together["runs"]]
    summary = together["over_runs"]["rewards"]["letters"]["mean"]
    assert summary["tuned"] == pytest.approx(intervals.over_runs(means))
    assert summary["base"] == together["runs"][0]["metrics"]["rewards"]["letters"]["mean"]["base"]
    for each in together["runs"]:
        own = json.loads((output / "runs" / each["name"] / "results.json").read_text())
        assert own["metrics"] == each["metrics"]
        assert own["best_of_n"]["points"] == together["best_of_n"]["points"]
        assert (output / "runs" / each["name"] / "report.html").is_file()
    alone, _ = run("--tuned", runs[1], output=tmp_path / "alone")
    assert alone["metrics"] == together["runs"][1]["metrics"]
    report = (output / "report.md").read_text()
    assert f"± {summary['tuned']['sd']:.3f}" in report
    assert (output / "report.html").is_file()


def test_runs_whose_folders_share_a_name_are_told_apart_by_their_parents(run, run_folder, tmp_path, unrendered):
    for name in ("0", "1"):
        shutil.copytree(run_folder / "checkpoint-9", tmp_path / name / "base")
    together, _ = run("--runs", str(tmp_path / "0" / "base"), str(tmp_path / "1" / "base"))
    assert [each["name"] for each in together["runs"]] == ["0-base", "1-base"]
    assert together["runs"][0]["metrics"] == together["runs"][1]["metrics"]


def test_best_of_n_stands_beside_the_tuned_model_and_a_judge_is_marked(run, gpt2_path, capsys):
    options = ["--tuned", gpt2_path, "--judge", f"vowels={__name__}:vowels", "--best_of", "1", "4", "8"]
    results, output = run(*options, "--best_of_prompts", "6")
    found = results["best_of_n"]
    assert (found["n_prompts"], found["samples_per_prompt"]) == (6, 8)
    means = [point["rewards"]["letters"]["mean"] for point in found["points"]]
    assert means == sorted(means)
    assert [point["n"] for point in found["points"]] == [1, 4, 8]
    assert {"letters", "vowels"} == set(found["points"][0]["rewards"])
    tuned = [sample["tuned"]["scores"]["letters"] for sample in results["samples"][:6]]
    assert found["at_equal_kl"]["tuned"]["mean"] == pytest.approx(np.mean(tuned))
    assert found["at_equal_kl"]["best_of_n"] == found["points"][0]["rewards"]["letters"]  # the model is its base: KL 0
    report = (output / "report.md").read_text()
    assert "best-of-n at the same KL" in report
    assert "vowels (judge): mean" in report
    assert "letters (judge)" not in report


def test_references_give_rouge_and_without_them_there_is_none(run, run_folder, tmp_path):
    with_them, output = run("--tuned", str(run_folder), "--reference_column", "summary")
    for role in ("base", "tuned"):
        values = [sample[role]["rouge"]["rouge1"] for sample in with_them["samples"]]
        assert with_them["metrics"]["rouge1"][role]["mean"] == pytest.approx(np.mean(values))
    assert "ROUGE-L" in (output / "report.md").read_text()
    without, _ = run("--tuned", str(run_folder), output=tmp_path / "without")
    assert not any(name.startswith("rouge") for name in without["metrics"])


@pytest.mark.parametrize("name", ["pairs", "chats"])
def test_pairs_measure_every_reward(run, run_folder, data, name):
    results, output = run("--tuned", str(run_folder), "--pairs", str(data / name), "--n_pairs", "7")
    assert results["pairs"]["rewards"]["letters"]["accuracy"]["n"] == (7 if name == "pairs" else 3)
    if name == "pairs":
        margins = [5 + i - (5 + 2 * (i % 3)) for i in range(7)]
        expected = np.mean([(m > 0) + 0.5 * (m == 0) for m in margins])
        assert results["pairs"]["rewards"]["letters"]["accuracy"]["mean"] == pytest.approx(expected)
    assert "Judged pairs" in (output / "report.md").read_text()


def test_kl_per_token_is_all_nats_over_all_tokens_and_peak_memory_is_known(run, run_folder, unrendered):
    results, _ = run("--tuned", str(run_folder))
    sides = [sample["tuned"] for sample in results["samples"]]
    expected = sum(side["kl"] for side in sides) / sum(side["tokens"] for side in sides)
    assert results["metrics"]["kl_per_token"]["tuned"]["mean"] == pytest.approx(expected)
    assert results["peak_memory_bytes"]["process"] > 2**20


# --- Bad input --------------------------------------------------------------------------------------------------

BEFORE_MODELS = {
    "nothing to compare": ([], ["--tuned", "--runs", "--sweep"]),
    "two things to compare": (["--tuned", "{run}", "--sweep", "{run}"], ["--sweep", "--tuned"]),
    "a sweep without a model": (["--sweep", "{data}"], ["--sweep", "data"]),
    "a run without a model": (["--runs", "{run}", "{data}"], ["--runs", "data", "no model"]),
    "runs that are files": (["--runs", "{data}/prompts/test.jsonl"], ["--runs", "test.jsonl"]),
    "a run named twice": (["--runs", "{run}", "{run}"], ["--runs", "twice"]),
    "a missing reference column": (["--tuned", "{run}", "--reference_column", "gold"], ["column gold", "summary"]),
    "pairs without their columns": (["--tuned", "{run}", "--pairs", "{data}/prompts"], ["--pairs", "column chosen"]),
    "an empty side of a pair": (["--tuned", "{run}", "--pairs", "{data}/hollow"], ["--pairs", "'rejected'", "row 0"]),
    "a judge without a spec": (["--tuned", "{run}", "--judge", "x="], ["--judge x="]),
    "a judge with a reward's name": (["--tuned", "{run}", "--judge", "letters=a:b"], ["--judge letters", "taken"]),
    "a judge that is a reward": (
        ["--tuned", "{run}", "--judge", f"x={__name__}:letters"],
        ["--judge x=", "is the reward 'letters' itself"],
    ),
    "a sweep of one model": (["--sweep", "{run}/checkpoint-9"], ["--sweep", "one model", "--save_steps"]),
    "a missing column of prompts": (["--tuned", "{run}", "--prompt_column", "x"], ["no column x", "--prompt_column"]),
    "a missing judge": (["--tuned", "{run}", "--judge", "x={data}/nowhere"], ["--judge x", "nowhere"]),
    "best of none": (["--tuned", "{run}", "--best_of", "0"], ["--best_of", "at least 1"]),
}


@pytest.mark.parametrize("case", BEFORE_MODELS)
def test_bad_input_ends_in_one_line_before_a_model_loads(case, run, run_folder, data, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "load_model", lambda path: pytest.fail("a model was loaded"))
    options, words = BEFORE_MODELS[case]
    with pytest.raises(SystemExit) as stopped:
        run(*(option.format(run=run_folder, data=data) for option in options))
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert stopped.value.code == 2
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]
    assert not (tmp_path / "out").exists()


def assert_stops(run, capsys, tmp_path, options, words):
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    error = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert stopped.value.code == 2
    for word in ("eval.compare: error", *words):
        assert word in error
    assert not list((tmp_path / "out").glob("re*"))  # neither results nor a report


def test_a_generation_that_fails_ends_in_one_line_without_results(run, gpt2_path, tmp_path, capsys):
    shutil.copytree(gpt2_path, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(gpt2_path)
    for weight in model.parameters():
        weight.data *= 1e30  # what they give is beyond float32
    model.save_pretrained(tmp_path / "broken")
    assert_stops(run, capsys, tmp_path, ["--tuned", str(tmp_path / "broken")], ["tuned", "cannot generate"])


def test_a_reward_that_raises_ends_in_one_line_that_names_it(run, run_folder, tmp_path, capsys):
    options = ["--tuned", str(run_folder), "--judge", f"x={__name__}:fails"]
    assert_stops(run, capsys, tmp_path, options, ["reward function 'x'", "KeyError", "no such thing"])
