"""The guide `recipes/guides/tune_ppo.md`: pictures are those of its runs, lines of the doctor those that were said."""

import json
import re
import shutil

import pytest

from benchmarks import tune_curves
from conftest import ROOT
from trl_ppo import PPOConfig
from trl_ppo.doctor import SAYS

GUIDE = ROOT / "recipes" / "guides" / "tune_ppo.md"
FOLDER = ROOT / "recipes" / "guides" / "tune_ppo"
CASES = json.loads((FOLDER / "curves.json").read_text())


def section_of(name):
    """The part of the guide that shows a case's picture."""
    (section,) = [part for part in GUIDE.read_text().split("\n## ") if f"(tune_ppo/{name}.svg)" in part]
    return section


def test_every_case_is_there_from_one_commit_one_seed_and_one_machine_which_the_guide_names():
    assert list(CASES) == list(tune_curves.CASES)
    ((commit, seed, hardware),) = {(case["commit"], case["seed"], case["hardware"]) for case in CASES.values()}
    text = " ".join(GUIDE.read_text().split())
    assert f"commit {commit[:7]}" in text
    assert f"seed {seed}" in text
    assert hardware.split(",")[0].split("(")[0] in text


@pytest.mark.parametrize("name", tune_curves.CASES)
def test_a_section_names_the_lines_that_the_doctor_said_and_no_others_as_its_own(name):
    (said,) = re.findall(r"^The doctor (?:says|said) (.+?)\.$", section_of(name), re.MULTILINE)
    assert re.findall(r"`([^`]+)`", said) == CASES[name]["doctor"]
    assert set(CASES[name]["doctor"]) <= set(SAYS)


def test_every_setting_that_the_guide_names_exists():
    named = re.findall(r"`([a-z]+(?:_[a-z]+)+)(?:: [^`]*)?`", GUIDE.read_text())
    known = {*PPOConfig.__dataclass_fields__} - set(PPOConfig.REFUSED) | {"repetition_penalty", "length_penalty"}
    assert len(set(named)) > 8
    assert set(named) <= known, set(named) - known


def test_a_picture_is_drawn_from_the_runs_alone(tmp_path):
    tune_curves.draw("too_fast", CASES, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (FOLDER / "too_fast.svg").read_bytes()


def test_a_missing_case_is_trained_and_those_that_are_there_are_not(
    gpt2_path, classifier_path, tmp_path, monkeypatch, own_cache
):
    monkeypatch.chdir(tmp_path)
    for name, source in (("sft", gpt2_path), ("reward", classifier_path)):
        shutil.copytree(source, tmp_path / "models" / name)
    rows = "".join(json.dumps({"prompt": f"the movie {number}"}) + "\n" for number in range(8))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "train.jsonl").write_text(rows)
    there = {"healthy": CASES["healthy"]}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "curves.json").write_text(json.dumps(there))
    options = "--models models --prompts prompts --output out --rollouts 2 --batch 4 --cases healthy too_dear"
    tune_curves.main(options.split())
    cases = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert cases["healthy"] == there["healthy"]
    assert len(cases["too_dear"]["curves"]["KL, nats"]) == 2
    assert {path.name for path in (tmp_path / "out").glob("*.svg")} == {"healthy.svg", "too_dear.svg"}
    settings = (tmp_path / "models" / "tune" / "too_dear.yaml").read_text()
    assert "kl_coef: 5.0" in settings
    assert "kl_target: null" in settings
