from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bench.report import SubjectReport
from bench.statistics import (
    Interval,
    Verdict,
    block_medians,
    judge,
    median_interval,
    paired_ratio,
    signed_rank_chance,
    unpaired_ratio,
)
from engines.errors import UnstableError

Make = Callable[..., SubjectReport]


def test_intervals_are_the_same_for_the_same_seed(subject: Make) -> None:
    made = subject("a", np.random.default_rng(0).integers(1, 10**9, (30, 5)).tolist())
    assert median_interval(made, seed=1) == median_interval(made, seed=1)
    medians = block_medians(made), dict.fromkeys(range(30), 1000.0)
    assert paired_ratio(*medians, seed=1) == paired_ratio(*medians, seed=1)
    assert paired_ratio(*medians, seed=1) != paired_ratio(*medians, seed=2)


def test_the_interval_of_a_median_holds_the_median_of_all_samples(subject: Make) -> None:
    # Quick blocks hold more calls: the median of all samples is 100, that of the block medians 150.
    made = subject("a", [[100] * 50, [200] * 3] * 10)
    found = median_interval(made)
    assert (found.value, found.low, found.high) == (100, 100, 100)
    with pytest.raises(UnstableError, match="4 blocks are too few"):
        median_interval(subject("a", [[1]] * 4))


def test_an_even_split_is_the_mean_of_the_two_middle_values(subject: Make) -> None:
    found = median_interval(subject("a", [[100, 200]] * 6))
    assert (found.value, found.low, found.high) == (150, 150, 150)


def test_large_blocks_are_stood_for_by_quantiles(subject: Make) -> None:
    rng = np.random.default_rng(4)
    large = median_interval(subject("a", rng.normal(1e6, 1e4, (20, 3000)).astype(int).tolist()))
    assert large.value == pytest.approx(1e6, rel=1e-3)
    assert large.low < large.value < large.high
    assert large.high - large.low < 1000


def test_ratio_of_a_constructed_sample_cancels_what_hits_both() -> None:
    # The machine slows down threefold halfway; the candidate always takes 0.4 of the baseline.
    drift = [1.0] * 10 + [3.0] * 10
    baseline = {index: 1000 * factor for index, factor in enumerate(drift)}
    candidate = {index: 400 * factor for index, factor in enumerate(drift)}
    assert paired_ratio(baseline, candidate) == Interval(0.4, 0.4, 0.4)


def test_two_reports_cannot_cancel_what_hits_only_one(subject: Make) -> None:
    baseline = subject("a", [[1000]] * 10 + [[3000]] * 10)
    candidate = subject("a", [[400]] * 11 + [[1200]] * 9)
    unpaired = unpaired_ratio(baseline, candidate)
    assert unpaired.value == 0.2
    assert unpaired.low < 0.4 < unpaired.high
    with pytest.raises(UnstableError, match="1 blocks are too few"):
        unpaired_ratio(baseline, subject("a", [[400]]))
    with pytest.raises(UnstableError, match="the clock is too coarse"):
        unpaired_ratio(subject("a", [[0]] * 5), candidate)


def test_only_rounds_that_both_have_are_paired() -> None:
    baseline = dict.fromkeys(range(10), 100.0)
    candidate = dict.fromkeys(range(5, 15), 200.0)
    assert paired_ratio(baseline, candidate) == Interval(2.0, 2.0, 2.0)
    with pytest.raises(UnstableError, match="4 blocks are too few for an interval, 5 are needed"):
        paired_ratio(baseline, dict.fromkeys(range(6, 20), 1.0))
    with pytest.raises(UnstableError, match="the clock is too coarse"):
        paired_ratio(dict.fromkeys(range(10), 0.0), baseline)


def test_block_medians_by_round(subject: Make) -> None:
    assert block_medians(subject("a", [[1, 9, 2], [4, 6]])) == {0: 2.0, 1: 5.0}


def _simulated_rounds(true: float, rounds: int, runs: int) -> list[tuple[dict[int, float], dict[int, float]]]:
    """Rounds share a slow heavy-tailed drift; each block has a noise of 2 % of its own."""
    rng = np.random.default_rng(20261101)
    found = []
    for _ in range(runs):
        drift = np.exp(np.cumsum(rng.normal(0, 0.02, rounds)) + 0.05 * rng.standard_t(2, rounds))
        baseline = 1e6 * drift * np.exp(rng.normal(0, 0.02, rounds))
        candidate = true * 1e6 * drift * np.exp(rng.normal(0, 0.02, rounds))
        found.append((dict(enumerate(baseline.tolist())), dict(enumerate(candidate.tolist()))))
    return found


def _simulated_ratios(true: float, rounds: int, runs: int) -> list[Interval]:
    return [paired_ratio(*pair, seed=seed) for seed, pair in enumerate(_simulated_rounds(true, rounds, runs))]


def _simulated_verdicts(true: float, rounds: int, runs: int) -> list[Verdict]:
    pairs = _simulated_rounds(true, rounds, runs)
    return [
        judge(paired_ratio(*pair, seed=seed), chance=signed_rank_chance(*pair))
        for seed, pair in enumerate(pairs)
    ]


def test_the_interval_of_a_ratio_covers_the_truth_as_often_as_it_says() -> None:
    intervals = _simulated_ratios(true=1.1, rounds=40, runs=300)
    covered = sum(interval.low <= 1.1 <= interval.high for interval in intervals) / len(intervals)
    assert 0.92 <= covered <= 0.99


def test_equal_subjects_are_not_told_apart_and_a_planted_slowdown_is_found() -> None:
    same = [judge(interval) for interval in _simulated_ratios(true=1.0, rounds=40, runs=100)]
    assert same == [Verdict.NO_DIFFERENCE] * 100
    slower = [judge(interval, margin=0.01) for interval in _simulated_ratios(true=1.05, rounds=40, runs=100)]
    assert slower.count(Verdict.SLOWER) >= 95


def test_a_difference_below_the_margin_is_found_and_equals_are_rarely_called_different() -> None:
    same = _simulated_verdicts(true=1.0, rounds=40, runs=300)
    assert len(same) - same.count(Verdict.NO_DIFFERENCE) <= 6  # 1 % is expected, 2 % allowed
    small = _simulated_verdicts(true=1.02, rounds=60, runs=100)
    assert small.count(Verdict.SLIGHTLY_SLOWER) + small.count(Verdict.SLOWER) >= 95
