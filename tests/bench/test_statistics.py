from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bench.report import SubjectReport
from bench.statistics import (
    Interval,
    Tail,
    Verdict,
    allowed_slower,
    block_medians,
    bootstrap_median,
    judge,
    paired_ratio,
    spread,
    summarise,
    tail,
    unpaired_ratio,
)
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


def test_intervals_are_the_same_for_the_same_seed() -> None:
    values = list(np.random.default_rng(0).normal(100, 5, 30))
    assert bootstrap_median(values, seed=1) == bootstrap_median(values, seed=1)
    assert bootstrap_median(values, seed=1) != bootstrap_median(values, seed=2)


def test_ratio_of_a_constructed_sample_cancels_what_hits_both() -> None:
    # The machine slows down threefold halfway; the candidate always takes 0.4 of the baseline.
    drift = [1.0] * 10 + [3.0] * 10
    baseline = {index: 1000 * factor for index, factor in enumerate(drift)}
    candidate = {index: 400 * factor for index, factor in enumerate(drift)}
    assert paired_ratio(baseline, candidate) == Interval(0.4, 0.4, 0.4)
    unpaired = unpaired_ratio(baseline, candidate)
    assert unpaired.high - unpaired.low > 0.5


def test_only_rounds_that_both_have_are_paired() -> None:
    baseline = dict.fromkeys(range(10), 100.0)
    candidate = dict.fromkeys(range(5, 15), 200.0)
    assert paired_ratio(baseline, candidate) == Interval(2.0, 2.0, 2.0)
    with pytest.raises(UnstableError, match="4 blocks are too few for an interval, 5 are needed"):
        paired_ratio(baseline, dict.fromkeys(range(6, 20), 1.0))
    with pytest.raises(UnstableError, match="the clock is too coarse"):
        paired_ratio(dict.fromkeys(range(10), 0.0), baseline)


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


def test_spread_of_known_values() -> None:
    assert spread([100, 100, 100]) == 0
    assert spread([90, 100, 110]) == pytest.approx(0.14826)


def test_block_medians_by_round(subject: Make) -> None:
    assert block_medians(subject("a", [[1, 9, 2], [4, 6]])) == {0: 2.0, 1: 5.0}


def _simulated_ratios(true: float, rounds: int, runs: int) -> list[Interval]:
    """Rounds share a slow heavy-tailed drift; each block has a noise of 2 % of its own."""
    rng = np.random.default_rng(20261101)
    found = []
    for seed in range(runs):
        drift = np.exp(np.cumsum(rng.normal(0, 0.02, rounds)) + 0.05 * rng.standard_t(2, rounds))
        baseline = 1e6 * drift * np.exp(rng.normal(0, 0.02, rounds))
        candidate = true * 1e6 * drift * np.exp(rng.normal(0, 0.02, rounds))
        pair = dict(enumerate(baseline.tolist())), dict(enumerate(candidate.tolist()))
        found.append(paired_ratio(*pair, seed=seed))
    return found


def test_the_interval_of_a_ratio_covers_the_truth_as_often_as_it_says() -> None:
    intervals = _simulated_ratios(true=1.1, rounds=40, runs=300)
    covered = sum(interval.low <= 1.1 <= interval.high for interval in intervals) / len(intervals)
    assert 0.92 <= covered <= 0.99


def test_equal_subjects_are_not_told_apart_and_a_planted_slowdown_is_found() -> None:
    same = [judge(interval) for interval in _simulated_ratios(true=1.0, rounds=40, runs=100)]
    assert same == [Verdict.NO_DIFFERENCE] * 100
    slower = [judge(interval, margin=0.01) for interval in _simulated_ratios(true=1.05, rounds=40, runs=100)]
    assert slower.count(Verdict.SLOWER) >= 95
