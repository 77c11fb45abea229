from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from bench.report import SubjectReport
from bench.statistics import Interval, Tail, Verdict, allowed_slower, judge, spread, summarise, tail
from engines.errors import UnstableError

Make = Callable[..., SubjectReport]


def test_summary_of_known_samples(subject: Make) -> None:
    blocks = [[10 * block + call for call in range(1, 11)] for block in range(10)]  # 1..100
    summary = summarise(subject("a", blocks))
    assert (summary.count, summary.minimum, summary.maximum) == (100, 1, 100)
    assert (summary.mean, summary.median) == (50.5, 50.5)
    assert summary.median_interval is not None
    assert summary.median_interval.value == 50.5
    assert summary.median_interval.low < 50.5 < summary.median_interval.high
    # Of 100 calls at most 3 may be slower than the true p90, so the third slowest bounds it.
    assert summary.tails == {90.0: Tail(value=90, bound=98), 95.0: None, 99.0: None, 99.9: None}


def test_no_interval_from_fewer_than_five_blocks(subject: Make) -> None:
    assert summarise(subject("a", [[1, 2], [3]])).median_interval is None
    with pytest.raises(UnstableError, match="a has no samples") as caught:
        summarise(subject("a", [], error="RuntimeError: gone"))
    assert caught.value.remedy == "RuntimeError: gone"


@pytest.mark.parametrize(("percentile", "needed"), [(90.0, 64), (95.0, 130), (99.0, 662), (99.9, 6636)])
def test_each_percentile_needs_its_number_of_samples(percentile: float, needed: int) -> None:
    assert tail(np.arange(needed - 1), percentile) is None
    found = tail(np.arange(needed), percentile)
    assert found is not None
    assert found.bound == needed - 1
    assert found.value < found.bound


def test_the_discarded_count_is_the_one_loadgen_prints() -> None:
    # A published MLPerf log: 2,048 queries, p90: "Would discard 172 highest latency queries".
    assert allowed_slower(2048, 90.0) - 1 == 172


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_large_samples_do_not_underflow(percentile: float) -> None:
    count = 1_000_000
    expected = count * (1 - percentile / 100)
    deviation = (expected * percentile / 100) ** 0.5
    assert allowed_slower(count, percentile) == pytest.approx(expected - 2.3263 * deviation, abs=3)


def test_nearest_rank_has_no_rounding_slip() -> None:
    found = tail(np.arange(1, 10_001), 99.9)
    assert found is not None
    assert found.value == 9990


def test_the_bound_holds_in_at_least_99_of_100_heavy_tailed_samples() -> None:
    rng = np.random.default_rng(1)
    true = 0.05 ** (-1 / 1.5)  # p95 of a Pareto law with shape 1.5
    samples = np.sort(rng.random((2000, 300)) ** (-1 / 1.5), axis=1)
    rank = 300 - allowed_slower(300, 95.0)
    assert np.mean(samples[:, rank] >= true) >= 0.985


LAWS = {  # sampler of n numbers, and its quantile function
    "normal": (lambda rng, n: rng.normal(0, 1, n), stats.norm.ppf),
    "log-normal": (lambda rng, n: rng.lognormal(0, 1, n), stats.lognorm(1).ppf),
    "exponential": (lambda rng, n: rng.exponential(1, n), stats.expon.ppf),
    "Pareto 1.1": (lambda rng, n: 1 + rng.pareto(1.1, n), stats.pareto(1.1).ppf),
    "Cauchy": (lambda rng, n: rng.standard_cauchy(n), stats.cauchy.ppf),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("percentile", "count"), [(90.0, 200), (99.0, 1000), (99.9, 8000)])
def test_a_bound_holds_for_every_law_as_often_as_it_says(law: str, percentile: float, count: int) -> None:
    draw, quantile = LAWS[law]
    rng = np.random.default_rng(20261101)
    true, runs = quantile(percentile / 100), 400
    bounds = [tail(np.sort(draw(rng, count)), percentile) for _ in range(runs)]
    held = sum(found is not None and found.bound >= true for found in bounds)
    assert held >= runs - 10  # 4 failures are expected; 11 or more of 400 have a chance of 0.3 %


def test_the_bound_is_the_incomplete_beta_rule() -> None:
    from scipy.special import betainc

    for count, percentile in ((64, 90.0), (2048, 90.0), (5000, 99.0), (20_000, 99.9)):
        most = allowed_slower(count, percentile)
        share = percentile / 100
        assert betainc(count - most, most + 1, share) <= 0.01 < betainc(count - most - 1, most + 2, share)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.031, 1.2, Verdict.SLOWER),
        (1.029, 1.2, Verdict.NO_DIFFERENCE),
        (0.5, 0.97, Verdict.FASTER),
        (0.5, 0.972, Verdict.NO_DIFFERENCE),
        (0.5, 2.0, Verdict.NO_DIFFERENCE),
    ],
)
def test_a_verdict_needs_the_whole_interval_beyond_the_margin(
    low: float, high: float, verdict: Verdict
) -> None:
    assert judge(Interval((low + high) / 2, low, high), margin=0.03) is verdict


@pytest.mark.parametrize(
    ("low", "high", "chance", "verdict"),
    [
        (1.001, 1.04, 0.009, Verdict.SLIGHTLY_SLOWER),
        (0.96, 0.999, 0.009, Verdict.SLIGHTLY_FASTER),
        (1.001, 1.04, 0.01, Verdict.NO_DIFFERENCE),
        (1.001, 1.04, None, Verdict.NO_DIFFERENCE),
        (1.0, 1.04, 0.001, Verdict.NO_DIFFERENCE),
        (1.031, 1.2, 0.5, Verdict.SLOWER),
        (0.5, 0.97, 0.001, Verdict.FASTER),
    ],
)
def test_a_difference_within_the_margin_is_slight_where_both_interval_and_test_see_it(
    low: float, high: float, chance: float | None, verdict: Verdict
) -> None:
    assert judge(Interval((low + high) / 2, low, high), 0.03, chance) is verdict


def test_spread_of_known_values() -> None:
    assert spread([100, 100, 100]) == 0
    assert spread([90, 100, 110]) == pytest.approx(0.14826)
