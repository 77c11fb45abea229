"""A map in threads that keeps the order and a bounded number of results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_AHEAD = 4  # results waiting for the slowest one, for each thread
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def ordered_map(
    function: Callable[[_Item], _Result], items: Iterable[_Item | None], *, threads: int
) -> Iterator[_Result]:
    """Map in threads, in order, with a bounded number of results waiting: memory does not grow with the source.

    Args:
        function: Called in a thread.
        items: What it is called with; taken in the calling thread. None says that no item is at hand just
            now: what waits is yielded instead of waiting for more.
        threads: How many at once.
    """
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for item in items:
                if item is not None:
                    waiting.append(pool.submit(function, item))
                    if len(waiting) >= threads * _AHEAD:
                        yield waiting.popleft().result()
                    continue
                while waiting:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
