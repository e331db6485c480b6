"""Files from elsewhere run no code, and a secret stays where it was."""

import ast
import contextlib
import functools
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from command_line import parse
from conftest import ROOT
from models_and_data import check_model
from recipe_args import PPOArguments
from test_ppo_trainer import make_trainer
from trl_ppo import PPOConfig, RewardModel

SOURCES = [path for folder in ("recipes", "eval", "data_prep", "benchmarks") for path in (ROOT / folder).rglob("*.py")]


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "code_was_run"


def test_the_payload_would_be_seen(marker):
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


def test_no_source_loads_pickles_runs_text_or_trusts_remote_code():
    assert len(SOURCES) > 30
    for path in SOURCES:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert name not in ("eval", "exec", "os.system", "pickle.load", "pickle.loads", "yaml.unsafe_load"), path
            assert name != "torch.load" or given.get("weights_only") == "True", path
            assert given.get("trust_remote_code", "False") == "False", path
            assert given.get("shell", "False") == "False", path


def test_a_yaml_cannot_make_python_objects(tmp_path, marker, capsys):
    config = tmp_path / "evil.yaml"
    config.write_text(f"seed: !!python/object/apply:os.mkdir ['{marker}']\n")
    script, types = str(ROOT / "recipes/sentiment_gpt2_ppo.py"), (PPOArguments, PPOConfig, ModelConfig)
    with pytest.raises(SystemExit):
        parse(script, *types, args=["--config", str(config)])
    assert "evil.yaml: line 1" in capsys.readouterr().err
    assert not marker.exists()


def test_pickled_weights_are_read_as_weights_alone(gpt2_path, classifier_path, tmp_path, marker):
    for load, path in ((AutoModelForCausalLM.from_pretrained, gpt2_path), (RewardModel, classifier_path)):
        folder = tmp_path / Path(path).name
        shutil.copytree(path, folder)
        (folder / "model.safetensors").unlink()
        torch.save({"transformer.wte.weight": Payload(marker)}, folder / "pytorch_model.bin")
        with pytest.raises(Exception, match=r"(?s)."):
            load(str(folder))
    assert not marker.exists()


def test_what_is_planted_in_a_checkpoint_is_not_run_on_resuming(gpt2_path, tmp_path, marker):
    settings = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    make_trainer(gpt2_path, tmp_path / "run", **settings).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    pickles = sorted({*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"), *checkpoint.glob("*.bin")})
    assert {path.name for path in pickles} >= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    for path in pickles:
        sound = path.read_bytes()
        torch.save(Payload(marker), path)
        with contextlib.suppress(Exception):  # resumed or refused, as long as nothing is run
            make_trainer(gpt2_path, tmp_path / "run", **settings).train(resume_from_checkpoint=str(checkpoint))
        assert not marker.exists(), path.name
        path.write_bytes(sound)


def test_a_models_own_code_is_not_run_unless_asked_for(gpt2_path, tmp_path, marker, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(gpt2_path, folder)
    config = (folder / "config.json").read_text()
    auto_map = (
        '"auto_map": {"AutoConfig": "custom.Custom", "AutoModelForCausalLM": "custom.Custom"}, "model_type": "own"'
    )
    (folder / "config.json").write_text(re.sub(r'"model_type": "gpt2"', auto_map, config))
    (folder / "custom.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    for load in (functools.partial(check_model, "model_name_or_path"), RewardModel):
        with pytest.raises((ValueError, OSError)):
            load(str(folder))
    with pytest.raises((ValueError, OSError)):
        make_trainer(str(folder), tmp_path / "run")
    assert not marker.exists()


def test_a_token_among_the_settings_is_refused_since_trainer_writes_them(capsys):
    script, types = str(ROOT / "recipes/sentiment_gpt2_ppo.py"), (PPOArguments, PPOConfig, ModelConfig)
    with pytest.raises(SystemExit):
        parse(script, *types, args=["--hub_token", "planted-token"])
    error = capsys.readouterr().err
    assert "hub_token: training_args.bin" in error
    assert "planted-token" not in error


def test_what_a_run_writes_is_safetensors_and_holds_no_secret_of_the_environment(gpt2_path, tmp_path):
    secrets = {name: f"planted-{name.lower()}" for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY")}
    script = (
        "import sys; from test_ppo_trainer import make_trainer; "
        "t = make_trainer(*sys.argv[1:3], save_strategy='steps', save_steps=2, report_to='wandb'); "
        "t.train(); t.save_model(); t.save_state()"
    )
    env = os.environ | secrets | {"PYTHONPATH": f"{ROOT / 'recipes'}:{ROOT / 'tests'}", "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, "-c", script, gpt2_path, str(tmp_path / "run")],
        env=env | {"WANDB_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    for secret in secrets.values():
        assert secret.encode() not in done.stdout + done.stderr
        for path in written:
            assert secret.encode() not in path.read_bytes(), path
    weights = {path.name for path in written if "model" in path.name or "critic" in path.name}
    assert weights >= {"model.safetensors", "critic.safetensors"}
    assert not [name for name in weights if name.endswith((".bin", ".pt", ".pth"))]
