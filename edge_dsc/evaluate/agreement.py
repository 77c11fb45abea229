"""How far two classifiers agree on the same labelled images: paired statistics, and intervals by patient, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from engines.record import Agreement, Change, Flip

RESAMPLES = 2000
CONFIDENCE = 0.95
CALIBRATION_BINS = 15
_CELLS = 2_000_000  # numbers held at once
Weights = NDArray[np.float64]  # [r, N]: how often each row is drawn, for r draws


class Estimate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A figure with its 95 % interval.

    Attributes:
        value: The figure.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledImages:
    """The N images that two classifiers answered.

    Attributes:
        true: Class indices ``[N]``, N at least 1.
        labels: Class names.
        paths: Name of each image, for those that flipped.
        patients: Patient of each image: the interval draws whole patients, whose images share their luck.

    Raises:
        ValueError: The lengths differ, or there are no images.
    """

    true: NDArray[np.int64]
    labels: Sequence[str]
    paths: Sequence[str]
    patients: Sequence[str]

    def __post_init__(self) -> None:
        """Check the lengths."""
        images = len(self.true)
        if not images or len(self.paths) != images or len(self.patients) != images:
            raise ValueError(f"{len(self.paths)} paths and {len(self.patients)} patients for {images} images")


def compare_answers(
    images: LabelledImages,
    reference: NDArray[np.floating],
    candidate: NDArray[np.floating],
    *,
    name: str,
    seed: int = 0,
) -> Agreement:
    """Compare two classifiers' probabilities for the same images.

    Args:
        images: The N images of C classes.
        reference: Probabilities ``[N, C]`` of the reference.
        candidate: Those of the engine in question.
        name: What the reference is.
        seed: Seed of the draws.

    Raises:
        ValueError: The shapes do not fit.
    """
    true, labels = images.true, images.labels
    if reference.shape != (len(true), len(labels)) or candidate.shape != reference.shape:
        raise ValueError(f"{true.shape} labels, probabilities {reference.shape} and {candidate.shape}")
    before, after = reference.argmax(axis=1), candidate.argmax(axis=1)
    right, right_after = before == true, after == true
    lost, won = int((right & ~right_after).sum()), int((~right & right_after).sum())
    flipped = tuple(
        Flip(images.paths[i], labels[true[i]], labels[before[i]], labels[after[i]])
        for i in np.flatnonzero(before != after).tolist()
    )
    accuracy, macro_f1 = _changes(images, before, after, seed)
    return Agreement(
        reference=name,
        images=len(true),
        same_top1=len(true) - len(flipped),
        accuracy=accuracy,
        macro_f1=macro_f1,
        lost=lost,
        won=won,
        mcnemar_p=mcnemar_exact(lost, won),
        reference_calibration_error=calibration_error(true, reference),
        candidate_calibration_error=calibration_error(true, candidate),
        largest_difference=float(np.abs(candidate - reference).max()),
        flipped=flipped,
    )


def mcnemar_exact(lost: int, won: int) -> float:
    """Return the two-sided p of McNemar's exact test: are losses and gains equally likely?

    Under that hypothesis ``lost`` of the ``lost + won`` images on which exactly one classifier is right follow
    Binomial(lost + won, 1/2); p is twice the smaller tail, at most 1.

    Args:
        lost: Images that only the reference has right.
        won: Images that only the candidate has right.

    Source:
        McNemar, Psychometrika 12 (1947); the exact conditional test as in Fagerland, Lydersen and Laake,
        BMC Medical Research Methodology 13:91 (2013), equation 3.
    """
    count = lost + won
    tail = term = 1  # the sum of the binomial coefficients (count over k) for k = 0 to the smaller, exactly
    for k in range(min(lost, won)):
        term = term * (count - k) // (k + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**count))


def calibration_error(
    true: NDArray[np.int64], probabilities: NDArray[np.floating], bins: int = CALIBRATION_BINS
) -> float:
    """Return the expected calibration error: how far confidence is from accuracy, 0..1.

    Images are sorted into bins of equal width by the probability of their top class; the error is the mean over
    the images of the distance between their bin's accuracy and its mean confidence.

    Args:
        true: Class indices ``[N]``.
        probabilities: ``[N, C]``.
        bins: Number of bins over 0..1.

    Source:
        Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017, equation 3, with
        their 15 bins ((m-1)/M, m/M].
    """
    probabilities = probabilities.astype(np.float64)
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == true
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def resample_patients(patients: Sequence[str], seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield how often each image is drawn when whole patients are drawn with replacement, as many as there are.

    Images of one patient share their luck: drawn one by one they would pass for more evidence than they are.

    Args:
        patients: Patient of each of N images; an image may stand in several rows.
        seed: Seed of the draws; the same patients and seed give the same draws.

    Yields:
        ``[r, N]``, some draws at once; :data:`RESAMPLES` in all.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13: the percentile interval; Davison
        and Hinkley, Bootstrap Methods and their Application (1997), section 3.8: whole groups are drawn.
    """
    _, group = np.unique(np.asarray(patients), return_inverse=True)
    groups = int(group.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES)
    for rows in np.array_split(drawn, max(1, RESAMPLES * len(group) // _CELLS)):
        yield rows[:, group].astype(np.float64)


def bootstrap(
    figures: Callable[[Weights], NDArray[np.float64]], patients: Sequence[str], seed: int = 0
) -> list[Estimate]:
    """Return F figures with their percentile intervals over draws of patients.

    Args:
        figures: Takes weights of N rows ``[r, N]``, and gives ``[F, r]``; a draw in which a figure has no meaning (a
            class without an image) is NaN and left out of its interval.
        patients: Patient of each row.
        seed: Seed of the draws.
    """
    values = figures(np.ones((1, len(patients))))[:, 0]
    drawn = np.concatenate([figures(weights) for weights in resample_patients(patients, seed)], axis=1)
    return [
        Estimate(float(value), *interval_of(row[np.isfinite(row)]))
        for value, row in zip(values, drawn, strict=True)
    ]


def beyond_all(found: Estimate, trials: int) -> Estimate:
    """Widen the interval of a share that is all or nothing, by the 3 in n of no event.

    Args:
        found: A recall, an accuracy or an AUROC.
        trials: Patients that it is of; for an AUROC those on the smaller side, of which each makes a pair of its own.
    """
    unseen = min(1.0, 3 / max(trials, 1))
    low = min(found.low, 1 - unseen) if found.value >= 1 else found.low
    high = max(found.high, unseen) if found.value <= 0 else found.high
    return Estimate(found.value, low, high)


def interval_of(drawn: NDArray[np.float64]) -> tuple[float, float]:
    """Return the ends of the percentile interval of draws; NaN of none."""
    if not len(drawn):
        return math.nan, math.nan
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def divide(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide, by nothing to NaN."""
    found = np.full(len(below), np.nan)
    np.divide(above, below, out=found, where=below > 0)
    return found


def _changes(
    images: LabelledImages, before: NDArray[np.int64], after: NDArray[np.int64], seed: int
) -> tuple[Change, Change]:
    """Accuracy and macro F1 of both, with intervals of the difference over the same draws of patients."""
    true, classes = images.true, len(images.labels)
    moved = []
    for weights in resample_patients(images.patients, seed):
        figures = [_figures(weights, true, answers, classes) for answers in (before, after)]
        moved.append(figures[1] - figures[0])
    low, high = np.quantile(
        np.concatenate(moved, axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=1
    )
    whole = np.ones((1, len(true)))
    (accuracy, f1), (accuracy_after, f1_after) = (
        _figures(whole, true, answers, classes)[:, 0] for answers in (before, after)
    )
    return (
        Change(float(accuracy), float(accuracy_after), float(low[0]), float(high[0])),
        Change(float(f1), float(f1_after), float(low[1]), float(high[1])),
    )


def _figures(
    weights: NDArray[np.float64], true: NDArray[np.int64], answers: NDArray[np.int64], classes: int
) -> NDArray[np.float64]:
    """Accuracy and macro F1, ``[2, R]``, for R weightings ``[R, N]`` of the images; F1 of nothing is 0."""
    one_hot = np.eye(classes)
    hits = weights @ (one_hot[true] * one_hot[answers])
    either = weights @ (one_hot[true] + one_hot[answers])
    f1 = np.divide(2 * hits, either, out=np.zeros_like(hits), where=either > 0)
    return np.stack([hits.sum(axis=1) / weights.sum(axis=1), f1.mean(axis=1)])
