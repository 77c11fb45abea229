"""Whether the processor was there when the measurement wanted it: the scheduler's own account of this process.

A call that has to wait for a processor is late by no fault of its engine, and the longer call waits more often: on
one core shared with several other programs a network that is 3.5 times slower than another came out 14 times slower.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MOST_WAITING = 0.05  # of the time that the process wanted to run


def read_scheduled(root: Path = Path("/")) -> dict[str, int | None]:
    """Read how long this process has run and how long it has waited for a processor, all threads together.

    Args:
        root: Where /proc lies.

    Returns:
        ``ran_ns`` and ``waited_ns``, nanoseconds since each thread's start; None where the kernel does not tell.

    Source:
        Linux, Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat: time spent on the processor, time spent
        waiting on a run queue.
    """
    told = [_numbers(path) for path in root.glob("proc/self/task/*/schedstat")]
    known = [numbers for numbers in told if len(numbers) >= 2]
    if not known:
        return {"ran_ns": None, "waited_ns": None}
    return {"ran_ns": sum(numbers[0] for numbers in known), "waited_ns": sum(numbers[1] for numbers in known)}


def waiting_share(states: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the share of the time that the process wanted to run and had to wait, from the first state to the last.

    Returns:
        0 to 1, or None where it is not known.
    """
    known = [
        state for state in states if state.get("ran_ns") is not None and state.get("waited_ns") is not None
    ]
    if len(known) < 2:
        return None
    # A thread that ended took its time along.
    ran, waited = (max(0, int(known[-1][key]) - int(known[0][key])) for key in ("ran_ns", "waited_ns"))
    return waited / (ran + waited) if ran + waited else None


def crowded(states: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Say that other programs took the processor away; empty where they did not, or where it is not known."""
    share = waiting_share(states)
    if share is None or share <= MOST_WAITING:
        return ()
    return (
        f"other programs had the processor for {share:.0%} of the time that the measurement wanted it, "
        f"{MOST_WAITING:.0%} is the limit",
    )


def _numbers(path: Path) -> list[int]:
    try:
        return [int(word) for word in path.read_text(encoding="ascii").split()]
    except (OSError, ValueError):
        return []
