"""A map in threads that keeps the order and a bounded number of results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

# A thread takes a few items at once: all are decoded, then all run, so that the network's weights stay in the
# processor's cache and the calling thread wakes less often: 0.92 instead of 0.88 of the rate of decoding alone.
TOGETHER = 4
_AHEAD = 2  # groups waiting for the slowest one, for each thread
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def ordered_map(
    function: Callable[[list[_Item]], list[_Result]], items: Iterable[_Item | None], *, threads: int
) -> Iterator[_Result]:
    """Map in threads, in order, with a bounded number of results waiting: memory does not grow with the source.

    Args:
        function: Called in a thread with up to four items; returns a result for each.
        items: What it is called with; taken in the calling thread. None says that no item is at hand just
            now: what waits is yielded instead of waiting for more.
        threads: How many at once.
    """
    waiting: deque[Future[list[_Result]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for group in _groups(items):
                if group:
                    waiting.append(pool.submit(function, group))
                    if len(waiting) >= threads * _AHEAD:
                        yield from waiting.popleft().result()
                    continue
                while waiting:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _groups(items: Iterable[_Item | None]) -> Iterator[list[_Item]]:
    """Collect items; an empty group says that the source is idle."""
    group: list[_Item] = []
    for item in items:
        if item is not None:
            group.append(item)
        if group and (item is None or len(group) == TOGETHER):
            yield group
            group = []
        if item is None:
            yield []
    if group:
        yield group
