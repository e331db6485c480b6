"""Best-of-n, the baseline that needs no training: of n samples of the base, the one with the highest reward.

From N samples of each prompt the expected result for every n ≤ N follows without bias: the sample of rank i (of N,
from below) is the best of n random ones in C(i−1, n−1) of C(N, n) choices, so it gets that weight. Other rewards of
the picked samples get the same weights.

Its KL to the base is at most log n − (n−1)/n (Stiennon et al. 2020; that this is an upper bound, and often a loose
one, is Beirami et al. 2024). The tuned model is compared where its own KL equals that bound, which favours it.
"""

import math

import numpy as np

from eval.intervals import interval, paired_difference


def kl_bound(n: int) -> float:
    """The most that best-of-n can differ from the base, in nats per completion."""
    return math.log(n) - (n - 1) / n


def rank_weights(total: int, n: int) -> np.ndarray:
    """The chance (total,) that the sample of each rank, lowest first, is the best of n drawn without replacement."""
    return np.array([math.comb(rank, n - 1) / math.comb(total, n) for rank in range(total)])


def expected_best(chosen_by: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """The expected value (prompts,) of the sample that the best of n is by `chosen_by`; both (prompts, N), n ≤ N."""
    order = np.argsort(chosen_by, axis=1, kind="stable")
    return np.take_along_axis(values, order, axis=1) @ rank_weights(values.shape[1], n)


def measure_best_of_n(scores: dict[str, np.ndarray], sizes: list[int], reward: str, seed: int) -> dict:
    """Every reward's mean at each n of `sizes`, picked by `reward`; `scores` are (prompts, N) by reward."""
    picked = scores[reward]
    points = []
    for n in sizes:
        means = {name: interval(expected_best(picked, values, n), seed=seed) for name, values in scores.items()}
        points.append({"n": n, "kl": kl_bound(n), "rewards": means})
    return {"reward": reward, "n_prompts": len(picked), "samples_per_prompt": picked.shape[1], "points": points}


def compare_at_equal_kl(
    picked: np.ndarray, tuned: np.ndarray, kl: float, sizes: list[int], seed: int, values: np.ndarray | None = None
) -> dict:
    """The tuned model against best-of-n where the KL of both is `kl`; beyond the largest n, against that n.

    `picked` (prompts, N) are the base's scores by the picking reward, `values` those by which the two are compared if
    these are another's, a judge's; `tuned` (prompts,) are the tuned model's. Between two n the score is interpolated
    linearly in KL. `verdict` is "ahead", "behind", or "level" where the interval of the paired difference holds 0.
    """
    values, largest = picked if values is None else values, max(sizes)
    reached = kl <= kl_bound(largest)
    n = next((n for n in range(1, largest) if kl_bound(n) <= kl < kl_bound(n + 1)), largest) if kl > 0 else 1
    best = expected_best(picked, values, n)
    if reached and n < largest:
        share = (max(kl, 0.0) - kl_bound(n)) / (kl_bound(n + 1) - kl_bound(n))
        best = (1 - share) * best + share * expected_best(picked, values, n + 1)
    difference = paired_difference(best, tuned, seed=seed)
    verdict = "ahead" if difference["low"] > 0 else "behind" if difference["high"] < 0 else "level"
    estimates = {"best_of_n": interval(best, seed=seed), "tuned": interval(tuned, seed=seed), "difference": difference}
    return {"kl": kl, "n": n, "equal_kl": reached, "verdict": verdict, **estimates}


def tuned_on_its_prompts(results: dict) -> dict[str, dict]:
    """The tuned model's mean by each reward, and its KL as "kl", on the prompts that best-of-n had."""
    sides = [sample["tuned"] for sample in results["samples"][: results["best_of_n"]["n_prompts"]]]
    values = {name: [side["scores"][name] for side in sides] for name in results["rewards"]}
    values["kl"] = [side["kl"] for side in sides]
    return {name: interval(np.array(each), seed=results["seed"]) for name, each in values.items()}


def verdict_sentence(found: dict, by: str) -> str:
    """What `compare_at_equal_kl` found by the reward or judge that `by` describes, in a sentence."""
    best = f"best-of-n at the same KL (n ≈ {found['n']})" if found["equal_kl"] else f"best-of-{found['n']}"
    who = {
        "ahead": f"the tuned model is ahead of {best}",
        "behind": f"{best} is ahead of the tuned model",
        "level": f"the tuned model and {best} cannot be told apart",
    }[found["verdict"]]
    difference = "{mean:+.3f} [{low:+.3f}, {high:+.3f}], n = {n}".format(**found["difference"])
    means = f"{found['tuned']['mean']:.3f} tuned, {found['best_of_n']['mean']:.3f} best-of-n"
    return f"By {by}, {who}: {means}, difference {difference}."


def distance_sentence(found: dict) -> str:
    """How far from the base the two that were compared are."""
    if found["equal_kl"]:
        return f"Both are {found['kl']:.2f} nats from the base."
    return (
        f"Best-of-{found['n']} stays within {kl_bound(found['n']):.2f} nats of the base; the tuned model is "
        f"{found['kl']:.2f} from it."
    )
