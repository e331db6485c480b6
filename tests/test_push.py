"""`--push_to_hub true` against a stand-in for the Hub on loopback."""

import os
import subprocess
import sys

from safetensors.torch import load

from conftest import ROOT
from hub_server import HubServer

TOKEN = "hf_a_secret_of_the_users"


def test_a_pushed_run_has_policy_critic_and_a_card_that_names_its_base_and_no_token(
    gpt2_path, classifier_path, tmp_path
):
    hub = HubServer()
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "train.jsonl").write_text('{"prompt": "the movie was"}\n' * 32)
    options = ["--model_name_or_path", gpt2_path, "--reward_model", classifier_path]
    options += ["--dataset_name", str(tmp_path / "prompts"), "--output_dir", str(tmp_path / "run")]
    options += ["--total_episodes", "16", "--per_device_train_batch_size", "8", "--max_completion_length", "4"]
    options += ["--push_to_hub", "true", "--hub_model_id", "user/tiny-ppo", "--disable_tqdm", "true"]
    script = ROOT / "recipes" / "sentiment_gpt2_ppo.py"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    command = [sys.executable, str(script), "--config", "tiny", *options]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    hub.shutdown()

    (pushed,) = hub.files.values()
    for name in ("model.safetensors", "critic.safetensors", "config.json", "tokenizer.json", "README.md"):
        assert pushed[name] == (tmp_path / "run" / name).read_bytes()
    assert set(load(pushed["critic.safetensors"])) == {"weight", "bias"}
    assert not [name for name, content in pushed.items() if TOKEN.encode() in content]
    card = pushed["README.md"].decode()
    assert f"a fine-tuned version of `{gpt2_path}`" in card
    assert "`critic.safetensors`" in card
    assert "None" not in card
