"""Each accelerate config on the CPU, gloo between its ranks: it trains as one process does, saves, and resumes exactly.

DeepSpeed's are skipped where it is not installed.
"""

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
from test_ppo_trainer import make_trainer
from trl_ppo.config import check_engine
from trl_ppo.critic import ValueHead
from trl_ppo.inputs import UserError

CASES = ["full", "lora", "critic", "bf16-full", "bf16-lora", "bf16-critic"]
ENGINES = {  # accelerate config → accelerate's name for it, ranks
    "cpu": ("NO", 1),
    "multi_gpu": ("MULTI_CPU", 2),
    "fsdp2": ("FSDP", 2),
    "zero2": ("DEEPSPEED", 2),
    "zero3": ("DEEPSPEED", 2),
}
SHARDED = ["fsdp2", "zero2", "zero3"]


# --- Settings ------------------------------------------------------------------------------------------------------


class Settings:
    """What `check_engine` reads of a `PPOConfig`."""

    fsdp_plugin_args = deepspeed_plugin = stop_epochs_at_kl = stop_at_kl = critic_path = value_model_path = None
    value_warmup_rollouts, sync_ref_model = 0, False


@pytest.mark.parametrize(
    ("key", "value"),
    [("version", "1"), ("state_dict_type", "SHARDED_STATE_DICT"), ("cpu_ram_efficient_loading", "true")],
)
def test_an_fsdp_setting_under_which_nothing_good_is_trained_or_saved_is_refused(monkeypatch, key, value):
    sound = {"version": "2", "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": "false"}
    for name, given in {"ACCELERATE_USE_FSDP": "true", **{f"FSDP_{n.upper()}": v for n, v in sound.items()}}.items():
        monkeypatch.setenv(name, given)
    check_engine(Settings())
    monkeypatch.setenv(f"FSDP_{key.upper()}", value)
    with pytest.raises(UserError, match=f"fsdp_{key}: .* set it to "):
        check_engine(Settings())


def test_fsdp_on_a_cpu_is_refused_where_accelerate_would_train_without_it(gpt2_path, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ppo.config.check_engine", lambda args: None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP: accelerate shards on GPUs alone"):
        make_trainer(gpt2_path, tmp_path)


def test_stopping_epochs_is_refused_under_deepspeed_which_steps_before():
    settings = Settings()
    settings.stop_epochs_at_kl = 0.1
    check_engine(settings)
    settings.deepspeed_plugin = object()
    with pytest.raises(UserError, match="stop_epochs_at_kl: DeepSpeed"):
        check_engine(settings)


@pytest.mark.parametrize(("mixed_precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_under_fsdp2_log_probabilities_and_values_are_not_rounded_to_the_type_of_the_weights(
    monkeypatch, mixed_precision, dtype
):
    settings = Settings()
    settings.fsdp_plugin_args = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", mixed_precision)
    check_engine(settings)
    policy = settings.fsdp_plugin_args["mixed_precision_policy"]
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (dtype, torch.float32, None)


def test_a_value_head_whose_weights_an_engine_made_bf16_works_in_float32():
    states = torch.randn(5, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    head = ValueHead(8).bfloat16()
    values = head(states)
    assert values.dtype == torch.float32
    assert torch.equal(values, states.float() @ head.weight[0].float())


# --- Runs ----------------------------------------------------------------------------------------------------------


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
def runs(gpt2_path, classifier_path, adapter_path, tmp_path_factory):
    """`runs(engine)`: the folder of an engine's runs, made when first asked for."""
    done = {}

    def run(engine):
        if engine.startswith("zero"):
            pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; accelerate_configs/README.md says how")
        if engine not in done:
            folder = done[engine] = tmp_path_factory.mktemp(engine)
            cases = CASES if engine == "cpu" else [*CASES, "bf16-sampled"]
            env = os.environ | {"PYTHONPATH": f"{ROOT / 'recipes'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
            script = [str(ROOT / "accelerate_configs" / f"{engine}.yaml"), str(ROOT / "tests" / "engine_ranks.py")]
            finished = subprocess.run(
                [*launch, *script, gpt2_path, classifier_path, adapter_path, str(folder), *cases],
                env=env | {"CUDA_VISIBLE_DEVICES": ""},
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert finished.returncode == 0, finished.stderr[-4000:]
        return done[engine]

    return run


def weights(folder):
    """All weights that a run wrote."""
    files = [*folder.glob("*model.safetensors"), folder / "critic.safetensors"]
    assert len(files) == 2
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def furthest(some, others):
    """The largest difference of a weight, and the names that only one of the two has."""
    return max((some[n].float() - others[n].float()).abs().max() for n in some.keys() & others.keys()), set(
        some.keys() ^ others.keys()
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_row_23_the_engine_is_the_one_that_the_config_names(runs, engine):
    for case in CASES:
        report = json.loads((runs(engine) / case / "report.json").read_text())
        assert (report["engine"], report["ranks"]) == ENGINES[engine]
        assert report["kinds"] == (["DTensor"] if engine == "fsdp2" else ["Parameter"])


@pytest.mark.parametrize("case", [*CASES, "bf16-sampled"])
@pytest.mark.parametrize("engine", ENGINES)
def test_row_22_the_first_rollout_has_no_kl_and_the_first_step_a_ratio_of_1(runs, engine, case):
    if (engine, case) == ("cpu", "bf16-sampled"):
        pytest.skip("test_ppo_trainer.py samples in one process")
    first = json.loads((runs(engine) / case / "report.json").read_text())["logged"][0]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert first["val/ratio"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", list(ENGINES)[1:])
def test_row_22_ranks_update_as_one_process_does(runs, engine, case):
    alone = weights(runs("cpu") / case.removeprefix("bf16-") / "final")
    together = weights(runs(engine) / case / "final")
    far, other_names = furthest(alone, together)
    assert far < (0.015 if case.startswith("bf16") else 1e-5)
    assert other_names <= {"model/lm_head.weight"}  # tied: ZeRO writes it twice


@pytest.mark.parametrize("case", [*CASES, "bf16-sampled"])
@pytest.mark.parametrize("engine", ENGINES)
def test_row_22_a_run_resumes_bit_identical_and_ends_with_its_best_model(runs, engine, case):
    if (engine, case) == ("cpu", "bf16-sampled"):
        pytest.skip("test_ppo_resume.py samples in one process")
    folder = runs(engine) / case
    assert furthest(weights(folder / "final"), weights(folder / "resumed" / "final")) == (0, set())
    kl_coefs = json.loads((folder / "report.json").read_text())["kl_coef"]
    assert kl_coefs[0] == kl_coefs[1]
    best = weights(folder / "best" / "checkpoint-4")
    assert furthest(weights(folder / "best" / "final"), best) == (0, set())
    assert furthest(weights(folder / "best" / "checkpoint-8"), best)[0] > 0


@pytest.mark.parametrize("engine", SHARDED)
def test_row_22_what_a_sharded_run_saves_loads_as_a_plain_model(runs, engine):
    _, info = AutoModelForCausalLM.from_pretrained(runs(engine) / "full" / "final", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    AutoPeftModelForCausalLM.from_pretrained(runs(engine) / "lora" / "final")


@pytest.mark.parametrize("engine", SHARDED)
def test_row_24_a_peft_reward_model_scores_the_same_under_an_engine(runs, engine):
    alone, under_engine = json.loads((runs(engine) / "scores.json").read_text())
    assert alone == under_engine
    assert alone[0] != alone[1]
