"""DeepSpeed's ZeRO-2 and ZeRO-3 on two CPU ranks (gloo); where DeepSpeed is not installed these tests are skipped."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from conftest import ROOT
from test_ppo_ranks import runs as ddp_runs  # noqa: F401, a fixture

JOBS = ["2-full", "2-lora", "3-full", "3-lora"]


@pytest.fixture(scope="module")
def adapter_path(classifier_path, tokenizer, tmp_path_factory):
    """A LoRA reward model on the classifier, its adapter not zero."""
    folder = tmp_path_factory.mktemp("reward_adapter")
    torch.manual_seed(2)
    config = LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    get_peft_model(AutoModelForSequenceClassification.from_pretrained(classifier_path), config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def zero_runs(gpt2_path, adapter_path, tmp_path_factory):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; recipes/README.md says how")
    folder = tmp_path_factory.mktemp("zero")
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'recipes'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(ROOT / "tests" / "zero_ranks.py")
    done = subprocess.run(
        [*launcher, script, gpt2_path, adapter_path, str(folder)], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def final(folder):
    """All weights that a run wrote."""
    files = [*folder.glob("*model.safetensors"), folder / "critic.safetensors"]
    assert len(files) == 2
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", JOBS)
def test_row_22_a_run_under_zero_resumes_bit_identical(zero_runs, name):
    whole, resumed = final(zero_runs / name / "final"), final(zero_runs / name / "resumed" / "final")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    report = json.loads((zero_runs / name / "report.json").read_text())
    assert report["ranks"] == 2
    assert report["kl_coef"][0] == report["kl_coef"][1]


@pytest.mark.parametrize("name", JOBS)
def test_row_22_zero_updates_as_ddp_does(zero_runs, ddp_runs, name):  # noqa: F811
    of_ddp = final(ddp_runs[2, name.split("-")[1]][0] / "final")
    of_zero = final(zero_runs / name / "final")
    assert of_zero.keys() - of_ddp.keys() <= {"model/lm_head.weight"}  # tied: ZeRO writes it twice
    assert all(torch.allclose(of_ddp[key], of_zero[key], atol=1e-5) for key in of_ddp)


@pytest.mark.parametrize("stage", [2, 3])
def test_row_22_what_zero_saves_loads_as_a_plain_model(zero_runs, stage):
    _, info = AutoModelForCausalLM.from_pretrained(zero_runs / f"{stage}-full" / "final", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    AutoPeftModelForCausalLM.from_pretrained(zero_runs / f"{stage}-lora" / "final")


def test_row_24_a_peft_reward_model_scores_the_same_under_zero_3(zero_runs):
    assert json.loads((zero_runs / "rewards.json").read_text())
