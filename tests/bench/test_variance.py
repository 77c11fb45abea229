from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.statistics import build_spreads
from bench.tables import render_report

Make = Callable[..., Any]


def simulated(subject: Make, report: Make, between: float, seed: int, builds: int = 6) -> Any:
    """Builds whose logarithms scatter by ``between``; blocks by 1 %, whole rounds by 10 %."""
    rng = np.random.default_rng(seed)
    rounds = rng.normal(0, 0.1, 60)
    subjects = []
    for index in range(builds):
        logs = np.log(1e7) + rng.normal(0, between) + rounds + rng.normal(0, 0.01, 60)
        blocks = [[round(value)] * 3 for value in np.exp(logs)]
        name = f"a (build {index + 1})" if index else "a"
        subjects.append(subject(name, blocks, description={"build_of": "a"}))
    return report(*subjects)


def test_the_two_spreads_are_told_apart(subject: Make, report: Make) -> None:
    found = [build_spreads(simulated(subject, report, 0.05, seed))[0] for seed in range(20)]
    assert np.mean([spread.within for spread in found]) == pytest.approx(0.01, rel=0.05)
    assert np.sqrt(np.mean([spread.between**2 for spread in found])) == pytest.approx(0.05, rel=0.2)
    assert all(spread.builds == 6 and spread.chance < 1e-6 for spread in found)


def test_equal_builds_are_called_different_as_often_as_the_chance_says(subject: Make, report: Make) -> None:
    found = [build_spreads(simulated(subject, report, 0.0, seed, builds=3))[0] for seed in range(100)]
    assert sum(spread.chance < 0.05 for spread in found) <= 11
    assert np.median([spread.between for spread in found]) < 0.002


def test_known_numbers(subject: Make, report: Make) -> None:
    description = {"build_of": "a"}
    made = report(
        subject("a", [[1000]] * 6, description=description),
        subject("a (build 2)", [[1100]] * 6, description=description),
        subject("b", [[5]] * 6),
    )
    (spread,) = build_spreads(made)
    assert spread.builds == 2 and spread.chance < 1e-20
    assert spread.slowest == pytest.approx(1.1)
    assert spread.between == pytest.approx(np.log(1.1) / 2**0.5)
    assert spread.within == pytest.approx(0, abs=1e-9)
    assert "Spread within a build and between builds" in render_report(made)


def test_single_builds_and_few_rounds_tell_nothing(subject: Make, report: Make) -> None:
    one = subject("a", [[1000]] * 6, description={"build_of": "a"})
    few = subject("a (build 2)", [[1000]] * 4, description={"build_of": "a"})
    assert build_spreads(report(one)) == build_spreads(report(one, few)) == ()
    assert "Spread within" not in render_report(report(one))
