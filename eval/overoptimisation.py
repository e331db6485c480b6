"""How far reward and judges rise with √KL before they fall, and the curves of Gao et al. 2023 (arXiv:2210.10760).

With d = √KL, KL in nats per completion, the gain over the base is fitted by least squares as d·(α − β·log d) for the
checkpoints of a PPO run and as d·(α − β·d) for best-of-n (their eqs. 1 and 2). Where β > 0 the first peaks at
d = exp(α/β − 1), the second at d = α/(2β). Both are linear in α and β.
"""

import math

import numpy as np

TERMS = {"tuned": np.log, "best_of_n": lambda d: d}  # what β multiplies, besides d


def gain(kind: str, fitted: dict, kl: np.ndarray) -> np.ndarray:
    """The fitted gain over the base at each KL, above 0."""
    d = np.sqrt(kl)
    return d * (fitted["alpha"] - fitted["beta"] * TERMS[kind](d))


def fit(kind: str, kl: list[float], gains: list[float]) -> dict | None:
    """α, β, n, the root mean square error and the KL of the peak; None below three points.

    The peak is None without one, and where it lies beyond ten times the largest KL, which no point bears out. A
    point without KL says nothing, since every curve starts at 0 there.
    """
    points = [(x, y) for x, y in zip(kl, gains, strict=True) if x > 0]
    if len(points) < 3:
        return None
    x, y = np.array(points).T
    d = np.sqrt(x)
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([d, -d * TERMS[kind](d)], axis=1), y, rcond=None)
    fitted = {"alpha": float(alpha), "beta": float(beta), "n": len(points)}
    error = float(np.sqrt(np.mean((gain(kind, fitted, x) - y) ** 2)))
    top = peak(kind, float(alpha), float(beta))
    return fitted | {"rmse": error, "peak_kl": None if top is None or top > 10 * max(x) else top}


def peak(kind: str, alpha: float, beta: float) -> float | None:
    """The KL at which the fitted curve is highest, in nats; None where it only rises, or falls from the start."""
    if beta <= 0 or (kind == "best_of_n" and alpha <= 0):
        return None
    d = alpha / (2 * beta) if kind == "best_of_n" else math.exp(min(alpha / beta - 1, 300.0))
    return d * d


def overoptimisation(results: dict) -> dict:
    """For each reward: where the sweep's checkpoints and best-of-n stand, their fits, and the checkpoint that is best.

    `{name: {"tuned": {"points", "fit"}, "best_of_n": … or None, "best": checkpoint}}`; a point is `(KL, gain)`.
    """
    found = {}
    for name in results["rewards"]:
        base = results["metrics"]["rewards"][name]["mean"]["base"]["mean"]
        swept = [
            (run["metrics"]["kl"]["tuned"]["mean"], run["metrics"]["rewards"][name]["mean"]["tuned"]["mean"] - base)
            for run in results["sweep"]
        ]
        best = max(range(len(swept)), key=lambda index: swept[index][1])
        found[name] = {"tuned": _curve("tuned", swept), "best_of_n": None, "best": results["sweep"][best]["name"]}
        if results["best_of_n"]:
            own = results["best_of_n"]["points"]
            start = next((point["rewards"][name]["mean"] for point in own if point["n"] == 1), base)
            picked = [(point["kl"], point["rewards"][name]["mean"] - start) for point in own]
            found[name]["best_of_n"] = _curve("best_of_n", picked)
    return found


def _curve(kind: str, points: list[tuple[float, float]]) -> dict:
    return {"points": points, "fit": fit(kind, *map(list, zip(*points, strict=True)))}
