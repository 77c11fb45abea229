"""Requests that arrive at a fixed rate, as a camera's frames do: the newest waits, older ones are dropped."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

from bench.plan import Block

if TYPE_CHECKING:
    from bench.samples import Samples

_SPIN_NS = 2_000_000  # the last stretch is not slept away: sleeping ends late


def wait_until(due_ns: int) -> None:
    """Wait for a time of ``time.perf_counter_ns``."""
    while (left := due_ns - time.perf_counter_ns()) > 0:
        if left > _SPIN_NS:
            time.sleep((left - _SPIN_NS) / 1e9)


def time_arrivals(
    call: Callable[[], object],
    block: Block,
    fps: float,
    *,
    clock: Callable[[], int],
    wait: Callable[[int], None] = wait_until,
) -> tuple[Samples, int, int]:
    """Answer frames that arrive ``fps`` times a second, one at a time, always the newest.

    Args:
        call: Answers one frame.
        block: How long, or how many answers.
        fps: Frames a second.
        clock: Monotonic time in nanoseconds.
        wait: Waits until a time of that clock.

    Returns:
        Latencies from the arrival of a frame to its answer, nanoseconds; how many frames were dropped because a
        newer one had come; how many samples were refused because the clock jumped backwards.
    """
    samples, dropped, refused, frame = array("q"), 0, 0, 0
    start = clock()
    while True:
        due = start + round(frame * 1e9 / fps)
        if block.calls is not None and len(samples) + refused >= block.calls:
            break
        if block.seconds is not None and due - start >= block.seconds * 1e9:
            break
        if clock() < due:
            wait(due)
        call()
        done = clock()
        if done < due:
            refused += 1
        else:
            samples.append(done - due)
        newest = int((done - start) * fps / 1e9)
        dropped += max(0, newest - frame - 1)
        frame = max(frame + 1, newest)
    return samples, dropped, refused
