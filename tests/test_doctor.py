"""The doctor: each fault is planted in a real, tiny run, and its line appears; healthy runs are silent."""

import copy
import random
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from conftest import ROOT, _save
from test_ppo_trainer import letter_share, make_trainer
from trl_ppo import PPOConfig, RewardModel
from trl_ppo.doctor import SAYS, look_at_rollouts

ROLLOUT = 8  # completions
LORA = {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}


@pytest.fixture(scope="module")
def sharp_path(gpt2_path, tokenizer, tmp_path_factory):
    """A GPT-2 whose next token is far from uniform."""
    model = AutoModelForCausalLM.from_pretrained(gpt2_path)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(20)
    return _save(model, tokenizer, tmp_path_factory.mktemp("sharp"))


def trained(path, folder, rollouts=1, plant=None, **set):
    """Trains for so many rollouts, with a fault planted in the trainer just before."""
    settings = {
        "total_episodes": rollouts * ROLLOUT,
        "per_device_train_batch_size": ROLLOUT,
        "gradient_accumulation_steps": 1,
        "num_iterations": 1,
        "learning_rate": 1e-4,
        "reward_funcs": noise,
    }
    trainer = make_trainer(path, folder, **(settings | set))
    if plant is not None:
        plant(trainer)
    trainer.train()
    return trainer


def said(capsys):
    """What the doctor found, by name, in the order in which it said so."""
    return re.findall(r"^doctor \(([^)]+)\): .+", capsys.readouterr().out, re.MULTILINE)


def noise(prompts, completions, **columns):
    """A score that varies, whatever the completions."""
    return torch.rand(len(completions), generator=torch.Generator().manual_seed(len("".join(prompts)))).tolist()


def many_e(prompts, completions, **columns):
    return [float(completion.count("e")) for completion in completions]


def always_one(prompts, completions, **columns):
    return [1.0] * len(completions)


def five_and_more(prompts, completions, **columns):
    return [5 + score for score in letter_share(prompts, completions)]


# --- What is planted: each takes a trainer that is about to train --------------------------------------------------


def turn_dropout_on(trainer):
    for module in trainer.policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3


def move_the_policy(trainer):
    with torch.no_grad():
        for name, weight in trainer.policy.named_parameters():
            if "ln_f" in name:
                weight.mul_(1.5)


def sample_hotter(trainer):
    trainer.generation_config.temperature = 3.0


def sample_with_the_first_weights(trainer):
    """As a sampler does that never gets the new ones."""
    first, sample = copy.deepcopy(trainer.policy.state_dict()), trainer._generate_single_turn

    def stale(*args, **kwargs):
        newest = copy.deepcopy(trainer.policy.state_dict())
        trainer.policy.load_state_dict(first)
        sampled = sample(*args, **kwargs)
        trainer.policy.load_state_dict(newest)
        return sampled

    trainer._generate_single_turn = stale
    trainer.policy_logprobs = lambda batch: trainer.logprobs(trainer.model, batch)  # none that sampling has kept


def completions(make):
    """Plants `make(rollout, row)`, the ids of a completion."""

    def plant(trainer):
        rollouts = iter(range(1000))

        def sample(prompt_ids, *args, **kwargs):
            rollout = next(rollouts)
            return [make(rollout, row) for row in range(len(prompt_ids))], None

        trainer._generate_single_turn = sample

    return plant


def some(rollout, row, n=6):
    """A completion of n random tokens, none of which is special."""
    return torch.randint(2, 290, (n,), generator=torch.Generator().manual_seed(1000 * rollout + row)).tolist()


EOS = 1  # of the tests' tokenizer
END_FIRST = completions(lambda rollout, row: [*some(rollout, row, 3), *([] if rollout else [EOS])])
SHORTER = completions(lambda rollout, row: [EOS] if rollout else [*some(rollout, row, 11), EOS])
FAST = {"num_iterations": 3, "learning_rate": 0.05, "kl_coef": 0.0, "reward_funcs": many_e, "max_completion_length": 24}
SLOW_TO_HOLD = FAST | {"learning_rate": 0.005, "kl_coef": 0.01, "kl_target": 0.01}
STALE = {"num_iterations": 3, "learning_rate": 0.03}
NEVER_ENDS = {"generation_kwargs": {"suppress_tokens": [EOS]}}

# What must be said, rollouts, settings, what is planted, what may be said besides because it is true as well.
FAULTS = {
    "dropout": ({"ratio"}, 1, {}, turn_dropout_on, {"jump"}),
    "adapter": ({"reference"}, 1, {"peft_config": LoraConfig(**LORA, init_lora_weights=False)}, None, {}),
    "reference": ({"reference"}, 1, {}, move_the_policy, {}),
    "top_k": ({"sampling"}, 1, {"top_k": 2, "max_completion_length": 24}, None, {}),
    "temperature": ({"sampling"}, 1, {}, sample_hotter, {}),
    "no end": ({"no end"}, 1, NEVER_ENDS | {"missing_eos_penalty": 1.0}, None, {}),
    "constant reward": ({"constant"}, 1, {"reward_funcs": always_one}, None, {}),
    "idle reward": ({"idle reward"}, 1, {"reward_funcs": [many_e, always_one]}, None, {}),
    "scores clipped": ({"score clip"}, 1, {"reward_funcs": five_and_more, "score_clip": 2.0}, None, {}),
    "epsilon": ({"clipped"}, 1, {"epsilon": 1e-4, "num_iterations": 8, "learning_rate": 1e-3}, None, {}),
    "learning rate": ({"jump"}, 1, {"learning_rate": 0.3, "num_iterations": 4}, None, {"clipped"}),
    "kl_coef 0": ({"KL", "entropy"}, 6, FAST, None, {"jump", "clipped", "same", "repetition", "limit", "gradient"}),
    "kl_target": ({"KL target"}, 4, SLOW_TO_HOLD, None, {"clipped", "gradient", "repetition"}),
    "stale sampler": (
        {"negative KL"},
        4,
        STALE,
        sample_with_the_first_weights,
        {"jump", "clipped", "entropy", "gradient"},
    ),
    "kl_horizon": ({"kl_coef"}, 5, {"kl_target": 50.0, "kl_horizon": 2}, None, {}),
    "vf_coef 0": ({"critic"}, 8, {"vf_coef": 0.0}, None, {}),
    "length at the limit": ({"limit"}, 4, {}, END_FIRST, {}),
    "length collapses": ({"short"}, 4, {"max_completion_length": 12}, SHORTER, {}),
    "repetition": ({"repetition"}, 3, {}, completions(lambda rollout, row: [5 + row] * 6), {"sampling"}),
    "all the same": ({"same"}, 3, {}, completions(lambda rollout, row: [5, 6, 7, 8, 9, 10]), {}),
    "max_grad_norm": ({"gradient"}, 5, {"max_grad_norm": 1e-4}, None, {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_diagnosed_once_and_no_other(gpt2_path, sharp_path, tmp_path, capsys, fault):
    names, rollouts, settings, plant, also = FAULTS[fault]
    sharp = names & {"ratio", "reference", "sampling", "KL", "KL target", "negative KL"}
    trained(sharp_path if sharp else gpt2_path, tmp_path, rollouts, plant, **settings)
    found = said(capsys)
    print(fault, found)
    assert len(found) == len({*found})
    assert names <= {*found} <= names | {*also}


def test_every_diagnosis_is_planted_in_a_run():
    below = {"other end", "blind", "length reward", "still", "no gain"}
    assert below.union(*(fault[0] for fault in FAULTS.values())) == set(SAYS)
    assert len(FAULTS) + len(below) >= 20


def test_every_diagnosis_is_explained_in_the_readme():
    table = (ROOT / "recipes" / "README.md").read_text().split("## The doctor")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE) == [*SAYS]


def test_a_token_that_ends_answers_but_is_no_end_token_here_is_named(gpt2_path, tmp_path, capsys):
    def plant(trainer):
        trainer._tokenizer.add_special_tokens({"sep_token": trainer._tokenizer.convert_ids_to_tokens(70)})
        completions(lambda rollout, row: [*some(rollout, row, 2), 70, *some(rollout, row, 2)])(trainer)

    trained(gpt2_path, tmp_path, plant=plant)
    assert said(capsys) == ["other end"]


def test_a_reward_model_that_reads_nothing_of_the_prompt_is_named(gpt2_path, classifier_path, tmp_path, capsys):
    """Its texts lose their beginning, down to the last tokens."""
    trained(gpt2_path, tmp_path, reward_funcs=RewardModel(classifier_path, max_length=4), max_completion_length=12)
    assert said(capsys) == ["blind"]


class NearlyLength(RewardModel):
    """Scores the length of the completion, and a little of the prompt's."""

    def __call__(self, prompts, completions, **_):
        return [len(c) + 0.1 * len(p) for p, c in zip(prompts, completions, strict=True)]


def test_a_reward_model_that_is_little_but_length_is_named(gpt2_path, classifier_path, tmp_path, capsys):
    """A function of one's own is not: its author knows what it reads."""
    plant = completions(lambda rollout, row: [70] * (1 + row % 5))
    settings = {"per_device_train_batch_size": 16, "total_episodes": 16, "plant": plant}
    trained(gpt2_path, tmp_path, reward_funcs=NearlyLength(classifier_path), **settings)
    assert said(capsys) == ["length reward"]
    trained(gpt2_path, tmp_path, reward_funcs=many_e, **settings)
    assert said(capsys) == []


def log_of(rollouts, **metrics):
    """A log's metrics, each a function of the rollout."""
    return [{name.replace("__", "/"): [value(i)] for name, value in metrics.items()} for i in range(rollouts)]


def found_in(rows, tmp_path, **set):
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **set)
    return {name for name, holds, *_ in look_at_rollouts(rows, args) if holds}


def test_a_policy_that_does_not_move_is_named_after_twenty_rollouts(tmp_path):
    """But not where the reference moves along, or the critic alone has been trained so far."""
    rows = log_of(20, objective__kl=lambda i: 0.0005 * i)
    assert found_in(rows, tmp_path) == {"still"}
    assert found_in(rows[:19], tmp_path) == set()
    assert found_in(log_of(20, objective__kl=lambda i: 0.05 * i), tmp_path) == set()


def test_a_policy_that_moves_and_gains_nothing_is_named_after_twenty_rollouts(tmp_path):
    rows = log_of(20, objective__kl=lambda i: 0.2 * i, objective__scores=lambda i: -0.1 * i)
    assert found_in(rows, tmp_path) == {"no gain"}
    rows = log_of(20, objective__kl=lambda i: 0.2 * i, objective__scores=lambda i: 0.1 * i)
    assert found_in(rows, tmp_path) == set()


def test_a_kl_that_chance_takes_below_0_is_no_fault_and_the_more_completions_the_less_is_chance(tmp_path):
    rows = log_of(3, objective__kl=lambda i: -1.0)
    assert found_in(rows, tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=1) == set()
    assert found_in(rows, tmp_path, per_device_train_batch_size=128, gradient_accumulation_steps=1) == {"negative KL"}


# --- Silence --------------------------------------------------------------------------------------------------------

HEALTHY = {
    "as it is": {},
    "completions that never end": NEVER_ENDS | {"max_completion_length": 12},
    "LoRA": {"peft_config": LoraConfig(**LORA)},
    "a separate critic": {"value_model_path": "classifier", "num_mini_batches": 2, "per_device_train_batch_size": 4},
    "a log of many rollouts": {"logging_steps": 7, "num_iterations": 2, "kl_target": 1.0},
}


@pytest.mark.parametrize("settings", HEALTHY)
def test_a_healthy_run_is_silent(gpt2_path, classifier_path, tmp_path, capsys, settings):
    settings = {k: classifier_path if v == "classifier" else v for k, v in HEALTHY[settings].items()}
    trained(gpt2_path, tmp_path, 4, reward_funcs=RewardModel(classifier_path), **settings)
    assert said(capsys) == []


def test_the_doctor_changes_nothing_and_one_setting_turns_it_off(gpt2_path, classifier_path, tmp_path, capsys):
    """The same weights, log and next random numbers, on a run that it has something to say of."""
    seen, settings = [], {"max_grad_norm": 1e-4, "score_clip": 1e-3, "missing_eos_penalty": 0.1}
    for doctor in (True, False):
        rewards = [RewardModel(classifier_path, max_length=4), five_and_more]
        trainer = trained(gpt2_path, tmp_path, 5, doctor=doctor, reward_funcs=rewards, **settings)
        log = [
            {k: v for k, v in row.items() if not re.search("time|per_second", k)} for row in trainer.state.log_history
        ]
        seen.append(
            (trainer.model.state_dict(), log, torch.get_rng_state(), np.random.get_state()[1:3], random.random())
        )
        assert bool(said(capsys)) == doctor
    torch.testing.assert_close(*seen, rtol=0, atol=0, equal_nan=True)
