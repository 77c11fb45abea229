"""Pictures of any source through one engine, answered in the order of the source."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from edge_dsc.loop.answers import Answer, Prepared
from edge_dsc.loop.ordered import ordered_map
from engines.errors import ImageError
from engines.packages import load
from engines.runtimes import Runner

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
    while batch := list(itertools.islice(found, runner.record.batch.best)):
        yield from answer_group(batch, runner)


def answer_group(group: Sequence[Prepared], runner: Runner) -> list[Answer]:
    """Run one batch and return an answer for each of its pictures, bad ones included."""
    good = [picture.pixels for picture in group if not isinstance(picture.pixels, ImageError)]
    started = time.perf_counter()
    rows = _run(good, runner) if good else []
    finished = time.perf_counter()
    answers: Iterator[Any] = iter(rows)
    return [_answer(p, answers, finished - started) for p in group]


def _run(good: list[Any], runner: Runner) -> list[Any]:
    if len(good) == 1 and runner.record.batch.smallest == 1:
        rows = runner.run(good[0][None])
    else:
        # An engine whose profile begins above one image gets the last image repeated; those answers are dropped.
        missing = max(0, runner.record.batch.smallest - len(good))
        rows = runner.run(load("numpy").stack(good + good[-1:] * missing))
    found: list[Any] = rows.tolist()
    return found


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
