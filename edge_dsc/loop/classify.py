"""Pictures of any source through one engine, answered in the order of the source."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from edge_dsc.loop.answers import Answer, Prepared
from edge_dsc.loop.ordered import ordered_map
from engines.errors import EdgeDscError, ImageError
from engines.packages import load
from engines.runtimes import Runner
from engines.tickets import Ticket

_Item = TypeVar("_Item")


def classify(
    items: Iterable[_Item | None], prepare: Callable[[_Item], Prepared], runner: Runner, *, threads: int
) -> Iterator[Answer]:
    """Prepare items in threads and yield an answer for each, in their order.

    A thread-safe runner runs batches of one in the preparing threads: for small networks on a CPU that is
    faster than collecting batches, and every core decodes. Any other runner runs in the calling thread,
    which owns it, in batches of the size that the engine was built for.

    Args:
        items: What ``prepare`` takes; None says that no item is at hand just now.
        prepare: Makes one item ready; runs in threads.
        runner: The engine.
        threads: Preparing threads.
    """

    def prepare_all(group: list[_Item]) -> list[Prepared]:
        return [prepare(item) for item in group]

    def answer_all(group: list[_Item]) -> list[Answer]:
        return [answer_group([prepared], runner)[0] for prepared in prepare_all(group)]

    if runner.thread_safe and runner.record.batch.smallest == 1:
        yield from ordered_map(answer_all, items, threads=threads)
        return
    found = ordered_map(prepare_all, items, threads=threads)
    groups = iter(lambda: list(itertools.islice(found, runner.record.batch.best)), [])
    if runner.slots == 1:
        for group in groups:
            yield from answer_group(group, runner)
    else:
        yield from _answer_ahead(groups, runner)


def _answer_ahead(groups: Iterable[list[Prepared]], runner: Runner) -> Iterator[Answer]:
    """Keep as many batches in flight as the runner has slots; a live frame is answered before the next is taken."""
    waiting: deque[tuple[list[Prepared], Ticket | None, float]] = deque()
    try:
        for group in groups:
            if len(waiting) == runner.slots or (waiting and _is_live(group)):
                yield from _collect(waiting, runner)
            good = _pixels(group)
            started = time.perf_counter()
            ticket = runner.submit(_stack(good, runner)) if good else None
            waiting.append((group, ticket, time.perf_counter() - started))
            while waiting and _is_live(group):
                yield from _collect(waiting, runner)
        while waiting:
            yield from _collect(waiting, runner)
    finally:  # stopped early, or failed: the runner keeps its slots
        for _, ticket, _ in waiting:
            if ticket is not None:
                with contextlib.suppress(EdgeDscError):
                    runner.collect(ticket)


def _collect(waiting: deque[tuple[list[Prepared], Ticket | None, float]], runner: Runner) -> list[Answer]:
    group, ticket, submitting = waiting.popleft()
    started = time.perf_counter()
    rows: Iterator[Any] = iter(runner.collect(ticket).tolist() if ticket is not None else [])
    seconds = (
        submitting + time.perf_counter() - started
    )  # what the loop spent on it, not what passed meanwhile
    return [_answer(picture, rows, seconds) for picture in group]


def _is_live(group: list[Prepared]) -> bool:
    return any(picture.frame is not None and picture.frame.seconds is None for picture in group)


def answer_group(group: Sequence[Prepared], runner: Runner) -> list[Answer]:
    """Run one batch and return an answer for each of its pictures, bad ones included."""
    good = _pixels(group)
    started = time.perf_counter()
    rows = _run(good, runner) if good else []
    finished = time.perf_counter()
    answers: Iterator[Any] = iter(rows)
    return [_answer(p, answers, finished - started) for p in group]


def _pixels(group: Sequence[Prepared]) -> list[Any]:
    return [picture.pixels for picture in group if not isinstance(picture.pixels, ImageError)]


def _run(good: list[Any], runner: Runner) -> list[Any]:
    found: list[Any] = runner.run(_stack(good, runner)).tolist()
    return found


def _stack(good: list[Any], runner: Runner) -> Any:
    """Make a batch: ``uint8 [N, height, width, 1]``."""
    if len(good) == 1 and runner.record.batch.smallest == 1:
        return good[0][None]
    # An engine whose profile begins above one image gets the last image repeated; those answers are dropped.
    missing = max(0, runner.record.batch.smallest - len(good))
    return load("numpy").stack(good + good[-1:] * missing)


def _answer(prepared: Prepared, answers: Iterator[Any], seconds: float) -> Answer:
    frame = prepared.frame
    bad = isinstance(prepared.pixels, ImageError)
    live = frame is not None and frame.seconds is None
    return Answer(
        prepared.path,
        None if bad else tuple(next(answers)),
        str(prepared.pixels) if bad else None,
        latency_ms=(prepared.seconds + (0.0 if bad else seconds)) * 1e3,
        age_ms=(time.monotonic() - frame.captured) * 1e3 if live and frame is not None else None,
        frame=frame,
        picture=prepared.picture,
    )
