from __future__ import annotations

import numpy as np
import pytest

from edge_dsc.evaluate.agreement import LabelledImages, calibration_error, compare_answers, mcnemar_exact
from edge_dsc.evaluate.metrics import classification_metrics
from engines.record import Agreement, Flip

LABELS = ("clear", "focal", "diffuse")


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (6, 1, 0.125), (10, 2, 0.03857421875), (7, 7, 1.0)],
)
def test_mcnemar_is_twice_the_smaller_binomial_tail(lost: int, won: int, p: float) -> None:
    assert mcnemar_exact(lost, won) == mcnemar_exact(won, lost) == p


def test_mcnemar_of_thousands_of_images() -> None:
    assert mcnemar_exact(2000, 3000) == pytest.approx(8.96e-46, rel=1e-2)
    assert mcnemar_exact(3000, 3000) == 1.0


def test_calibration_error_by_hand() -> None:
    # One bin holds 0.9 right and 0.9 wrong, another 0.6 right: (|1 - 1.8| + |1 - 0.6|) / 3.
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    assert calibration_error(np.array([0, 1, 1]), probabilities) == pytest.approx(1.2 / 3)
    assert calibration_error(np.array([0]), np.array([[1.0, 0.0]])) == 0.0


def test_bins_are_open_below_and_closed_above() -> None:
    # 0.8 closes the bin (11/15, 12/15] and shares it with 0.75; 0.81 would not.
    together = calibration_error(np.array([0, 1]), np.array([[0.75, 0.25], [0.8, 0.2]]))
    apart = calibration_error(np.array([0, 1]), np.array([[0.75, 0.25], [0.81, 0.19]]))
    assert together == pytest.approx(abs(0.25 - 0.8) / 2)
    assert apart == pytest.approx((0.25 + 0.81) / 2)


def one_hot(*answers: int) -> np.ndarray:
    return np.eye(3, dtype=np.float32)[list(answers)]


def compare(
    true: list[int], before: np.ndarray, after: np.ndarray, patients: list[str] | None = None
) -> Agreement:
    names = [f"{index}.png" for index in range(len(true))]
    images = LabelledImages(
        true=np.array(true, int), labels=LABELS, paths=names, patients=names if patients is None else patients
    )
    return compare_answers(images, before, after, name="FP32")


def test_what_flipped_was_lost_and_was_won() -> None:
    found = compare([0, 0, 1, 1, 2, 2], one_hot(0, 0, 1, 2, 2, 0), one_hot(0, 1, 1, 1, 2, 1))
    assert (found.images, found.same_top1, found.lost, found.won) == (6, 3, 1, 1)
    assert found.flipped == (
        Flip("1.png", "clear", "clear", "focal"),
        Flip("3.png", "focal", "diffuse", "focal"),
        Flip("5.png", "diffuse", "clear", "focal"),
    )
    assert (found.accuracy.reference, found.accuracy.candidate, found.accuracy.difference) == (
        4 / 6,
        4 / 6,
        0,
    )
    assert found.largest_difference == 1.0
    assert found.mcnemar_p == 1.0


def test_figures_are_those_of_the_metrics() -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, 200)
    before, after = rng.dirichlet(np.ones(3), 200), rng.dirichlet(np.ones(3), 200)
    found = compare(true.tolist(), before, after)
    for figures, probabilities in (("reference", before), ("candidate", after)):
        expected = classification_metrics(true, probabilities, LABELS)
        assert getattr(found.accuracy, figures) == pytest.approx(expected.accuracy)
        assert getattr(found.macro_f1, figures) == pytest.approx(expected.f1)


def test_a_class_that_nobody_names_has_f1_zero() -> None:
    found = compare([0, 0, 1, 1], one_hot(0, 0, 1, 1), one_hot(0, 0, 1, 1))
    assert found.macro_f1.reference == pytest.approx(2 / 3)


def test_equal_answers_have_no_interval() -> None:
    answers = np.random.default_rng(1).dirichlet(np.ones(3), 50)
    found = compare([0] * 50, answers, answers)
    assert (found.accuracy.low, found.accuracy.high, found.macro_f1.low, found.macro_f1.high) == (0, 0, 0, 0)
    assert found.flipped == ()


def test_the_interval_is_that_of_a_binomial_for_independent_images() -> None:
    true = [0] * 400
    found = compare(true, one_hot(*true), one_hot(*([0] * 360 + [1] * 40)))
    # 10 % +- 1.96 * sqrt(0.1 * 0.9 / 400)
    assert found.accuracy.low == pytest.approx(-0.1 - 0.0294, abs=0.003)
    assert found.accuracy.high == pytest.approx(-0.1 + 0.0294, abs=0.003)
    assert found == compare(true, one_hot(*true), one_hot(*([0] * 360 + [1] * 40)))


def test_images_of_one_patient_share_their_luck() -> None:
    true = [0] * 400
    after = one_hot(*([0] * 360 + [1] * 40))
    alone = compare(true, one_hot(*true), after).accuracy
    shared = compare(
        true, one_hot(*true), after, patients=[str(index // 20) for index in range(400)]
    ).accuracy
    assert shared.high - shared.low > 3 * (alone.high - alone.low)


def test_large_sets_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    true = [0, 1, 2] * 20
    after = one_hot(*([0, 1, 2] * 19 + [1, 1, 1]))
    whole = compare(true, one_hot(*true), after)
    monkeypatch.setattr("edge_dsc.evaluate.agreement._CELLS", 600)
    assert compare(true, one_hot(*true), after) == whole


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"probabilities \(1, 3\) and \(2, 3\)"):
        compare([0], one_hot(0), one_hot(0, 1))
    with pytest.raises(ValueError, match="0 paths and 0 patients for 0 images"):
        compare([], np.zeros((0, 3)), np.zeros((0, 3)))
    with pytest.raises(ValueError, match="1 paths and 2 patients for 1 images"):
        compare([0], one_hot(0), one_hot(0), patients=["a", "b"])
