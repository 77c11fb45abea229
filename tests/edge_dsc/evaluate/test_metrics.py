from __future__ import annotations

import numpy as np
import pytest

from edge_dsc.evaluate.metrics import ClassMetrics, classification_metrics

LABELS = ("clear", "diffuse", "focal")


def one_hot(indices: list[int], classes: int = 3) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[indices]


def test_figures_by_hand() -> None:
    true = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    metrics = classification_metrics(true, one_hot([0, 0, 0, 1, 1, 0, 2, 1]), LABELS)
    assert metrics.confusion == ((3, 1, 0), (1, 1, 0), (0, 1, 1))
    assert metrics.count == 8
    assert metrics.accuracy == 5 / 8
    assert metrics.per_class["clear"] == ClassMetrics(precision=3 / 4, recall=3 / 4, f1=3 / 4, support=4)
    assert metrics.per_class["diffuse"] == ClassMetrics(precision=1 / 3, recall=1 / 2, f1=2 / 5, support=2)
    assert metrics.per_class["focal"] == ClassMetrics(precision=1.0, recall=1 / 2, f1=2 / 3, support=2)
    assert metrics.recall == pytest.approx((3 / 4 + 1 / 2 + 1 / 2) / 3)
    assert metrics.precision == pytest.approx((3 / 4 + 1 / 3 + 1) / 3)
    assert metrics.f1 == pytest.approx((3 / 4 + 2 / 5 + 2 / 3) / 3)


def test_loss_is_the_mean_cross_entropy_in_nats_and_stays_finite() -> None:
    probabilities = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    metrics = classification_metrics(np.array([0, 1]), probabilities, LABELS)
    assert metrics.loss == pytest.approx((np.log(2) - np.log(1e-7)) / 2)


def test_a_class_that_is_never_there_nor_given_counts_as_zero() -> None:
    metrics = classification_metrics(np.array([0, 1]), one_hot([0, 1]), LABELS)
    assert metrics.per_class["focal"] == ClassMetrics(precision=0.0, recall=0.0, f1=0.0, support=0)
    assert metrics.f1 == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("true", "probabilities", "text"),
    [
        ([], np.zeros((0, 3)), r"\(0,\) labels"),
        ([0, 1], np.zeros((2, 2)), "for 3 classes"),
        ([0], np.zeros((2, 3)), r"\(1,\) labels"),
        ([0, 3], np.zeros((2, 3)), r"0\.\.3"),
        ([-1, 0], np.zeros((2, 3)), r"-1\.\.0"),
    ],
)
def test_input_that_does_not_fit_is_refused(true: list[int], probabilities: np.ndarray, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        classification_metrics(np.array(true, int), probabilities, LABELS)
