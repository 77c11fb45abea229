"""Measuring: subjects opened again and again, in turns, every call timed; at their own pace or a camera's."""

from __future__ import annotations

import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bench.machine import environment, read_state
from bench.plan import Block, Plan
from bench.report import BlockSamples, Report, SubjectReport, WarmUp
from engines.errors import UsageError

if TYPE_CHECKING:
    from engines.runtimes import Progress

Clock = Callable[[], int]  # monotonic, nanoseconds
_JUMPS_PER_BLOCK = 10  # a clock that jumps more often than this ends the block
_WARMUP_BLOCKS = 8  # blocks in the shortest warm-up
_SHORT_WARMUPS = 20  # warm-ups of a later opening in one of the first: packages and clocks are warm already
# In the shortest turn: with fewer, what the turn before left in the caches would be measured.
_TURN_CALLS = 20
_STAGE_CALLS = 5  # after each block
_SPIN_NS = 2_000_000  # the last stretch before a frame is not slept away: sleeping ends late
_NEVER = sys.maxsize


@dataclass(frozen=True)
class Opened:
    """A subject that is open.

    Attributes:
        call: One request, from the input being there to the answer being there.
        stages: One request that returns the nanoseconds of its stages. It is called a few times after each block,
            never among the samples, because timing the stages costs time.
    """

    call: Callable[[], object]
    stages: Callable[[], Mapping[str, int]] | None = None


def always_open(
    call: Callable[[], object], stages: Callable[[], Mapping[str, int]] | None = None
) -> Callable[[ExitStack], Opened]:
    """Return what opens a plain callable: there is nothing to open, and every opening is the same."""
    return lambda _stack: Opened(call, stages)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Something to measure.

    Attributes:
        name: Its name in the report, unique.
        open: Opens it; what the stack is given is closed when the opening is over.
        description: What it is, as JSON values: precision, runtime, batch, threads, hashes, switches.
        control_of: The subject that this one is, opened and measured a second time.
    """

    name: str
    open: Callable[[ExitStack], Opened]
    description: Mapping[str, Any] = field(default_factory=dict)
    control_of: str | None = None


@dataclass
class _State:
    """What is known of a subject while the measurement runs."""

    subject: Subject
    opened: Opened | None = None
    call_ns: float = 0.0  # latency at last, 0 where nothing is known yet
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
    """Open every subject, warm it up and measure all in interleaved rounds; then open all of them again.

    Args:
        subjects: What to measure.
        plan: How long, in how many openings and turns; its seed draws the orders.
        clock: Monotonic time in nanoseconds.
        progress: Called with ("warm-up" or "measure", done, total).
        read_environment: Describes the machine; asked at the start and at the end.
        read_machine: Reads what changes while the machine works; asked after each round, outside all timing.

    Returns:
        The report. A subject that cannot be opened or whose call raises keeps its blocks so far and carries the
        error; an interrupt (Ctrl-C) ends the measurement and marks the report.

    Raises:
        UsageError: No subject, or two of one name.
        KeyboardInterrupt: Before the first block was complete: there is nothing to keep.
    """
    _check_names(subjects)
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    before = read_environment()
    states = [_State(subject) for subject in subjects]
    run = _Run(states, plan, clock, progress or _ignore, read_machine)
    interrupted = False
    try:
        run.run()
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
        states=tuple(run.seen),
    )


@dataclass
class _Run:
    """One measurement: what it is made of, and what the machine did meanwhile."""

    states: list[_State]
    plan: Plan
    clock: Clock
    progress: Progress
    read_machine: Callable[[], Mapping[str, Any]]
    seen: list[Mapping[str, Any]] = field(default_factory=list)
    origin: int = 0

    def run(self) -> None:
        draw = random.Random(self.plan.seed)
        for opening, rounds in enumerate(self.plan.rounds_of_openings()):
            with ExitStack() as stack:
                ballast = self._open(stack, draw, first=opening == 0)
                if opening == 0:
                    self.origin = self.clock()
                    self._note()
                for index in rounds:
                    self._run_round(opening, index, draw)
                del ballast
        total = len(self.plan.blocks()) * len(self.states)
        self.progress("measure", total, total)

    def _note(self) -> None:
        self.seen.append({"at_ns": self.clock() - self.origin, **self.read_machine()})

    def _open(self, stack: ExitStack, draw: random.Random, *, first: bool) -> list[NDArray[np.float64]]:
        """Open the subjects and warm them up, in an order of its own; return what lies between them in memory.

        A runtime takes much of its memory in the first call, so each is called before the next one is opened.
        """
        ballast = []
        for place, state in enumerate(draw.sample(self.states, len(self.states))):
            if first:
                self.progress("warm-up", place, len(self.states))
            ballast += _occupy(draw)
            with _recorded_error(state):
                if state.error is None:
                    state.opened = state.subject.open(stack)
                    found = _warm_up(state.opened.call, self.plan, self.clock, short=not first)
                    state.warmup = found if first else state.warmup
                    state.call_ns = found.seconds * 1e9 / found.calls if found.calls else state.call_ns
        if first:
            self.progress("warm-up", len(self.states), len(self.states))
        return ballast

    def _run_round(self, opening: int, index: int, draw: random.Random) -> None:
        """Measure one block of each subject, in turns."""
        block = self.plan.blocks()[index]
        timed = [Timed([]) for _ in self.states]
        starts: list[int | None] = [None] * len(self.states)
        turns = self._turns(block)
        for turn in range(turns):
            for place, which in enumerate(draw.sample(range(len(self.states)), len(self.states))):
                if turn == 0:
                    done = index * len(self.states) + place
                    self.progress("measure", done, len(self.plan.blocks()) * len(self.states))
                state = self.states[which]
                if state.error is None and state.opened is not None:
                    with _recorded_error(state):
                        start, part = _measure_turn(
                            state.opened, block.part(turn, turns), self.plan, self.clock
                        )
                        starts[which] = start if turn == 0 else starts[which]
                        timed[which] += part
        for state, began, found in zip(self.states, starts, timed, strict=True):
            state.refused += found.refused
            if state.error is None and state.opened is not None and began is not None and found.latencies:
                with _recorded_error(state):
                    block_samples = _block_samples(opening, index, began - self.origin, found, state.opened)
                    state.blocks.append(block_samples)
                    state.call_ns = block_samples.median_ns
        self._note()

    def _turns(self, block: Block) -> int:
        """Return in how many turns the block is measured: the slowest subject decides, for they alternate."""
        shortest_ns = (self.plan.turn_seconds or math.inf) * 1e9
        calls_ns = [state.call_ns for state in self.states if state.error is None]
        if self.plan.fps is not None or not calls_ns or min(calls_ns) <= 0 or shortest_ns == math.inf:
            return 1
        if block.calls is not None:
            return max(1, int(min(block.calls / max(_TURN_CALLS, shortest_ns / taken) for taken in calls_ns)))
        seconds = block.seconds or 0.0
        return max(1, int(seconds * 1e9 / max(shortest_ns, _TURN_CALLS * max(calls_ns))))


def _occupy(draw: random.Random) -> list[NDArray[np.float64]]:
    """Take memory of random sizes, 4 KiB to 1 MiB: what is opened next gets other addresses and other pages."""
    return [np.ones(draw.randrange(1, 257) * 512) for _ in range(24)]


@dataclass(frozen=True)
class Timed:
    """What timing one block gave.

    Attributes:
        latencies: Of each call, nanoseconds.
        turns: Median latency of each turn, nanoseconds; 0 where it has none.
        refused: Samples left out because the clock jumped backwards in them.
        dropped: Frames that were dropped because a newer one had come.
    """

    latencies: list[int]
    turns: tuple[int, ...] = ()
    refused: int = 0
    dropped: int = 0

    def __add__(self, other: Timed) -> Timed:
        """Return both, one after the other."""
        return Timed(
            self.latencies + other.latencies,
            self.turns + other.turns,
            self.refused + other.refused,
            self.dropped + other.dropped,
        )


def _measure_turn(opened: Opened, part: Block, plan: Plan, clock: Clock) -> tuple[int, Timed]:
    """Return when the turn began, by the clock, and what it gave."""
    for _ in range(plan.lead_in):
        opened.call()
    start = clock()
    with _no_garbage_collection():
        if plan.fps is None:
            timed = _time_block(opened.call, part, clock)
        else:
            timed = time_arrivals(opened.call, part, plan.fps, clock=clock)
    return start, replace(timed, turns=(round(statistics.median(timed.latencies or [0])),))


def _block_samples(opening: int, index: int, start_ns: int, timed: Timed, opened: Opened) -> BlockSamples:
    samples = np.array(timed.latencies, dtype=np.int64)
    return BlockSamples(
        opening=opening,
        round=index,
        start_ns=start_ns,
        samples_ns=samples,
        turns_ns=np.array(timed.turns, dtype=np.int64),
        refused=timed.refused,
        stages_ns={} if opened.stages is None else _time_stages(opened.stages),
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
    return Timed(latencies, refused=refused)


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
    return Timed(latencies, refused=refused, dropped=dropped)


def _warm_up(call: Callable[[], object], plan: Plan, clock: Clock, *, short: bool) -> WarmUp:
    """Call until the time is up and the block median moves less than the plan allows, or the limit is reached.

    A short warm-up, of a later opening, is a twentieth of that and ends by its time alone.
    """
    seconds, calls, previous = 0.0, 0, 0.0
    if plan.warmup_seconds == 0:
        return WarmUp()
    if short:
        latencies = _time_block(call, Block(seconds=plan.warmup_seconds / _SHORT_WARMUPS), clock).latencies
        return WarmUp(seconds=sum(latencies) / 1e9, calls=len(latencies), stable=True)
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
