"""Resuming: a run that was stopped and resumed ends as one that never was, bit for bit."""

import json
import shutil
from contextlib import suppress

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from rewards import preference, reference_sampler
from test_ppo_trainer import make_trainer, prompts
from trl_ppo import PPOConfig, RewardModel

TIMINGS = ("time/", "step_time", "runtime", "samples_per_second", "steps_per_second", "total_flos")


class StopAt(TrainerCallback):
    """Breaks off a run without any of its tidying up."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def job(path, folder, **set):
    """Six rollouts in three passes over two rollouts' worth of prompts, a checkpoint after each."""
    settings = {
        "train_dataset": prompts(16),
        "num_train_epochs": 3,
        "num_mini_batches": 2,
        "gradient_accumulation_steps": 1,
        "save_strategy": "steps",
        "save_steps": 4,
        "logging_steps": 3,
        "kl_target": 1.0,
        "kl_horizon": 100,
        "score_norm": True,
    }
    return make_trainer(path, folder, **(settings | set))


def logged(trainer):
    return [
        {key: value for key, value in entry.items() if not key.removeprefix("eval_").startswith(TIMINGS)}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]


def assert_same_end(resumed, whole):
    ends = resumed.policy.state_dict(), whole.policy.state_dict()
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0]:
        assert torch.equal(ends[0][name], ends[1][name]), name
    assert logged(resumed) == logged(whole)
    assert resumed.kl_coef == whole.kl_coef
    assert resumed.score_sums == whole.score_sums


@pytest.mark.parametrize(
    ("stop", "variant"),
    [
        (5, "plain"),
        (11, "plain"),
        (18, "plain"),
        (23, "plain"),
        (18, "evaluation"),
        (18, "own critic"),
        (18, "preference"),
    ],
)
def test_row_18_a_run_that_was_broken_off_and_resumed_ends_bit_identical(
    gpt2_path, classifier_path, tmp_path, stop, variant
):
    set = {}
    if variant == "evaluation":
        set = {"eval_dataset": prompts(3), "eval_strategy": "steps", "eval_steps": 3}
    if variant == "preference":  # whose references are sampled, by a model that is loaded anew
        config = PPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_completion_length=6)
        set["reward_funcs"] = preference(RewardModel(classifier_path), reference_sampler(gpt2_path, config))
    if variant == "own critic":
        set = {"value_model_path": classifier_path, "value_learning_rate": 1e-3}
    whole = job(gpt2_path, tmp_path / "whole", **set)
    whole.train()
    assert whole.state.global_step == 24
    with pytest.raises(KeyboardInterrupt):
        job(gpt2_path, tmp_path / "broken", callbacks=[StopAt(stop)], **set).train()
    resumed = job(gpt2_path, tmp_path / "broken", **set)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, whole)


@pytest.mark.parametrize("max_steps", [4, 8])  # within a pass over the prompts, and at its end
def test_resuming_a_run_that_had_finished_takes_no_further_step(gpt2_path, tmp_path, max_steps):
    whole = job(gpt2_path, tmp_path, max_steps=max_steps)
    whole.train()
    resumed = job(gpt2_path, tmp_path, max_steps=max_steps)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == max_steps
    ends = resumed.policy.state_dict(), whole.policy.state_dict()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
    assert resumed.kl_coef == whole.kl_coef


def test_resuming_where_there_is_no_checkpoint_starts_from_the_beginning(gpt2_path, tmp_path):
    trainer = job(gpt2_path, tmp_path, num_train_epochs=1)
    trainer.train(resume_from_checkpoint="true")
    assert trainer.state.global_step == 8


def test_the_model_card_of_a_run_from_a_local_folder_names_it(gpt2_path, tmp_path):
    job(gpt2_path, tmp_path, max_steps=4).train()
    card = (tmp_path / "README.md").read_text()
    assert f"This model is a fine-tuned version of `{gpt2_path}`" in card
    assert "None" not in card


def test_every_pass_over_the_prompts_has_an_order_of_its_own(gpt2_path, tmp_path):
    """A pass over 24 prompts is three rollouts of 8; a resumed run sees the orders of one left alone."""
    texts = [f"prompt {i}" for i in range(24)]

    def prompts_seen(folder, resume=False, **set):
        seen = []

        def reward(prompts, completions, **columns):
            seen.append(list(prompts))
            return [float(len(completion)) for completion in completions]

        trainer = job(gpt2_path, folder, reward_funcs=reward, train_dataset=Dataset.from_dict({"prompt": texts}), **set)
        with suppress(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=resume)
        return seen

    whole = prompts_seen(tmp_path / "whole")
    passes = [whole[3 * i] + whole[3 * i + 1] + whole[3 * i + 2] for i in range(3)]
    assert len(whole) == 9
    assert all(sorted(order) == sorted(texts) for order in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    broken = prompts_seen(tmp_path / "broken", callbacks=[StopAt(21)])  # in the second pass
    resumed = prompts_seen(tmp_path / "broken", resume=True)
    assert broken[:5] == whole[:5]
    assert resumed == whole[5:]


def test_the_trainers_state_is_the_last_file_of_a_checkpoint(gpt2_path, tmp_path):
    job(gpt2_path, tmp_path, num_train_epochs=1).train()
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint-8").iterdir()}
    assert max(files, key=files.get) == "trainer_state.json"


def test_checkpoints_fall_between_rollouts_and_say_so_when_rounded(tmp_path, capsys):
    set = {"use_cpu": True, "bf16": False, "num_iterations": 4, "num_mini_batches": 2, "save_strategy": "steps"}
    config = PPOConfig(output_dir=str(tmp_path), save_steps=12, **set)
    assert config.save_steps == 16
    assert capsys.readouterr().out == "save_steps: 12 is rounded up to 16, whole rollouts of 8 steps\n"
    config = PPOConfig(output_dir=str(tmp_path), save_steps=16, **set)
    assert config.save_steps == 16
    assert not capsys.readouterr().out


def test_the_best_checkpoint_by_held_out_score_is_loaded_at_the_end(gpt2_path, tmp_path):
    trainer = job(
        gpt2_path,
        tmp_path,
        eval_dataset=prompts(8),
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        learning_rate=1e-2,
        num_train_epochs=2,
    )
    trainer.train()
    scores = {e["step"]: e["eval_objective/scores"] for e in trainer.state.log_history if "eval_objective/scores" in e}
    best = max(scores, key=scores.get)
    assert trainer.state.best_metric == scores[best]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")

    saved = load_file(tmp_path / f"checkpoint-{best}" / "critic.safetensors")
    assert torch.equal(trainer.policy.critic.weight, saved["weight"])
    assert json.loads((tmp_path / f"checkpoint-{best}" / "ppo_state.json").read_text())["kl_coef"] == trainer.kl_coef
    shutil.rmtree(tmp_path)
