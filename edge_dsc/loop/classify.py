"""Pictures of any source through one engine, answered in the order of the source."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from edge_dsc.loop.answers import Answer, Prepared
from edge_dsc.loop.ordered import in_groups, ordered_map
from engines.errors import ImageError
from engines.images import Array
from engines.packages import load
from engines.runtimes import Runner
from engines.tickets import answer_batches

_Item = TypeVar("_Item")


def classify(
    items: Iterable[_Item | None], prepare: Callable[[_Item], Prepared], runner: Runner, *, threads: int
) -> Iterator[Answer]:
    """Prepare items in threads and yield an answer for each, in their order.

    A thread-safe runner runs batches of one in the preparing threads: for small networks on a CPU that is
    faster than collecting batches, and every core decodes. Any other runner runs in the calling thread,
    which owns it, in batches of the size that the engine was built for, as many in flight as it has slots: while
    the device works on one batch, the next is decoded and copied in.

    Args:
        items: What ``prepare`` takes; None says that no item is at hand just now: a batch that is not full runs then.
        prepare: Makes one item ready; runs in threads.
        runner: The engine.
        threads: Preparing threads.
    """

    def prepare_all(group: list[_Item]) -> list[Prepared]:
        return [prepare(item) for item in group]

    def answer_all(group: list[_Item]) -> list[Answer]:
        return [answer_group([prepared], runner)[0] for prepared in prepare_all(group)]

    if runner.thread_safe and runner.record.batch.smallest == 1:
        for answer in ordered_map(answer_all, items, threads=threads):
            if answer is not None:
                yield answer
        return
    prepared = ordered_map(prepare_all, items, threads=threads)
    yield from _classify_in_batches(prepared, runner)


def answer_group(group: Sequence[Prepared], runner: Runner) -> list[Answer]:
    """Run one batch and return an answer for each of its pictures, bad ones included."""
    started = time.perf_counter()
    rows = runner.run(_stack(group, runner)) if _has_good(group) else None
    return _answers(group, rows, time.perf_counter() - started)


def _classify_in_batches(prepared: Iterator[Prepared | None], runner: Runner) -> Iterator[Answer]:
    groups = in_groups(prepared, runner.record.batch.best)
    for good, some in itertools.groupby(groups, _has_good):
        # Nothing to run: these wait for what is in flight, so that the order holds. An empty group, of a source that
        # is silent, lets what is in flight come out.
        if not good:
            for group in some:
                yield from _answers(group, None, 0.0)
            continue
        resumed = time.perf_counter()
        batches = (((group, time.perf_counter()), _stack(group, runner)) for group in some)
        for (group, started), rows in answer_batches(runner, batches):
            # The time that the caller took, and that of the batch before, is not this batch's.
            yield from _answers(group, rows, time.perf_counter() - max(started, resumed))
            resumed = time.perf_counter()


def _has_good(group: Sequence[Prepared]) -> bool:
    return any(not isinstance(picture.pixels, ImageError) for picture in group)


def _stack(group: Sequence[Prepared], runner: Runner) -> Array:
    good = [picture.pixels for picture in group if not isinstance(picture.pixels, ImageError)]
    smallest = runner.record.batch.smallest
    if len(good) == smallest == 1:
        return good[0][None]
    # An engine whose profile begins above one image gets the last image repeated; those answers are dropped.
    return load("numpy").stack(good + good[-1:] * max(0, smallest - len(good)))


def _answers(group: Sequence[Prepared], rows: Array, seconds: float) -> list[Answer]:
    answers: Iterator[Any] = iter(() if rows is None else rows.tolist())
    return [_answer(picture, answers, seconds) for picture in group]


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
