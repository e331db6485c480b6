"""Pairs of preferences: how they are read, and what is said of a reward model on them."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scipy.stats import binomtest
from transformers import AutoModelForSequenceClassification

import preferences
from models_and_data import merge_adapter
from rewards import length_penalty, repetition_penalty
from trl_ppo import RewardModel
from trl_ppo.inputs import UserError


def write(folder, rows):
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def test_a_prompt_is_joined_to_both_sides(tmp_path):
    rows = [{"prompt": "Q: why?", "chosen": " because", "rejected": " no", "source": "x"}]
    pairs = preferences.load_pairs(write(tmp_path / "pairs", rows), "train")
    assert pairs[0] == {"prompt": "Q: why?", "chosen": " because", "rejected": " no"}
    whole = {"chosen": "Q: why? because", "rejected": "Q: why? no"}
    assert preferences.join_prompts(pairs)[0] == {"prompt": "Q: why?", **whole}


def test_conversations_stay_conversations(tmp_path):
    turns = [("user", "hi"), ("assistant", "a"), ("assistant", "b")]
    user, good, bad = ({"role": role, "content": text} for role, text in turns)
    rows = [{"prompt": [user], "chosen": [good], "rejected": [bad]}]
    pairs = preferences.join_prompts(preferences.load_pairs(write(tmp_path / "pairs", rows), "train"))
    assert pairs[0] == {"prompt": [user], "chosen": [user, good], "rejected": [user, bad]}


def test_pairs_without_prompts_get_empty_ones_and_are_whole_as_they_are(tmp_path):
    rows = [{"chosen": "a", "rejected": "b"}, {"chosen": "c", "rejected": "d"}]
    pairs = preferences.load_pairs(write(tmp_path / "pairs", rows), "train", limit=1)
    assert pairs[:] == {"prompt": [""], "chosen": ["a"], "rejected": ["b"]}
    assert preferences.join_prompts(pairs)[:] == {"prompt": [""], "chosen": ["a"], "rejected": ["b"]}


def test_a_missing_side_is_named(tmp_path):
    folder = write(tmp_path / "pairs", [{"chosen": "a", "worse": "b"}])
    with pytest.raises(UserError, match="no column rejected; it has chosen, worse"):
        preferences.load_pairs(folder, "train")


def test_a_tie_counts_half_and_the_interval_is_wilsons():
    margins = np.array([1.0] * 37 + [-1.0] * 13)
    ours = preferences.accuracy(margins)
    wilson = binomtest(37, 50).proportion_ci(method="wilson")
    assert ours["mean"] == 37 / 50
    assert (ours["low"], ours["high"]) == pytest.approx((wilson.low, wilson.high), abs=1e-4)
    assert (ours["low"], ours["high"]) == pytest.approx((0.6045, 0.8413), abs=1e-3), "by hand: 37 of 50, z = 1.96"
    with_ties = preferences.accuracy(np.array([1.0] * 36 + [-1.0] * 12 + [0.0, 0.0]))
    assert with_ties == ours
    assert preferences.accuracy(np.array([1.0, 0.0]))["mean"] == 0.75


def test_a_model_whose_margins_are_log_odds_is_calibrated():
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, 40_000)
    correct = rng.random(40_000) < 1 / (1 + np.exp(-np.abs(margins)))
    for scale, diagonal in ((1, True), (3, False)):
        bins = preferences.calibration(np.where(correct, 1, -1) * np.abs(margins) * scale)
        assert sum(b["n"] for b in bins) == 40_000
        gap = max(abs(b["confidence"] - b["accuracy"]["mean"]) for b in bins)
        assert (gap < 0.03) == diagonal


def test_the_report_holds_what_is_printed(classifier_path, tmp_path, capsys):
    reward_model = RewardModel(classifier_path)
    pairs = Dataset.from_dict({"chosen": ["a great film", "good"], "rejected": ["an awful plot", "bad"]})
    results = preferences.report(reward_model, tmp_path, train=pairs, test=pairs)
    assert json.loads((tmp_path / "reward_report.json").read_text()) == results
    assert f"test pairwise accuracy {results['test']['accuracy']['mean']:.3f}" in capsys.readouterr().out
    assert (tmp_path / "reward_report.svg").read_text().startswith("<?xml")
    scores = [reward_model.score([pairs[i]["chosen"], pairs[i]["rejected"]]) for i in range(2)]
    assert results["test"]["mean_margin"] == pytest.approx(np.mean([a - b for a, b in scores]), abs=1e-6)


def test_the_report_says_what_length_alone_would_reach_leaving_the_prompt_out(classifier_path, tmp_path, capsys):
    prompt = "a long prompt of many words, more than its answers have:"
    rows = [(" a great film", " awful"), (" good", " bad"), (" it", " the plot was bad")]
    pairs = Dataset.from_list([{"prompt": prompt, "chosen": prompt + c, "rejected": prompt + r} for c, r in rows])
    test = preferences.report(RewardModel(classifier_path), tmp_path, test=pairs)["test"]
    assert test["longer_wins"]["mean"] == test["shorter_wins"]["mean"] == 0.5
    assert test["like_length"]["n"] == 1, "one word each; with the prompt all three would be alike"
    assert test["length_correlation"]["n"] == 6
    printed = capsys.readouterr().out
    assert "n = 3; the longer text wins 0.500" in printed
    assert f"python -m eval.reward_model --reward reward={tmp_path} --pairs" in printed


def test_the_penalties_grow_with_words_and_with_repetition():
    texts = ["a b c d", "a b c a b c", "a b c a b c a b c", "", "one two"]
    assert length_penalty(completions=texts) == [-4, -6, -9, 0, -2]
    repeated = repetition_penalty(completions=texts)
    assert repeated[0] == repeated[3] == repeated[4] == 0
    assert repeated[2] < repeated[1] < 0
    assert repetition_penalty(completions=[[{"role": "assistant", "content": texts[2]}]]) == [repeated[2]]


def test_a_merged_reward_adapter_scores_as_the_adapter_does(classifier_path, tokenizer, tmp_path):
    torch.manual_seed(2)
    lora = LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False
    )
    get_peft_model(AutoModelForSequenceClassification.from_pretrained(classifier_path), lora).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["a great film", "a terrible film with an awful plot"]
    adapter = RewardModel(str(tmp_path))
    merged = RewardModel(merge_adapter(str(tmp_path), "float32"))
    assert merged.score(texts) == pytest.approx(adapter.score(texts), abs=1e-5)
    assert merged.score(texts) != pytest.approx(RewardModel(classifier_path).score(texts), abs=1e-3)
