"""PPOTrainer against TRL 1.12's: what must be equal is, to 1e-5, and every intended difference has a test of its own.

`tests/data/trl112_reference.json` holds what TRL's own `train()` computed on small models and fixed rollouts; it names
the command that made it, and benchmarks/trl112_reference.py says what each entry is. A "row" in a test's name is one of
the table of defects in recipes/README.md.

TRL counts one position more than the completion has, where there is room: `mask_p1`, against `mask`. So our functions
are held to its numbers under its masks on every rollout, and our trainer, with its own masks, on rollouts in which no
completion leaves room for that position.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from datasets import Dataset
from trl.trainer.utils import disable_dropout_in_model

from benchmarks.trl112_reference import EOS, PAD, SCORES, WIDTH, Case, build_models, checksum, make_tokenizer
from trl_ppo import (
    PPOConfig,
    PPOTrainer,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    kl_estimate,
    token_rewards,
    whiten,
)
from trl_ppo.critic import ValueHead, ValueModel
from trl_ppo.logprobs import TokenLogprobs, add_logprobs_forward, pad_batch

DUMP = Path(__file__).parent / "data" / "trl112_reference.json"
REFERENCE = json.loads(DUMP.read_text())["cases"]
EVERY = [name for name in REFERENCE if "pad = eos" not in name]
FULL = [name for name in EVERY if "full" in name]
MIXED = [name for name in EVERY if "mixed" in name]
SAME_NAME = ("kl_estimator", "whiten_rewards", "temperature", "gamma", "lam", "kl_coef", "vf_coef")
SAME_NAME += ("cliprange_value", "missing_eos_penalty")
SHARED_TRUNK = [name for name in EVERY if REFERENCE[name]["settings"]["critic_on_policy_trunk"]]


# ---------------------------------------------------------------------------------------------------------------
# TRL's numbers as tensors, and our trainer on the same models and rollouts
# ---------------------------------------------------------------------------------------------------------------


def load(name):
    """A case of the dump: lists of numbers as tensors, except for ragged ones, and `case`, its settings."""
    recorded = dict(REFERENCE[name])
    ragged = ("prompts", "completions", "settings", "metrics", "micro_batches")
    tensors = {key: torch.tensor(value) for key, value in recorded.items() if key not in ragged and value is not None}
    return SimpleNamespace(**{**recorded, **tensors, "case": Case(**recorded["settings"])})


def without_dropout(case):
    """`build_models`, with dropout off as either trainer has it; `ValueModel` sees to its own."""
    policy, ref_model, value_model = build_models(case)
    disable_dropout_in_model(policy)
    disable_dropout_in_model(ref_model)
    return policy, ref_model, value_model


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=1e-5, atol=1e-5)


def differ(ours, theirs):
    """Where two tensors differ by more than rounding could explain."""
    return (ours - theirs).abs() > 1e-3


def words(ids):
    """A text that `make_tokenizer`'s tokenizer reads as these tokens."""
    return " ".join(f"w{i}" for i in ids)


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


class FixedRollout(PPOTrainer):
    """A PPOTrainer with the models, completions and scores of a recorded case; `folder` takes its files."""

    def __init__(self, trl, folder):
        case, self.trl = trl.case, trl
        policy, ref_model, value_model = build_models(case)
        policy.save_pretrained(folder / "policy")
        value_model.save_pretrained(folder / "critic")
        args = PPOConfig(
            output_dir=str(folder),
            value_model_path=str(folder / "critic"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            per_device_train_batch_size=2,  # not TRL's 4: it must not matter
            gradient_accumulation_steps=4,
            max_completion_length=WIDTH,
            epsilon=case.cliprange,
            **{name: trl.settings[name] for name in SAME_NAME},
        )
        super().__init__(
            str(folder / "policy"),
            lambda completions, **columns: SCORES,
            args,
            Dataset.from_dict({"prompt": [words(ids) for ids in trl.prompts]}),
            processing_class=make_tokenizer(EOS if case.pad_is_eos else PAD),
        )
        self.ref_model.load_state_dict(ref_model.state_dict())
        self.model.train()

    def _generate(self, prompts):
        return self.trl.prompts, self.trl.completions, None, [words(ids) for ids in self.trl.completions], None

    def rollout(self):
        """What the trainer stores of the rollout, for all eight completions; metrics start afresh."""
        self._metrics["train"].clear()
        return self._generate_and_score_completions([{"prompt": words(ids)} for ids in self.trl.prompts])

    def mini_batch_loss(self, rollout):
        """The loss of the whole rollout as one mini-batch, ready for `backward`."""
        self.model.zero_grad()
        return self._compute_loss(self.model, {**rollout, "num_tokens": rollout["completion_mask"].sum()})

    def metric(self, name):
        (mean,) = self._metrics["train"][name]
        return mean

    def grad_norm(self, of_critic):
        gradients = [p.grad for name, p in self.model.named_parameters() if ("critic." in name) == of_critic]
        return torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm().item()


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """Gives the trainer of a case, by `load`'s result; each is made once."""
    made = {}

    def trainer(trl):
        key = str(trl.case)
        if key not in made:
            made[key] = FixedRollout(trl, tmp_path_factory.mktemp("fidelity"))
        return made[key]

    return trainer


def scored(trl, model, critic=None):
    """`(TokenLogprobs, mask)` of the recorded completions under a model that has learnt to score."""
    batch = pad_batch(trl.prompts, trl.completions, PAD)
    mask = batch.pop("completion_mask")
    add_logprobs_forward(model, trl.case.temperature).critic = critic
    with torch.no_grad():
        return model(**batch, num_completion_tokens=mask.size(1)), mask


def replay(trainer, trl, micro, **inputs):
    """The trainer's loss of one of TRL's micro-batches, on TRL's own forward pass; metrics start afresh.

    `inputs` replaces some of what the loss reads, by name.
    """
    rows = micro["rows"]
    mask = trl.mask[rows]
    forward = TokenLogprobs(
        logprobs=torch.tensor(micro["new_logprobs"]) * mask,
        state_values=torch.tensor(micro["vpred"]) * mask,
        entropy=torch.zeros(mask.shape),
    )
    trainer._metrics["train"].clear()
    inputs = {
        "completion_mask": mask,
        "old_logprobs": trl.logprobs[rows] * mask,
        "old_values": trl.values[rows] * mask,
        "advantages": trl.advantages[rows],
        "returns": trl.returns[rows],
        "num_tokens": mask.sum(),
        **inputs,
    }
    with mock.patch.object(trainer, "_forward", return_value=forward):
        return trainer._compute_loss(trainer.model, inputs)


def entropy_everywhere(trl):
    """The policy's entropy at every position that predicts one of a completion's columns, padding included (B, C)."""
    batch = pad_batch(trl.prompts, trl.completions, PAD)
    width = batch.pop("completion_mask").size(1)
    positions = batch["attention_mask"].cumsum(1) - batch["attention_mask"]
    with torch.no_grad():
        logits = without_dropout(trl.case)[0](**batch, position_ids=positions).logits[:, -width - 1 : -1]
    return torch.distributions.Categorical(logits=logits / trl.case.temperature).entropy()


def room_after_end(trl):
    """Rows of the completions that leave room for one more position, and the index of their last token."""
    lengths = torch.tensor([len(ids) for ids in trl.completions])
    rows = (lengths < trl.mask.size(1)).nonzero().squeeze(1)
    return rows, lengths[rows] - 1


# ---------------------------------------------------------------------------------------------------------------
# Equal
# ---------------------------------------------------------------------------------------------------------------


def test_the_dump_is_small_and_comes_from_trl_1_12_on_the_models_built_here():
    assert DUMP.stat().st_size < 200_000
    assert json.loads(DUMP.read_text())["versions"]["trl"] == "1.12.0"
    for name in REFERENCE:
        trl = load(name)
        assert checksum(*build_models(trl.case)) == pytest.approx(trl.checksum.item(), rel=1e-7)


@pytest.mark.parametrize("name", EVERY)
def test_log_probs_and_reference_log_probs_are_trls(name):
    trl = load(name)
    policy, ref_model, _ = without_dropout(trl.case)
    for model, theirs in ((policy, trl.logprobs), (ref_model, trl.ref_logprobs)):
        ours, mask = scored(trl, model)
        assert mask.equal(trl.mask)
        assert_close(ours.logprobs[mask.bool()], theirs[mask.bool()])
    assert differ(trl.logprobs, trl.ref_logprobs).any()


@pytest.mark.parametrize("name", EVERY)
def test_values_of_a_separate_critic_are_trls(name, tmp_path):
    trl = load(name)
    policy, _, value_model = without_dropout(trl.case)
    value_model.save_pretrained(tmp_path)
    ours, mask = scored(trl, policy, ValueModel(tmp_path, policy.config.vocab_size))
    assert_close(ours.state_values[mask.bool()], trl.values[mask.bool()])


@pytest.mark.parametrize("name", SHARED_TRUNK)
def test_a_value_head_on_the_policy_gives_the_values_of_trls_critic_on_a_copy_of_its_trunk(name):
    trl = load(name)
    policy, _, value_model = without_dropout(trl.case)
    head = ValueHead(policy.config.hidden_size)
    head.weight.data.copy_(value_model.score.weight)
    ours, mask = scored(trl, policy, head)
    assert_close(ours.state_values[mask.bool()], trl.values[mask.bool()])


@pytest.mark.parametrize("name", EVERY)
def test_kl_estimates_are_trls_on_every_position_padding_included(name):
    trl = load(name)
    assert_close(kl_estimate(trl.logprobs, trl.ref_logprobs, trl.case.kl_estimator), trl.kl)


@pytest.mark.parametrize("name", EVERY)
def test_under_trls_masks_rewards_whitening_and_gae_are_trls(name):
    trl = load(name)
    rewards = token_rewards(trl.scores, trl.kl, trl.mask_p1, trl.case.kl_coef)
    assert_close(rewards, trl.rewards)
    if trl.case.whiten_rewards:
        rewards = whiten(rewards, trl.mask_p1, shift_mean=False)
        assert_close(rewards, trl.whitened_rewards)
    advantages, returns = gae(rewards, trl.values, trl.mask_p1, trl.case.gamma, trl.case.lam)
    assert_close(advantages, trl.raw_advantages)
    assert_close(returns, trl.returns)
    assert_close(whiten(advantages, trl.mask), trl.advantages)


@pytest.mark.parametrize("name", EVERY)
def test_under_trls_masks_both_losses_and_clip_fractions_are_trls_before_and_after_the_first_update(name):
    trl = load(name)
    clipped = 0
    for micro in trl.micro_batches:
        rows = micro["rows"]
        mask, mask_p1 = trl.mask[rows], trl.mask_p1[rows]
        policy_loss, policy_clipped = clipped_policy_loss(
            torch.tensor(micro["new_logprobs"]),
            trl.logprobs[rows],
            trl.advantages[rows],
            trl.case.cliprange,
            trl.case.cliprange,
        )
        value_loss, value_clipped = clipped_value_loss(
            torch.tensor(micro["vpred"]), trl.values[rows], trl.returns[rows], trl.case.cliprange_value
        )
        assert_close(masked_mean(policy_loss, mask), micro["pg_loss"])
        assert_close(masked_mean(value_loss, mask_p1), micro["vf_loss"])
        assert_close(masked_mean(policy_clipped, mask), micro["pg_clipfrac"])
        assert_close(masked_mean(value_clipped, mask_p1), micro["vf_clipfrac"])
        clipped += (micro["pg_clipfrac"] > 0) + (micro["vf_clipfrac"] > 0)
    assert clipped == 4  # both kinds, in both micro-batches after the update


@pytest.mark.parametrize("name", FULL)
def test_a_rollout_without_room_after_its_completions_is_trls_from_the_weights_to_the_advantages(name, trainers):
    trl = load(name)
    ours = trainers(trl).rollout()
    assert_close(ours["old_logprobs"], trl.logprobs)
    assert_close(ours["old_values"], trl.values)
    assert_close(ours["returns"], trl.returns)
    assert_close(ours["advantages"], trl.advantages)


@pytest.mark.parametrize("name", FULL)
def test_the_first_update_on_a_rollout_without_room_has_trls_losses_statistics_and_gradients(name, trainers):
    trl = load(name)
    trainer = trainers(trl)
    loss = trainer.mini_batch_loss(trainer.rollout())
    loss.backward()

    def theirs(statistic):
        return pytest.approx(sum(micro[statistic] for micro in trl.micro_batches[:2]) / 2, rel=1e-5, abs=1e-5)

    assert loss.item() == theirs("loss")
    assert trainer.metric("loss/policy_avg") == theirs("pg_loss")
    assert trainer.metric("loss/value_avg") == theirs("vf_loss")
    assert trainer.metric("policy/entropy_avg") == theirs("entropy")
    assert trainer.metric("policy/approxkl_avg") == theirs("approxkl")
    assert trainer.metric("val/ratio") == theirs("ratio")
    assert trainer.grad_norm(of_critic=False) == pytest.approx(trl.policy_grad_norm.item(), rel=1e-5)
    assert trainer.grad_norm(of_critic=True) == pytest.approx(trl.value_grad_norm.item(), rel=1e-5)


@pytest.mark.parametrize("name", FULL)
def test_later_updates_on_a_rollout_without_room_have_trls_losses_and_statistics(name, trainers):
    trl = load(name)
    trainer = trainers(trl)
    for micro in trl.micro_batches:
        assert_close(replay(trainer, trl, micro), micro["loss"])
        for metric, statistic in {
            "loss/policy_avg": "pg_loss",
            "loss/value_avg": "vf_loss",
            "policy/clipfrac_avg": "pg_clipfrac",
            "val/clipfrac_avg": "vf_clipfrac",
            "policy/approxkl_avg": "approxkl",
            "val/ratio": "ratio",
        }.items():
            assert trainer.metric(metric) == pytest.approx(micro[statistic], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_objectives_are_logged_as_trl_logs_them(name, trainers):
    trl = load(name)
    trainer = trainers(trl)
    trainer.rollout()
    for metric in ("objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward"):
        assert trainer.metric(metric) == pytest.approx(trl.metrics[metric], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in EVERY if REFERENCE[name]["settings"]["missing_eos_penalty"]])
def test_the_missing_eos_penalty_is_taken_from_the_same_completions(name, trainers):
    trl = load(name)
    finished = torch.tensor([ids[-1] == EOS for ids in trl.completions])
    assert_close(trainers(trl)._shape_scores(torch.tensor(SCORES), finished), trl.scores)
    assert not finished.all()


# ---------------------------------------------------------------------------------------------------------------
# Different, and meant to be
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXED)
def test_row_9_trl_puts_the_score_one_position_after_the_end_and_we_put_it_on_the_end(name):
    trl = load(name)
    ours = token_rewards(trl.scores, trl.kl, trl.mask, trl.case.kl_coef)
    rows, ends = room_after_end(trl)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    price = -trl.case.kl_coef * trl.kl[rows, ends]
    assert_close(trl.rewards[rows, ends + 1], trl.scores[rows])
    assert_close(trl.rewards[rows, ends], price)
    assert_close(ours[rows, ends + 1], torch.zeros(5))
    assert_close(ours[rows, ends], price + trl.scores[rows])
    moved = trl.rewards.clone()
    moved[rows, ends], moved[rows, ends + 1] = moved[rows, ends] + moved[rows, ends + 1], torch.zeros(5)
    assert_close(ours, moved)


@pytest.mark.parametrize("name", MIXED)
def test_row_9_with_trls_score_moved_back_and_its_values_ending_with_the_completion_our_rollout_follows(name, trainers):
    trl = load(name)
    rewards = trl.rewards.clone()
    rows, ends = room_after_end(trl)
    rewards[rows, ends] += rewards[rows, ends + 1]
    if trl.case.whiten_rewards:
        rewards = whiten(rewards, trl.mask, shift_mean=False)
    advantages, returns = gae(rewards, trl.values, trl.mask, trl.case.gamma, trl.case.lam)
    ours = trainers(trl).rollout()
    assert_close(ours["returns"], returns)
    assert_close(ours["advantages"], whiten(advantages, trl.mask))
    assert differ(ours["returns"], trl.returns)[rows].any(1).all()


@pytest.mark.parametrize("name", MIXED)
def test_row_9_in_trl_the_end_token_gets_its_score_discounted_and_mixed_with_a_value_after_the_end(name):
    trl = load(name)
    rows, ends = room_after_end(trl)
    gamma, lam = trl.case.gamma, trl.case.lam
    rewards = trl.whitened_rewards if trl.case.whiten_rewards else trl.rewards
    score, late_value = rewards[rows, ends + 1], trl.values[rows, ends + 1]
    moved = rewards * trl.mask
    moved[rows, ends] += score
    ours, _ = gae(moved, trl.values, trl.mask, gamma, lam)
    credited = gamma * (lam * score + (1 - lam) * late_value)
    assert_close(trl.raw_advantages[rows, ends] - ours[rows, ends], credited - score)
    assert differ(credited, score).sum() >= 4  # by chance one may agree


@pytest.mark.parametrize("name", MIXED)
def test_row_9_trl_keeps_a_value_after_the_end_and_we_keep_none(name, trainers):
    trl = load(name)
    rows, ends = room_after_end(trl)
    assert differ(trl.values[rows, ends + 1], torch.zeros(5)).all()
    ours = trainers(trl).rollout()
    assert ours["old_values"][trl.mask == 0].eq(0).all()
    assert ours["returns"][trl.mask == 0].eq(0).all()


@pytest.mark.parametrize("name", MIXED)
def test_row_9_trl_trains_the_critic_on_the_position_after_the_end_and_we_do_not(name, trainers):
    trl = load(name)
    trainer = trainers(trl)
    after_end = trl.mask_p1 - trl.mask
    for micro in trl.micro_batches[:2]:
        rows = micro["rows"]
        late_errors = 0.5 * (torch.tensor(micro["vpred"]) - trl.returns[rows]) ** 2 * after_end[rows]
        without = (micro["vf_loss"] * trl.mask_p1[rows].sum() - late_errors.sum()) / trl.mask[rows].sum()
        loss = replay(trainer, trl, micro)
        assert_close(torch.tensor(trainer.metric("loss/value_avg")).float(), without)
        assert_close(loss, micro["pg_loss"] + trl.case.vf_coef * without)
        assert differ(without, torch.tensor(micro["vf_loss"])) == after_end[rows].any()
    assert after_end.sum() == 5


@pytest.mark.parametrize("name", [name for name in MIXED if REFERENCE[name]["settings"]["whiten_rewards"]])
def test_row_9_trl_whitens_rewards_with_the_position_after_the_end_and_we_over_the_completion_alone(name):
    trl = load(name)
    ours = whiten(token_rewards(trl.scores, trl.kl, trl.mask, trl.case.kl_coef), trl.mask, shift_mean=False)
    assert ours[trl.mask.bool()].var().item() == pytest.approx(1, abs=1e-5)
    assert trl.whitened_rewards[trl.mask_p1.bool()].var().item() == pytest.approx(1, abs=1e-5)
    assert abs(trl.whitened_rewards[trl.mask.bool()].var().item() - 1) > 1e-2


@pytest.mark.parametrize("name", MIXED)
def test_trls_log_probs_are_1_on_padding_and_ours_are_0(name, trainers):
    trl = load(name)
    assert trl.logprobs[trl.mask == 0].eq(1).all()
    assert trainers(trl).rollout()["old_logprobs"][trl.mask == 0].eq(0).all()


@pytest.mark.parametrize("name", MIXED)
def test_row_13_trls_ratio_and_approxkl_count_padding_and_ours_do_not(name, trainers):
    trl = load(name)
    trainer = trainers(trl)
    for micro in trl.micro_batches[2:]:
        replay(trainer, trl, micro)
        real = trl.mask[micro["rows"]].float().mean().item()  # the share of positions that are not padding
        assert real < 1
        # Padding has a ratio of 1 and a KL of 0.
        assert real * trainer.metric("val/ratio") + (1 - real) == pytest.approx(micro["ratio"], rel=1e-5)
        assert real * trainer.metric("policy/approxkl_avg") == pytest.approx(micro["approxkl"], rel=1e-5)
        assert abs(trainer.metric("val/ratio") - micro["ratio"]) > 1e-3
        assert abs(trainer.metric("policy/approxkl_avg") - micro["approxkl"]) > 1e-3


@pytest.mark.parametrize("name", MIXED)
def test_row_13_trls_entropy_counts_padding_and_ours_does_not(name, trainers):
    trl = load(name)
    trainer = trainers(trl)
    trainer.mini_batch_loss(trainer.rollout())
    everywhere = entropy_everywhere(trl)
    theirs = sum(micro["entropy"] for micro in trl.micro_batches[:2]) / 2
    assert theirs == pytest.approx(everywhere.mean().item(), rel=1e-5)
    assert trainer.metric("policy/entropy_avg") == pytest.approx(masked_mean(everywhere, trl.mask).item(), rel=1e-5)
    assert abs(trainer.metric("policy/entropy_avg") - theirs) > 1e-3


@pytest.mark.parametrize("name", MIXED)
def test_trl_averages_means_of_micro_batches_and_we_average_over_the_mini_batchs_tokens(name, trainers):
    trl = load(name)
    trainer = trainers(trl)
    micros = trl.micro_batches[2:]  # before the first update whitened advantages add up to 0 anyway
    losses, counts = [micro["pg_loss"] for micro in micros], [trl.mask[micro["rows"]].sum().item() for micro in micros]
    with mock.patch.object(trainer.args, "vf_coef", 0):  # the critic's loss differs by row 9 as well
        ours = sum(replay(trainer, trl, micro, num_tokens=sum(counts)).item() for micro in micros)
    assert ours == pytest.approx(sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts), abs=1e-5)
    assert abs(ours - sum(losses) / 2) > 1e-3


def test_row_8_where_pad_is_eos_trl_drops_the_end_token_and_we_count_it(trainers):
    name = "gpt2 mixed k1"
    different, same = load(name), load(f"{name}, pad = eos")
    assert different.prompts == same.prompts
    lengths = torch.tensor([len(ids) for ids in same.completions])
    finished = torch.tensor([ids[-1] == EOS for ids in same.completions]).int()
    assert same.mask.sum(1).equal(lengths - finished)
    ours = trainers(same).rollout()
    assert ours["completion_mask"].sum(1).equal(lengths)
    assert_close(ours["old_logprobs"], different.logprobs * different.mask)


def test_row_8_where_pad_is_eos_trl_reads_the_score_one_token_early_and_an_immediate_end_from_the_prompt():
    last = torch.tensor([len(ids) for ids in REFERENCE["gpt2 mixed k1"]["completions"]]) - 1
    assert load("gpt2 mixed k1").score_read_at.equal(last)
    assert load("gpt2 mixed k1, pad = eos").score_read_at.tolist() == [-1, 0, 1, 2, 3, 4, 5, 5]
    assert last.tolist() == [0, 1, 2, 3, 4, 5, 5, 5]


@pytest.mark.parametrize("name", [name for name in EVERY if REFERENCE[name]["settings"]["missing_eos_penalty"]])
def test_trl_logs_scores_after_the_missing_eos_penalty_and_we_before_it(name, trainers):
    trl = load(name)
    trainer = trainers(trl)
    trainer.rollout()
    cut_off = sum(ids[-1] != EOS for ids in trl.completions)
    penalty = trl.case.missing_eos_penalty * cut_off / len(trl.completions)
    assert trainer.metric("objective/scores") - penalty == pytest.approx(trl.metrics["objective/scores"], abs=1e-5)
    assert penalty > 0
