"""Classification metrics from labels and probabilities, in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

_FLOOR = 1e-7  # Keras' epsilon: keeps the logarithm finite


class ClassMetrics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Figures of one class against the rest, 0..1; 0 where a denominator is 0.

    Attributes:
        precision: True positives among those given this class.
        recall: True positives among those of this class.
        f1: Harmonic mean of both.
        support: Images of this class.
    """

    precision: float
    recall: float
    f1: float
    support: int


class Metrics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How well probabilities meet the truth.

    Attributes:
        count: Images.
        accuracy: Share whose most probable class is the true one.
        loss: Mean cross-entropy in nats.
        precision: Macro mean over the classes.
        recall: Macro mean over the classes (balanced accuracy).
        f1: Macro mean over the classes.
        labels: Class names, in the order of the outputs.
        per_class: Figures by class name.
        confusion: ``[true][predicted]`` counts.
    """

    count: int
    accuracy: float
    loss: float
    precision: float
    recall: float
    f1: float
    labels: tuple[str, ...]
    per_class: Mapping[str, ClassMetrics]
    confusion: tuple[tuple[int, ...], ...]


def classification_metrics(
    true: NDArray[np.int64], probabilities: NDArray[np.floating], labels: Sequence[str]
) -> Metrics:
    """Compare probabilities with the truth.

    Args:
        true: Class indices ``[N]``, N at least 1.
        probabilities: ``[N, C]``, rows summing to 1.
        labels: C class names.

    Raises:
        ValueError: The shapes do not fit, there are no images, or an index is out of range.
    """
    probabilities = probabilities.astype(np.float64)
    classes = len(labels)
    if true.ndim != 1 or not len(true) or probabilities.shape != (len(true), classes):
        raise ValueError(f"{true.shape} labels and {probabilities.shape} probabilities for {classes} classes")
    if true.min() < 0 or true.max() >= classes:
        raise ValueError(f"class indices {true.min()}..{true.max()} for {classes} classes")
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (true, probabilities.argmax(axis=1)), 1)
    per_class = {label: _class_metrics(confusion, index) for index, label in enumerate(labels)}
    chosen = probabilities[np.arange(len(true)), true]
    return Metrics(
        count=len(true),
        accuracy=float(np.trace(confusion) / len(true)),
        loss=float(-np.log(np.clip(chosen, _FLOOR, 1.0)).mean()),
        precision=_mean([figures.precision for figures in per_class.values()]),
        recall=_mean([figures.recall for figures in per_class.values()]),
        f1=_mean([figures.f1 for figures in per_class.values()]),
        labels=tuple(labels),
        per_class=per_class,
        confusion=tuple(tuple(int(value) for value in row) for row in confusion),
    )


def _class_metrics(confusion: NDArray[np.int64], index: int) -> ClassMetrics:
    hits, given, support = (
        int(value) for value in (confusion[index, index], confusion[:, index].sum(), confusion[index].sum())
    )
    return ClassMetrics(
        precision=hits / given if given else 0.0,
        recall=hits / support if support else 0.0,
        f1=2 * hits / (given + support) if given + support else 0.0,
        support=support,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
