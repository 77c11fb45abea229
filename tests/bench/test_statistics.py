from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from scipy import stats

from bench.report import SubjectReport
from bench.statistics import (
    Interval,
    PairedRatio,
    Tail,
    Verdict,
    allowed_slower,
    block_medians,
    build_spreads,
    judge,
    log_medians,
    log_turns,
    median_interval,
    paired_ratio,
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


def test_the_interval_of_a_median_holds_the_median_of_all_samples(subject: Make) -> None:
    # Quick blocks hold more calls: the median of all samples is 100, that of the block medians 150.
    made = subject("a", [[100] * 50, [200] * 3] * 10)
    found = median_interval(made)
    assert (found.value, found.low, found.high) == (100, 100, 100)
    with pytest.raises(UnstableError, match="4 blocks are too few"):
        median_interval(subject("a", [[1]] * 4))


def test_the_interval_of_a_median_is_students_over_the_openings(subject: Make) -> None:
    made = subject("a", [[value] for value in (90, 110, 100, 100, 110, 90, 120, 120)], openings=4)
    logs = np.log([[90, 110], [100, 100], [110, 90], [120, 120]]).mean(axis=1)
    half = stats.t.ppf(0.975, 3) * logs.std(ddof=1) / 2
    found = median_interval(made)
    assert found.value == 105
    assert (found.low, found.high) == pytest.approx((105 * np.exp(-half), 105 * np.exp(half)))


def test_ratio_of_a_constructed_sample_cancels_what_hits_both(subject: Make) -> None:
    # The machine slows down threefold halfway; the candidate always takes 0.4 of the baseline.
    drift = [1] * 10 + [3] * 10
    baseline = subject("a", [[1000 * factor] for factor in drift])
    candidate = subject("b", [[400 * factor] for factor in drift])
    found = paired_ratio(baseline, candidate)
    assert (found.interval.value, found.interval.low, found.interval.high) == pytest.approx((0.4, 0.4, 0.4))
    assert found.within == pytest.approx(0, abs=1e-9) and found.between == pytest.approx(0, abs=1e-9)


def test_a_paired_ratio_is_the_one_way_random_effects_model(subject: Make) -> None:
    rng = np.random.default_rng(5)
    openings, rounds = 6, 8
    effects = rng.normal(0, 0.01, (openings, 1))
    logs = (0.03 + effects + rng.normal(0, 0.02, (openings, rounds))).ravel()
    baseline = subject("a", [[10**9]] * openings * rounds, openings=openings)
    candidate = subject("b", [[round(1e9 * np.exp(value))] for value in logs], openings=openings)
    found = paired_ratio(baseline, candidate)
    cells = logs.reshape(openings, rounds)
    centres = np.median(cells, axis=1)
    test = stats.ttest_1samp(centres, 0)
    assert found.chance == pytest.approx(test.pvalue, rel=1e-6)
    assert (found.interval.low, found.interval.high) == pytest.approx(np.exp(test.confidence_interval(0.95)))
    assert found.interval.value == pytest.approx(np.exp(centres.mean()))
    assert found.openings == openings
    within = 1.4826 * np.median(np.abs(cells - centres[:, None]))
    assert found.within == pytest.approx(within, rel=1e-6)
    explained = np.pi / 2 * within**2 / rounds
    assert found.between**2 == pytest.approx(max(0, centres.var(ddof=1) - explained), rel=1e-5)
    assert (found.lowest, found.highest) == pytest.approx((np.exp(centres.min()), np.exp(centres.max())))


def with_turns(made: SubjectReport, turns: Sequence[Sequence[int] | None]) -> SubjectReport:
    blocks = [
        replace(block, turns_ns=None if found is None else np.array(found))
        for block, found in zip(made.blocks, turns, strict=True)
    ]
    return replace(made, blocks=tuple(blocks))


def test_turns_beside_each_other_cancel_what_changes_within_a_round(subject: Make) -> None:
    # In each round another number of turns is slow for both, so the medians of the blocks say nothing of the ratio.
    slow = [[1] * (9 - count) + [3] * count for count in (2, 7, 4, 6, 3, 5)]
    baseline = with_turns(subject("a", [[100]] * 6), [[100 * factor for factor in one] for one in slow])
    candidate = with_turns(subject("b", [[300]] * 6), [[110 * factor for factor in one] for one in slow])
    found = paired_ratio(baseline, candidate)
    assert (found.interval.value, found.interval.low, found.interval.high) == pytest.approx((1.1, 1.1, 1.1))


def test_a_turn_that_only_one_subject_lost_does_not_move_its_opening(subject: Make) -> None:
    baseline = with_turns(subject("a", [[100]] * 5), [[100, 100, 100]] * 5)
    candidate = with_turns(subject("b", [[100]] * 5), [[100, 900, 100]] * 5)
    assert paired_ratio(baseline, candidate).interval.value == 1.0


def test_turns_without_samples_are_left_out_and_unlike_rounds_count_as_one(subject: Make) -> None:
    ones = subject("a", [[100]] * 5)
    baseline = with_turns(ones, [[100, 0], [100, 100], [100], None, [0, 0]])
    candidate = with_turns(ones, [[200, 200], [0, 300], [400, 400], [500], [600, 600]])
    assert [np.exp(logs).round().tolist() for logs in log_turns(baseline, candidate)] == [
        [[100], [200]],
        [[100], [300]],
        *[[[100], [100]]] * 3,
    ]


def test_more_rounds_do_not_narrow_what_openings_differ_by(subject: Make) -> None:
    # Each opening has its own ratio, and its rounds agree on it to the nanosecond.
    def width(rounds: int) -> float:
        ratios = [ratio for ratio in (1010, 990, 1005, 995, 1000) for _ in range(rounds)]
        baseline = subject("a", [[1000]] * len(ratios))
        found = paired_ratio(baseline, subject("b", [[ratio] for ratio in ratios]))
        assert found.within == 0
        return found.interval.high - found.interval.low

    assert width(2) == pytest.approx(width(40)) == pytest.approx(0.0196, abs=1e-4)


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


def test_two_reports_are_compared_by_welchs_interval_of_their_openings(subject: Make) -> None:
    rng = np.random.default_rng(6)
    logs = [rng.normal(np.log(1e9), scale, 12) for scale in (0.02, 0.05)]
    made = [subject("a", [[round(value)] for value in np.exp(part)], openings=6) for part in logs]
    found = unpaired_ratio(*made)
    means = [part.reshape(6, 2).mean(axis=1) for part in logs]
    expected = stats.ttest_ind(means[1], means[0], equal_var=False).confidence_interval(0.95)
    assert np.log(found.high / found.low) == pytest.approx(expected.high - expected.low, rel=1e-6)
    assert found.value == pytest.approx(np.median(np.exp(logs[1])) / np.median(np.exp(logs[0])))


def test_equal_times_without_spread_have_a_ratio_without_width(subject: Make) -> None:
    one = subject("a", [[100]] * 10)
    assert unpaired_ratio(one, one) == Interval(1.0, 1.0, 1.0)
    assert paired_ratio(one, one).chance == 1.0
    assert paired_ratio(one, subject("b", [[101]] * 10)).chance == 0.0


def test_only_rounds_that_both_have_are_paired(subject: Make) -> None:
    def rounds(first: int, count: int, value: int) -> Any:
        made = subject("a", [[1]] * first + [[value]] * count)
        return replace(made, blocks=made.blocks[first:])

    found = paired_ratio(rounds(0, 10, 100), rounds(5, 10, 200))
    assert (found.interval.low, found.interval.high) == pytest.approx((2.0, 2.0))
    with pytest.raises(UnstableError, match="4 blocks are too few for an interval, 5 are needed"):
        paired_ratio(rounds(0, 10, 100), rounds(6, 10, 200))
    with pytest.raises(UnstableError, match="the clock is too coarse"):
        paired_ratio(rounds(0, 10, 0), rounds(0, 10, 100))


def test_what_was_opened_once_is_cut_into_ten_runs_of_rounds(subject: Make) -> None:
    once = subject("a", [[100 + index] for index in range(25)], openings=1)
    assert [len(logs) for logs in log_medians(once)] == [2, 3] * 5
    assert [len(logs) for logs in log_medians(subject("a", [[1]] * 7, openings=1))] == [1] * 7
    assert [len(logs) for logs in log_medians(subject("a", [[1]] * 7, openings=3))] == [3, 2, 2]
    assert paired_ratio(once, once).openings == 1


def test_block_medians_by_round(subject: Make) -> None:
    assert block_medians(subject("a", [[1, 9, 2], [4, 6]])) == {0: 2.0, 1: 5.0}


def _simulated_pairs(subject: Make, true: float, rounds: int, runs: int, between: float) -> list[PairedRatio]:
    """Openings differ by ``between``, rounds share a slow drift, each block has a heavy-tailed noise of its own."""
    rng = np.random.default_rng(20261101)
    found = []
    for _ in range(runs):
        drift = np.cumsum(rng.normal(0, 0.02, rounds))
        made = []
        for factor in (1.0, true):
            opening = np.repeat(rng.normal(0, between, 10), rounds // 10)
            logs = np.log(factor * 1e6) + drift + opening + 0.005 * rng.standard_t(3, rounds)
            made.append(subject("a", [[round(value)] for value in np.exp(logs)], openings=10))
        found.append(paired_ratio(*made))
    return found


def _verdicts(pairs: list[PairedRatio]) -> list[Verdict]:
    return [judge(pair.interval, chance=pair.chance) for pair in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("between", [0.0, 0.007])
def test_the_interval_of_a_ratio_covers_the_truth_as_often_as_it_says(subject: Make, between: float) -> None:
    pairs = _simulated_pairs(subject, true=1.1, rounds=40, runs=600, between=between)
    covered = sum(pair.interval.low <= 1.1 <= pair.interval.high for pair in pairs) / len(pairs)
    assert 0.93 <= covered <= 0.97


@pytest.mark.slow
def test_equals_are_rarely_called_different_and_planted_slowdowns_are_found(subject: Make) -> None:
    same = _verdicts(_simulated_pairs(subject, true=1.0, rounds=40, runs=400, between=0.007))
    assert len(same) - same.count(Verdict.NO_DIFFERENCE) <= 8  # 1 % is expected, 2 % allowed
    large = _verdicts(_simulated_pairs(subject, true=1.05, rounds=40, runs=100, between=0.007))
    assert large.count(Verdict.SLOWER) >= 95
    small = _verdicts(_simulated_pairs(subject, true=1.02, rounds=60, runs=100, between=0.007))
    assert small.count(Verdict.SLIGHTLY_SLOWER) + small.count(Verdict.SLOWER) >= 95


def simulated(subject: Make, report: Make, between: float, seed: int, builds: int = 6) -> Any:
    """Builds whose logarithms scatter by ``between``; openings by 1 %, whole rounds by 10 %."""
    rng = np.random.default_rng(seed)
    rounds = rng.normal(0, 0.1, 60)
    subjects = []
    for index in range(builds):
        openings = np.repeat(rng.normal(0, 0.01, 10), 6)
        logs = np.log(1e7) + rng.normal(0, between) + rounds + openings
        blocks = [[round(value)] * 3 for value in np.exp(logs)]
        name = f"a (build {index + 1})" if index else "a"
        subjects.append(subject(name, blocks, description={"build_of": "a"}, openings=10))
    return report(*subjects)


def test_the_two_spreads_are_told_apart(subject: Make, report: Make) -> None:
    found = [build_spreads(simulated(subject, report, 0.05, seed))[0] for seed in range(20)]
    assert np.mean([spread.within for spread in found]) == pytest.approx(0.01, rel=0.07)
    assert np.sqrt(np.mean([spread.between**2 for spread in found])) == pytest.approx(0.05, rel=0.2)
    assert all(spread.builds == 6 and spread.chance < 1e-6 for spread in found)


def test_equal_builds_are_called_different_as_often_as_the_chance_says(subject: Make, report: Make) -> None:
    found = [build_spreads(simulated(subject, report, 0.0, seed, builds=3))[0] for seed in range(100)]
    assert sum(spread.chance < 0.05 for spread in found) <= 11
    assert np.median([spread.between for spread in found]) < 0.003


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
