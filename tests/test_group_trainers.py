"""`--algorithm grpo` and `rloo`: TRL's own trainers, set up from a PPO recipe."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer, RLOOTrainer

from group_trainers import count_positions, make_trainer
from test_ppo_trainer import letter_share, prompts
from trl_ppo import PPOConfig
from trl_ppo.inputs import UserError

TRAINERS = {"grpo": GRPOTrainer, "rloo": RLOOTrainer}


def build(algorithm, path, folder, group_size=4, **settings):
    """A trainer of two rollouts of 8 completions."""
    args = PPOConfig(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 8,
            "max_completion_length": 6,
            "num_iterations": 2,
            "total_episodes": 16,
            "learning_rate": 1e-3,
            "kl_coef": 0.25,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        | settings
    )
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    others = {"model": path, "reward_funcs": [letter_share], "train_dataset": prompts(), "processing_class": tokenizer}
    return make_trainer(algorithm, group_size, args, **others)


@pytest.mark.parametrize("algorithm", TRAINERS)
def test_trls_trainer_takes_the_recipes_settings_and_trains_as_many_steps(algorithm, gpt2_path, tmp_path):
    trainer = build(algorithm, gpt2_path, tmp_path)
    assert type(trainer) is TRAINERS[algorithm]
    args = trainer.args
    assert (args.beta, args.num_generations, args.learning_rate, args.adam_epsilon) == (0.25, 4, 1e-3, 1e-8)
    assert (args.generation_batch_size, args.num_iterations, args.max_steps) == (8, 2, 4)
    before = trainer.model.lm_head.weight.clone()
    assert trainer.train().global_step == 4
    assert not torch.equal(trainer.model.lm_head.weight, before)
    trainer.save_model()
    AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("algorithm", TRAINERS)
def test_a_row_behind_padding_gets_the_log_probabilities_that_it_has_alone(algorithm, gpt2_path, tmp_path):
    trainer = build(algorithm, gpt2_path, tmp_path)
    row, padding = torch.tensor([[7, 8, 9, 10, 11, 12]]), torch.tensor([[0, 0, 0]])
    padded, mask = torch.cat([padding, row], 1), torch.tensor([[0] * 3 + [1] * 6])
    for model in (trainer.model, trainer.ref_model):
        alone = trainer._get_per_token_logps_and_entropies(model, row, torch.ones_like(row), 4)[0]
        behind = trainer._get_per_token_logps_and_entropies(model, padded, mask, 4)[0]
        torch.testing.assert_close(behind, alone, rtol=0, atol=1e-5)


def test_generation_is_as_before_once_positions_are_counted(gpt2_path):
    model = AutoModelForCausalLM.from_pretrained(gpt2_path).eval()
    inputs = {
        "input_ids": torch.tensor([[0, 0, 7], [8, 9, 10]]),
        "attention_mask": torch.tensor([[0, 0, 1], [1, 1, 1]]),
    }
    before = model.generate(**inputs, do_sample=False, max_new_tokens=5)
    count_positions(model)
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=5), before)


def test_settings_of_ppo_alone_are_named_as_without_effect(gpt2_path, tmp_path, capsys):
    build("rloo", gpt2_path, tmp_path, kl_target=6.0, lam=0.9)
    assert "algorithm: settings of PPO alone, without effect: kl_target, lam" in capsys.readouterr().out


@pytest.mark.parametrize("group_size", [1, 3, 16])
def test_a_rollout_that_is_not_whole_groups_is_refused(group_size, gpt2_path, tmp_path):
    with pytest.raises(UserError, match=f"group_size: a rollout of 8 completions .* groups of {group_size}"):
        build("grpo", gpt2_path, tmp_path, group_size=group_size)
