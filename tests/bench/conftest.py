"""A clock that only the subjects move, and reports made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest

from bench.plan import Plan
from bench.report import BlockSamples, Report, SubjectReport, WarmUp, as_samples

MACHINE = {
    "machine": "Jetson Orin Nano",
    "architecture": "aarch64",
    "cpu": "Cortex-A78AE",
    "cores": 6,
    "load": 0.5,
}


class FakeClock:
    """Monotonic nanoseconds that move only when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000

    def __call__(self) -> int:
        return self.now

    def takes(self, *durations_ns: int, log: list[str] | None = None, name: str = "") -> Callable[[], None]:
        """A call that takes these times, one after the other and then again from the first."""
        state = {"calls": 0}

        def call() -> None:
            self.now += durations_ns[state["calls"] % len(durations_ns)]
            state["calls"] += 1
            if log is not None:
                log.append(name)

        return call


def make_subject(
    name: str,
    blocks: Iterable[Sequence[int]],
    *,
    description: Mapping[str, Any] | None = None,
    warmup: WarmUp | None = None,
    refused: int = 0,
    error: str | None = None,
    openings: int = 5,
) -> SubjectReport:
    blocks = list(blocks)
    return SubjectReport(
        name=name,
        description={"batch": 1, "threads": 1} if description is None else description,
        blocks=tuple(
            BlockSamples(
                opening=index * openings // len(blocks),
                round=index,
                start_ns=index * 1000,
                samples_ns=as_samples(block),
            )
            for index, block in enumerate(blocks)
        ),
        warmup=warmup or WarmUp(seconds=2.0, calls=10, stable=True),
        refused=refused,
        error=error,
    )


def make_report(*subjects: SubjectReport, **changes: Any) -> Report:
    values: dict[str, Any] = {
        "subjects": subjects,
        "plan": Plan(),
        "environment": MACHINE,
        "environment_end": {**MACHINE, "load": 0.75},
        "created": "2026-11-01T12:00:00+00:00",
    }
    return Report(**{**values, **changes})


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def subject() -> Callable[..., SubjectReport]:
    return make_subject


@pytest.fixture
def report() -> Callable[..., Report]:
    return make_report
