"""What the scripts beside this file share: their arguments, and timing calls that take turns."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

Result = TypeVar("Result")


class Times(NamedTuple):
    """How long one call took, seconds; processor time is of all threads and holds on a busy machine too."""

    wall: float
    processor: float


def script_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose ``--help`` is the script's docstring as it stands."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def time_call(call: Callable[[], Result]) -> tuple[Result, Times]:
    """Call, and return the result with its times."""
    wall, processor = time.perf_counter(), time.process_time()
    result = call()
    return result, Times(time.perf_counter() - wall, time.process_time() - processor)


def time_in_turns(
    calls: Mapping[str, Callable[..., object]],
    rounds: int,
    *,
    warm_up: int = 1,
    prepare: Callable[[], tuple[Any, ...]] = tuple,
) -> dict[str, list[Times]]:
    """Time calls that take turns, each round in another order, so that drift hits all alike.

    Args:
        calls: What is timed, by name.
        rounds: How often each of them is timed.
        warm_up: Rounds before those.
        prepare: Returns the arguments of each call; its own time does not count.

    Returns:
        The times of each call, round by round.
    """
    names = list(calls)
    found: dict[str, list[Times]] = {name: [] for name in names}
    for index in range(-warm_up, rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            call, arguments = calls[name], prepare()
            _, times = time_call(lambda call=call, arguments=arguments: call(*arguments))  # type: ignore[misc]
            if index >= 0:
                found[name].append(times)
    return found
