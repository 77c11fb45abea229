"""Statistics of samples and of their ratios: medians, tails, intervals, verdicts, spreads."""

from __future__ import annotations

import bisect
import enum
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.report import Report, Samples, SubjectReport
from engines.errors import UnstableError
from engines.packages import load

PERCENTILES = (90.0, 95.0, 99.0, 99.9)
TAIL_CONFIDENCE = 0.99  # of the bound of a percentile
CONFIDENCE = 0.95  # of an interval
RESAMPLES = 2000
LEAST_BLOCKS = 5  # for an interval
MARGIN = 0.03  # the smallest difference worth a word
DETECTED = 0.01  # the chance below which a difference that does not clear the margin is still reported
BUILD_OF = "build_of"  # key of a subject's description: the engine that it is a build of
_POINTS = 6000  # of all blocks together; a block with more than its share is stood for by quantiles
_LEAST_POINTS = 21  # of one block


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval, in the unit of the estimate.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Tail:
    """A percentile of the latency, nanoseconds.

    Attributes:
        value: The percentile of the sample (nearest rank: a latency that was measured).
        bound: The true percentile is below this with 99 % confidence.
    """

    value: float
    bound: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The statistics of one subject; all times in nanoseconds.

    Attributes:
        count: Number of samples.
        minimum: Smallest sample.
        maximum: Largest sample.
        mean: Arithmetic mean.
        median: Median of all samples.
        median_interval: The median with its bootstrap interval; None with fewer than 5 blocks.
        tails: Percentile (90.0, 95.0, 99.0, 99.9) to its value, or None where the sample is too small for it.
    """

    count: int
    minimum: float
    maximum: float
    mean: float
    median: float
    median_interval: Interval | None
    tails: dict[float, Tail | None]


class Verdict(str, enum.Enum):
    """What a ratio of latencies allows to say."""

    FASTER = "faster"
    SLOWER = "slower"
    SLIGHTLY_FASTER = "slightly faster"
    SLIGHTLY_SLOWER = "slightly slower"
    NO_DIFFERENCE = "no significant difference"


@dataclass(frozen=True, kw_only=True)
class BuildSpread:
    """How much builds of one engine differ.

    Attributes:
        engine: Name of the engine.
        builds: Number of builds.
        within: Standard deviation of one block's median, as a fraction, what hits whole rounds taken out.
        between: Standard deviation between builds, as a fraction, the part that ``within`` explains taken out.
        slowest: Slowest / fastest build, of the mean logarithms of their block medians.
        chance: Of such differences between equal builds (F test).
    """

    engine: str
    builds: int
    within: float
    between: float
    slowest: float
    chance: float


def summarise(subject: SubjectReport, *, seed: int = 0) -> Summary:
    """Derive the statistics of a subject from its samples.

    Raises:
        UnstableError: It has no samples.
    """
    if not subject.blocks:
        raise UnstableError(f"{subject.name} has no samples", remedy=subject.error or "measure for longer")
    ordered = subject.ordered_ns
    return Summary(
        count=len(ordered),
        minimum=float(ordered[0]),
        maximum=float(ordered[-1]),
        mean=float(ordered.mean()),
        median=sample_median(subject),
        median_interval=median_interval(subject, seed=seed) if len(subject.blocks) >= LEAST_BLOCKS else None,
        tails=summarise_tails(subject),
    )


def summarise_tails(subject: SubjectReport) -> dict[float, Tail | None]:
    """Return percentile (90.0, 95.0, 99.0, 99.9) -> its value and bound, None where the sample is too small."""
    return {percentile: tail(subject.ordered_ns, percentile) for percentile in PERCENTILES}


def tail(ordered: Samples, percentile: float) -> Tail | None:
    """Return a percentile and its upper bound, or None where the sample is too small to say anything.

    Args:
        ordered: Latencies in nanoseconds, ascending, ``int64 [n]``.
        percentile: Such as 99.0.

    Source:
        The early-stopping rule of MLPerf's LoadGen (early_stopping.cc and results.cc, single stream, tolerance 0,
        confidence 0.99): with n queries take the largest t for which I(p; n - t, t + 1) <= 0.01; the
        t-th largest latency bounds the percentile p. I is the regularised incomplete beta function, which for
        whole numbers is the chance that at most t of n calls are slower than the true percentile. The
        smallest n that allows t = 1 are 64 (p90), 130 (p95), 662 (p99) and 6,636 (p99.9).
        The percentile of the sample is definition 1 of Hyndman and Fan, Sample Quantiles in Statistical
        Packages (The American Statistician 50, 1996): the inverse of the empirical distribution.
    """
    count = len(ordered)
    slower = allowed_slower(count, percentile)
    if slower < 1:
        return None
    rank = max(1, -int(-count * round(percentile * 10) // 1000))  # ceil without a float's error
    return Tail(value=float(ordered[rank - 1]), bound=float(ordered[count - slower]))


def allowed_slower(count: int, percentile: float) -> int:
    """Return the largest t >= 0 with P(Binomial(count, 1 - p) <= t) <= 0.01; 0 also where there is none."""
    chance = load("scipy.special").bdtr  # of at most t successes; in terms of the incomplete beta function
    share = 1 - round(percentile * 10) / 1000
    most = int(count * share) + 1  # the answer lies below the mean
    beyond = bisect.bisect_right(
        range(most + 1), 1 - TAIL_CONFIDENCE, key=lambda slower: float(chance(slower, count, share))
    )
    return max(0, beyond - 1)


def block_medians(subject: SubjectReport) -> dict[int, float]:
    """Return the median latency of each block, nanoseconds, by its round."""
    return {block.round: block.median_ns for block in subject.blocks}


def sample_median(subject: SubjectReport) -> float:
    """Return the median of all samples of a subject, nanoseconds."""
    ordered = subject.ordered_ns
    return float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def stage_medians(subject: SubjectReport) -> dict[str, float]:
    """Return stage -> the median over the blocks of its median time in a block, nanoseconds."""
    stages = dict.fromkeys(stage for block in subject.blocks for stage in block.stages_ns)
    return {
        stage: statistics.median(
            block.stages_ns[stage] for block in subject.blocks if stage in block.stages_ns
        )
        for stage in stages
    }


def spread(medians: Sequence[float]) -> float:
    """Return how much block medians disagree: 1.4826 times their median absolute deviation over their median.

    Source:
        1.4826 makes it the standard deviation for normal values: Rousseeuw and Croux, JASA 88 (1993).
    """
    values = np.asarray(medians, dtype=np.float64)
    middle = float(np.median(values))
    deviation = 1.4826 * float(np.median(np.abs(values - middle)))
    return deviation / middle if middle > 0 else 0.0


def median_interval(subject: SubjectReport, *, seed: int = 0) -> Interval:
    """Return the median of all samples of a subject, nanoseconds, with its interval.

    Raises:
        UnstableError: Fewer than 5 blocks.
    """
    _require_blocks(len(subject.blocks))
    return _interval(sample_median(subject), _resampled_medians(subject, seed))


def paired_ratio(baseline: Mapping[int, float], candidate: Mapping[int, float], *, seed: int = 0) -> Interval:
    """Return candidate / baseline of subjects measured in the same rounds.

    The estimate is the median over the rounds of the ratio of the two block medians: what hits both blocks of a
    round cancels. Rounds are drawn, so the pairs stay together. On a restless machine it differs
    from the quotient of the two medians over all samples.

    Args:
        baseline: Block median in nanoseconds by round.
        candidate: Likewise.
        seed: Seed of the draws.

    Raises:
        UnstableError: Fewer than 5 rounds in common, or a clock too coarse for the calls.
    """
    rounds = sorted(baseline.keys() & candidate.keys())
    _require_blocks(len(rounds))
    _require_positive(min(baseline[index] for index in rounds))
    ratios = np.array([candidate[index] / baseline[index] for index in rounds])
    draws = np.random.default_rng(seed).integers(0, len(ratios), size=(RESAMPLES, len(ratios)))
    return _interval(float(np.median(ratios)), np.median(ratios[draws], axis=1))


def unpaired_ratio(baseline: SubjectReport, candidate: SubjectReport, *, seed: int = 0) -> Interval:
    """Return candidate / baseline, medians of all samples, of subjects measured at different times.

    The blocks of the two are drawn independently. What changed between the two measurements, the load of the
    machine above all, is in the ratio and not in its interval.

    Raises:
        UnstableError: Fewer than 5 blocks in one of them, or a clock too coarse for the calls.
    """
    _require_blocks(min(len(baseline.blocks), len(candidate.blocks)))
    below = _resampled_medians(baseline, seed)
    _require_positive(float(below.min()))
    value = sample_median(candidate) / sample_median(baseline)
    return _interval(value, _resampled_medians(candidate, seed + 1) / below)


def _interval(value: float, draws: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))


def _require_blocks(count: int) -> None:
    if count < LEAST_BLOCKS:
        raise UnstableError(
            f"{count} blocks are too few for an interval, {LEAST_BLOCKS} are needed",
            remedy="measure for longer",
        )


def _require_positive(smallest: float) -> None:
    if smallest <= 0:
        raise UnstableError(
            "the clock is too coarse: a block's median latency is 0 ns", remedy="measure a larger batch"
        )


def _resampled_medians(subject: SubjectReport, seed: int) -> NDArray[np.float64]:
    """Return the median of all samples for each draw of blocks, ``float64 [RESAMPLES]``, nanoseconds."""
    points = max(_LEAST_POINTS, _POINTS // len(subject.blocks))
    parts = [_sketch(block.samples_ns, points) for block in subject.blocks]
    values = np.concatenate([values for values, _ in parts])
    weights = np.repeat([weight for _, weight in parts], [len(values) for values, _ in parts])
    blocks = np.repeat(np.arange(len(parts)), [len(values) for values, _ in parts])
    order = np.argsort(values, kind="stable")
    values, weights, blocks = values[order], weights[order], blocks[order]
    count = len(parts)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    below = np.zeros((len(values), count))  # samples of each block up to each value
    below[np.arange(len(values)), blocks] = weights
    below = below.cumsum(axis=0)
    half = drawn @ below[-1] / 2
    # As the median does: the mean of the two middle values where the samples split exactly in half.
    lower = _first_row(drawn, below, lambda mass: mass >= half)
    upper = _first_row(drawn, below, lambda mass: mass > half)
    medians: NDArray[np.float64] = (values[lower] + values[upper]) / 2
    return medians


def _first_row(
    drawn: NDArray[np.int64],
    below: NDArray[np.float64],
    reached: Callable[[NDArray[np.float64]], NDArray[np.bool_]],
) -> NDArray[np.int64]:
    """Return for each draw the first row of ``below`` whose mass, weighted by the draw, has reached enough: bisection.

    Args:
        drawn: How often each block was drawn, ``int64 [draws, blocks]``.
        below: Mass of each block up to each row, ``float64 [rows, blocks]``, ascending along the rows.
        reached: ``float64 [draws]`` to ``bool [draws]``; true in the last row.
    """
    first, last = np.zeros(len(drawn), np.int64), np.full(len(drawn), len(below) - 1)
    while (first < last).any():
        middle = (first + last) // 2
        enough = reached((drawn * below[middle]).sum(axis=1))
        first, last = np.where(enough, first, middle + 1), np.where(enough, middle, last)
    return last


def _sketch(samples: Samples, points: int) -> tuple[NDArray[np.float64], float]:
    """Return a block's samples, or evenly spaced quantiles of a large block, and how many samples each stands for."""
    values = np.sort(samples).astype(np.float64)
    if len(values) <= points:
        return values, 1.0
    ranks = (np.arange(points) + 0.5) / points * (len(values) - 1)
    return np.interp(ranks, np.arange(len(values)), values), len(values) / points


def signed_rank_chance(baseline: Mapping[int, float], candidate: Mapping[int, float]) -> float:
    """Return the chance that equals would differ so one-sidedly over the rounds: the two-sided p-value.

    The ranks are of the logarithms of the ratios within rounds, so that twice and half weigh the same. It stands
    beside the interval: a tiny p-value says that there is a difference, not that it is worth a word.

    Args:
        baseline: Block median in nanoseconds by round, all above 0.
        candidate: Likewise.

    Raises:
        EnvironmentProblem: SciPy is missing.

    Source:
        Wilcoxon, Individual Comparisons by Ranking Methods, Biometrics Bulletin 1 (1945); rounds without a
        difference are left out, as there. ``scipy.stats.wilcoxon``: exact up to 50 rounds without ties, else
        the normal approximation with correction for ties.
    """
    stats = load("scipy.stats")
    rounds = sorted(baseline.keys() & candidate.keys())
    logs = np.log([candidate[index] / baseline[index] for index in rounds])
    logs = logs[logs != 0]
    if not len(logs):
        return 1.0
    return float(stats.wilcoxon(logs).pvalue)


def judge(ratio: Interval, margin: float = MARGIN, chance: float | None = None) -> Verdict:
    """Say what a ratio of latencies shows: to be faster or slower it must clear the margin with its whole interval.

    A difference that is surely there but perhaps smaller than the margin is called slight. That takes a ratio within
    rounds: between two measurements of different times the machine itself differs by as much.

    Args:
        ratio: Candidate / baseline.
        margin: The smallest difference worth a word, as a fraction; symmetric on the log scale.
        chance: The signed-rank test's p-value of a paired ratio; without it nothing is called slight.
    """
    if ratio.low > 1 + margin:
        return Verdict.SLOWER
    if ratio.high < 1 / (1 + margin):
        return Verdict.FASTER
    if chance is not None and chance < DETECTED:
        if ratio.low > 1:
            return Verdict.SLIGHTLY_SLOWER
        if ratio.high < 1:
            return Verdict.SLIGHTLY_FASTER
    return Verdict.NO_DIFFERENCE


def build_spreads(report: Report) -> tuple[BuildSpread, ...]:
    """Return the spread of every engine that the report has two builds or more of, with at least 5 common rounds."""
    groups: dict[str, list[SubjectReport]] = {}
    for subject in report.measured:
        if BUILD_OF in subject.description:
            groups.setdefault(str(subject.description[BUILD_OF]), []).append(subject)
    found = (_spread(name, subjects) for name, subjects in groups.items() if len(subjects) > 1)
    return tuple(spread for spread in found if spread is not None)


def _spread(name: str, subjects: Sequence[SubjectReport]) -> BuildSpread | None:
    """Separate the two spreads by an analysis of variance with rounds as blocks.

    Source:
        Montgomery, Design and Analysis of Experiments, the randomized complete block design; the component
        between is (MS builds - MS error) / rounds (Searle, Casella and McCulloch, Variance Components, 1992).
    """
    stats = load("scipy.stats")
    medians = [block_medians(subject) for subject in subjects]
    rounds = sorted(set.intersection(*(set(found) for found in medians)))
    if len(rounds) < LEAST_BLOCKS or min(min(found.values()) for found in medians) <= 0:
        return None
    logs = np.log([[found[index] for index in rounds] for found in medians])
    builds, count = logs.shape
    means = logs.mean(axis=1)
    rest = logs - means[:, None] - logs.mean(axis=0)[None, :] + logs.mean()
    freedom = (builds - 1) * (count - 1)
    error = float((rest**2).sum()) / freedom
    between = count * float(((means - means.mean()) ** 2).sum()) / (builds - 1)
    chance = float(stats.f.sf(between / error, builds - 1, freedom)) if error > 0 else float(between <= 0)
    return BuildSpread(
        engine=name,
        builds=builds,
        within=error**0.5,
        between=max(0.0, (between - error) / count) ** 0.5,
        slowest=float(np.exp(means.max() - means.min())),
        chance=chance,
    )
