from __future__ import annotations

import pytest

from edge_dsc.infer.live_page import RecentRate, TimeHistogram


def test_quantiles_are_right_to_one_percent_and_the_largest_exactly() -> None:
    times = TimeHistogram()
    for value in range(1, 1001):
        times.add(value / 10)
    assert times.quantile(0.5) == pytest.approx(50.0, rel=0.011)
    assert times.quantile(0.99) == pytest.approx(99.0, rel=0.011)
    assert times.quantile(1.0) == pytest.approx(100.0, rel=0.011)
    assert times.to_dict()["max_ms"] == 100.0
    assert len(times._buckets) < 400


def test_few_samples_give_no_p99_and_none_give_nothing() -> None:
    times = TimeHistogram()
    assert times.to_dict() == {"median_ms": None, "p99_ms": None, "max_ms": None}
    times.add(0.0)
    assert times.to_dict() == {"median_ms": 0.0, "p99_ms": None, "max_ms": 0.0}


def test_the_rate_is_that_of_the_last_answers() -> None:
    rate = RecentRate(window=5)
    assert rate.per_second() is None
    for now in (0.0, 100.0, 100.5, 101.0, 101.5, 102.0):
        rate.add(now)
    assert rate.per_second() == 2.0
