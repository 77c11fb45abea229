"""What probabilities mean: figures of made answers that are known exactly."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from edge_dsc.evaluate.agreement import Estimate
from edge_dsc.evaluate.confidence import (
    Judgement,
    confidence_plots,
    confidence_table,
    fit_temperature,
    measure_confidence,
    measure_point,
    point_table,
)
from edge_dsc.infer.classify import OperatingPoint

LABELS = ("a", "b")


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def judged(scores: list[float], true: list[int], patients: str | None = None) -> Judgement:
    """Two classes; ``scores`` are the probabilities of ``b``, one letter of ``patients`` for each image."""
    second = np.array(scores)
    names = list(patients or "abcdefghijklmnopqrstuvwxyz"[: len(true)])
    return Judgement(
        labels=LABELS,
        true=np.array(true),
        patients=names,
        probabilities=np.stack([1 - second, second], axis=1),
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_the_answers_were_drawn_with_is_found(temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (20_000, 3))
    true = (softmax(logits).cumsum(axis=1) < rng.random((len(logits), 1))).sum(axis=1)
    found = fit_temperature(true, softmax(logits * temperature))
    assert found == pytest.approx(temperature, rel=0.03)
    # At the minimum the cross-entropy does not change: the mean logit of the truth is that of the answers.
    answers = softmax(logits * temperature / found)
    rows = np.arange(len(true))
    assert (logits[rows, true] - (answers * logits).sum(axis=1)).mean() == pytest.approx(0, abs=1e-3)


def test_there_is_no_temperature_without_a_wrong_answer_or_with_few_images() -> None:
    sure = np.tile([0.9, 0.1], (40, 1))
    assert fit_temperature(np.zeros(40, np.int64), sure) == 1.0
    few = np.zeros(19, np.int64)
    few[:5] = 1
    assert fit_temperature(few, sure[:19]) == 1.0
    assert fit_temperature(np.append(few, 0), sure[:20]) != 1.0


def test_a_curve_has_the_area_of_mann_and_whitney_and_goes_through_its_points() -> None:
    scores = [0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2, 0.1]
    true = [1, 1, 0, 1, 0, 1, 0, 0]
    curve = measure_confidence(judged(scores, true)).curves["b"]
    positive = np.array(true, bool)
    statistic = mannwhitneyu(np.array(scores)[positive], np.array(scores)[~positive]).statistic
    assert curve.area.value == pytest.approx(statistic / 16)
    sensitivities = [one.value for one in curve.sensitivity]
    assert (sensitivities[0], sensitivities[-1]) == (0.5, 1.0)  # two are above the first false alarm
    assert (sensitivities[12], sensitivities[13]) == (0.5, 0.75)  # of 24 and 26 % false alarms
    assert all(one.low <= one.value <= one.high for one in curve.sensitivity)


def test_thresholds_reach_their_sensitivity_and_say_what_it_costs() -> None:
    scores = [0.91, 0.81, 0.71, 0.61, 0.51, 0.41, 0.55, 0.35, 0.2, 0.1]
    true = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    first, *_, last = measure_confidence(judged(scores, true)).curves["b"].thresholds
    assert (first.threshold, first.sensitivity, first.specificity) == (0.61, 0.8, 1.0)
    assert (last.threshold, last.sensitivity, last.specificity) == (0.51, 1.0, 0.8)


def test_images_of_one_patient_are_no_more_evidence_than_one() -> None:
    scores, true = [0.9, 0.2, 0.8, 0.3] * 4, [1, 0, 0, 1] * 4
    alone = measure_confidence(judged(scores, true)).curves["b"].area
    together = measure_confidence(judged(scores, true, "abcd" * 4)).curves["b"].area
    assert alone.value == together.value == 0.75
    assert together.high - together.low > alone.high - alone.low


def test_a_class_without_images_has_no_curve_and_bins_are_of_images() -> None:
    found = measure_confidence(judged([0.05, 0.15, 0.18, 0.45], [0, 0, 1, 0]), temperature=1.5)
    assert set(measure_confidence(judged([0.2, 0.3], [0, 0])).curves) == set()
    assert [(one.images, one.accuracy.value) for one in found.bins] == [(1, 1.0), (2, 0.5), (1, 1.0)]
    assert found.bins[1].confidence == pytest.approx((0.85 + 0.82) / 2)
    text = confidence_table(found)
    assert text.title.startswith("expected calibration error") and text.title.endswith("at temperature 1.5")
    assert [plot.label.split()[0] for plot in confidence_plots(found)] == ["ROC", "How"]


def test_an_operating_point_is_told_with_its_coverage() -> None:
    answers = judged([0.35, 0.1, 0.45, 0.95], [1, 0, 1, 1])
    point = OperatingPoint(labels=LABELS, thresholds={"b": 0.4}, abstain=0.7)
    found = measure_point(answers, point)  # undecided, a, b, b
    assert found.coverage.value == 0.75
    assert found.accuracy is not None and found.accuracy.value == 1.0
    second = found.per_class["b"]
    assert second.images == 3
    values = [one and one.value for one in (second.sensitivity, second.specificity, second.precision)]
    assert values == [pytest.approx(2 / 3), 1.0, 1.0]
    assert point_table(found).title.startswith(
        "operating point (b from 0.4, others from 0.7): a class is called for 0.750 ["
    )


def test_a_point_that_calls_nothing_has_no_accuracy() -> None:
    found = measure_point(judged([0.5, 0.5], [0, 1]), OperatingPoint(labels=LABELS, abstain=0.9))
    assert found.coverage == Estimate(0.0, 0.0, 1.0)
    assert found.accuracy is found.per_class["a"].precision is None
    assert found.per_class["a"].sensitivity == Estimate(0.0, 0.0, 1.0)
    assert point_table(found).rows[0][-1] == "none"


def test_the_curves_of_several_trainings_are_averaged_not_pooled() -> None:
    """One training scores all low, the other all high: pooled, their order would mean nothing."""
    answers = judged([0.2, 0.1, 0.9, 0.8], [1, 0, 1, 0])
    pooled = measure_confidence(answers).curves["b"].area.value
    apart = Judgement(**{**vars(answers), "trainings": [np.array([0, 1]), np.array([2, 3])]})
    assert (pooled, measure_confidence(apart).curves["b"].area.value) == (0.75, 1.0)
