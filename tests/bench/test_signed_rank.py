from __future__ import annotations

import numpy as np
import pytest

from bench.statistics import signed_rank_chance


def test_a_published_example() -> None:
    # Darwin's pairs of crossed and self-fertilised maize, eighths of an inch: Fisher, The Design of
    # Experiments (1935), table 3; the exact two-sided chance for W- = 24 of 15 pairs is 0.0413.
    differences = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    baseline = dict.fromkeys(range(15), 1.0)
    candidate = {index: float(np.exp(value / 1000)) for index, value in enumerate(differences)}
    assert signed_rank_chance(baseline, candidate) == pytest.approx(0.0413, abs=5e-5)
    assert signed_rank_chance(candidate, baseline) == pytest.approx(0.0413, abs=5e-5)


def test_all_rounds_on_one_side_have_the_chance_of_so_many_equal_coins() -> None:
    baseline = dict.fromkeys(range(10), 100.0)
    candidate = {index: 101.0 + index for index in range(10)}
    assert signed_rank_chance(baseline, candidate) == 2 / 2**10


def test_rounds_without_a_difference_and_without_a_partner_are_left_out() -> None:
    baseline = dict.fromkeys(range(20), 100.0)
    candidate = {**dict.fromkeys(range(10), 100.0), 10: 101.0, 11: 102.0, 99: 1.0}
    assert signed_rank_chance(baseline, candidate) == 0.5
    assert signed_rank_chance(baseline, baseline) == 1.0


def test_equals_are_told_apart_as_often_as_the_chance_says() -> None:
    rng = np.random.default_rng(7)
    below, above = (np.exp(rng.standard_t(2, (400, 40)) * 0.02) for _ in range(2))
    chances = [
        signed_rank_chance(dict(enumerate(first)), dict(enumerate(second)))
        for first, second in zip(below, above, strict=True)
    ]
    assert 0.03 <= np.mean(np.array(chances) < 0.05) <= 0.07
