"""Memory that is computed from a recipe's settings, against what a run was seen to take."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from trl import ModelConfig

from benchmarks.memory import main, memory
from benchmarks.throughput_jobs import Job
from command_line import parse
from conftest import ROOT
from measured_memory import settings
from recipe_args import PPOArguments
from trl_ppo import PPOConfig

QWEN2 = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
LORA = {"lora_targets": "all-linear", "gradient_checkpointing": True}
JOBS = {
    "lora": Job("lora", "qwen2", QWEN2 | {"num_key_value_heads": 2}, 80000, 8, 4, (256, 256), (4, 4), **LORA),
    "full": Job("full", "gpt2", {"n_embd": 384, "n_layer": 6, "n_head": 6}, 20000, 8, 4, (128, 128), (16, 16)),
}


def measure(job, folder):
    """Phase → bytes, of a process that trains on the job."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'recipes'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # What is freed goes back to the system at once, so that what is resident is what is in use.
    env |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    command = [sys.executable, str(ROOT / "tests" / "measured_memory.py"), str(folder), job.to_json()]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "peaks.json").read_text())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a phase's peak is read as Linux has it")
@pytest.mark.slow  # `make memory-test`: half a minute each, and a machine short of memory would swap
@pytest.mark.parametrize("name", JOBS)
def test_the_computed_peak_of_each_phase_is_within_15_percent_of_the_measured_one(name, tmp_path):
    job = JOBS[name]
    measured = measure(job, tmp_path)
    lora = {"use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_target_modules": [job.lora_targets]}
    path = str(tmp_path / "job" / "policy")
    model = ModelConfig(model_name_or_path=path, dtype=job.dtype, **(lora if job.lora_targets else {}))
    script = SimpleNamespace(max_prompt_tokens=job.prompt_tokens[1], rewards={})
    computed = memory(script, PPOConfig(**settings(job)), model, triton=False)
    assert measured.keys() == computed.keys() == {"sampling", "log-probs", "update"}
    totals = {phase: sum(roles.values()) for phase, roles in computed.items()}
    print({phase: f"{totals[phase] / 1e6:.0f} MB, measured {measured[phase] / 1e6:.0f}" for phase in totals})
    for phase, total in totals.items():
        assert total == pytest.approx(measured[phase], rel=0.15), phase


@pytest.fixture
def update(qwen2_path, classifier_path):
    """`update(*options)`: role → bytes at the update's peak, of the recipe on a tiny model with those options."""
    script = str(ROOT / "recipes" / "qwen_summarize_ppo.py")
    small = ["--model_name_or_path", qwen2_path, "--reward_model", classifier_path]
    small += ["--dtype", "float32", "--reward_dtype", "float32"]
    small += ["--use_cpu", "true", "--max_prompt_tokens", "40", "--max_completion_length", "8"]

    def roles(*options):
        parsed = parse(script, PPOArguments, PPOConfig, ModelConfig, args=[*small, *options])
        return memory(*parsed)["update"]

    return roles


def test_roles_follow_the_settings(update, qwen2_path, classifier_path):
    weights = sum(tensor.nbytes for tensor in load_file(f"{qwen2_path}/model.safetensors").values())
    lora = update()
    adapter = lora["policy"] - weights
    assert lora["reference"] == 0
    assert lora["gradients"] == adapter + lora["critic"] > lora["critic"] > 0
    assert lora["reward model"] == sum(t.nbytes for t in load_file(f"{classifier_path}/model.safetensors").values())

    full = update("--use_peft", "false")
    assert full["policy"] == full["reference"] == weights
    assert full["optimiser"] == 2 * full["gradients"] == 2 * (weights + full["critic"])

    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # numbers in the layers of the two blocks
    four_bits = update("--load_in_4bit", "true")
    assert four_bits["policy"] == weights + adapter / 2 - linear * (4 - 4.5 / 8)

    own = update("--value_model_path", classifier_path)
    assert own["critic"] == lora["reward model"]
    assert own["gradients"] == adapter + own["critic"]


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing(update):
    usual = update("--gradient_checkpointing", "false")["activations"]
    larger = update("--gradient_checkpointing", "false", "--per_device_train_batch_size", "8")["activations"]
    assert larger > 1.6 * usual
    assert update()["activations"] < usual


@pytest.mark.slow
@pytest.mark.parametrize("config", ["", "qlora"])
def test_the_yaml_quotes_what_is_computed(config, capsys):
    main(["--recipe", "qwen_summarize_ppo", *(["--config", config] if config else [])])
    peak = capsys.readouterr().out.splitlines()[-1].split()[1]
    path = f"variants/qwen_summarize_ppo/{config}.yaml" if config else "qwen_summarize_ppo.yaml"
    assert f"Memory on a GPU, computed: {peak} GB" in (ROOT / "recipes" / path).read_text()


def test_the_command_prints_a_column_a_phase_and_the_peak(qwen2_path, classifier_path, capsys):
    small = ["--model_name_or_path", qwen2_path, "--reward_model", classifier_path, "--max_prompt_tokens", "40"]
    main(["--recipe", "qwen_summarize_ppo", *small])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| GB | sampling | log-probs | scores | update |"
    assert lines[-2].startswith("| total | ")
    assert re.fullmatch(r"peak \d\.\d GB, computed", lines[-1])
