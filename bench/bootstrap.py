"""Bootstrap intervals for medians and their ratios: blocks are drawn, not samples.

Samples of one block share its luck with the machine, so drawing single samples would give intervals far too narrow.

Source:
    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13, for the percentile interval;
    Kalibera and Jones, Rigorous Benchmarking in Reasonable Time (ISMM 2013), for resampling the outer level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.report import SubjectReport
from engines.errors import UnstableError
from engines.packages import load

Array = Any
CONFIDENCE = 0.95
RESAMPLES = 2000
LEAST_BLOCKS = 5
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


def block_medians(subject: SubjectReport) -> dict[int, float]:
    """Return the median latency of each block, nanoseconds, by its round."""
    return {block.round: block.median_ns for block in subject.blocks}


def sample_median(subject: SubjectReport) -> float:
    """Return the median of all samples of a subject, nanoseconds."""
    ordered = subject.ordered_ns
    return float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


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
    np = load("numpy")
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


def _resampled_medians(subject: SubjectReport, seed: int) -> Array:
    """Return the median of all samples for each draw of blocks, ``float64 [RESAMPLES]``, nanoseconds."""
    np = load("numpy")
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
    return (values[lower] + values[upper]) / 2


def _first_row(drawn: Array, below: Array, reached: Callable[[Array], Array]) -> Array:
    """Return for each draw the first row of ``below`` whose mass, weighted by the draw, has reached enough: bisection.

    Args:
        drawn: How often each block was drawn, ``int64 [draws, blocks]``.
        below: Mass of each block up to each row, ``float64 [rows, blocks]``, ascending along the rows.
        reached: ``float64 [draws]`` to ``bool [draws]``; true in the last row.
    """
    np = load("numpy")
    first, last = np.zeros(len(drawn), np.int64), np.full(len(drawn), len(below) - 1)
    while (first < last).any():
        middle = (first + last) // 2
        enough = reached((drawn * below[middle]).sum(axis=1))
        first, last = np.where(enough, first, middle + 1), np.where(enough, middle, last)
    return last


def _sketch(samples: Array, points: int) -> tuple[Array, float]:
    """Return a block's samples, or evenly spaced quantiles of a large block, and how many samples each stands for."""
    np = load("numpy")
    values = np.sort(np.frombuffer(samples, dtype=np.int64)).astype(np.float64)
    if len(values) <= points:
        return values, 1.0
    ranks = (np.arange(points) + 0.5) / points * (len(values) - 1)
    return np.interp(ranks, np.arange(len(values)), values), len(values) / points


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


def _interval(value: float, draws: Array) -> Interval:
    np = load("numpy")
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))
