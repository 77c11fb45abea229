"""How far two classifiers agree on the same labelled images: paired statistics, in numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from engines.record import Agreement, Change, Flip

Array = Any
RESAMPLES = 2000
CONFIDENCE = 0.95
CALIBRATION_BINS = 15
_CELLS = 2_000_000  # numbers held at once


def compare_answers(
    true: Array,
    reference: Array,
    candidate: Array,
    *,
    paths: Sequence[str],
    patients: Sequence[str],
    labels: Sequence[str],
    name: str,
    seed: int = 0,
) -> Agreement:
    """Compare two classifiers' probabilities for the same images.

    Args:
        true: Class indices, ``int [N]``, N at least 1.
        reference: Probabilities ``float [N, C]`` of the reference.
        candidate: Likewise of the engine in question.
        paths: N names, for the flipped images.
        patients: N patients: the interval draws whole patients, whose images share their luck.
        labels: C class names.
        name: What the reference is.
        seed: Seed of the draws.

    Raises:
        ValueError: The lengths do not fit, or there are no images.
    """
    true, reference, candidate = (np.asarray(values) for values in (true, reference, candidate))
    if not len(true) or reference.shape != (len(true), len(labels)) or candidate.shape != reference.shape:
        raise ValueError(f"{true.shape} labels, probabilities {reference.shape} and {candidate.shape}")
    if len(paths) != len(true) or len(patients) != len(true):
        raise ValueError(f"{len(paths)} paths and {len(patients)} patients for {len(true)} images")
    before, after = reference.argmax(axis=1), candidate.argmax(axis=1)
    right, right_after = before == true, after == true
    lost, won = int((right & ~right_after).sum()), int((~right & right_after).sum())
    flipped = tuple(
        Flip(str(paths[i]), labels[true[i]], labels[before[i]], labels[after[i]])
        for i in np.flatnonzero(before != after).tolist()
    )
    accuracy, macro_f1 = _changes(true, before, after, patients, len(labels), seed)
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
    tail = sum(math.comb(count, k) for k in range(min(lost, won) + 1))
    return min(1.0, float(2 * tail / 2**count))


def calibration_error(true: Array, probabilities: Array, bins: int = CALIBRATION_BINS) -> float:
    """Return the expected calibration error: how far confidence is from accuracy, 0..1.

    Images are sorted into bins of equal width by the probability of their top class; the error is the mean over
    the images of the distance between their bin's accuracy and its mean confidence.

    Args:
        true: Class indices, ``int [N]``.
        probabilities: ``float [N, C]``.
        bins: Number of bins over 0..1.

    Source:
        Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017, equation 3, with
        their 15 bins ((m-1)/M, m/M].
    """
    probabilities = np.asarray(probabilities, np.float64)
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == np.asarray(true)
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def _changes(
    true: Array, before: Array, after: Array, patients: Sequence[str], classes: int, seed: int
) -> tuple[Change, Change]:
    """Accuracy and macro F1 of both, with intervals of the difference over the same draws of patients.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13: the percentile interval.
    """
    _, group = np.unique(np.asarray(patients), return_inverse=True)
    groups = int(group.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES)
    moved = []
    for rows in np.array_split(drawn, max(1, RESAMPLES * len(true) // _CELLS)):
        weights = rows[:, group].astype(np.float64)
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


def _figures(weights: Array, true: Array, answers: Array, classes: int) -> Array:
    """Accuracy and macro F1, ``float64 [2, R]``, for R weightings ``[R, N]`` of the images; F1 of nothing is 0."""
    one_hot = np.eye(classes)
    hits = weights @ (one_hot[true] * one_hot[answers])
    either = weights @ (one_hot[true] + one_hot[answers])
    f1 = np.divide(2 * hits, either, out=np.zeros_like(hits), where=either > 0)
    return np.stack([hits.sum(axis=1) / weights.sum(axis=1), f1.mean(axis=1)])
