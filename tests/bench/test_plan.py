from __future__ import annotations

import math

import pytest

from bench.plan import PLANS, Plan, choose_plan
from engines.errors import UsageError


def test_presets_are_those_of_the_field() -> None:
    assert {name: plan.seconds for name, plan in PLANS.items()} == {
        "quick": 10,
        "standard": 60,
        "publish": 600,
    }
    assert all(plan.name == name and plan.rounds >= 20 for name, plan in PLANS.items())
    assert all(plan.warmup_seconds == 2 and plan.warmup_change == 0.01 for plan in PLANS.values())


def test_openings_share_the_rounds_evenly() -> None:
    assert {name: [len(rounds) for rounds in plan.rounds_of_openings()] for name, plan in PLANS.items()} == {
        "quick": [2] * 20,
        "standard": [2] * 40,
        "publish": [5] * 60,
    }
    uneven = Plan(rounds=7, openings=3).rounds_of_openings()
    assert uneven == [range(2), range(2, 4), range(4, 7)]
    assert len(Plan(iterations=4, openings=9).rounds_of_openings()) == 4


def test_more_openings_than_rounds_make_more_rounds() -> None:
    plan = choose_plan("quick", openings=50)
    assert (plan.name, plan.openings, plan.rounds) == ("custom", 50, 50)
    assert choose_plan(seconds=1, openings=3).rounds == 20
    assert choose_plan(seconds=1, openings=40).openings == 40  # what the preset has, but not a second
    assert choose_plan("quick", openings=20) == PLANS["quick"]


@pytest.mark.parametrize(
    ("asked", "openings"),
    [
        ({"seconds": 1}, 10),
        ({"seconds": 20}, 20),
        ({"seconds": 600}, 60),
        ({"iterations": 1}, 1),
        ({"iterations": 9}, 4),
    ],
)
def test_own_durations_and_iterations_open_once_for_two_rounds(asked: dict[str, int], openings: int) -> None:
    assert choose_plan(**asked).openings == openings


def test_iterations_are_spread_over_the_rounds_exactly() -> None:
    blocks = Plan(iterations=130, rounds=60).blocks()
    assert [block.calls for block in blocks] == [3] * 10 + [2] * 50
    assert [block.calls for block in Plan(iterations=3, rounds=60).blocks()] == [1, 1, 1]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 20), (10, 20), (60, 120), (1000, 300)])
def test_own_duration_gets_blocks_of_half_a_second_within_limits(seconds: float, rounds: int) -> None:
    plan = choose_plan(seconds=seconds)
    assert (plan.name, plan.seconds, plan.rounds) == ("custom", seconds, rounds)


def test_a_long_warm_up_moves_its_limit() -> None:
    plan = choose_plan("quick", warmup_seconds=30)
    assert (plan.warmup_seconds, plan.warmup_limit_seconds) == (30, 30)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"seconds": 0}, "the duration is 0 s"),
        ({"seconds": -1}, "the duration is -1 s"),
        ({"seconds": math.nan}, "the duration is nan s"),
        ({"seconds": math.inf}, "the duration is inf s"),
        ({"openings": 0}, "the number of openings is 0"),
        ({"iterations": 0}, "the number of iterations is 0"),
        ({"warmup_seconds": -2}, "the warm-up is -2 s"),
        ({"warmup_seconds": math.nan}, "the warm-up is nan s"),
        ({"seconds": 1, "iterations": 1}, "both a duration and a number of iterations"),
        ({"name": "slow"}, "there is no plan 'slow'"),
    ],
)
def test_impossible_plans_are_refused(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        choose_plan(**arguments)  # type: ignore[arg-type]
    assert caught.value.remedy
