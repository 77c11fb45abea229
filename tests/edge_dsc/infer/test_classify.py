from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edge_dsc.infer.classify import Prepared, classify
from edge_dsc.infer.video import Frame
from engines.errors import EnvironmentProblem, ImageError
from engines.record import BatchRange
from engines.runtimes import Ticket

PIXELS = np.zeros((2, 2, 1), np.uint8)


class Slots:
    """A runner with two slots that is not thread-safe: answers the brightness, and notes what happens."""

    thread_safe = False
    slots = 2

    def __init__(self, best: int = 2, smallest: int = 1, fails_at: int = -1) -> None:
        self.record: Any = type("Record", (), {"batch": BatchRange(smallest, best, best)})()
        self.log: list[str] = []
        self.open = 0
        self.fails_at = fails_at

    def submit(self, batch: np.ndarray) -> Ticket:
        assert self.open < self.slots
        self.open += 1
        values = batch[:, 0, 0, 0].tolist()
        self.log.append(f"submit {values}")
        return Ticket(self, np.array([[value / 100, 1 - value / 100] for value in values]))

    def collect(self, ticket: Ticket) -> Any:
        answers = ticket.take(self)
        self.open -= 1
        self.log.append("collect")
        if round(answers[0][0] * 100) == self.fails_at:
            raise EnvironmentProblem("the GPU is gone", remedy="none")
        return answers


def prepare(value: int) -> Prepared:
    if value == 99:
        return Prepared("bad", ImageError("truncated", remedy="none"))
    return Prepared(str(value), PIXELS + np.uint8(value))


def prepare_live(value: int) -> Prepared:
    return Prepared("camera", PIXELS + np.uint8(value), frame=Frame(index=value, pixels=PIXELS, captured=0.0))


def run(runner: Slots, values: list[int]) -> list[tuple[str, float | None]]:
    found = classify(values, prepare, runner, threads=1)
    return [(str(a.path), a.probabilities and round(a.probabilities[0] * 100)) for a in found]


def test_two_batches_are_in_flight_and_answers_stay_in_order() -> None:
    runner = Slots()
    assert run(runner, [1, 2, 3, 4, 5]) == [("1", 1), ("2", 2), ("3", 3), ("4", 4), ("5", 5)]
    assert runner.log == ["submit [1, 2]", "submit [3, 4]", "collect", "submit [5]", "collect", "collect"]


def test_bad_pictures_cost_their_own_answer_only() -> None:
    assert run(Slots(), [1, 99, 99, 99, 5]) == [
        ("1", 1),
        ("bad", None),
        ("bad", None),
        ("bad", None),
        ("5", 5),
    ]


def test_a_silent_source_runs_the_batch_that_is_not_full_and_hands_out_what_is_in_flight() -> None:
    taken: list[int | None] = []

    def source() -> Iterator[int | None]:
        for item in (1, 2, 3, None, None, 4):
            taken.append(item)
            yield item

    runner = Slots()
    answers = classify(source(), prepare, runner, threads=1)
    assert [next(answers).path for _ in range(3)] == ["1", "2", "3"]
    assert (taken, runner.open) == ([1, 2, 3, None], 0)
    assert [answer.path for answer in answers] == ["4"]
    assert [line for line in runner.log if line != "collect"] == ["submit [1, 2]", "submit [3]", "submit [4]"]


def test_a_profile_above_one_gets_the_last_picture_repeated() -> None:
    runner = Slots(best=3, smallest=3)
    assert run(runner, [1, 2, 3, 4]) == [("1", 1), ("2", 2), ("3", 3), ("4", 4)]
    assert runner.log[1] == "submit [4, 4, 4]"


def test_stopping_early_gives_the_slots_back() -> None:
    runner = Slots()
    answers = classify(range(20), prepare, runner, threads=1)
    next(answers)
    answers.close()
    assert runner.open == 0


def test_a_failure_is_told_and_gives_the_slots_back() -> None:
    runner = Slots(fails_at=3)
    with pytest.raises(EnvironmentProblem, match="the GPU is gone"):
        run(runner, [1, 2, 3, 4, 5, 6])
    assert runner.open == 0
