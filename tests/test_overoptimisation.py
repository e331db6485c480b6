"""Score against √KL: the fitted curves of Gao et al. 2023, and what a report says of them."""

import numpy as np
import pytest

from eval import overoptimisation
from eval.figures import pictures
from eval.tables import tables
from page_results import make_results

KL = [0.0, 0.5, 1.0, 4.0, 9.0, 16.0]


@pytest.mark.parametrize(
    ("kind", "curve", "peak"),
    [
        ("tuned", lambda d: d * (0.9 - 0.3 * np.log(d)), np.exp(0.9 / 0.3 - 1) ** 2),
        ("best_of_n", lambda d: d * (0.8 - 0.1 * d), 16.0),
    ],
)
def test_a_curve_of_the_papers_form_is_found_again_with_its_peak(kind, curve, peak):
    gains = [0.0, *(float(curve(np.sqrt(kl))) for kl in KL[1:])]
    found = overoptimisation.fit(kind, KL, gains)
    assert (found["alpha"], found["beta"]) == pytest.approx({"tuned": (0.9, 0.3), "best_of_n": (0.8, 0.1)}[kind])
    assert found["n"] == 5, "the start says nothing"
    assert found["rmse"] == pytest.approx(0, abs=1e-12)
    assert found["peak_kl"] == pytest.approx(peak)
    around = overoptimisation.gain(kind, found, np.array([0.99, 1.0, 1.01]) * peak)
    assert around.argmax() == 1


def test_a_gain_that_only_rises_has_no_peak():
    assert overoptimisation.fit("best_of_n", [1, 4, 9], [1.0, 2.0, 3.0])["peak_kl"] is None
    assert overoptimisation.peak("tuned", 1.0, -0.1) is None


def test_two_points_are_not_fitted():
    assert overoptimisation.fit("tuned", [0.0, 1.0, 4.0], [0.0, 1.0, 2.0]) is None


def test_the_report_of_a_sweep_names_where_each_reward_is_highest():
    results = make_results()
    found = overoptimisation.overoptimisation(results)
    for name, curves in found.items():
        means = {run["name"]: run["metrics"]["rewards"][name]["mean"]["tuned"]["mean"] for run in results["sweep"]}
        assert curves["best"] == max(means, key=means.get)
        assert curves["best_of_n"]["points"][0] == (0.0, 0.0)
    (table,) = [table for table in tables(results) if table.title == "Over-optimisation"]
    assert [row[:3] for row in table.rows] == [
        ["reward", "PPO", found["reward"]["best"]],
        ["reward", "best-of-n", "–"],
        ["judge", "PPO", found["judge"]["best"]],
        ["judge", "best-of-n", "–"],
    ]
    (picture,) = [picture for picture in pictures(results) if picture.name == "overoptimisation"]
    assert f"judge is highest at {found['judge']['best']}" in picture.description


def test_a_comparison_without_a_sweep_has_no_such_table_or_picture():
    results = make_results() | {"sweep": None}
    assert "Over-optimisation" not in [table.title for table in tables(results)]
    assert "overoptimisation" not in [picture.name for picture in pictures(results)]
