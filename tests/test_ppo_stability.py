"""Settings that keep PPO stable, all off by default: each does what its source says, and nothing else."""

import pytest
import torch
from peft import LoraConfig

from test_ppo_resume import StopAt, assert_same_end, job
from test_ppo_trainer import history, make_trainer, prompts
from two_ranks import fixed_completion

LORA = {"peft_config": LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)}


def weights(trainer):
    """Two copies: the policy's weights by name, and the critic's."""
    own, critic = {}, {}
    for name, weight in trainer.model.named_parameters():
        (critic if ".critic." in f".{name}" else own)[name] = weight.detach().clone()
    return own, critic


def same(first, second):
    return {name: torch.equal(first[name], second[name]) for name in first}


# --- value_warmup_rollouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["value head", "lora", "own critic"])
def test_while_the_critic_warms_up_it_alone_moves_and_the_policy_starts_after_it(
    gpt2_path, classifier_path, tmp_path, variant
):
    set = {"value head": {}, "lora": LORA, "own critic": {"value_model_path": classifier_path}}[variant]
    trainer = make_trainer(
        gpt2_path,
        tmp_path,
        value_warmup_rollouts=3,
        total_episodes=32,  # four rollouts of four steps
        train_dataset=prompts(8),
        num_iterations=4,
        value_learning_rate=1e-2,
        weight_decay=0.1,
        learning_rate=1e-2,
        kl_target=1.0,
        vf_coef=1.0,
        **set,
    )
    policy, critic = weights(trainer)
    trainer._generate_single_turn = lambda prompt_ids, *_: ([fixed_completion(ids) for ids in prompt_ids], None)
    seen = []
    training_step = trainer.training_step

    def watched(*args):
        if trainer._is_first_micro_batch:
            seen.append((weights(trainer), set_of_states(trainer)))
        return training_step(*args)

    trainer.training_step = watched
    trainer.train()
    assert len(seen) == 4
    for (own, theirs), states in seen[1:]:
        assert all(same(policy, own).values())
        assert not any(same(critic, theirs).values())
        assert states == {id(p) for p in trainer.policy.critic.parameters()}, "the optimiser knows the critic alone"
    assert not all(same(policy, weights(trainer)[0]).values()), "the policy does not move after the warm-up"
    assert history(trainer, "objective/kl") == pytest.approx([0] * 4, abs=1e-6)
    assert history(trainer, "val/ratio")[:12] == pytest.approx([1] * 12, abs=1e-6)
    losses = history(trainer, "loss/value_avg")
    assert losses[11] < 0.5 * losses[0]
    coefs = history(trainer, "objective/kl_coef")
    assert coefs == pytest.approx([trainer.args.kl_coef] * 4)
    assert trainer.kl_coef < trainer.args.kl_coef, "beta reacts to the first rollout after the warm-up"


def set_of_states(trainer):
    return {id(parameter) for parameter, state in trainer.optimizer.state.items() if state}


def test_without_a_warm_up_the_policy_moves_at_once(gpt2_path, tmp_path):
    trainer = make_trainer(gpt2_path, tmp_path, max_steps=1)
    policy, _ = weights(trainer)
    trainer.train()
    assert not any(same(policy, weights(trainer)[0]).values())


def test_a_run_that_was_broken_off_while_the_critic_warmed_up_resumes_bit_identical(gpt2_path, tmp_path):
    set = {"value_warmup_rollouts": 2, "num_train_epochs": 2}  # of four rollouts of four steps
    whole = job(gpt2_path, tmp_path / "whole", **set)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        job(gpt2_path, tmp_path / "broken", callbacks=[StopAt(6)], **set).train()
    resumed = job(gpt2_path, tmp_path / "broken", **set)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, whole)
