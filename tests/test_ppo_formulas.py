"""PPO's formulas, on numbers small enough to work out by hand or against a definition written another way."""

import math
import threading

import pytest
import torch

from trl_ppo import (
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    kl_estimate,
    lambdas,
    next_kl_coef,
    token_rewards,
    whiten,
)
from trl_ppo.critic import ValueHead
from trl_ppo.logprobs import pad_batch, take_rows

MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def test_kl_estimators_agree_in_expectation_with_the_exact_divergence():
    policy = torch.tensor([0.5, 0.3, 0.2])
    reference = torch.tensor([0.2, 0.5, 0.3])
    exact = (policy * (policy / reference).log()).sum()
    for estimator in ("k1", "k3"):
        estimates = kl_estimate(policy.log(), reference.log(), estimator)
        assert (policy * estimates).sum().item() == pytest.approx(exact.item(), abs=1e-6)


def test_k3_is_never_negative_and_k1_can_be():
    logprobs, ref_logprobs = torch.tensor([-2.0, -1.0]), torch.tensor([-1.0, -2.0])
    assert (kl_estimate(logprobs, ref_logprobs, "k3") > 0).all()
    assert kl_estimate(logprobs, ref_logprobs, "k1").tolist() == [-1.0, 1.0]


def test_row_9_the_score_lands_on_the_last_real_token_and_kl_is_charged_on_every_one():
    rewards = token_rewards(torch.tensor([10.0, 20.0]), torch.ones(2, 3), MASK, kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, -0.5, 9.5], [19.5, 0.0, 0.0]]


def test_gae_is_the_discounted_sum_of_temporal_differences():
    torch.manual_seed(0)
    rewards, values, mask = torch.randn(2, 5), torch.randn(2, 5), torch.ones(2, 5)
    gamma, lam = 0.9, 0.8
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    following = torch.cat([values[:, 1:], torch.zeros(2, 1)], dim=1)
    deltas = rewards + gamma * following - values
    for t in range(5):
        discounts = torch.tensor([(gamma * lam) ** k for k in range(5 - t)])
        assert torch.allclose(advantages[:, t], (discounts * deltas[:, t:]).sum(1), atol=1e-6)
    assert torch.allclose(returns, advantages + values)


def test_gae_with_lambda_1_gives_the_return_to_go_and_ignores_what_follows_the_end():
    rewards = torch.tensor([[1.0, 2.0, 3.0], [4.0, 100.0, 100.0]])
    values = torch.tensor([[0.3, -0.2, 0.5], [0.1, 100.0, 100.0]])
    advantages, returns = gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    assert torch.allclose(returns, torch.tensor([[6.0, 5.0, 3.0], [4.0, 0.0, 0.0]]), atol=1e-6)
    assert advantages[1, 1:].tolist() == [0.0, 0.0]


def test_whitening_gives_mean_0_and_variance_1_over_what_counts():
    torch.manual_seed(0)
    x, mask = torch.randn(4, 6) * 3 + 2, (torch.rand(4, 6) > 0.3).float()
    whitened = whiten(x, mask)[mask.bool()]
    assert whitened.mean().item() == pytest.approx(0, abs=1e-6)
    assert whitened.var().item() == pytest.approx(1, abs=1e-5)
    unshifted = whiten(x, mask, shift_mean=False)[mask.bool()]
    assert unshifted.mean().item() == pytest.approx(x[mask.bool()].mean().item(), abs=1e-5)
    assert unshifted.var().item() == pytest.approx(1, abs=1e-5)


def test_row_12_two_ranks_of_4_whiten_as_one_rank_of_8():
    torch.manual_seed(0)
    x, mask = torch.randn(8, 5) * 2 + 1, (torch.rand(8, 5) > 0.4).float()
    barrier, shared, parts = threading.Barrier(2), {}, {}

    def rank(index):
        def reduce(sums):
            shared[index] = sums
            barrier.wait()
            total = shared[0] + shared[1]
            barrier.wait()
            return total

        rows = slice(4 * index, 4 * index + 4)
        parts[index] = whiten(x[rows], mask[rows], reduce=reduce)

    threads = [threading.Thread(target=rank, args=(index,)) for index in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert torch.allclose(torch.cat([parts[0], parts[1]]), whiten(x, mask), atol=1e-6)


def test_policy_loss_has_no_gradient_where_the_ratio_left_the_clip_range_for_the_better():
    logprobs = torch.tensor([[0.5, -0.5, 0.5, -0.5, 0.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0]])
    loss, clipped = clipped_policy_loss(logprobs, torch.zeros(1, 5), advantages)
    loss.sum().backward()
    assert logprobs.grad[0, :2].tolist() == [0.0, 0.0]  # better than clipped: no more to gain
    assert (logprobs.grad[0, 2:] != 0).all()
    assert clipped.tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0]]
    assert loss[0, 4].item() == -1.0


def test_each_epsilon_bounds_the_ratio_on_its_own_side():
    ratio = torch.tensor([1.4, 1.6, 0.95, 0.8])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, clipped = clipped_policy_loss(ratio.log(), torch.zeros(4), advantages, epsilon_low=0.1, epsilon_high=0.5)
    assert loss.tolist() == pytest.approx([-1.4, -1.5, 0.95, 0.9])
    assert clipped.tolist() == [0.0, 1.0, 0.0, 1.0]


def test_value_loss_is_half_the_larger_of_both_squared_errors():
    loss, clipped = clipped_value_loss(
        values=torch.tensor([1.0, 0.1]), old_values=torch.zeros(2), returns=torch.tensor([1.0, 1.0]), cliprange=0.2
    )
    assert loss.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 0.9**2])
    assert clipped.tolist() == [1.0, 0.0]


def test_row_32_kl_coef_moves_towards_the_target_by_at_most_a_fifth_of_n_over_horizon():
    assert next_kl_coef(0.2, kl=6, target=6, horizon=100, n=10) == pytest.approx(0.2)
    assert next_kl_coef(0.2, kl=6.6, target=6, horizon=100, n=10) == pytest.approx(0.2 * 1.01)
    assert next_kl_coef(0.2, kl=100, target=6, horizon=100, n=10) == pytest.approx(0.2 * 1.02)
    assert next_kl_coef(0.2, kl=0, target=6, horizon=100, n=10) == pytest.approx(0.2 * 0.98)


def test_value_head_starts_at_the_published_spread_and_with_bias_0():
    head = ValueHead(4095, seed=0)
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(4096), rel=0.05)
    assert head.bias.item() == 0
    assert torch.equal(head.weight, ValueHead(4095, seed=0).weight)


def test_a_padded_batch_has_prompts_on_the_left_and_completions_on_the_right():
    batch = pad_batch([[1, 2], [3]], [[4], [5, 6]], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 4, 0], [0, 3, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert batch["completion_mask"].tolist() == [[1, 0], [1, 1]]


def test_taking_rows_drops_columns_that_are_padding_in_all_of_them():
    batch = pad_batch([[1, 2, 3], [4]], [[5], [6, 7]], pad_token_id=0)
    first, second = take_rows(batch, torch.tensor([0])), take_rows(batch, torch.tensor([1]))
    assert first["input_ids"].tolist() == [[1, 2, 3, 5]]
    assert first["completion_mask"].tolist() == [[1]]
    assert second["input_ids"].tolist() == [[4, 6, 7]]
    assert take_rows(batch, torch.tensor([0, 1]))["input_ids"].tolist() == batch["input_ids"].tolist()


def test_lambda_grows_with_a_completions_length_and_that_of_the_critics_targets_is_its_own():
    mask = torch.zeros(3, 200)
    mask[0, :200], mask[1, :40], mask[2, :1] = 1, 1, 1
    of_policy, of_value = lambdas(mask, lam=0.95, alpha=0.05)
    assert of_policy.tolist() == pytest.approx([0.9, 0.5, 0.0])  # 1 − 1/10, 1 − 1/2, and never below 0
    assert of_value == 0.95
    assert lambdas(mask, lam=0.95) == (0.95, 0.95)
    assert lambdas(mask, lam=0.95, lam_value=0.0) == (0.95, 0.0)


def test_gae_takes_a_lambda_for_each_completion():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.25, 0.75], [0.5, 0.25, 0.75]])
    # Temporal differences of both: −0.25, 0.5, 0.25.
    advantages, returns = gae(rewards, values, torch.ones(2, 3), gamma=1.0, lam=torch.tensor([0.0, 0.5]))
    assert advantages.tolist() == [[-0.25, 0.5, 0.25], [0.0625, 0.625, 0.25]]
    assert returns.tolist() == [[0.25, 0.75, 1.0], [0.5625, 0.875, 1.0]]
