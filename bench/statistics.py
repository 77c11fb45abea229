"""Statistics of latency samples: derived from the raw samples, never stored instead of them."""

from __future__ import annotations

import bisect
import enum
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.bootstrap import LEAST_BLOCKS, Interval, median_interval, sample_median
from bench.report import SubjectReport
from engines.errors import UnstableError
from engines.packages import load

Array = Any
PERCENTILES = (90.0, 95.0, 99.0, 99.9)
TAIL_CONFIDENCE = 0.99  # of the bound of a percentile
MARGIN = 0.03
DETECTED = 0.01  # the chance below which a difference that does not clear the margin is still told


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
        tails=_tails(ordered),
    )


def summarise_tails(subject: SubjectReport) -> dict[float, Tail | None]:
    """Return percentile (90.0, 95.0, 99.0, 99.9) -> its value and bound, None where the sample is too small."""
    return _tails(subject.ordered_ns)


def _tails(ordered: Array) -> dict[float, Tail | None]:
    return {percentile: tail(ordered, percentile) for percentile in PERCENTILES}


def stage_medians(subject: SubjectReport) -> dict[str, float]:
    """Return stage -> the median over the blocks of its median time in a block, nanoseconds."""
    stages = dict.fromkeys(stage for block in subject.blocks for stage in block.stages_ns)
    return {
        stage: statistics.median(
            block.stages_ns[stage] for block in subject.blocks if stage in block.stages_ns
        )
        for stage in stages
    }


def tail(ordered: Array, percentile: float) -> Tail | None:
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


def spread(medians: Sequence[float]) -> float:
    """Return how much block medians disagree: 1.4826 times their median absolute deviation over their median.

    Source:
        1.4826 makes it the standard deviation for normal values: Rousseeuw and Croux, JASA 88 (1993).
    """
    np = load("numpy")
    values = np.asarray(medians, dtype=np.float64)
    middle = float(np.median(values))
    deviation = 1.4826 * float(np.median(np.abs(values - middle)))
    return deviation / middle if middle > 0 else 0.0
