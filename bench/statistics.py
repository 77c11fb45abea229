"""Statistics of samples and of their ratios: medians, tails, intervals, verdicts, spreads."""

from __future__ import annotations

import bisect
import enum
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.report import BlockSamples, Report, Samples, SubjectReport
from engines.errors import UnstableError
from engines.packages import load

PERCENTILES = (90.0, 95.0, 99.0, 99.9)
TAIL_CONFIDENCE = 0.99  # of the bound of a percentile
CONFIDENCE = 0.95  # of an interval
LEAST_BLOCKS = 5  # for an interval
MARGIN = 0.03  # the smallest difference worth a word
DETECTED = 0.01  # the chance below which a difference that does not clear the margin is still reported
BUILD_OF = "build_of"  # key of a subject's description: the engine that it is a build of
_TO_DEVIATION = 1.4826  # times the median absolute deviation: the standard deviation of normal values
_BATCHES = 10  # runs of rounds that stand for openings where there was one


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, in the unit of the estimate.

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
        median_interval: The median with its interval over the openings; None with fewer than 5 blocks.
        tails: Percentile (90.0, 95.0, 99.0, 99.9) to its value, or None where the sample is too small for it.
    """

    count: int
    minimum: float
    maximum: float
    mean: float
    median: float
    median_interval: Interval | None
    tails: dict[float, Tail | None]


@dataclass(frozen=True, kw_only=True)
class PairedRatio:
    """A ratio of latencies of turns beside each other, and what its openings say of it.

    Attributes:
        interval: Candidate / baseline with its 95 % interval over the openings.
        chance: That equals would differ so over the openings: Student's test, two-sided.
        openings: In how many openings it was measured; in 1, nothing is known of how openings differ.
        within: Standard deviation of a turn's ratio within an opening, as a fraction, by its median deviation.
        between: Standard deviation between openings, as a fraction, the part that ``within`` explains taken out.
        lowest: The lowest ratio of an opening.
        highest: The highest.
    """

    interval: Interval
    chance: float
    openings: int
    within: float
    between: float
    lowest: float
    highest: float


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
        within: Standard deviation between openings of one build, as a fraction, what hits all builds taken out.
        between: Standard deviation between builds, as a fraction, the part that ``within`` explains taken out.
        slowest: Slowest / fastest build, of the mean logarithms of their openings.
        chance: Of such differences between equal builds (F test).
    """

    engine: str
    builds: int
    within: float
    between: float
    slowest: float
    chance: float


def summarise(subject: SubjectReport) -> Summary:
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
        median_interval=median_interval(subject) if has_interval(subject) else None,
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
    deviation = _TO_DEVIATION * float(np.median(np.abs(values - middle)))
    return deviation / middle if middle > 0 else 0.0


def median_interval(subject: SubjectReport) -> Interval:
    """Return the median of all samples of a subject, nanoseconds, with its interval over its openings.

    Raises:
        UnstableError: Fewer than 5 blocks, or a clock too coarse for the calls.
    """
    medians = np.array([logs.mean() for logs in log_medians(subject)])
    return _around(sample_median(subject), *_standard_error(medians))


def has_interval(*subjects: SubjectReport) -> bool:
    """Say whether subjects have enough rounds in common, and calls that the clock can tell from nothing."""
    medians = [block_medians(subject) for subject in subjects]
    enough = len(set.intersection(*(set(found) for found in medians))) >= LEAST_BLOCKS
    return enough and all(min(found.values()) > 0 for found in medians)


def log_medians(subject: SubjectReport) -> list[NDArray[np.float64]]:
    """Return the logarithms of the block medians of a subject, nanoseconds, ``float64 [rounds]`` for each opening.

    Raises:
        UnstableError: Fewer than 5 blocks, or a clock too coarse for the calls.
    """
    medians = block_medians(subject)
    return [np.log([medians[index] for index in rounds]) for rounds in _rounds_of_openings(subject)]


def log_turns(*subjects: SubjectReport) -> list[NDArray[np.float64]]:
    """Return the logarithms of turns that stand beside each other, nanoseconds, opening by opening.

    A turn is some milliseconds long, and in turn i of a round every subject had its own, so what hits the machine for
    longer than that hits all of them. Rounds whose turns are not known, and rounds in which the subjects had different
    numbers of them, count as one turn: the block.

    Returns:
        One array ``float64 [subjects, turns of the opening]`` for each opening.

    Raises:
        UnstableError: Fewer than 5 rounds in common, or a clock too coarse for the calls.
    """
    blocks = [{block.round: block for block in subject.blocks} for subject in subjects]
    return [
        np.log(
            np.concatenate([_turns_beside([found[index] for found in blocks]) for index in rounds], axis=1)
        )
        for rounds in _rounds_of_openings(*subjects)
    ]


def _turns_beside(blocks: Sequence[BlockSamples]) -> NDArray[np.float64]:
    """Return the medians of the turns of one round, nanoseconds, ``float64 [subjects, turns]``."""
    turns = [block.turns_ns for block in blocks if block.turns_ns is not None]
    if len(turns) == len(blocks) and len({len(found) for found in turns}) == 1:
        beside = np.array(turns, dtype=np.float64)
        answered = beside[:, (beside > 0).all(axis=0)]
        if answered.size:
            return answered
    return np.array([[block.median_ns] for block in blocks])


def _rounds_of_openings(*subjects: SubjectReport) -> list[list[int]]:
    """Return the rounds that all subjects have, opening by opening.

    What is one opening stands and falls together, so that the openings, not the rounds, are what a conclusion
    counts. Where everything was opened once, ten runs of consecutive rounds take their place (batch means).

    Raises:
        UnstableError: Fewer than 5 rounds in common, or a clock too coarse for the calls.

    Source:
        Batch means: Law, Simulation Modeling and Analysis, 5th edition (2015), section 9.5.3.
    """
    medians = [block_medians(subject) for subject in subjects]
    rounds = sorted(set.intersection(*(set(found) for found in medians)))
    if len(rounds) < LEAST_BLOCKS:
        raise UnstableError(
            f"{len(rounds)} blocks are too few for an interval, {LEAST_BLOCKS} are needed",
            remedy="measure for longer",
        )
    if min(found[index] for found in medians for index in rounds) <= 0:
        raise UnstableError(
            "the clock is too coarse: a block's median latency is 0 ns", remedy="measure a larger batch"
        )
    opening_of = {block.round: block.opening for block in subjects[0].blocks}
    openings = [list(found) for _, found in itertools.groupby(rounds, opening_of.__getitem__)]
    if len(openings) > 1:
        return openings
    count = min(_BATCHES, len(rounds))
    edges = [len(rounds) * index // count for index in range(count + 1)]
    return [rounds[first:last] for first, last in itertools.pairwise(edges)]


def paired_ratio(baseline: SubjectReport, candidate: SubjectReport) -> PairedRatio:
    """Return candidate / baseline of subjects measured in the same rounds.

    The ratio is taken between turns beside each other, where what hits both cancels. The median over the turns of an
    opening is its ratio: a neighbour who takes the processor for some turns does not move it. The openings are a
    sample of all openings that there could be: the mean of their logarithms, and Student's interval for it, is the
    answer. More turns make each opening's ratio surer, but only more openings narrow what openings differ by. On a
    restless machine the ratio differs from the quotient of the two medians over all samples.

    Raises:
        UnstableError: Fewer than 5 rounds in common, or a clock too coarse for the calls.

    Source:
        Kalibera and Jones, Rigorous Benchmarking in Reasonable Time (ISMM 2013), and Quantifying Performance Changes
        with Effect Size Confidence Intervals (University of Kent, 2012): repetitions are nested, the topmost
        decide. The components of variance are those of the one-way random-effects model: Searle, Casella and
        McCulloch, Variance Components (1992), chapter 3; the variance of a median of n normal values is about
        pi / 2 of that of their mean (Kenney and Keeping, Mathematics of Statistics, part 2, 1951).
    """
    ratios = [above - below for below, above in log_turns(baseline, candidate)]
    centres = np.array([np.median(logs) for logs in ratios])
    error, freedom = _standard_error(centres)
    deviations = np.concatenate([logs - np.median(logs) for logs in ratios])
    within = _TO_DEVIATION * float(np.median(np.abs(deviations)))
    explained = np.pi / 2 * within**2 * float(np.mean([1 / len(logs) for logs in ratios]))
    return PairedRatio(
        interval=_around(float(np.exp(centres.mean())), error, freedom),
        chance=_chance(float(centres.mean()), error, freedom),
        openings=len({block.opening for block in candidate.blocks}),
        within=within,
        between=max(0.0, float(centres.var(ddof=1)) - explained) ** 0.5,
        lowest=float(np.exp(centres.min())),
        highest=float(np.exp(centres.max())),
    )


def unpaired_ratio(baseline: SubjectReport, candidate: SubjectReport) -> Interval:
    """Return candidate / baseline, medians of all samples, of subjects measured at different times.

    Each brings the spread of its own openings (Welch). What changed between the two measurements, the load of the
    machine above all, is in the ratio and not in its interval.

    Raises:
        UnstableError: Fewer than 5 blocks in one of them, or a clock too coarse for the calls.

    Source:
        Welch, The Generalization of Student's Problem when Several Different Population Variances are Involved,
        Biometrika 34 (1947).
    """
    errors = [
        _standard_error(np.array([logs.mean() for logs in log_medians(subject)]))
        for subject in (baseline, candidate)
    ]
    squares = [error**2 for error, _ in errors]
    total = sum(squares)
    parts = sum(square**2 / freedom for square, (_, freedom) in zip(squares, errors, strict=True))
    freedom = total**2 / parts if parts else 1.0
    return _around(sample_median(candidate) / sample_median(baseline), total**0.5, freedom)


def _standard_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the standard error of a mean, and its degrees of freedom."""
    return float(values.std(ddof=1)) / len(values) ** 0.5, len(values) - 1.0


def _around(value: float, error: float, freedom: float) -> Interval:
    """Return Student's interval around a value whose logarithm has that standard error."""
    half = error * float(load("scipy.special").stdtrit(freedom, (1 + CONFIDENCE) / 2))
    return Interval(value, value * float(np.exp(-half)), value * float(np.exp(half)))


def _chance(mean: float, error: float, freedom: float) -> float:
    """Return the chance that equals would be as far from 0 or farther: Student's test, two-sided."""
    if error == 0:
        return float(mean == 0)
    return 2 * float(load("scipy.special").stdtr(freedom, -abs(mean) / error))


def judge(ratio: Interval, margin: float = MARGIN, chance: float | None = None) -> Verdict:
    """Say what a ratio of latencies shows: to be faster or slower it must clear the margin with its whole interval.

    A difference that is surely there but perhaps smaller than the margin is called slight. That takes a ratio within
    rounds, for between two measurements of different times the machine itself differs by as much, and several openings,
    for two openings of one file do, too.

    Args:
        ratio: Candidate / baseline.
        margin: The smallest difference worth a word, as a fraction; symmetric on the log scale.
        chance: The p-value of a ratio over several openings; without it nothing is called slight.
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
    """Separate the two spreads by an analysis of variance with openings as blocks.

    Source:
        Montgomery, Design and Analysis of Experiments, the randomized complete block design; the component
        between is (MS builds - MS error) / openings (Searle, Casella and McCulloch, Variance Components, 1992).
    """
    if not has_interval(*subjects):
        return None
    logs = np.array([np.median(opening - opening.mean(axis=0), axis=1) for opening in log_turns(*subjects)]).T
    builds, count = logs.shape
    means = logs.mean(axis=1)
    rest = logs - means[:, None] - logs.mean(axis=0)[None, :] + logs.mean()
    freedom = (builds - 1) * (count - 1)
    error = float((rest**2).sum()) / freedom
    between = count * float(((means - means.mean()) ** 2).sum()) / (builds - 1)
    beyond = load("scipy.special").fdtrc  # of the F distribution
    chance = float(beyond(builds - 1, freedom, between / error)) if error > 0 else float(between <= 0)
    return BuildSpread(
        engine=name,
        builds=builds,
        within=error**0.5,
        between=max(0.0, (between - error) / count) ** 0.5,
        slowest=float(np.exp(means.max() - means.min())),
        chance=chance,
    )
