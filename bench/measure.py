"""Measuring: subjects in interleaved blocks, every call timed, at their own pace or as a camera's frames arrive."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.machine import environment, read_state
from bench.plan import Block, Plan
from bench.report import BlockSamples, Report, SubjectReport, WarmUp
from engines.errors import UsageError

if TYPE_CHECKING:
    from engines.runtimes import Progress

Clock = Callable[[], int]  # monotonic, nanoseconds
_JUMPS_PER_BLOCK = 10  # a clock that jumps more often than this ends the block
_WARMUP_BLOCKS = 8  # blocks in the shortest warm-up
_STAGE_CALLS = 5  # after each block
_SPIN_NS = 2_000_000  # the last stretch before a frame is not slept away: sleeping ends late
_NEVER = sys.maxsize


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Something to measure.

    Attributes:
        name: Its name in the report, unique.
        call: One request, from the input being there to the answer being there.
        description: What it is, as JSON values: precision, runtime, batch, threads, hashes, switches.
        control_of: The subject that this one is, measured a second time.
        stages: One request that returns the nanoseconds of its stages. It is called a few times after each block,
            never among the samples, because timing the stages costs time.
    """

    name: str
    call: Callable[[], object]
    description: Mapping[str, Any] = field(default_factory=dict)
    control_of: str | None = None
    stages: Callable[[], Mapping[str, int]] | None = None


@dataclass
class _State:
    """What is known of a subject while the measurement runs."""

    subject: Subject
    warmup: WarmUp = field(default_factory=WarmUp)
    blocks: list[BlockSamples] = field(default_factory=list)
    refused: int = 0
    error: str | None = None

    def report(self) -> SubjectReport:
        return SubjectReport(
            name=self.subject.name,
            description=dict(self.subject.description),
            blocks=tuple(self.blocks),
            warmup=self.warmup,
            refused=self.refused,
            error=self.error,
            control_of=self.subject.control_of,
        )


def measure(
    subjects: Sequence[Subject],
    plan: Plan,
    *,
    clock: Clock = time.perf_counter_ns,
    progress: Progress | None = None,
    read_environment: Callable[[], Mapping[str, Any]] = environment,
    read_machine: Callable[[], Mapping[str, Any]] = read_state,
) -> Report:
    """Warm every subject up, then measure all of them in interleaved rounds.

    Args:
        subjects: What to measure.
        plan: How long and in which order.
        clock: Monotonic time in nanoseconds.
        progress: Called with ("warm-up" or "measure", done, total).
        read_environment: Describes the machine; asked at the start and at the end.
        read_machine: Reads what changes while the machine works; asked after each round, outside all timing.

    Returns:
        The report. A subject whose call raises keeps its blocks so far and carries the error; an
        interrupt (Ctrl-C) during the rounds ends the measurement and marks the report.

    Raises:
        UsageError: No subject, or two of one name.
        KeyboardInterrupt: Before the first block was complete: there is nothing to keep.
    """
    _check_names(subjects)
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    before = read_environment()
    states = [_State(subject) for subject in subjects]
    report_progress = progress or _ignore
    for index, state in enumerate(states):
        report_progress("warm-up", index, len(states))
        with _recorded_error(state):
            state.warmup = _warm_up(state.subject.call, plan, clock)
    report_progress("warm-up", len(states), len(states))
    interrupted = False
    seen: list[Mapping[str, Any]] = []
    try:
        _run_rounds(
            states, plan, clock, report_progress, lambda at: seen.append({"at_ns": at, **read_machine()})
        )
    except KeyboardInterrupt:
        if not any(state.blocks for state in states):
            raise
        interrupted = True
    return Report(
        subjects=tuple(state.report() for state in states),
        plan=plan,
        environment=before,
        environment_end=read_environment(),
        created=created,
        interrupted=interrupted,
        states=tuple(seen),
    )


def _run_rounds(
    states: list[_State], plan: Plan, clock: Clock, progress: Progress, note: Callable[[int], None]
) -> None:
    origin = clock()
    note(0)
    blocks = plan.blocks()
    total = len(blocks) * len(states)
    for index, (block, order) in enumerate(zip(blocks, plan.orders(len(states)), strict=True)):
        for place, which in enumerate(order):
            progress("measure", index * len(states) + place, total)
            state = states[which]
            if state.error is None:
                with _recorded_error(state):
                    start, timed = _measure_block(state.subject, block, plan, clock)
                    state.refused += timed.refused
                    if timed.latencies:
                        state.blocks.append(_block_samples(index, start - origin, timed, state.subject))
        note(clock() - origin)
    progress("measure", total, total)


@dataclass(frozen=True)
class Timed:
    """What timing one block gave.

    Attributes:
        latencies: Of each call, nanoseconds.
        refused: Samples left out because the clock jumped backwards in them.
        dropped: Frames that were dropped because a newer one had come.
    """

    latencies: list[int]
    refused: int = 0
    dropped: int = 0


def _measure_block(subject: Subject, block: Block, plan: Plan, clock: Clock) -> tuple[int, Timed]:
    """Return when the block began, by the clock, and what it gave."""
    for _ in range(plan.lead_in):
        subject.call()
    start = clock()
    with _no_garbage_collection():
        if plan.fps is None:
            return start, _time_block(subject.call, block, clock)
        return start, time_arrivals(subject.call, block, plan.fps, clock=clock)


def _block_samples(index: int, start_ns: int, timed: Timed, subject: Subject) -> BlockSamples:
    samples = np.array(timed.latencies, dtype=np.int64)
    return BlockSamples(
        round=index,
        start_ns=start_ns,
        samples_ns=samples,
        refused=timed.refused,
        stages_ns={} if subject.stages is None else _time_stages(subject.stages),
        dropped=timed.dropped,
    )


def _time_stages(stages: Callable[[], Mapping[str, int]]) -> dict[str, float]:
    times = [stages() for _ in range(_STAGE_CALLS)]
    return {stage: float(statistics.median(request[stage] for request in times)) for stage in times[0]}


def _time_block(call: Callable[[], object], block: Block, clock: Clock) -> Timed:
    """Time calls one after the other until the block is full; start again where the clock jumped."""
    latencies: list[int] = []
    refused = 0
    while refused < _JUMPS_PER_BLOCK:
        if block.calls is not None:
            part, jumped = _time_calls(call, clock, block.calls - len(latencies), _NEVER)
        else:
            left = int((block.seconds or 0.0) * 1e9) - sum(latencies)
            part, jumped = _time_calls(call, clock, _NEVER, clock() + left)
        latencies.extend(part)
        if not jumped:
            break
        refused += 1
        if _is_full(block, latencies):
            break
    return Timed(latencies, refused)


def _is_full(block: Block, latencies: list[int]) -> bool:
    if block.calls is not None:
        return len(latencies) >= block.calls
    return sum(latencies) >= (block.seconds or 0.0) * 1e9


def _time_calls(call: Callable[[], object], clock: Clock, most: int, until: int) -> tuple[list[int], bool]:
    """Time calls until ``most`` are done, the clock passes ``until``, or it jumps backwards.

    Only ``call()`` and one reading of the clock stand between ``start`` and ``end``.

    Returns:
        The latencies in nanoseconds, and whether the clock jumped backwards; that sample is left out.
    """
    samples: list[int] = []
    append = samples.append
    last = clock()
    for _ in range(most):
        start = clock()
        call()
        end = clock()
        append(end - start)
        if not last <= start <= end < until:
            if last <= start <= end:
                return samples, False
            samples.pop()
            return samples, True
        last = end
    return samples, False


def wait_until(due_ns: int) -> None:
    """Wait for a time of ``time.perf_counter_ns``: sleep, then spin for the last 2 ms."""
    while (left := due_ns - time.perf_counter_ns()) > 0:
        if left > _SPIN_NS:
            time.sleep((left - _SPIN_NS) / 1e9)


def time_arrivals(
    call: Callable[[], object],
    block: Block,
    fps: float,
    *,
    clock: Clock,
    wait: Callable[[int], None] = wait_until,
) -> Timed:
    """Answer frames that arrive ``fps`` times a second, one at a time, always the newest.

    Args:
        call: Answers one frame.
        block: How long, or how many answers.
        fps: Frames a second.
        clock: Monotonic time in nanoseconds.
        wait: Waits until a time of that clock.

    Returns:
        Latencies from the arrival of a frame to its answer, with the frames that were dropped.
    """
    latencies: list[int] = []
    dropped, refused, frame = 0, 0, 0
    start = clock()
    while True:
        due = start + round(frame * 1e9 / fps)
        if block.calls is not None and len(latencies) + refused >= block.calls:
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
            latencies.append(done - due)
        newest = int((done - start) * fps / 1e9)
        dropped += max(0, newest - frame - 1)
        frame = max(frame + 1, newest)
    return Timed(latencies, refused, dropped)


def _warm_up(call: Callable[[], object], plan: Plan, clock: Clock) -> WarmUp:
    """Call until the time is up and the block median moves less than the plan allows, or the limit is reached."""
    seconds, calls, previous = 0.0, 0, 0.0
    if plan.warmup_seconds == 0:
        return WarmUp()
    block = Block(seconds=plan.warmup_seconds / _WARMUP_BLOCKS)
    limit = max(plan.warmup_limit_seconds, plan.warmup_seconds)
    stable = False
    for _ in range(round(limit / plan.warmup_seconds * _WARMUP_BLOCKS)):
        with _no_garbage_collection():
            latencies = _time_block(call, block, clock).latencies
        if not latencies:
            continue
        seconds += sum(latencies) / 1e9
        calls += len(latencies)
        median = float(statistics.median(latencies))
        stable = abs(median - previous) < plan.warmup_change * previous
        previous = median
        if (stable and seconds >= plan.warmup_seconds) or seconds >= limit:
            break
    return WarmUp(seconds=seconds, calls=calls, stable=stable)


@contextmanager
def _recorded_error(state: _State) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001  a subject is anybody's callable; the others go on without it
        state.error = f"{type(error).__name__}: {error}"


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_names(subjects: Sequence[Subject]) -> None:
    names = [subject.name for subject in subjects]
    if not names:
        raise UsageError("there is nothing to measure", remedy="name at least one engine")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(
            f"two subjects are named {', '.join(twice)}", remedy="give every subject its own name"
        )


def _ignore(_phase: str, _done: int, _total: int) -> None:
    """Report progress to nobody."""
