from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bench.statistics import (
    Interval,
    Tail,
    Verdict,
    allowed_slower,
    block_medians,
    build_spreads,
    judge,
    median_interval,
    paired_ratio,
    signed_rank_chance,
    spread,
    summarise,
    tail,
    unpaired_ratio,
)
from bench.tables import render_report
from engines.errors import UnstableError

Make = Callable[..., Any]


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


LAWS = {  # sampler of n numbers, and its quantile function: the lightest and the heaviest tail
    "normal": (lambda rng, n: rng.normal(0, 1, n), stats.norm.ppf),
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


@pytest.mark.slow
def test_the_interval_of_a_ratio_covers_the_truth_as_often_as_it_says() -> None:
    intervals = _simulated_ratios(true=1.1, rounds=40, runs=300)
    covered = sum(interval.low <= 1.1 <= interval.high for interval in intervals) / len(intervals)
    assert 0.92 <= covered <= 0.99


@pytest.mark.slow
def test_equal_subjects_are_not_told_apart_and_a_planted_slowdown_is_found() -> None:
    same = [judge(interval) for interval in _simulated_ratios(true=1.0, rounds=40, runs=100)]
    assert same == [Verdict.NO_DIFFERENCE] * 100
    slower = [judge(interval, margin=0.01) for interval in _simulated_ratios(true=1.05, rounds=40, runs=100)]
    assert slower.count(Verdict.SLOWER) >= 95


@pytest.mark.slow
def test_a_difference_below_the_margin_is_found_and_equals_are_rarely_called_different() -> None:
    same = _simulated_verdicts(true=1.0, rounds=40, runs=300)
    assert len(same) - same.count(Verdict.NO_DIFFERENCE) <= 6  # 1 % is expected, 2 % allowed
    small = _simulated_verdicts(true=1.02, rounds=60, runs=100)
    assert small.count(Verdict.SLIGHTLY_SLOWER) + small.count(Verdict.SLOWER) >= 95


def test_a_published_example() -> None:
    # Darwin's pairs of crossed and self-fertilised maize, eighths of an inch: Fisher, The Design of
    # Experiments (1935), table 3; the exact two-sided chance for W- = 24 of 15 pairs is 0.0413.
    differences = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    baseline = dict.fromkeys(range(15), 1.0)
    candidate = {index: float(np.exp(value / 1000)) for index, value in enumerate(differences)}
    assert signed_rank_chance(baseline, candidate) == pytest.approx(0.0413, abs=5e-5)
    assert signed_rank_chance(candidate, baseline) == pytest.approx(0.0413, abs=5e-5)


def test_all_rounds_on_one_side_have_the_chance_of_so_many_equal_coins() -> None:
    baseline = dict.fromkeys(range(10), 100.0)
    candidate = {index: 101.0 + index for index in range(10)}
    assert signed_rank_chance(baseline, candidate) == 2 / 2**10


def test_rounds_without_a_difference_and_without_a_partner_are_left_out() -> None:
    baseline = dict.fromkeys(range(20), 100.0)
    candidate = {**dict.fromkeys(range(10), 100.0), 10: 101.0, 11: 102.0, 99: 1.0}
    assert signed_rank_chance(baseline, candidate) == 0.5
    assert signed_rank_chance(baseline, baseline) == 1.0


def test_equals_are_told_apart_as_often_as_the_chance_says() -> None:
    rng = np.random.default_rng(7)
    below, above = (np.exp(rng.standard_t(2, (400, 40)) * 0.02) for _ in range(2))
    chances = [
        signed_rank_chance(dict(enumerate(first)), dict(enumerate(second)))
        for first, second in zip(below, above, strict=True)
    ]
    assert 0.03 <= np.mean(np.array(chances) < 0.05) <= 0.07


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
