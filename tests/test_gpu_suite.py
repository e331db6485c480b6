"""The suite for a GPU, dry on a CPU: that its jobs run, and that nothing ends it before its time."""

import json
import sys

import pytest
import torch

from benchmarks import gpu_suite, random_models


@pytest.mark.parametrize(
    "name",
    ["gpt2, ours", "sentiment_gpt2_ppo", "sentiment_gpt2_classifier", "qwen_summarize_sft", "qwen_summarize_reward"],
)
def test_a_job_of_each_kind_runs_at_tiny_sizes(name, tmp_path, own_cache):
    output = tmp_path / "result.json"
    gpu_suite.main(["--worker", name, "--smoke", "--folder", str(tmp_path), "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["peak_gpu_gb"] is None
    assert result["versions"]["torch"]
    if name.endswith(gpu_suite.OURS):
        assert result["samples_per_second"] > 0
    else:
        assert result["steps"] == (8 if name.endswith("ppo") else 1)  # two rollouts of four epochs
        assert abs(result["logged"]["loss"]) < 100


def test_the_plan_has_every_recipe_and_every_job_for_a_gpu():
    recipes = {path.stem for path in (gpu_suite.ROOT / "recipes").glob("*.yaml")}
    assert recipes <= set(gpu_suite.PLAN)
    assert {
        f"{name}{side}" for name, job in gpu_suite.JOBS.items() if job.gpu for side in (", ours", ", TRL 1.12")
    } <= set(gpu_suite.PLAN)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("lvwerra/gpt2-imdb", 124),
        ("openai-community/gpt2-large", 774),
        ("Qwen/Qwen2.5-0.5B", 494),
        ("Qwen/Qwen2.5-1.5B", 1544),
        ("Qwen/Qwen2.5-7B", 7616),
        ("lvwerra/distilbert-imdb", 66),
        ("google-bert/bert-base-uncased", 109),
        ("microsoft/deberta-v3-base", 184),
    ],
)
def test_random_models_have_the_published_number_of_parameters(name, millions):
    import transformers

    config, model_class = random_models.configuration(name)
    with torch.device("meta"):
        model = getattr(transformers, model_class).from_config(config)
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=0.01)


def test_what_a_random_model_says_reads_back_as_about_as_many_tokens():
    tokenizer = random_models.byte_level_tokenizer(50257)
    assert len(tokenizer) == 50257
    ids = torch.randint(258, 50257, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    assert 1 <= len(tokenizer(tokenizer.decode(ids))["input_ids"]) / len(ids) < 1.7


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """`suite(jobs, seconds)`: runs the suite whose jobs are the given Python code; what it wrote, and what it ran."""
    ran = []
    monkeypatch.setattr(gpu_suite, "machine", lambda: {"gpu": "none"})

    def run(jobs, seconds=540):
        def worker(name, args, result):
            ran.append(name)
            return [sys.executable, "-c", f"result = {str(result)!r}\n{jobs[name]}"]

        monkeypatch.setattr(gpu_suite, "PLAN", list(jobs))
        monkeypatch.setattr(gpu_suite, "worker", worker)
        monkeypatch.setattr(gpu_suite, "LIMIT", 3)
        output = tmp_path / "suite.json"
        options = ["--smoke", "--commit", "abc", "--seconds", str(seconds), "--output", str(output)]
        gpu_suite.main([*options, "--folder", str(tmp_path / "folder")])
        return json.loads(output.read_text()) if output.exists() else None, ran

    return run


WORKS = "open(result, 'w').write('{\"samples_per_second\": 2.0}')"
FAILS = "raise SystemExit('the reason')"


def test_a_job_that_fails_says_why_and_the_next_one_runs(suite):
    content, ran = suite({"first": FAILS, "second": WORKS})
    assert ran == ["first", "second"]
    failed, worked = content["jobs"].values()
    assert failed["error"] == "exit status 1"
    assert failed["log"] == ["the reason"]
    assert worked["samples_per_second"] == 2.0
    assert (worked["gpu"], worked["commit"]) == ("none", "abc")
    assert content["summary"][0] == "first: exit status 1"


def test_a_job_that_hangs_is_stopped(suite, monkeypatch):
    content, _ = suite({"hangs": "import time; print('waiting', flush=True); time.sleep(60)", "second": WORKS})
    assert content["jobs"]["hangs"]["error"] == "stopped after 3 s"
    assert content["jobs"]["hangs"]["log"] == ["waiting"]
    assert content["jobs"]["second"]["samples_per_second"] == 2.0


def test_started_again_it_runs_what_is_missing_then_what_failed(suite):
    suite({"first": FAILS, "second": WORKS})
    content, ran = suite({"first": WORKS, "second": FAILS, "third": WORKS})
    assert ran[2:] == ["third", "first"]
    assert all("error" not in result for result in content["jobs"].values())


def test_no_job_is_started_that_has_no_time(suite):
    assert suite({"first": WORKS}, seconds=gpu_suite.LEAST - 1) == (None, [])


def test_what_a_machine_lacks_is_left_out_and_not_remembered(suite, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite.importlib.util, "find_spec", lambda name: None if name == "vllm" else name)
    content, ran = suite({"gpt2, TRL 1.12": WORKS, "sentiment_gpt2_ppo, vLLM": WORKS, "last": WORKS})
    assert ran == list(content["jobs"]) == ["last"]
    assert "gpt2, TRL 1.12: left out, --trl112 is not given" in capsys.readouterr().out


def test_the_machine_is_named():
    here = gpu_suite.machine()
    assert here.keys() == {"gpu", "processor", "cores"}
    assert all(here.values())


def test_samples_per_second_stand_next_to_those_of_trl():
    results = {"gpt2, ours": {"samples_per_second": 6.0, "seconds_in_all": 1, "minutes_of_all_episodes": 142.2}}
    results["gpt2, TRL 1.12"] = {"samples_per_second": 2.0, "seconds_in_all": 1}
    said = gpu_suite.line("gpt2, ours", results)
    assert said == "gpt2, ours: 1 s, 6.00 samples/s, 142.2 minutes for 51,200 episodes, 3.00 × TRL 1.12"
