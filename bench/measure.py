"""Measuring: subjects in interleaved blocks, every call timed, at their own pace or as a camera's frames arrive."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from bench.machine import environment, read_state
from bench.plan import Block, Plan
from bench.report import BlockSamples, Report, SubjectReport, WarmUp
from engines.errors import UsageError

if TYPE_CHECKING:
    from bench.samples import Samples
    from engines.runtimes import Progress


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


Clock = Callable[[], int]
_JUMPS_PER_BLOCK = 10  # a clock that jumps more often than this ends the block
_WARMUP_BLOCKS = 8  # blocks in the shortest warm-up
_STAGE_CALLS = 5  # after each block
_NEVER = sys.maxsize


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Something to measure.

    Attributes:
        name: Its name in the report, unique.
        call: One request, from the input being there to the answer being there.
        description: What it is, as JSON values: precision, runtime, batch, threads, hashes, switches.
        control_of: The subject that this one is, measured a second time.
        stages: One request that tells the nanoseconds of its stages. It is called a few times after each block,
            never among the samples, because telling stages costs time.
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
        read_machine: Tells what changes while the machine works; asked after each round, outside all timing.

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
                    _measure_block(state, index, block, plan, clock, origin)
        note(clock() - origin)
    progress("measure", total, total)


def _measure_block(state: _State, index: int, block: Block, plan: Plan, clock: Clock, origin: int) -> None:
    call = state.subject.call
    for _ in range(plan.lead_in):
        call()
    start, dropped = clock(), 0
    if plan.fps is None:
        samples, refused = _time_block(call, block, clock)
    else:
        with _no_garbage_collection():
            samples, dropped, refused = time_arrivals(call, block, plan.fps, clock=clock)
    state.refused += refused
    if samples:
        stages = _time_stages(state.subject.stages)
        state.blocks.append(
            BlockSamples(
                round=index,
                start_ns=start - origin,
                samples_ns=samples,
                refused=refused,
                stages_ns=stages,
                dropped=dropped,
            )
        )


def _time_stages(stages: Callable[[], Mapping[str, int]] | None) -> dict[str, float]:
    if stages is None:
        return {}
    told = [stages() for _ in range(_STAGE_CALLS)]
    return {stage: float(statistics.median(times[stage] for times in told)) for stage in told[0]}


def _time_block(call: Callable[[], object], block: Block, clock: Clock) -> tuple[Samples, int]:
    """Return the latencies of one block in nanoseconds, and how many were refused."""
    samples = array("q")
    refused = 0
    with _no_garbage_collection():
        while refused < _JUMPS_PER_BLOCK:
            if block.calls is not None:
                part, jumped = _time_calls(call, clock, block.calls - len(samples), _NEVER)
            else:
                left = int((block.seconds or 0.0) * 1e9) - sum(samples)
                part, jumped = _time_calls(call, clock, _NEVER, clock() + left)
            samples.extend(part)
            if not jumped:
                break
            refused += 1
            if _is_full(block, samples):
                break
    return samples, refused


def _is_full(block: Block, samples: Samples) -> bool:
    if block.calls is not None:
        return len(samples) >= block.calls
    return sum(samples) >= (block.seconds or 0.0) * 1e9


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


def _warm_up(call: Callable[[], object], plan: Plan, clock: Clock) -> WarmUp:
    """Call until the time is up and the block median moves less than the plan allows, or the limit is reached."""
    seconds, calls, previous = 0.0, 0, 0.0
    if plan.warmup_seconds == 0:
        return WarmUp()
    block = Block(seconds=plan.warmup_seconds / _WARMUP_BLOCKS)
    limit = max(plan.warmup_limit_seconds, plan.warmup_seconds)
    blocks = round(limit / plan.warmup_seconds * _WARMUP_BLOCKS)
    stable = False
    for _ in range(blocks):
        samples, _refused = _time_block(call, block, clock)
        if not samples:
            continue
        seconds += sum(samples) / 1e9
        calls += len(samples)
        median = float(statistics.median(samples))
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
