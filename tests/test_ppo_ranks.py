"""Two ranks on the CPU (torchrun, gloo): they train, save and resume, and do together what one rank does alone."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from conftest import ROOT
from trl_ppo.checkpoints import PPO_FILES, damage


@pytest.fixture(scope="module")
def runs(gpt2_path, tmp_path_factory):
    """The jobs of two_ranks.py in one process and in two, side by side."""
    folder = tmp_path_factory.mktemp("ranks")
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'recipes'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    script = str(ROOT / "tests" / "two_ranks.py")
    launchers = {
        1: [sys.executable],
        2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }
    running = {
        ranks: subprocess.Popen(
            [*launcher, script, gpt2_path, str(folder / str(ranks))],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for ranks, launcher in launchers.items()
    }
    try:
        for ranks, process in running.items():
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, f"{ranks} ranks:\n{output[-4000:]}"
    finally:
        for process in running.values():  # a launcher that is terminated ends its ranks, one that is killed does not
            process.terminate()
            process.wait()
    return {
        (ranks, name): (
            folder / str(ranks) / name,
            json.loads((folder / str(ranks) / name / "report.json").read_text()),
        )
        for ranks in launchers
        for name in ("full", "lora", "stop_epochs", "stability", "evaluate", "doctor", "vllm_colocate", "vllm_server")
    }


@pytest.mark.parametrize("name", ["full", "lora"])
def test_rows_12_20_and_21_two_ranks_of_4_update_as_one_rank_of_8(runs, name):
    (one, report_of_one), (two, report_of_two) = runs[1, name], runs[2, name]
    assert (report_of_one["ranks"], report_of_two["ranks"]) == (1, 2)
    alone, together = torch.load(one / "trained.pt"), torch.load(two / "trained.pt")
    assert alone.keys() == together.keys()
    for parameter in alone:
        assert torch.allclose(alone[parameter], together[parameter], atol=1e-5), parameter
    for first, second in zip(report_of_one["logged"], report_of_two["logged"], strict=True):
        for metric in ("objective/kl", "objective/scores", "val/ratio", "policy/approxkl_avg", "grad_norm"):
            assert first[metric] == pytest.approx(second[metric], abs=1e-5), metric
        assert first["logged/share"] == pytest.approx(first["objective/scores"], abs=1e-6)
        assert second["logged/share"] == pytest.approx(first["logged/share"], abs=1e-6)
        assert second["logged/by_rank_0_alone"] == 7
    assert report_of_one["kl_coef"] == pytest.approx(report_of_two["kl_coef"], abs=1e-9)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_ranks_do_not_drift_apart(runs, name):
    assert runs[2, name][1]["drift"] == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_is_not_complete_before_every_rank_has_written_its_random_state(runs, ranks, tmp_path):
    checkpoint = shutil.copytree(runs[ranks, "full"][0] / "whole" / "checkpoint-4", tmp_path / "checkpoint-4")
    states = sorted(checkpoint.glob("rng_state*.pth"))
    assert len(states) == ranks
    assert damage(checkpoint, rank=ranks - 1, also=PPO_FILES) is None
    states[-1].unlink()
    assert damage(checkpoint, rank=ranks - 1, also=PPO_FILES)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["full", "lora"])
def test_row_18_a_run_on_ranks_resumes_bit_identical(runs, ranks, name):
    assert runs[ranks, name][1]["resumed_equals_whole"]


def test_row_21_what_ranks_save_loads_as_a_plain_model(runs):
    _, info = AutoModelForCausalLM.from_pretrained(runs[2, "full"][0] / "final", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    AutoPeftModelForCausalLM.from_pretrained(runs[2, "lora"][0] / "final")
    for name in ("full", "lora"):
        assert (runs[2, name][0] / "final" / "critic.safetensors").exists()


def test_ranks_stop_the_epochs_of_a_rollout_together_by_the_kl_of_all(runs):
    _, alone = runs[1, "stop_epochs"]
    _, together = runs[2, "stop_epochs"]
    assert together["kl"] == pytest.approx(alone["kl"], abs=1e-6)
    assert alone["used"][0][:2] == [0, 1]
    assert len(alone["used"][0]) < 8, "both rollouts' four epochs"
    assert together["used"] == alone["used"] * 2


def test_ranks_warm_the_critic_up_and_end_at_the_kl_ceiling_together_with_the_weights_below_it(runs):
    (one, alone), (two, together) = runs[1, "stability"], runs[2, "stability"]
    assert together["kl"] == pytest.approx(alone["kl"], abs=1e-6)
    assert alone["kl"][:2] == pytest.approx([0, 0], abs=1e-6)
    assert 1e-6 < alone["kl"][2] < alone["kl"][3]
    for rank in alone["of_ranks"] + together["of_ranks"]:
        assert rank["step"] == 7, "one step into the fourth rollout of two"
        assert rank["same"] == [False, False, True, False], "the weights at the start of the third rollout"
        assert rank["moved"]
        assert all("critic." in name for name in rank["moved"]), "in the first rollout the critic alone moves"
    ends = torch.load(one / "trained.pt"), torch.load(two / "trained.pt")
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-5) for name in ends[0])


def test_on_ranks_the_doctor_says_a_thing_once(runs):
    assert runs[1, "doctor"][1] == [["constant"]]
    assert runs[2, "doctor"][1] == [["constant"], []]


def test_samples_that_only_fill_up_the_last_batch_of_an_evaluation_are_not_counted(runs):
    _, alone = runs[1, "evaluate"]
    _, together = runs[2, "evaluate"]
    for metric in ("objective/scores", "objective/kl", "objective/entropy", "rewards/letter_share"):
        assert together[f"eval_{metric}"] == pytest.approx(alone[f"eval_{metric}"], abs=1e-6), metric
    assert alone["eval_objective/scores"] > 0


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_on_ranks_vllm_has_the_policys_weights_and_each_rank_gets_the_completions_of_its_prompts(runs, ranks, mode):
    _, report = runs[ranks, f"vllm_{mode}"]
    assert report["same"] == [[True] * 3] * (ranks if mode == "colocate" else 1)
    assert report["completions"] == 24
    assert report["own"]
