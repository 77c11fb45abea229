"""Figures of made answers: what they are, how wide they are, and what may be concluded from them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from edge_dsc.study.verdict import (
    Difference,
    Estimate,
    Judged,
    Spread,
    bootstrap,
    compare_judged,
    judge_noninferiority,
    measure_quality,
    weighted_auroc,
)
from engines.record import Change

LABELS = ("a", "b")


def judged(name: str, true: list[int], answers: list[int], trainings: list[int] | None = None) -> Judged:
    """Rows of images 0, 1, ... of each training; every image is a patient of its own."""
    numbers = np.array(trainings or [0] * len(true))
    places = [int((numbers[:row] == number).sum()) for row, number in enumerate(numbers)]
    return Judged(
        name=name,
        labels=LABELS,
        trainings=numbers,
        images=[f"{place}.png" for place in places],
        patients=[f"p{place}" for place in places],
        true=np.array(true),
        probabilities=np.eye(2)[answers] * 0.8 + 0.1,
    )


def difference(value: float, low: float, high: float, **changes: object) -> Difference:
    figures = {
        "reference": "cnn",
        "candidate": "dsc",
        "rows": 300,
        "images": 200,
        "patients": 100,
        "accuracy": Change(0.8, 0.8 + value, low, high),
        "macro_f1": Change(0.8, 0.8, -0.1, 0.1),
        "lost": 20,
        "won": 10,
        "by_training": (value,),
        "over_trainings": None,
    }
    return Difference(**{**figures, **changes})  # type: ignore[arg-type]


def test_a_spread() -> None:
    assert Spread.of([0.7]) == Spread(0.7, None, (0.7,))
    found = Spread.of([0.6, 0.8])
    assert found.mean == pytest.approx(0.7)
    assert found.deviation == pytest.approx(0.02**0.5)


@pytest.mark.parametrize("ties", [False, True])
def test_the_area_under_the_curve_is_mann_and_whitneys(ties: bool) -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(40)
    if ties:
        scores = scores.round(1)
    positive = rng.random(40) < 0.4
    expected = mannwhitneyu(scores[positive], scores[~positive]).statistic / (
        positive.sum() * (~positive).sum()
    )
    assert weighted_auroc(scores, positive, np.ones((1, 40)))[0] == pytest.approx(expected)
    # A weight of n is the row n times.
    weights = rng.integers(0, 4, (3, 40)).astype(float)
    for row, found in zip(weights, weighted_auroc(scores, positive, weights), strict=True):
        again, which = np.repeat(scores, row.astype(int)), np.repeat(positive, row.astype(int))
        assert found == pytest.approx(weighted_auroc(again, which, np.ones((1, len(again))))[0])


def test_an_area_needs_both_sides() -> None:
    scores, positive = np.array([0.1, 0.2]), np.array([True, True])
    assert np.isnan(weighted_auroc(scores, positive, np.ones((1, 2)))).all()
    assert weighted_auroc(np.array([1.0, 0.0]), np.array([True, False]), np.ones((2, 2))).tolist() == [1, 1]


def test_an_interval_of_patients_is_that_of_their_binomial() -> None:
    right = np.array([True] * 70 + [False] * 30)

    def share(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return (weights @ right / weights.sum(axis=1))[None]

    (alone,) = bootstrap(share, [f"p{row}" for row in range(100)])
    assert alone.value == pytest.approx(0.7)
    assert (alone.low, alone.high) == pytest.approx((0.61, 0.79), abs=0.015)
    # Ten images of a patient, all alike: ten patients, not a hundred images.
    (grouped,) = bootstrap(share, [f"p{row // 10}" for row in range(100)])
    assert (grouped.low, grouped.high) == pytest.approx((0.4, 1.0), abs=0.11)


def test_a_figure_without_meaning_in_a_draw_is_left_out() -> None:
    def figures(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([np.where(weights[:, 0] > 0, 0.5, np.nan), np.full(len(weights), np.nan)])

    some, none = bootstrap(figures, ["p", "q"])
    assert some == Estimate(0.5, 0.5, 0.5)
    assert np.isnan([none.value, none.low, none.high]).all()


def test_quality_over_two_trainings() -> None:
    true = [0, 0, 1, 1] * 2
    found = measure_quality(judged("dsc", true, [0, 0, 1, 0, 0, 1, 1, 1], [0] * 4 + [1] * 4))
    assert (found.rows, found.images, found.patients) == (8, 4, 4)
    assert found.accuracy == Spread.of([0.75, 0.75])
    assert found.pooled_accuracy.value == 0.75
    assert found.per_class["a"].images == 4
    assert found.per_class["a"].recall.value == found.per_class["b"].recall.value == 0.75
    assert found.loss.mean == pytest.approx(-(3 * np.log(0.9) + np.log(0.1)) / 4)
    auroc = found.per_class["b"].auroc
    # Each training: one of two positives ties with the two negatives, or one negative with the two positives.
    assert auroc is not None and auroc.value == pytest.approx(0.75)


def test_all_right_is_not_never_wrong() -> None:
    """Ten patients of one class, all right, and twenty of the other, none right."""
    found = measure_quality(judged("dsc", [0] * 10 + [1] * 20, [0] * 30))
    assert found.per_class["a"].recall == Estimate(1.0, 0.7, 1.0)
    assert found.per_class["b"].recall == Estimate(0.0, 0.0, 0.15)
    perfect = measure_quality(judged("dsc", [0] * 10 + [1] * 20, [0] * 10 + [1] * 20))
    assert perfect.pooled_accuracy == Estimate(1.0, 0.9, 1.0)
    assert perfect.per_class["a"].auroc == perfect.per_class["b"].auroc == Estimate(1.0, 0.7, 1.0)


def test_a_class_that_nothing_judged_has_no_figures() -> None:
    found = measure_quality(judged("dsc", [0, 0, 0], [0, 0, 1]))
    assert set(found.per_class) == {"a"}
    assert found.per_class["a"].auroc is None


def test_networks_are_paired_by_training_and_image() -> None:
    cnn = judged("cnn", [0] * 6, [0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1])
    dsc = judged("dsc", [0] * 6, [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 2])
    found = compare_judged(cnn, dsc)
    assert found is not None
    # The pairs of training 0 are its three images, those of training 1 two; training 2 has no partner.
    assert (found.rows, found.images, found.patients) == (5, 3, 3)
    assert (found.lost, found.won) == (1, 1)
    assert found.by_training == (pytest.approx(-1 / 3), pytest.approx(0.5))
    assert found.accuracy.reference == found.accuracy.candidate == pytest.approx(0.6)
    assert found.over_trainings is None
    assert compare_judged(cnn, judged("dsc", [0], [0], [7])) is None


def test_trainings_that_differ_widen_the_interval() -> None:
    images, trainings = 200, 5
    numbers = [number for number in range(trainings) for _ in range(images)]
    right = judged("cnn", [0] * len(numbers), [0] * len(numbers), numbers)
    # In each training a share of the same images is lost: none, 2, 4, 6, 8 %.
    answers = [int(place < images * 0.02 * number) for number in range(trainings) for place in range(images)]
    found = compare_judged(right, judged("dsc", [0] * len(numbers), answers, numbers))
    assert found is not None and found.over_trainings is not None
    assert found.by_training == pytest.approx((0, -0.02, -0.04, -0.06, -0.08))
    assert (found.over_trainings.value, found.accuracy.difference) == pytest.approx((-0.04, -0.04))
    assert found.over_trainings.low < found.accuracy.low < found.accuracy.high < found.over_trainings.high


def test_a_side_without_an_event_is_three_events_wider() -> None:
    cnn = judged("cnn", [0] * 100, [0] * 100)
    found = compare_judged(cnn, judged("dsc", [0] * 100, [1] * 20 + [0] * 80))
    assert found is not None
    assert (found.lost, found.won) == (20, 0)
    assert (found.accuracy.low, found.accuracy.high) == pytest.approx((-0.28, -0.12 + 0.03), abs=0.012)


def test_nothing_lost_is_not_nothing_to_lose() -> None:
    found = compare_judged(judged("cnn", [0] * 60, [0] * 60), judged("dsc", [0] * 60, [0] * 60))
    assert found is not None
    assert (found.accuracy.low, found.accuracy.high) == (-0.05, 0.05)  # three of sixty patients
    assert judge_noninferiority(found, 2).answer == "not decided"
    assert judge_noninferiority(found, 6).answer == "yes"


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [
        (-0.0199, 0.05, "yes"),
        (-0.02, 0.05, "not decided"),
        (-0.05, -0.02, "not decided"),
        (-0.05, -0.0201, "no"),
    ],
)
def test_the_whole_interval_decides(low: float, high: float, answer: str) -> None:
    found = judge_noninferiority(difference((low + high) / 2, low, high), 2)
    assert found.answer == answer
    assert (found.images_needed is None) == (answer != "not decided")


def test_the_images_that_would_decide_it() -> None:
    # Variance goes with the number of images: with these the interval's end is 0.84 standard errors clear of -2.
    found = judge_noninferiority(difference(0.0, -0.04, 0.04), 2)
    deviation = 0.04 / 1.959964
    assert found.images_needed == int(np.ceil(200 * (deviation * 2.801585 / 0.02) ** 2))
    times = (found.images_needed or 0) / 200
    assert deviation / times**0.5 * (1.959964 + 0.841621) == pytest.approx(0.02, rel=1e-3)
    assert judge_noninferiority(difference(-0.02, -0.06, 0.02), 2).images_needed is None


def test_other_trainings_may_answer_otherwise() -> None:
    wide = difference(0.0, -0.01, 0.01, over_trainings=Estimate(0.0, -0.03, 0.03))
    found = judge_noninferiority(wide, 2)
    assert (found.answer, found.over_trainings) == ("yes", "not decided")
