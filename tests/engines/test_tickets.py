from __future__ import annotations

from collections.abc import Iterator

import pytest

from engines.errors import EnvironmentProblem
from engines.runtimes import DirectSubmission, RunnerOptions, Ticket, answer_batches


class Doubling(DirectSubmission):
    def run(self, batch: int) -> int:
        return 2 * batch


class Slots:
    """A runner with two slots that notes what happens, and fails where told."""

    slots = 2

    def __init__(self, fails: int = -1) -> None:
        self.log: list[str] = []
        self.fails = fails
        self.open = 0

    def submit(self, batch: int) -> Ticket:
        assert self.open < self.slots
        self.open += 1
        self.log.append(f"submit {batch}")
        return Ticket(self, batch)

    def collect(self, ticket: Ticket) -> int:
        batch = ticket.take(self)
        self.open -= 1
        self.log.append(f"collect {batch}")
        if batch >= self.fails >= 0:
            raise EnvironmentProblem(f"batch {batch} fails", remedy="none")
        return 2 * batch


def tagged(count: int) -> Iterator[tuple[str, int]]:
    return ((f"t{index}", index) for index in range(count))


def test_direct_submission_runs_at_once() -> None:
    runner = Doubling()
    ticket = runner.submit(4)
    assert (runner.collect(ticket), ticket.stages_ns, runner.slots) == (8, None, 1)
    assert list(answer_batches(runner, tagged(3))) == [("t0", 0), ("t1", 2), ("t2", 4)]


def test_a_ticket_is_collected_once_and_by_its_runner() -> None:
    runner = Doubling()
    ticket = runner.submit(1)
    with pytest.raises(ValueError, match="of another runner"):
        Doubling().collect(ticket)
    runner.collect(ticket)
    with pytest.raises(ValueError, match="collected before"):
        runner.collect(ticket)


def test_the_slots_are_kept_full_and_answers_stay_in_order() -> None:
    runner = Slots()
    answers = answer_batches(runner, tagged(4))
    assert next(answers) == ("t0", 0)
    # The device has the third batch before the caller gets the first answer.
    assert runner.log == ["submit 0", "submit 1", "collect 0", "submit 2"]
    assert list(answers) == [("t1", 2), ("t2", 4), ("t3", 6)]
    assert runner.log[4:] == ["collect 1", "submit 3", "collect 2", "collect 3"]


def test_stopping_early_leaves_no_ticket_open() -> None:
    runner = Slots()
    answers = answer_batches(runner, tagged(9))
    next(answers)
    answers.close()
    assert runner.open == 0


def test_a_source_that_fails_leaves_no_ticket_open() -> None:
    def failing() -> Iterator[tuple[str, int]]:
        yield from tagged(2)
        raise OSError("unplugged")

    runner = Slots()
    with pytest.raises(OSError, match="unplugged"):
        list(answer_batches(runner, failing()))
    assert runner.open == 0


def test_the_first_failure_is_told_and_the_rest_dropped() -> None:
    runner = Slots(fails=1)
    with pytest.raises(EnvironmentProblem, match="batch 1 fails"):
        list(answer_batches(runner, tagged(5)))
    assert runner.open == 0


@pytest.mark.parametrize("wrong", [{"slots": 0}, {"threads": 0}, {"memory": "managed"}])
def test_options_are_checked(wrong: dict) -> None:
    with pytest.raises(ValueError, match="no slot, no thread, or a memory"):
        RunnerOptions(**wrong)
