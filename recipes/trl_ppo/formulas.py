"""The formulas of PPO for language models, as pure functions of tensors.

Shapes: B completions of at most C tokens. A `mask` (B, C) is 1 on the tokens that count: the completion's own, its end
token included.

Sources: Schulman et al. 2016 (arXiv:1506.02438) and 2017 (1707.06347), Ziegler et al. 2019 (1909.08593).
"""

import math

import torch


def kl_estimate(logprobs, ref_logprobs, estimator="k1"):
    """Per-token estimate of KL(policy‖reference) on tokens that the policy sampled, in nats; (B, C) → (B, C).

    `k1` is unbiased and may be negative. `k3` is unbiased and never negative, with less variance (Schulman,
    "Approximating KL Divergence", 2020), but as a penalty inside the reward its gradient is not that of the KL
    (arXiv:2510.01555, 2512.21852).
    """
    log_ratio = ref_logprobs - logprobs
    return -log_ratio if estimator == "k1" else torch.expm1(log_ratio) - log_ratio


def token_rewards(scores, kl, mask, kl_coef):
    """r_t = −β·kl_t, plus the score on the last token that counts; scores (B,), kl and mask (B, C) → (B, C)."""
    rewards = -kl_coef * kl * mask
    last = mask.sum(1).long() - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016) over the tokens that count.

    A_t = δ_t + γλ·A_{t+1} with δ_t = r_t + γ·V_{t+1} − V_t, and V = A = 0 after the last token, where padding is.
    All (B, C), λ one number or one for each completion (B,); returns `(advantages, returns)`, both 0 on padding.
    """
    values, rewards = values * mask, rewards * mask
    advantage = next_value = torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
        advantages[:, t] = advantage
    return advantages, advantages + values


def lambdas(mask, lam, lam_value=None, alpha=None):
    """λ of the policy's advantages, and that of the critic's targets (decoupled in VC-PPO, arXiv:2503.01491).

    With `alpha` the policy's is 1 − 1/(α·l) for a completion of l tokens, at least 0 (VAPO, arXiv:2504.05118), as a
    tensor (B,): the weights λ^t of the temporal differences then add up to about α·l.
    """
    of_policy = lam if alpha is None else (1 - 1 / (alpha * mask.sum(1))).clamp(min=0)
    return of_policy, lam if lam_value is None else lam_value


def decoupled_gae(rewards, values, mask, gamma, lam, lam_value):
    """The advantages of `gae` with `lam`, and its returns with `lam_value`; one pass where both are the same."""
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    return advantages, returns if lam_value is lam else gae(rewards, values, mask, gamma, lam_value)[1]


def whiten(x, mask, shift_mean=True, reduce=lambda sums: sums):
    """Scale `x` (B, C) to unit variance, and to zero mean if asked, over the tokens that count on every rank.

    `reduce` sums a tensor over ranks. The variance is the unbiased one (n − 1).
    """
    total, count = reduce(torch.stack([(x * mask).sum(), mask.sum()]))
    mean = total / count
    variance = reduce(((x - mean) ** 2 * mask).sum()) / (count - 1).clamp(min=1)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def clipped_policy_loss(logprobs, old_logprobs, advantages, epsilon_low=0.2, epsilon_high=0.2):
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated; (B, C) → per-token loss and where it clipped."""
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return torch.max(unclipped, clipped), (clipped > unclipped).float()


def clipped_value_loss(values, old_values, returns, cliprange=0.2):
    """½·max of the squared error and that of the value held within `cliprange` of the old one; (B, C) per token."""
    clipped_values = old_values + (values - old_values).clamp(-cliprange, cliprange)
    unclipped, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    return 0.5 * torch.max(unclipped, clipped), (clipped > unclipped).float()


def importance_weights(logprobs, sampler_logprobs, low=None, high=None):
    """The policy's probability of each token over the sampler's, held within [low, high]; all (B, C).

    Another engine samples from a distribution that differs a little from the policy's, by rounding and kernels. A
    token's policy loss times this weight is corrected for it; the bound keeps its variance small (truncated importance
    sampling: Yao et al. 2025, https://fengyao.notion.site/off-policy-rl). 1 where the sampler gave none (NaN).
    """
    return (logprobs - sampler_logprobs).nan_to_num(nan=0.0).exp().clamp(low, high)


def next_kl_coef(kl_coef, kl, target, horizon, n):
    """β ← β·(1 + clip(KL/target − 1, ±0.2)·n/horizon) after n episodes of mean KL `kl` (Ziegler et al. 2019, §2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * n / horizon)


def explained_variance(values, returns, mask):
    """1 − Var(returns − values) / Var(returns) over the tokens that count; (B, C) → scalar, at most 1."""
    real = mask.bool()
    return 1 - (returns - values)[real].var() / returns[real].var().clamp(min=1e-8)


def normalise(scores, n, total, squares):
    """(score − mean) / standard deviation, by the running sums of n scores: Σ score and Σ score²; as given if n = 0."""
    if not n:
        return scores
    variance = (squares - total**2 / n) / max(n - 1, 1)
    return (scores - total / n) / max(math.sqrt(max(variance, 0.0)), 1e-8)
