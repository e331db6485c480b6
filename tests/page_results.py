"""Results files for the tests of the page, made by the evaluation's own code from numbers drawn here."""

import numpy as np

from eval.best_of_n import compare_at_equal_kl, measure_best_of_n
from eval.metrics import Samples, describe_samples, measure, rouge_scores, summarise_runs
from eval.pairs import calibrate
from eval.prompts import Prompts
from eval.report import SCHEMA_VERSION

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">' & $x$ style=\"color:red\""
)
WORDS = ("the", "film", "was", "a", "great", "and", "terrible", "story", "with", "an", "awful", "plot", "but")


def _texts(rng: np.random.Generator, n: int) -> list[str]:
    return [" ".join(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(n)]


def _samples(rng: np.random.Generator, n: int, shift: float, references: list[str]) -> Samples:
    texts = _texts(rng, n)
    samples = Samples([[1] * len(text.split()) for text in texts], texts, list(rng.random(n) < 0.5))
    samples.ended = [bool(ended) for ended in samples.ended]
    samples.scores = {"reward": rng.normal(shift, 1, n).tolist(), "judge": rng.normal(shift / 2, 1, n).tolist()}
    samples.base_logprobs = (-2 * samples.tokens()).tolist()
    samples.rouge = rouge_scores(references, texts)
    return samples


def _run(rng: np.random.Generator, n: int) -> dict:
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "python -m eval.compare --base base --tuned tuned",
        "created": "2026-01-01T00:00:00+00:00",
        "seed": 0,
        "settings": {"n_prompts": n, "n_samples": 5, "temperature": 1.0, "max_new_tokens": 8},
        "prompts": {"source": "data", "split": "test", "column": "prompt", "n": n, "sha256": "0" * 64},
        "models": {"base": {"path": "runs/base", "sha256": "1" * 64}},
        "rewards": {
            "reward": {"path": "runs/reward", "sha256": "2" * 64, "judge": False},
            "judge": {"path": "module:function", "sha256": None, "judge": True},
        },
        "pairs": {"rewards": {name: calibrate(rng.normal(1, 2, 80)) for name in ("reward", "judge")}},
        "versions": {"python": "3.11"},
        "hardware": {"cpu": "cpu", "threads": 1, "gpu": None},
        "git_commit": None,
        "wall_seconds": 1.0,
        "peak_memory_bytes": {"process": 2**20, "gpu": None},
        "resumed": 0,
    }


def make_results(n: int = 40) -> dict:
    """Results of kind `comparison` with every optional part; sample 0's tuned completion is hostile."""
    rng = np.random.default_rng(0)
    prompts = Prompts(_texts(rng, n), {}, references=_texts(rng, n))
    base = _samples(rng, n, 0, prompts.references)
    sweep = []
    for step in (10, 20, None):
        tuned = _samples(rng, n, 1.5 if step is None else step / 20, prompts.references)
        tuned.texts[0] = HOSTILE
        tuned.kl = rng.normal(3 if step is None else step / 10, 0.5, n).tolist()
        name = "final" if step is None else f"step-{step}"
        sweep.append({"name": name, "step": step, "model": {"path": "runs/tuned", "sha256": "3" * 64}})
        sweep[-1]["metrics"] = measure({"base": base, "tuned": tuned}, 0)
    scores = {"reward": rng.normal(0, 1, (n, 8)), "judge": rng.normal(0, 1, (n, 8))}
    kl = float(np.mean(tuned.kl))
    best = measure_best_of_n(scores, [1, 2, 4, 8], "reward", 0)
    compared = {
        name: compare_at_equal_kl(scores["reward"], np.array(tuned.scores[name]), kl, [1, 2, 4, 8], 0, values)
        for name, values in scores.items()
    }
    best |= {"at_equal_kl": compared["reward"], "judges": {"judge": compared["judge"]}}
    run = _run(rng, n)
    return run | {
        "kind": "comparison",
        "models": run["models"] | {"tuned": sweep[-1]["model"]},
        "metrics": sweep[-1]["metrics"],
        "best_of_n": best,
        "sweep": sweep,
        "training": {"source": "runs/tuned", "curves": {"objective/kl": [[1, 0.0], [2, 1.0], [3, 1.5]]}},
        "samples": describe_samples(prompts, {"base": base, "tuned": tuned}),
    }


def make_runs_results(n: int = 20) -> dict:
    """Results of kind `runs`, of three of them."""
    rng = np.random.default_rng(1)
    references = _texts(rng, n)
    base = _samples(rng, n, 0, references)
    runs = []
    for seed in range(3):
        tuned = _samples(rng, n, 1, references)
        tuned.kl = rng.normal(2, 1, n).tolist()
        metrics = measure({"base": base, "tuned": tuned}, 0)
        model = {"path": f"runs/seeds/{seed}", "sha256": None}
        runs.append({"name": f"seed-{seed}", "step": None, "model": model, "metrics": metrics})
    return _run(rng, n) | {
        "kind": "runs",
        "runs": runs,
        "over_runs": summarise_runs(runs),
        "best_of_n": None,
    }
