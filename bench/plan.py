"""How long to measure, in how many openings, rounds and turns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec

from engines.errors import UsageError

SINGLE_STREAM = "single-stream"  # one request at a time, the next when the last one is answered
_SLOWEST_FPS = 0.001
_MOST_OPENINGS = 60
Number = int | float  # in a document 10 stays 10 and 10.5 stays 10.5


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _require(fine: bool, what: str, remedy: str) -> None:
    if not fine:
        raise UsageError(what, remedy=remedy)


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to measure: every subject is opened several times and gets one block in each round of each opening.

    A block is measured in turns of some milliseconds, in which the subjects alternate in an order that is drawn
    each time: drift (heat, clocks, a neighbour's load) then hits all subjects alike. What stays as it is while a
    subject is open (where its memory lies) hits it alone: that is what the openings are for.

    Attributes:
        name: ``quick``, ``standard``, ``publish`` or ``custom``.
        seconds: Measured time of one subject, warm-up not counted. Seconds.
        iterations: Calls of one subject, instead of ``seconds``.
        rounds: Blocks of one subject, those of all openings together.
        openings: How often each subject is opened, all of them anew in another order; at most ``rounds``.
        turn_seconds: Shortest turn; a turn also holds 20 calls, or the whole block. None where a block is one turn.
            Seconds.
        warmup_seconds: Shortest warm-up of one subject; 0 leaves the warm-up out. Seconds.
        warmup_limit_seconds: Longest warm-up of one subject. Seconds.
        warmup_change: The warm-up ends when the block median moves less than this, as a fraction.
        lead_in: Calls before each turn that are not counted: they find the caches as the turn before left them.
        seed: Seed of the order.
        scenario: How requests arrive; reports of different scenarios are not comparable.
        fps: Requests that arrive each second, whether or not the last one is answered; None for one after the other.

    Raises:
        UsageError: A number that cannot be measured with.

    Source:
        Warm-up of at least 2 s and until the block median moves less than 1 %, the openings and 20 blocks or more
        are this project's choice; 600 s is the minimum duration in the MLPerf inference rules.
    """

    name: str = "standard"
    seconds: Number = 60.0
    iterations: int | None = None
    rounds: int = 80
    openings: int = 40
    turn_seconds: Number | None = 0.025
    warmup_seconds: Number = 2.0
    warmup_limit_seconds: Number = 15.0
    warmup_change: Number = 0.01
    lead_in: int = 2
    seed: int = 0
    scenario: str = SINGLE_STREAM
    fps: Number | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        _require(_positive(self.seconds), f"the duration is {self.seconds} s", "give a --duration above 0")
        _require(
            self.iterations is None or self.iterations >= 1,
            f"the number of iterations is {self.iterations}",
            "give --iterations of 1 or more",
        )
        _require(self.rounds >= 1, f"the number of rounds is {self.rounds}", "give 1 or more")
        _require(self.openings >= 1, f"the number of openings is {self.openings}", "give 1 or more")
        _require(
            self.turn_seconds is None or _positive(self.turn_seconds),
            f"the shortest turn is {self.turn_seconds} s",
            "give 0.025",
        )
        _require(
            0 <= self.warmup_seconds < math.inf and 0 <= self.warmup_limit_seconds < math.inf,
            f"the warm-up is {self.warmup_seconds} s, at most {self.warmup_limit_seconds} s",
            "give a --warmup of 0 or more",
        )
        _require(_positive(self.warmup_change), f"the warm-up's change is {self.warmup_change}", "give 0.01")
        _require(
            self.fps is None or _SLOWEST_FPS <= self.fps < math.inf,
            f"the rate is {self.fps} fps",
            f"give an --fps of {_SLOWEST_FPS} or more",
        )
        _require(self.lead_in >= 0, f"the lead-in is {self.lead_in} calls", "give 0 or more")

    def blocks(self) -> list[Block]:
        """Return the share of one subject in each round; with few iterations there are fewer rounds."""
        if self.iterations is None:
            return [Block(seconds=self.seconds / self.rounds)] * self.rounds
        rounds = min(self.rounds, self.iterations)
        size, more = divmod(self.iterations, rounds)
        return [Block(calls=size + (index < more)) for index in range(rounds)]

    def rounds_of_openings(self) -> list[range]:
        """Return the rounds of each opening, shared out evenly; with few rounds there are fewer openings."""
        rounds = len(self.blocks())
        count = min(self.openings, rounds)
        return [range(rounds * index // count, rounds * (index + 1) // count) for index in range(count)]


@dataclass(frozen=True, kw_only=True)
class Block:
    """How long one block is: a time or a number of calls.

    Attributes:
        seconds: Time; the call that passes it is the last one.
        calls: Number of calls.
    """

    seconds: float | None = None
    calls: int | None = None

    def part(self, index: int, parts: int) -> Block:
        """Return one of several equal parts of the block; the first ones have the calls that are left over."""
        if self.calls is None:
            return Block(seconds=(self.seconds or 0.0) / parts)
        size, more = divmod(self.calls, parts)
        return Block(calls=size + (index < more))


def _openings_of(rounds: int) -> int:
    """Return how often to open what is measured in so many rounds: two rounds are one opening."""
    return max(1, min(_MOST_OPENINGS, rounds // 2))


PLANS = {
    "quick": Plan(name="quick", seconds=10, rounds=40, openings=_openings_of(40), warmup_limit_seconds=5),
    "standard": Plan(
        name="standard", seconds=60, rounds=80, openings=_openings_of(80), warmup_limit_seconds=15
    ),
    "publish": Plan(
        name="publish", seconds=600, rounds=300, openings=_openings_of(300), warmup_limit_seconds=60
    ),
}


def choose_plan(
    name: str = "standard",
    *,
    seconds: float | None = None,
    iterations: int | None = None,
    warmup_seconds: float | None = None,
    openings: int | None = None,
    seed: int = 0,
    scenario: str | None = None,
    fps: float | None = None,
) -> Plan:
    """Return a preset, or a plan of its own where a duration, iterations, a warm-up or openings are given.

    Raises:
        UsageError: No preset of that name, both a duration and iterations, or a number that is impossible.
    """
    if name not in PLANS:
        raise UsageError(f"there is no plan {name!r}", remedy=f"choose one of {', '.join(PLANS)}")
    if seconds is not None and iterations is not None:
        raise UsageError(
            "both a duration and a number of iterations are given", remedy="give only one of them"
        )
    preset = PLANS[name]
    changed: dict[str, Any] = {"seed": seed, "fps": fps}
    if fps is not None:
        changed["scenario"] = f"camera of {fps:g} fps"
    if scenario is not None:
        changed["scenario"] = scenario
    if seconds is not None:
        # Blocks of half a second, but never fewer than 20 nor more than 300 of them.
        wanted = round(seconds * 2) if _positive(seconds) else 0
        rounds = min(300, max(20, wanted))
        changed |= {"name": "custom", "seconds": seconds, "rounds": rounds, "openings": _openings_of(rounds)}
    if iterations is not None:
        changed |= {
            "name": "custom",
            "iterations": iterations,
            "openings": _openings_of(min(iterations, preset.rounds)),
        }
    if openings is not None and openings != changed.get("openings", preset.openings):
        rounds = max(changed.get("rounds", preset.rounds), openings)  # each opening has one at least
        changed |= {"name": "custom", "openings": openings, "rounds": rounds}
    if warmup_seconds is not None:
        limit = max(preset.warmup_limit_seconds, warmup_seconds)
        changed |= {"name": "custom", "warmup_seconds": warmup_seconds, "warmup_limit_seconds": limit}
    return msgspec.structs.replace(preset, **changed)
