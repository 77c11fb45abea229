"""How far probabilities can be believed: the temperature, ROC curves, reliability, and operating points.

Every figure has an interval that draws whole patients. The temperature and the thresholds are chosen on the validation
part alone (:mod:`edge_dsc.data.purposes`): chosen on the images that judge, both would flatter the network there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_dsc.evaluate.agreement import (
    Estimate,
    Weights,
    beyond_all,
    bootstrap,
    calibration_error,
    divide,
)
from edge_dsc.infer.classify import ABSTAIN, SMALLEST, OperatingPoint
from edge_dsc.page.charts import Plot, reliability_plot, roc_plot
from engines.packages import load
from engines.text_table import Table

_GRID = tuple(step / 50 for step in range(51))  # shares of false alarms at which a ROC curve is drawn
_BINS = (
    10  # of the reliability picture; fewer than the error's, so that each has images enough for an interval
)
_WANTED = (0.8, 0.9, 0.95)  # sensitivities whose thresholds are given
_LEAST_IMAGES = 20  # fewer say nothing of a temperature
_FURTHEST = 10.0  # a temperature beyond it, or below its inverse, is no minimum but a lack of wrong answers


class Threshold(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a threshold of a class would do on these images.

    Attributes:
        threshold: Images with at least this probability are called the class.
        sensitivity: Share of the images of the class that are.
        specificity: Share of the other images that are not.
    """

    threshold: float
    sensitivity: float
    specificity: float


class RocCurve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The receiver operating characteristic of one class against the rest.

    Attributes:
        area: Under the curve.
        sensitivity: At the shares of false alarms 0, 0.02, ... 1.
        thresholds: That reach 80, 90 and 95 % sensitivity.
    """

    area: Estimate
    sensitivity: tuple[Estimate, ...]
    thresholds: tuple[Threshold, ...]


class Bin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Images whose most probable class has a probability in one tenth of 0..1.

    Attributes:
        images: Their number.
        confidence: Mean of that probability.
        accuracy: Share of them that are of that class.
    """

    images: int
    confidence: float
    accuracy: Estimate


class Confidence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the probabilities of an engine mean.

    Attributes:
        temperature: That they were given with, see :class:`engines.contract.ModelContract`; None of several networks.
        calibration_error: :func:`edge_dsc.evaluate.agreement.calibration_error`.
        curves: By class name; without a class that has no image, or all.
        bins: Of the reliability picture, without empty ones.
    """

    temperature: float | None
    calibration_error: float
    curves: Mapping[str, RocCurve]
    bins: tuple[Bin, ...]


class CalledClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One class at an operating point; an image that is left undecided is not called it.

    Attributes:
        images: Images of the class.
        sensitivity: Share of them that are called it; None of none.
        specificity: Share of the others that are not; None of none.
        precision: Share of those called it that are; None of none.
    """

    images: int
    sensitivity: Estimate | None
    specificity: Estimate | None
    precision: Estimate | None


class AtPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an operating point makes of an engine's answers.

    Attributes:
        thresholds: By class.
        abstain: Least probability of any other class.
        coverage: Share of the images that a class is called for.
        accuracy: Share of these that are of it; None of none.
        per_class: By class name.
    """

    thresholds: Mapping[str, float]
    abstain: float
    coverage: Estimate
    accuracy: Estimate | None
    per_class: Mapping[str, CalledClass]


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """Labelled images with an engine's answers.

    Attributes:
        labels: C class names.
        true: Class of each image, ``[N]``, N at least 1.
        patients: Patient of each.
        probabilities: ``[N, C]``.
        trainings: Rows of each training whose answers these are: scores of two have no common scale, and their curves
            are averaged. None takes all rows for those of one.
    """

    labels: Sequence[str]
    true: NDArray[np.int64]
    patients: Sequence[str]
    probabilities: NDArray[np.float64]
    trainings: Sequence[NDArray[np.int64]] | None = None

    @property
    def parts(self) -> Sequence[NDArray[np.int64]]:
        """The rows of each training."""
        return self.trainings if self.trainings is not None else [np.arange(len(self.true))]


def fit_temperature(true: NDArray[np.int64], probabilities: NDArray[np.floating]) -> float:
    """Return the temperature that makes the cross-entropy of the answers to validation images smallest.

    The cross-entropy is convex in the inverse of the temperature, so there is one minimum. Where every answer is right
    there is none: a smaller temperature is always better, and such images say nothing of how sure the network may be.

    Args:
        true: Class indices ``[N]``.
        probabilities: ``[N, C]`` of a softmax.

    Returns:
        1 where there are fewer than 20 images, or no minimum between 1/10 and 10.

    Source:
        Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017, section 4.2.
    """
    if len(true) < _LEAST_IMAGES or (probabilities.argmax(axis=1) == true).all():
        return 1.0
    logits = np.log(np.maximum(probabilities.astype(np.float64), SMALLEST))
    logits -= logits[np.arange(len(true)), true][:, None]  # so that the truth has 0

    def loss(logarithm: float) -> float:
        return float(np.logaddexp.reduce(logits / np.exp(logarithm), axis=1).mean())

    end = float(np.log(_FURTHEST))
    found = load("scipy.optimize").minimize_scalar(
        loss, bounds=(-end, end), method="bounded", options={"xatol": 1e-6}
    )
    inside = abs(found.x) < end - 1e-3 and found.fun < loss(0.0)
    return round(float(np.exp(found.x)), 4) if inside else 1.0


def measure_confidence(judged: Judgement, temperature: float | None = None, seed: int = 0) -> Confidence:
    """Measure what probabilities mean.

    Args:
        judged: The answers.
        temperature: That they were given with; None of several networks.
        seed: Seed of the draws.
    """
    curves = {}
    for index, label in enumerate(judged.labels):
        positive = judged.true == index
        if positive.any() and not positive.all():
            curves[label] = _roc_curve(judged, index, seed)
    return Confidence(
        temperature=temperature,
        calibration_error=calibration_error(judged.true, judged.probabilities),
        curves=curves,
        bins=_bins(judged, seed),
    )


def measure_point(judged: Judgement, point: OperatingPoint, seed: int = 0) -> AtPoint:
    """Measure what an operating point makes of answers.

    Args:
        judged: The answers.
        point: When a class is called.
        seed: Seed of the draws.
    """
    places = {label: index for index, label in enumerate(judged.labels)} | {ABSTAIN: -1}
    called = np.array([places[point.decide(row)] for row in judged.probabilities.tolist()])
    decided = called >= 0

    def share(hits: NDArray[np.bool_], among: NDArray[np.bool_]) -> Estimate | None:
        return _share(hits, among, judged.patients, seed)

    coverage = share(decided, np.ones_like(decided))
    assert coverage is not None, "there is an image"
    per_class = {}
    for index, label in enumerate(judged.labels):
        own, given = judged.true == index, called == index
        per_class[label] = CalledClass(
            images=int(own.sum()),
            sensitivity=share(given, own),
            specificity=share(~given, ~own),
            precision=share(own, given),
        )
    return AtPoint(
        thresholds=dict(point.thresholds),
        abstain=point.abstain,
        coverage=coverage,
        accuracy=share(called == judged.true, decided),
        per_class=per_class,
    )


def _share(
    hits: NDArray[np.bool_], among: NDArray[np.bool_], patients: Sequence[str], seed: int
) -> Estimate | None:
    """Return the share of hits among some images; None of none."""
    if not among.any():
        return None
    (found,) = bootstrap(
        lambda weights: divide(weights @ (hits & among), weights @ among)[None], patients, seed
    )
    return beyond_all(found, len({patient for patient, one in zip(patients, among, strict=True) if one}))


def _roc_curve(judged: Judgement, index: int, seed: int) -> RocCurve:
    scores, positive = judged.probabilities[:, index], judged.true == index

    def figures(weights: Weights) -> NDArray[np.float64]:
        each = np.stack(
            [_roc_figures(scores[rows], positive[rows], weights[:, rows]) for rows in judged.parts]
        )
        known = np.isfinite(each)
        total = np.where(known, each, 0.0).sum(axis=0)
        counts = known.sum(axis=0).astype(np.float64)
        mean: NDArray[np.float64] = divide(total.ravel(), counts.ravel()).reshape(total.shape)
        return mean

    area, *sensitivity = bootstrap(figures, judged.patients, seed)
    sides = [
        len({judged.patients[row] for row in np.flatnonzero(side).tolist()}) for side in (positive, ~positive)
    ]
    return RocCurve(
        area=beyond_all(area, min(sides)),
        sensitivity=tuple(sensitivity),
        thresholds=tuple(_threshold(scores, positive, wanted) for wanted in _WANTED),
    )


def _roc_figures(
    scores: NDArray[np.float64], positive: NDArray[np.bool_], weights: Weights
) -> NDArray[np.float64]:
    """Return the area and the sensitivities at :data:`_GRID`, ``[1 + len(_GRID), r]``; NaN without both sides."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))  # of equal scores
    shares = []
    for side in (positive[order], ~positive[order]):
        counts = np.cumsum(np.add.reduceat(weights[:, order] * side, starts, axis=1), axis=1)
        shares.append(np.concatenate([np.zeros((len(weights), 1)), counts], axis=1))
    hits, alarms = shares
    found = np.full((len(_GRID), len(weights)), np.nan)
    for row in np.flatnonzero((hits[:, -1] > 0) & (alarms[:, -1] > 0)):
        found[:, row] = np.interp(_GRID, alarms[row] / alarms[row, -1], hits[row] / hits[row, -1])
    return np.concatenate([weighted_auroc(scores, positive, weights)[None], found])


def _threshold(scores: NDArray[np.float64], positive: NDArray[np.bool_], wanted: float) -> Threshold:
    """Return the largest threshold, to four digits, that reaches a sensitivity."""
    own = np.sort(scores[positive])[::-1]
    reached = own[max(0, int(np.ceil(wanted * len(own) - 1e-9)) - 1)]
    threshold = float(np.floor(reached * 1e4) / 1e4)
    return Threshold(
        threshold=threshold,
        sensitivity=float((own >= threshold).mean()),
        specificity=float((scores[~positive] < threshold).mean()),
    )


def _bins(judged: Judgement, seed: int) -> tuple[Bin, ...]:
    top = judged.probabilities.max(axis=1)
    right = judged.probabilities.argmax(axis=1) == judged.true
    place = np.clip(np.ceil(top * _BINS).astype(int) - 1, 0, _BINS - 1)
    found = []
    for index in np.unique(place).tolist():
        inside = place == index
        accuracy = _share(right, inside, judged.patients, seed)
        assert accuracy is not None, "the bin holds an image"
        found.append(Bin(images=int(inside.sum()), confidence=float(top[inside].mean()), accuracy=accuracy))
    return tuple(found)


def confidence_plots(found: Confidence) -> tuple[Plot, ...]:
    """Return the ROC curves and the reliability picture for a page."""
    curves = {
        f"{label}, area {_interval(curve.area)}": [
            (share, one.value, one.low, one.high) for share, one in zip(_GRID, curve.sensitivity, strict=True)
        ]
        for label, curve in found.curves.items()
    }
    bins = [(one.confidence, one.accuracy.value, one.accuracy.low, one.accuracy.high) for one in found.bins]
    plots = [roc_plot(curves)] if curves else []
    return (*plots, reliability_plot(bins, caption=_calibration_words(found)))


def confidence_table(found: Confidence) -> Table:
    """Return each class's area under the ROC curve, and the thresholds that reach some sensitivities."""
    header = ["class", "area under ROC", *(f"{100 * wanted:g} % found from" for wanted in _WANTED)]
    rows = [
        (
            label,
            _interval(curve.area),
            *(f"{one.threshold:.4f} (specificity {one.specificity:.3f})" for one in curve.thresholds),
        )
        for label, curve in found.curves.items()
    ]
    return Table(title=_calibration_words(found), header=tuple(header), rows=tuple(rows))


def point_table(found: AtPoint) -> Table:
    """Return what an operating point makes of answers."""
    words = [f"{name} from {value:g}" for name, value in found.thresholds.items()]
    words += [f"others from {found.abstain:g}"] if found.abstain else []
    right = f", {_interval(found.accuracy)} of which are right" if found.accuracy else ""
    rows = tuple(
        (label, str(one.images), *map(_interval, (one.sensitivity, one.specificity, one.precision)))
        for label, one in found.per_class.items()
    )
    return Table(
        title=f"operating point ({', '.join(words) or 'the most probable class'}):"
        f" a class is called for {_interval(found.coverage)} of the images{right}",
        header=("class", "images", "sensitivity", "specificity", "precision"),
        rows=rows,
    )


def _calibration_words(found: Confidence) -> str:
    at = "" if found.temperature is None else f" at temperature {found.temperature:g}"
    return f"expected calibration error {found.calibration_error:.4f}{at}"


def _interval(found: Estimate | None) -> str:
    return "none" if found is None else f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def weighted_auroc(
    scores: NDArray[np.float64], positive: NDArray[np.bool_], weights: Weights
) -> NDArray[np.float64]:
    """Return the area under the ROC curve ``[r]``: the chance that a positive scores above a negative, ties half.

    Args:
        scores: ``[N]``.
        positive: Which rows are of the class, ``[N]``.
        weights: How often each row counts, ``[r, N]``.

    Returns:
        NaN for weights without a positive or without a negative.

    Source:
        Hanley and McNeil, The meaning and use of the area under a ROC curve, Radiology 143 (1982): it is Mann and
        Whitney's U over the number of pairs.
    """
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))  # of equal scores
    hits = np.add.reduceat(weights[:, order] * positive[order], starts, axis=1)
    misses = np.add.reduceat(weights[:, order] * ~positive[order], starts, axis=1)
    below = np.cumsum(misses, axis=1) - misses
    pairs = hits.sum(axis=1) * misses.sum(axis=1)
    above = (hits * (below + misses / 2)).sum(axis=1)
    return divide(above, pairs)
