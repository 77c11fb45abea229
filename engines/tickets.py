"""Batches in flight: what submit gives, what collect takes, and the loop that keeps every slot busy."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from engines.errors import EdgeDscError

Array = Any
_Tag = TypeVar("_Tag")


class Ticket:
    """A batch that was submitted; :meth:`Runner.collect` gives its answers, once.

    Attributes:
        stages_ns: After collecting, where the runner times them: nanoseconds on the device of ``h2d``,
            ``execute`` and ``d2h``. None where it does not.
    """

    __slots__ = ("_answers", "_taken", "owner", "stages_ns")

    def __init__(self, owner: object, answers: Array = None) -> None:
        """Issue a ticket.

        Args:
            owner: The runner that collects it.
            answers: The answers, where they are there already.
        """
        self.owner = owner
        self.stages_ns: Mapping[str, int] | None = None
        self._answers = answers
        self._taken = False

    def take(self, owner: object) -> Array:
        """Mark the ticket as collected and return the answers that it was issued with.

        Raises:
            ValueError: Another runner issued it, or it was collected before.
        """
        if owner is not self.owner:
            raise ValueError("this ticket is of another runner")
        if self._taken:
            raise ValueError("this ticket was collected before")
        self._taken = True
        answers, self._answers = self._answers, None
        return answers


class Submits(Protocol):
    """What the loop needs of a runner."""

    slots: int

    def submit(self, batch: Array) -> Ticket:
        """Begin a batch."""
        ...

    def collect(self, ticket: Ticket) -> Array:
        """Wait for its answers."""
        ...


class DirectSubmission:
    """``submit`` and ``collect`` for a runner whose ``run`` does all the work in the calling thread.

    Attributes:
        slots: 1: nothing is gained by submitting ahead.
    """

    slots = 1

    def run(self, batch: Array) -> Array:
        """Classify a batch; the runner's own."""
        raise NotImplementedError

    def submit(self, batch: Array) -> Ticket:
        """Run the batch at once; the ticket holds the answers."""
        return Ticket(self, self.run(batch))

    def collect(self, ticket: Ticket) -> Array:
        """Return the answers of a ticket.

        Raises:
            ValueError: Another runner issued it, or it was collected before.
        """
        return ticket.take(self)


def answer_batches(runner: Submits, batches: Iterable[tuple[_Tag, Array]]) -> Iterator[tuple[_Tag, Array]]:
    """Run tagged batches with as many in flight as the runner has slots, and yield them in order.

    While the device works on one batch, the next is taken from ``batches`` and copied in. When the caller stops
    early or a batch fails, the tickets still open are collected and dropped, so that the runner stays usable.

    Args:
        runner: Any runner.
        batches: A tag and its batch; the batch may be reused as soon as the next one is asked for.

    Yields:
        The tag, and ``float32 [N, classes]``.
    """
    waiting: deque[tuple[_Tag, Ticket]] = deque()
    try:
        for tag, batch in batches:
            full = len(waiting) >= runner.slots
            done = _collect_oldest(runner, waiting) if full else None
            waiting.append(
                (tag, runner.submit(batch))
            )  # before the caller gets its turn: the device stays busy
            if done is not None:
                yield done
        while waiting:
            yield _collect_oldest(runner, waiting)
    except BaseException:
        for _, ticket in waiting:
            with contextlib.suppress(EdgeDscError):  # the first failure is the one to tell
                runner.collect(ticket)
        raise


def _collect_oldest(runner: Submits, waiting: deque[tuple[_Tag, Ticket]]) -> tuple[_Tag, Array]:
    tag, ticket = waiting.popleft()
    return tag, runner.collect(ticket)
