"""The benchmark of algorithms: its runs on tiny random models, and its report on runs that are made up."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import algorithms, algorithms_report
from conftest import ROOT


@pytest.fixture
def tiny_family(gpt2_path, classifier_path, tmp_path, monkeypatch, own_cache):
    """The family `tiny` with random models and a hundred short prompts, in a folder of its own, where the test runs."""
    shutil.copytree(gpt2_path, tmp_path / "runs" / "tiny" / "sft")
    shutil.copytree(classifier_path, tmp_path / "runs" / "tiny" / "reward")
    folder = tmp_path / "data" / "toy_reviews" / "prompts"
    folder.mkdir(parents=True)
    rows = "".join(json.dumps({"prompt": f"the film {i % 7}"}) + "\n" for i in range(300))
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(rows)
    monkeypatch.setattr(algorithms, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORT = "total_episodes=256,max_completion_length=4"


def run(*words):
    algorithms.main(["--family", "tiny", "--n_prompts", "8", "--here", *words])


@pytest.mark.parametrize("name", ["ppo", "rloo"])
def test_a_run_leaves_one_json_with_its_curve_and_is_not_made_again(name, tiny_family, monkeypatch):
    run("--run", f"{name}:{SHORT}", "--seeds", "3")
    (path,) = Path("runs/tiny/algorithms").iterdir()  # the policy itself is not kept
    result = json.loads(path.read_text())
    assert (result["algorithm"], result["seed"], result["settings"]["total_episodes"]) == (name, 3, "256")
    first, last = result["points"]
    assert (first["episodes"], first["seconds"], last["episodes"]) == (0, 0.0, 256)
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert last["seconds"] > 0
    assert last["kl"] != first["kl"]
    monkeypatch.setattr(algorithms, "train", None)
    run("--run", f"{name}:{SHORT}", "--seeds", "3")


def test_an_evaluation_leaves_the_random_numbers_of_training_alone(tiny_family):
    evaluate = algorithms.Evaluator("tiny", 8)
    model = AutoModelForCausalLM.from_pretrained("runs/tiny/sft")
    before = torch.random.get_rng_state()
    first, again = evaluate(model), evaluate(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == again


def test_best_of_n_has_a_higher_reward_the_more_it_may_pick_from(tiny_family, monkeypatch):
    monkeypatch.setattr(algorithms, "SIZES", [1, 2, 4])
    run("--run", "best_of_n")
    (path,) = Path("runs/tiny/algorithms").iterdir()
    points = json.loads(path.read_text())["points"]
    rewards = [point["reward"] for point in points]
    assert rewards == sorted(rewards)
    assert rewards[0] < rewards[-1]
    assert points[0]["kl"] == 0


def test_an_unknown_algorithm_is_refused(capsys):
    with pytest.raises(SystemExit):
        algorithms.main(["--run", "dqn"])
    assert "'dqn' is none of ppo, ppo_own_critic, grpo, rloo, sft, best_of_n" in capsys.readouterr().err


def test_the_settings_of_a_run_may_hold_a_list():
    name, settings = algorithms.parse_run("ppo:reward_model=[runs/a, runs/b],seed=1")
    assert (name, settings) == ("ppo", {"reward_model": "[runs/a, runs/b]", "seed": "1"})
    assert algorithms.path_of("tiny", name, settings, 3).name == "ppo-reward_model=_runs_a_runs_b_-seed=1-3.json"


def points(*pairs):
    """A curve of (KL, judge) at 0, 640, 1,280 … completions, a second for each hundred."""
    rows = enumerate(pairs)
    return [{"kl": k, "judge": j, "reward": i, "episodes": 640 * i, "seconds": 6.4 * i} for i, (k, j) in rows]


def test_the_judge_at_a_kl_is_that_of_the_policy_of_highest_reward_within_it():
    curve = points((0, 0.5), (5, 0.8), (6, 0.7), (9, 0.9))  # the reward rises throughout
    assert algorithms_report.judge_at(curve, 6.0) == 0.7  # though the judge liked the one before more
    assert algorithms_report.judge_at(curve, 5.5) == 0.8
    assert algorithms_report.judge_at(curve, 10.0) == 0.9


def test_a_share_counts_as_reached_within_the_kl_only():
    curve = points((0, 0.5), (11, 0.95), (9, 0.91), (9, 0.99))
    assert algorithms_report.reached(curve, 10.0)["episodes"] == 1280
    assert algorithms_report.reached(curve, 8.0) is None
    assert algorithms_report.has_failed(points((0, 0.5), (12, 0.9)), 10.0)
    assert not algorithms_report.has_failed(curve, 10.0)


def made_up(name, curve, seed=0, **settings):
    words = {key: str(value) for key, value in settings.items()}
    logged = {"val/explained_variance": [], "doctor": None}
    run = {
        "family": "scratch",
        "algorithm": name,
        "settings": words,
        "seed": seed,
        "points": curve,
        "peak_memory_gb": 1.5,
    }
    return run | {"logged": logged, "models": "abc"}


def test_the_report_gives_each_setting_its_mean_over_seeds_and_what_failed(tmp_path):
    runs = [
        made_up("ppo", points((0, 0.5), (8, 0.8), (10, 0.92)), seed=0),
        made_up("ppo", points((0, 0.5), (8, 0.9), (10, 0.94)), seed=1),
        made_up("grpo", points((0, 0.5), (10, 0.6)), learning_rate=1e-4),
    ]
    runs[0]["logged"] = {"val/explained_variance": [-2.0, 0.0]}
    runs[1]["logged"] = {"val/explained_variance": [0.0, 0.5]}
    runs.append(made_up("best_of_n", [{"n": 4, "kl": 0.64, "judge": 0.9, "reward": 1.0, "seconds": 0.01}]))
    for number, run in enumerate(runs):
        (tmp_path / f"{number}.json").write_text(json.dumps(run))
    text = algorithms_report.write(tmp_path, tmp_path / "benchmarks" / "made_up", (6.0, 8.0, 10.0))
    ppo = next(line for line in text.splitlines() if line.startswith("| PPO, value head"))
    assert (
        "| num_iterations 4, learning_rate 3e-4 | 2 | 0.500 ± 0.000 | 0.850 ± 0.071 | 0.930 ± 0.014 | 10.0 ± 0.0 |"
        in ppo
    )
    assert "| 10 ± 5 | 960 ± 453 | 13 ± 0 | 1.50 | 0 of 2 | -1.00, 0.25 |" in ppo
    assert "| learning_rate 0.0001 | 1 |" in text
    assert "| – | – | 6 | 1.50 | 1 of 1 | – |" in text
    assert "| 4 | 0.64 | 0.900 | 0.010 |" in text
    picture = (tmp_path / "benchmarks" / "made_up.svg").read_text()
    assert [picture.count(f"<!-- {name}") for name in ("PPO, value head, n = 2", "GRPO", "best of n", "RLOO")] == [
        1,
        1,
        1,
        0,
    ]


def test_runs_are_kept_together_in_one_file_and_not_made_again(tmp_path, monkeypatch):
    run = made_up("ppo", points((0, 0.5), (8, 0.123456789)), seed=1, learning_rate=1)
    (tmp_path / "one.json").write_text(json.dumps(run))
    (tmp_path / "benchmarks").mkdir()
    algorithms_report.write(tmp_path, tmp_path / "benchmarks" / "algorithms" / "tiny", (6.0, 8.0, 10.0))
    (tmp_path / "one.json").unlink()
    together = tmp_path / "benchmarks" / "algorithms" / "tiny.json"
    (kept,) = algorithms_report.collect(tmp_path, together).values()
    assert kept["points"][1]["judge"] == 0.1235
    monkeypatch.setattr(algorithms, "ROOT", tmp_path)
    monkeypatch.setattr(algorithms.subprocess, "run", None)
    algorithms.main(["--family", "tiny", "--run", "ppo:learning_rate=1", "--seeds", "1"])


def test_runs_that_start_from_other_models_are_not_put_together(tmp_path):
    for number, models in enumerate(("abc", "def")):
        (tmp_path / f"{number}.json").write_text(json.dumps(made_up("ppo", points((0, 0.5))) | {"models": models}))
    with pytest.raises(SystemExit, match="different models: abc, def"):
        algorithms_report.collect(tmp_path, tmp_path / "none.json")


def test_an_algorithm_is_stood_for_by_what_is_best_at_a_level_on_three_seeds_where_it_has_so_many():
    groups = algorithms_report.by_setting(
        [
            made_up("ppo", points((0, 0.5), (8, 0.99)), learning_rate=9),
            *(made_up("ppo", points((0, 0.5), (5, 0.7), (8, 0.8)), seed, learning_rate=1) for seed in range(3)),
            *(made_up("ppo", points((0, 0.5), (5, 0.6), (8, 0.9)), seed, learning_rate=2) for seed in range(3)),
            *(made_up("ppo", points((0, 0.5), (5, 0.6), (8, 0.7)), seed, learning_rate=3) for seed in range(5)),
            made_up("rloo", points((0, 0.5), (8, 0.8)), learning_rate=1),
            *(made_up("grpo", points((0, 0.5), (7, 0.9), (8, 0.8)), seed, learning_rate=1) for seed in range(3)),
            *(made_up("grpo", points((0, 0.5), (5, 0.8), (8, 0.95)), seed, learning_rate=2) for seed in range(3)),
            *(made_up("grpo", points((0, 0.5), (7, 0.9), (8, 0.8)), seed, learning_rate=3) for seed in range(2)),
        ]
    )
    assert {key for key in algorithms_report.at_best(groups, (6.0, 8.0)) if key[0] == "grpo"} == {
        ("grpo", "learning_rate 1"),  # the first at 0.9
        ("grpo", "learning_rate 2"),
    }
    groups = {key: runs for key, runs in groups.items() if key[0] != "grpo"}
    assert {settings for _, settings in algorithms_report.at_best(groups, (6.0, 8.0))} == {
        "num_iterations 4, learning_rate 1",
        "num_iterations 4, learning_rate 2",
        "learning_rate 1",
    }


@pytest.mark.parametrize("family", ["scratch", "tiny"])
def test_the_committed_tables_are_those_of_the_committed_runs(family):
    folder = ROOT / "benchmarks" / "algorithms"
    text = algorithms_report.render(
        json.loads((folder / f"{family}.json").read_text()), algorithms.FAMILIES[family][-1]
    )
    assert (folder / f"{family}.md").read_text() == text
    if family == "scratch":
        first = text.split("\n## ")[0].split("\n\n")[1]
        assert first in (ROOT / "benchmarks" / "README.md").read_text()
