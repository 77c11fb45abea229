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
) -> Iterator[_Result | None]:
    """Map in threads, in order, with a bounded number of results waiting: memory does not grow with the source.

    Args:
        function: Called in a thread with up to four items; returns a result for each.
        items: What it is called with; taken in the calling thread. None says that no item is at hand just
            now: what waits is yielded instead of waiting for more.
        threads: How many at once.

    Yields:
        A result; or None for a None among ``items``, after the results of all items before it.
    """
    waiting: deque[Future[list[_Result]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for group in in_groups(items, TOGETHER):
                if group:
                    waiting.append(pool.submit(function, group))
                    if len(waiting) >= threads * _AHEAD:
                        yield from waiting.popleft().result()
                    continue
                while waiting:
                    yield from waiting.popleft().result()
                yield None
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def in_groups(items: Iterable[_Item | None], size: int) -> Iterator[list[_Item]]:
    """Collect items to groups of ``size``; None ends a group early, and an empty group then says so."""
    group: list[_Item] = []
    for item in items:
        if item is not None:
            group.append(item)
        if group and (item is None or len(group) == size):
            yield group
            group = []
        if item is None:
            yield []
    if group:
        yield group
