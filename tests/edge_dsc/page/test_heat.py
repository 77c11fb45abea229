"""Shares of evidence outside the central chest, of maps whose shares are known, and what is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from edge_dsc.page.heat import (
    OUTSIDE_AREA,
    central_weights,
    draw_heat,
    evidence_for,
    outside_share,
)


def test_what_all_classes_share_is_no_evidence() -> None:
    maps = np.array([[[5.0, 1.0]], [[5.0, 3.0]], [[5.0, 2.0]]], np.float32)
    assert evidence_for(maps, 1).tolist() == [[0.0, 1.0]]
    assert evidence_for(maps, 0).tolist() == [[0.0, -1.0]]


@pytest.mark.parametrize("sides", [(14, 14), (7, 7), (8, 10), (1, 1)])
def test_evidence_without_a_place_of_its_own_lies_outside_as_the_area_does(sides: tuple[int, int]) -> None:
    assert outside_share(np.ones(sides, np.float32)) == pytest.approx(OUTSIDE_AREA) == 0.4375
    assert central_weights(*sides).mean() == pytest.approx(0.5625)


def test_a_place_on_the_border_counts_by_its_area() -> None:
    weights = central_weights(14, 14)
    assert weights[7, [0, 1, 2]].tolist() == pytest.approx([0, 0.25, 1])  # the border is at 1.75 places
    corner, middle = np.zeros((14, 14), np.float32), np.zeros((14, 14), np.float32)
    corner[0, 13], middle[6:8, 6:8] = 2, 1
    assert (outside_share(corner), outside_share(middle)) == (1.0, 0.0)
    assert outside_share(corner + middle - 1) == pytest.approx(1.0)  # what speaks against it does not count


def test_nothing_that_speaks_for_a_class_has_no_share_and_is_not_drawn() -> None:
    picture = np.full((20, 30, 3), 90, np.uint8)
    against = np.full((2, 2), -1, np.float32)
    assert outside_share(against) is None
    assert (draw_heat(picture, against) == picture).all()


def test_heat_is_red_where_the_evidence_is_and_leaves_the_rest() -> None:
    picture = np.full((64, 64, 3), 90, np.uint8)
    evidence = np.zeros((4, 4), np.float32)
    evidence[0, 0] = 7
    drawn = draw_heat(picture, evidence)
    assert (picture == 90).all() and drawn.shape == picture.shape
    blue, _, red = drawn[4, 4].tolist()
    assert red > 110 > 90 > blue
    assert (drawn[32:, 32:] == 90).all()
