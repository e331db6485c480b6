"""Settings that keep PPO stable, all off by default: each does what its source says, and nothing else."""

from contextlib import suppress

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from test_ppo_resume import StopAt, assert_same_end, job
from test_ppo_trainer import give_completions, history, make_trainer, prompts, roll_out
from trl_ppo.inputs import UserError
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


def resumed_and_whole(path, folder, step, **set):
    """A run that was broken off at `step` and has gone on to its end, and one that was not."""
    whole = job(path, folder / "whole", **set)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        job(path, folder / "broken", callbacks=[StopAt(step)], **set).train()
    resumed = job(path, folder / "broken", **set)
    resumed.train(resume_from_checkpoint=True)
    return resumed, whole


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
    assert_same_end(*resumed_and_whole(gpt2_path, tmp_path, 6, **set))


# --- lam_value, lam_length_alpha ------------------------------------------------------------------------------------


def rollout_with(path, folder, **set):
    """Advantages and returns of four given completions, of 6, 3, 1 and 5 tokens, whose critic is the same."""
    trainer = make_trainer(path, folder, **set)
    give_completions(trainer, [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14], [15, 16, 17, 18, 19]])
    rollout = roll_out(trainer)
    return rollout["advantages"], rollout["returns"]


def test_the_critics_targets_have_a_lambda_of_their_own(gpt2_path, tmp_path):
    advantages, returns = rollout_with(gpt2_path, tmp_path, lam=0.9)
    for same_lam in ({"lam_value": None}, {"lam_value": 0.9}):
        assert all(map(torch.equal, rollout_with(gpt2_path, tmp_path, lam=0.9, **same_lam), (advantages, returns)))
    decoupled = rollout_with(gpt2_path, tmp_path, lam=0.9, lam_value=1.0)
    assert torch.equal(decoupled[0], advantages)
    assert torch.equal(decoupled[1], rollout_with(gpt2_path, tmp_path, lam=1.0)[1])
    assert not torch.equal(decoupled[1], returns)


def test_lambda_by_length_is_that_of_the_policys_advantages_alone(gpt2_path, tmp_path):
    _, returns = rollout_with(gpt2_path, tmp_path, lam=0.9)
    adaptive = rollout_with(gpt2_path, tmp_path, lam=0.9, lam_length_alpha=0.5)
    assert torch.equal(adaptive[1], returns)
    # One λ for all: α of 0.001 puts every completion at 0.
    at_0 = rollout_with(gpt2_path, tmp_path, lam=0.9, lam_length_alpha=0.001)
    assert torch.equal(at_0[0], rollout_with(gpt2_path, tmp_path, lam=0.0)[0])
    assert not torch.equal(adaptive[0], at_0[0])


# --- critic_path ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def critics(gpt2_path, classifier_path, tmp_path_factory):
    """`critics[kind]`: the folder of a run of one step, and the settings that ask for its kind of critic."""
    runs = {}
    for kind, set in (("value head", {}), ("own critic", {"value_model_path": classifier_path})):
        folder = tmp_path_factory.mktemp(kind.replace(" ", "_"))
        trainer = make_trainer(gpt2_path, folder, max_steps=1, learning_rate=1e-2, **set)
        trainer.train()
        trainer.save_model()
        runs[kind] = str(folder), set
    return runs


@pytest.mark.parametrize("kind", ["value head", "own critic"])
def test_a_critic_starts_from_an_earlier_runs(gpt2_path, tmp_path, critics, kind):
    folder, set = critics[kind]
    saved = load_file(f"{folder}/critic.safetensors")
    fresh = make_trainer(gpt2_path, tmp_path, **set).policy.critic.state_dict()
    started = make_trainer(gpt2_path, tmp_path, critic_path=folder, **set).policy.critic.state_dict()
    assert started.keys() == saved.keys()
    assert all(same(started, saved).values())
    assert not any(same(fresh, saved).values())


def test_a_critic_that_is_no_file_or_of_the_other_kind_is_refused_before_a_model_loads(
    gpt2_path, classifier_path, tmp_path, critics, monkeypatch
):
    monkeypatch.setattr("trl.GRPOTrainer.__init__", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    (tmp_path / "critic.safetensors").write_text("not a critic")
    for path, set, said in [
        (
            str(tmp_path / "none"),
            {},
            "none/critic.safetensors': No such file or directory.*give the folder of a PPO run",
        ),
        (str(tmp_path), {}, "critic.safetensors': .*give the folder of a PPO run"),
        (critics["value head"][0], {"value_model_path": classifier_path}, "a value head; leave out value_model_path"),
        (critics["own critic"][0], {}, "a critic of its own; give its value_model_path too"),
    ]:
        with pytest.raises(UserError, match=f"^critic_path: .*{said}"):
            make_trainer(gpt2_path, tmp_path, critic_path=path, **set)


def test_a_critic_of_another_shape_or_with_nan_in_it_is_refused(gpt2_path, tmp_path, critics):
    folder = tmp_path / "other"
    folder.mkdir()
    save_file({"weight": torch.zeros(1, 8), "bias": torch.zeros(1)}, folder / "critic.safetensors")
    with pytest.raises(
        UserError, match=r"^critic_path: .* weight is \[1, 8\] there, \[1, 32\] in the critic asked for"
    ):
        make_trainer(gpt2_path, tmp_path, critic_path=str(folder))
    save_file({"weight": torch.full((1, 32), torch.nan), "bias": torch.zeros(1)}, folder / "critic.safetensors")
    with pytest.raises(UserError, match=r"^critic_path: .* weight is NaN or infinite"):
        make_trainer(gpt2_path, tmp_path, critic_path=str(folder))


# --- stop_at_kl -----------------------------------------------------------------------------------------------------


def watched_run(path, folder, resume=None, **set):
    """A run, its weights at the start of each rollout, and its KL at each."""
    trainer, starts, kl = job(path, folder, **({"learning_rate": 1e-2, "logging_steps": 4} | set)), [], []
    react = trainer._react_to_kl

    def watched(sequence_kl):
        starts.append(weights(trainer))
        kl.append(sequence_kl.mean().item())
        react(sequence_kl)

    trainer._react_to_kl = watched
    with suppress(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=resume)
    return trainer, starts, kl


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_a_run_ends_at_the_kl_ceiling_with_all_weights_of_the_last_rollout_below_it(
    gpt2_path, tmp_path, variant, capsys
):
    set = LORA | {"learning_rate": 3e-2} if variant == "lora" else {}
    _, starts, kl = watched_run(gpt2_path, tmp_path / "free", **set)
    assert len(kl) == 6
    first = next(i for i in (2, 3, 4, 5) if kl[i] > max(kl[:i]))  # past the ceiling, counted from 0
    ceiling = (max(kl[:first]) + kl[first]) / 2
    capsys.readouterr()
    stopped, _, seen = watched_run(gpt2_path, tmp_path / "stopped", stop_at_kl=ceiling, **set)
    assert seen == kl[: first + 1]
    assert stopped.state.global_step == 4 * first + 1
    for ours, theirs in zip(weights(stopped), starts[first - 1], strict=True):
        assert all(same(ours, theirs).values())
    assert not all(same(starts[first][0], starts[first - 1][0]).values())
    said = f"rollout {first + 1} has a KL of {kl[first]:.3g} nats, above {ceiling:g}; the policy of rollout {first}, "
    assert said + f"after step {4 * (first - 1)}, is kept\n" in capsys.readouterr().out
    assert history(stopped, "objective/kl")[-1] == pytest.approx(kl[first], abs=1e-6)
    stopped.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / "below_kl.safetensors").exists()

    watched_run(gpt2_path, tmp_path / "broken", stop_at_kl=ceiling, callbacks=[StopAt(4 * first)], **set)
    resumed, _, seen = watched_run(gpt2_path, tmp_path / "broken", True, stop_at_kl=ceiling, **set)
    assert seen == [kl[first]], "it resumes right before the rollout that passes the ceiling"
    assert_same_end(resumed, stopped)


def test_a_run_that_begins_above_the_kl_ceiling_is_one_line(gpt2_path, tmp_path):
    trainer = make_trainer(gpt2_path, tmp_path, stop_at_kl=0.5)
    with pytest.raises(UserError, match=r"^stop_at_kl: 0.5 is below 2, the KL that this run starts with"):
        trainer._react_to_kl(torch.tensor([1.0, 3.0]))


class LaterIsBetter(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_objective/scores"] = float(state.global_step)


def test_below_a_kl_ceiling_the_best_checkpoint_is_what_is_left(gpt2_path, tmp_path, capsys):
    set = {"eval_dataset": prompts(8), "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    free, _, _ = watched_run(gpt2_path, tmp_path / "free", callbacks=[LaterIsBetter()], **set)
    kl = {row["step"]: row["eval_objective/kl"] for row in free.state.log_history if "eval_objective/kl" in row}
    assert free.state.best_model_checkpoint.endswith(f"checkpoint-{max(kl)}")

    first, second, *_ = sorted(kl)
    assert kl[first] < kl[second]
    ceiling = (kl[first] + kl[second]) / 2
    set |= {"callbacks": [LaterIsBetter()], "stop_at_kl": ceiling}
    stopped = job(gpt2_path, tmp_path / "stopped", learning_rate=1e-2, logging_steps=4, **set)
    measured, training_kl = stopped.ceiling.measured, iter([0.0, 0.0, ceiling + 1])
    stopped.ceiling.measured = lambda _: measured(next(training_kl))
    stopped.train()
    assert stopped.state.global_step == second + 1, "the second checkpoint was there to be chosen"
    assert stopped.state.best_model_checkpoint.endswith(f"checkpoint-{first}")
    saved, (own, _) = load_file(tmp_path / "stopped" / f"checkpoint-{first}" / "model.safetensors"), weights(stopped)
    assert all(torch.equal(saved[name], own[name]) for name in saved)
    assert f"; the best checkpoint, checkpoint-{first}, is kept\n" in capsys.readouterr().out


# --- sync_ref_model -------------------------------------------------------------------------------------------------

SYNC = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 3}


class Mixes(TrainerCallback):
    """Works out for itself what the reference has to be, and says where it is not."""

    def __init__(self):
        self.trainer, self.syncs, self.wrong = None, 0, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = {n: w.detach().clone() for n, w in self.trainer.ref_model.named_parameters()}

    def on_step_end(self, args, state, control, **kwargs):
        policy, is_synced = dict(self.trainer.policy.named_parameters()), state.global_step % 3 == 0
        self.syncs += is_synced
        for name, now in self.trainer.ref_model.named_parameters():
            mix = self.before[name] * 0.75 + policy[name] * 0.25 if is_synced else self.before[name]
            if not torch.allclose(now, mix, rtol=0, atol=1e-7) or torch.equal(now, self.before[name]) == is_synced:
                self.wrong += [(state.global_step, name)]


@pytest.mark.parametrize("variant", ["value head", "own critic"])
def test_after_a_sync_the_reference_is_the_mix_tensor_by_tensor(gpt2_path, classifier_path, tmp_path, variant):
    set = {"value_model_path": classifier_path} if variant == "own critic" else {}
    trainer, mixes = make_trainer(gpt2_path, tmp_path, max_steps=7, learning_rate=1e-2, **SYNC, **set), Mixes()
    mixes.trainer = trainer
    trainer.add_callback(mixes)
    trainer.train()
    assert mixes.syncs == 2
    assert not mixes.wrong


def test_a_run_whose_reference_moves_resumes_bit_identical(gpt2_path, tmp_path):
    set = SYNC | {"num_train_epochs": 2, "learning_rate": 1e-2}
    resumed, whole = resumed_and_whole(gpt2_path, tmp_path, 10, **set)
    assert_same_end(resumed, whole)
    assert all(same(*(dict(t.ref_model.named_parameters()) for t in (whole, resumed))).values())
    with pytest.raises(UserError, match="was made with sync_ref_model: True, not False"):
        job(gpt2_path, tmp_path / "broken", num_train_epochs=2).train(resume_from_checkpoint=True)


def test_a_moving_reference_is_refused_with_lora(gpt2_path, tmp_path):
    with pytest.raises(UserError, match=r"^sync_ref_model: not with LoRA"):
        make_trainer(gpt2_path, tmp_path, **SYNC, **LORA)


# --- Engines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set", [{"value_warmup_rollouts": 1}, {"stop_at_kl": 1.0}, {"sync_ref_model": True}])
def test_what_needs_whole_weights_is_refused_under_fsdp(gpt2_path, tmp_path, monkeypatch, set):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=f"^{next(iter(set))}: not under FSDP or DeepSpeed"):
        make_trainer(gpt2_path, tmp_path, **set)
