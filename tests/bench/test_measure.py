from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from bench.measure import Opened, Subject, Timed, always_open, measure, time_arrivals, wait_until
from bench.plan import Block, Plan, choose_plan
from bench.report import Report
from engines.errors import UsageError

MS = 1_000_000
Make = Callable[..., Any]


COLD = {"warmup_seconds": 0.0, "lead_in": 0}


def run(subjects: list[Subject], plan: Plan, clock: Any, **options: Any) -> Report:
    machine = {"read_environment": lambda: {"cpu": "fake"}, "read_machine": dict, **options}
    return measure(subjects, plan, clock=clock, **machine)


def test_samples_are_exactly_the_times_of_the_calls(clock: Any) -> None:
    subject = Subject(name="a", open=always_open(clock.takes(3 * MS, 5 * MS)), description={"batch": 1})
    report = run([subject], Plan(iterations=6, rounds=3, **COLD), clock)
    (measured,) = report.subjects
    assert [list(block.samples_ns) for block in measured.blocks] == [[3 * MS, 5 * MS]] * 3
    assert [block.turns_ns.tolist() for block in measured.blocks] == [[4 * MS]] * 3
    assert [block.start_ns for block in measured.blocks] == [0, 8 * MS, 16 * MS]
    assert [block.round for block in measured.blocks] == [0, 1, 2]
    assert (measured.name, measured.description, measured.error) == ("a", {"batch": 1}, None)
    assert report.environment == report.environment_end == {"cpu": "fake"}
    assert not report.interrupted


def test_a_block_ends_with_the_call_that_passes_its_time(clock: Any) -> None:
    report = run(
        [Subject(name="a", open=always_open(clock.takes(3 * MS)))],
        Plan(seconds=0.020, rounds=2, **COLD),
        clock,
    )
    assert [len(block.samples_ns) for block in report.subjects[0].blocks] == [4, 4]


def test_a_call_longer_than_the_block_is_measured_once_a_block(clock: Any) -> None:
    report = run(
        [Subject(name="a", open=always_open(clock.takes(900 * MS)))],
        Plan(seconds=0.020, rounds=2, **COLD),
        clock,
    )
    assert [list(block.samples_ns) for block in report.subjects[0].blocks] == [[900 * MS]] * 2


def named(clock: Any, names: str, log: list[str], nanoseconds: int = MS) -> list[Subject]:
    return [
        Subject(name=name, open=always_open(clock.takes(nanoseconds, log=log, name=name))) for name in names
    ]


def test_every_subject_has_its_calls_in_each_round_in_a_seeded_order(clock: Any) -> None:
    def order(seed: int) -> list[str]:
        log: list[str] = []
        plan = Plan(iterations=40, rounds=20, openings=1, warmup_seconds=0, lead_in=1, seed=seed)
        report = run(named(clock, "abc", log), plan, clock)
        assert [subject.name for subject in report.subjects] == ["a", "b", "c"]
        assert all(len(subject.samples_ns) == 40 for subject in report.subjects)
        rounds = ["".join(log[start : start + 9]) for start in range(0, 180, 9)]
        assert {"".join(sorted(calls)) for calls in rounds} == {"aaabbbccc"}
        assert len(set(rounds)) > 3
        return rounds

    assert order(3) == order(3) != order(4)


def test_a_block_is_measured_in_turns_of_twenty_calls_at_least(clock: Any) -> None:
    # The first round does not know yet how long a call takes, and is one turn of each.
    log: list[str] = []
    plan = Plan(seconds=0.4, rounds=2, openings=1, turn_seconds=0.025, warmup_seconds=0, lead_in=2)
    report = run(named(clock, "ab", log, 2 * MS), plan, clock)
    turns = [len(list(calls)) for _, calls in itertools.groupby(log)]
    # 0.2 s hold five turns of twenty calls of 2 ms; the call that passes a turn's time is its last one.
    assert sum(turns) == 2 * 102 + 2 * 5 * 22 and max(turns[2:]) <= 2 * 22
    assert [len(block.samples_ns) for block in report.subjects[0].blocks] == [100, 100]
    assert [block.turns_ns.tolist() for block in report.subjects[0].blocks] == [[2 * MS], [2 * MS] * 5]
    assert report.subjects[0].blocks[0].start_ns in (4 * MS, 208 * MS)


def test_a_number_of_calls_is_shared_out_over_turns_exactly(clock: Any) -> None:
    log: list[str] = []
    plan = Plan(iterations=98, rounds=2, openings=1, turn_seconds=0.025, warmup_seconds=0, lead_in=0)
    report = run(named(clock, "ab", log, 2 * MS), plan, clock)
    assert [len(block.samples_ns) for block in report.subjects[0].blocks] == [49, 49]
    assert [len(list(calls)) for _, calls in itertools.groupby(log)][:2] == [49, 49]
    assert {len(list(calls)) for _, calls in itertools.groupby(log[98:])} <= {25, 24, 49}


def test_the_slowest_subject_decides_how_many_turns_there_are(clock: Any) -> None:
    log: list[str] = []
    plan = Plan(seconds=0.4, rounds=2, openings=1, turn_seconds=0.025, warmup_seconds=0, lead_in=0)
    run([*named(clock, "a", log), *named(clock, "b", log, 20 * MS)], plan, clock)
    assert [len(list(calls)) for _, calls in itertools.groupby(log)] in (
        [200, 10, 200, 10],
        [10, 200] * 2,
        [200, 20, 200],
        [10, 400, 10],
    )


class Opening:
    """Notes what is opened and closed, and takes longer in one opening than in the next."""

    def __init__(self, clock: Any, log: list[str], name: str, *durations_ns: int) -> None:
        self.clock, self.log, self.name, self.durations = clock, log, name, list(durations_ns)

    def __call__(self, stack: ExitStack) -> Opened:
        self.log.append(f"open {self.name}")
        stack.callback(self.log.append, f"close {self.name}")
        return Opened(self.clock.takes(self.durations.pop(0)))


def test_every_subject_is_opened_anew_for_its_share_of_the_rounds(clock: Any) -> None:
    log: list[str] = []
    subjects = [Subject(name=name, open=Opening(clock, log, name, MS, 2 * MS, 3 * MS)) for name in ("a", "b")]
    report = run(subjects, Plan(iterations=8, rounds=8, openings=3, **COLD), clock)
    for subject in report.subjects:
        assert [(block.opening, block.round) for block in subject.blocks] == [
            (0, 0), (0, 1), (1, 2), (1, 3), (1, 4), (2, 5), (2, 6), (2, 7),
        ]  # fmt: skip
        assert list(subject.samples_ns) == [MS] * 2 + [2 * MS] * 3 + [3 * MS] * 3
    steps = [log[start : start + 4] for start in range(0, 12, 4)]
    for opened, closed in ((step[:2], step[2:]) for step in steps):
        assert sorted(opened) == ["open a", "open b"] and sorted(closed) == ["close a", "close b"]


def test_the_order_of_opening_is_drawn() -> None:
    orders = set()
    for seed in range(8):
        log: list[str] = []
        subjects = [Subject(name=name, open=Opening(None, log, name)) for name in "ab"]
        for subject in subjects:
            subject.open.durations = [0]  # type: ignore[attr-defined]
        measure(
            subjects, Plan(iterations=1, openings=1, seed=seed, **COLD), clock=itertools.count(1).__next__
        )
        orders.add(tuple(log[:2]))
    assert orders == {("open a", "open b"), ("open b", "open a")}


def test_each_opening_lies_elsewhere_in_memory() -> None:
    """In a process of its own: a large hole in the heap, as other tests leave it, would give every one its place."""
    code = """
import numpy as np
from bench.measure import Opened, Subject, measure
from bench.plan import Plan

places = set()

def opened(stack):
    places.add(np.empty(3 << 20, np.uint8).ctypes.data)
    return Opened(lambda: None)

plan = Plan(iterations=10, rounds=10, openings=10, warmup_seconds=0)
measure([Subject(name="a", open=opened)], plan, read_environment=dict)
print(len(places))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 5  # of ten; without what lies between them it is two


def test_a_later_opening_has_a_short_warm_up_and_the_first_one_is_reported(clock: Any) -> None:
    log: list[str] = []
    plan = Plan(iterations=2, rounds=2, openings=2, warmup_seconds=2, lead_in=0)
    report = run(named(clock, "a", log, 10 * MS), plan, clock)
    assert report.subjects[0].warmup.calls == 200
    assert len(log) == 200 + 1 + 10 + 1


def test_a_subject_that_cannot_be_opened_again_keeps_its_blocks(clock: Any) -> None:
    log: list[str] = []
    bad = Subject(name="bad", open=Opening(clock, log, "bad", MS))  # the second opening raises IndexError
    report = run([bad, *named(clock, "g", [])], Plan(iterations=9, rounds=9, openings=3, **COLD), clock)
    first, second = report.subjects
    assert first.error == "IndexError: pop from empty list"
    assert len(first.blocks) == 3 and len(second.blocks) == 9
    assert log.count("open bad") == 2


def test_the_machine_is_looked_at_after_each_round_and_outside_the_samples(clock: Any) -> None:
    def look() -> dict[str, Any]:
        clock.now += 100 * MS
        return {"hottest_c": 50.0}

    subject = Subject(name="a", open=always_open(clock.takes(MS)))
    report = run([subject], Plan(iterations=4, rounds=2, **COLD), clock, read_machine=look)
    assert [state["at_ns"] for state in report.states] == [0, 102 * MS, 204 * MS]
    assert report.states[0]["hottest_c"] == 50.0
    assert list(report.subjects[0].samples_ns) == [MS] * 4


def test_stages_are_told_by_calls_beside_the_samples(clock: Any) -> None:
    told = iter(range(1, 100))
    stages = lambda: {"execute": next(told) * 10, "d2h": 7}  # noqa: E731
    subject = Subject(name="a", open=always_open(clock.takes(MS), stages))
    report = run([subject], Plan(iterations=4, rounds=2, **COLD), clock)
    (measured,) = report.subjects
    assert [dict(block.stages_ns) for block in measured.blocks] == [
        {"execute": 30, "d2h": 7},
        {"execute": 80, "d2h": 7},
    ]
    assert list(measured.samples_ns) == [MS] * 4


def test_lead_in_calls_are_not_counted(clock: Any) -> None:
    call = clock.takes(50 * MS, 40 * MS, MS, MS)
    report = run(
        [Subject(name="a", open=always_open(call))],
        Plan(iterations=4, rounds=2, warmup_seconds=0, lead_in=2),
        clock,
    )
    assert list(report.subjects[0].samples_ns) == [MS] * 4


def test_warm_up_runs_its_time_and_stops_when_the_median_rests(clock: Any) -> None:
    plan = Plan(iterations=1, rounds=1, warmup_seconds=2, warmup_limit_seconds=10, lead_in=0)
    report = run([Subject(name="a", open=always_open(clock.takes(10 * MS)))], plan, clock)
    warmup = report.subjects[0].warmup
    assert (warmup.seconds, warmup.calls, warmup.stable) == (pytest.approx(2.0), 200, True)


def test_warm_up_goes_on_while_the_median_moves(clock: Any) -> None:
    # One call fills a block of 0.25 s; each is 2 % faster than the one before, until the 12th.
    falling = [round(400 * MS * 0.98**index) for index in range(12)]
    plan = Plan(iterations=1, rounds=1, warmup_seconds=2, warmup_limit_seconds=30, lead_in=0)
    report = run(
        [Subject(name="a", open=always_open(clock.takes(*falling, *[falling[-1]] * 30)))], plan, clock
    )
    assert report.subjects[0].warmup.calls == 13
    assert report.subjects[0].warmup.stable


def test_warm_up_that_never_rests_ends_at_its_limit(clock: Any) -> None:
    plan = Plan(iterations=1, rounds=1, warmup_seconds=2, warmup_limit_seconds=6, lead_in=0)
    report = run([Subject(name="a", open=always_open(clock.takes(250 * MS, 500 * MS)))], plan, clock)
    warmup = report.subjects[0].warmup
    assert not warmup.stable
    assert 6 <= warmup.seconds < 6.5


def test_a_subject_that_fails_keeps_its_blocks_and_the_others_go_on(clock: Any) -> None:
    calls = {"left": 5}

    def breaks() -> None:
        clock.now += MS
        calls["left"] -= 1
        if calls["left"] < 0:
            raise RuntimeError("CUDA error 719")

    subjects = [
        Subject(name="bad", open=always_open(breaks)),
        Subject(name="good", open=always_open(clock.takes(2 * MS))),
    ]
    report = run(subjects, Plan(iterations=20, rounds=10, **COLD), clock)
    bad, good = report.subjects
    assert bad.error == "RuntimeError: CUDA error 719"
    assert [len(block.samples_ns) for block in bad.blocks] == [2, 2]
    assert good.error is None
    assert list(good.samples_ns) == [2 * MS] * 20
    assert report.failed == (bad,)


def test_a_subject_that_fails_in_its_warm_up_is_recorded(clock: Any) -> None:
    def breaks() -> None:
        raise ValueError("no such input")

    subjects = [
        Subject(name="bad", open=always_open(breaks)),
        Subject(name="good", open=always_open(clock.takes(100 * MS))),
    ]
    report = run(subjects, Plan(iterations=2, rounds=2), clock)
    assert report.subjects[0].error == "ValueError: no such input"
    assert report.measured == (report.subjects[1],)


def test_an_interrupt_keeps_the_finished_blocks(clock: Any) -> None:
    calls = {"left": 7}

    def stopped() -> None:
        clock.now += MS
        calls["left"] -= 1
        if calls["left"] < 0:
            raise KeyboardInterrupt

    report = run(
        [Subject(name="a", open=always_open(stopped))], Plan(iterations=20, rounds=10, **COLD), clock
    )
    assert report.interrupted
    assert list(report.subjects[0].samples_ns) == [MS] * 6
    assert report.subjects[0].error is None
    assert gc.isenabled()


def test_an_interrupt_before_the_first_block_is_passed_on(clock: Any) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([Subject(name="a", open=always_open(stopped))], Plan(iterations=20, rounds=10, **COLD), clock)


def test_a_clock_that_jumps_backwards_costs_only_that_sample(clock: Any) -> None:
    call = clock.takes(MS, MS, -500 * MS, MS)
    report = run([Subject(name="a", open=always_open(call))], Plan(iterations=12, rounds=2, **COLD), clock)
    (measured,) = report.subjects
    assert list(measured.samples_ns) == [MS] * 12
    assert measured.refused == 4
    assert sum(block.refused for block in measured.blocks) == 4


def test_a_clock_that_jumps_backwards_does_not_lengthen_a_timed_block(clock: Any) -> None:
    call = clock.takes(MS, MS, -500 * MS, *[MS] * 100)
    report = run([Subject(name="a", open=always_open(call))], Plan(seconds=0.010, rounds=1, **COLD), clock)
    assert list(report.subjects[0].samples_ns) == [MS] * 10
    assert report.subjects[0].refused == 1


def test_a_clock_that_only_runs_backwards_ends_every_block(clock: Any) -> None:
    report = run(
        [Subject(name="a", open=always_open(clock.takes(-MS)))], Plan(iterations=4, rounds=2, **COLD), clock
    )
    assert report.subjects[0].blocks == ()
    assert report.subjects[0].refused == 20


def test_garbage_is_not_collected_within_a_block_and_is_again_after_it(clock: Any) -> None:
    seen = []

    def call() -> None:
        clock.now += MS
        seen.append(gc.isenabled())

    run([Subject(name="a", open=always_open(call))], Plan(iterations=2, rounds=1, **COLD), clock)
    assert seen == [False, False]
    assert gc.isenabled()


def test_progress_counts_warm_ups_and_blocks(clock: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    subjects = [Subject(name=name, open=always_open(clock.takes(MS))) for name in "ab"]
    run(subjects, Plan(iterations=2, rounds=2, **COLD), clock, progress=lambda *step: seen.append(step))
    assert seen == [("warm-up", done, 2) for done in range(3)] + [("measure", done, 4) for done in range(5)]


def test_names_must_be_there_and_differ(clock: Any) -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        run([], Plan(), clock)
    with pytest.raises(UsageError, match="two subjects are named a"):
        run([Subject(name="a", open=always_open(clock.takes(MS)))] * 2, Plan(), clock)


def test_the_real_clock_and_environment_work() -> None:
    report = measure(
        [Subject(name="a", open=always_open(lambda: None))], Plan(iterations=20, rounds=5, warmup_seconds=0)
    )
    assert len(report.subjects[0].samples_ns) == 20
    assert report.environment["python"].startswith("CPython")


def arrive(clock: Any, block: Block, *durations: int) -> Timed:
    def wait(due: int) -> None:
        clock.now = due

    return time_arrivals(clock.takes(*durations), block, 100.0, clock=clock, wait=wait)


def test_a_fast_engine_answers_every_frame_when_it_comes(clock: Any) -> None:
    assert arrive(clock, Block(seconds=0.05), 4 * MS) == Timed([4 * MS] * 5)


def test_a_slow_engine_takes_the_newest_frame_and_drops_those_between(clock: Any) -> None:
    # Frames come every 10 ms. The first takes 35 ms: those of 10 and 20 ms are dropped, that of 30 ms is 5 ms old.
    found = arrive(clock, Block(seconds=0.05), 35 * MS, 4 * MS, 4 * MS)
    assert found == Timed([35 * MS, 9 * MS, 4 * MS], dropped=2)


def test_a_frame_that_waits_for_the_one_before_is_late_not_dropped(clock: Any) -> None:
    found = arrive(clock, Block(calls=3), 12 * MS, 3 * MS, 3 * MS)
    assert found == Timed([12 * MS, 5 * MS, 3 * MS])


def test_a_frame_at_which_the_clock_jumps_backwards_is_refused(clock: Any) -> None:
    found = arrive(clock, Block(calls=4), 2 * MS, -500 * MS, 2 * MS, 2 * MS)
    assert (found.refused, len(found.latencies)) == (1, 3)


def test_waiting_ends_when_the_time_has_come() -> None:
    due = time.perf_counter_ns() + 3 * MS
    wait_until(due)
    assert time.perf_counter_ns() >= due


def test_a_measurement_at_a_fixed_rate_counts_drops() -> None:
    plan = choose_plan(seconds=0.02, warmup_seconds=0, fps=1000)
    assert (plan.scenario, plan.fps) == ("camera of 1000 fps", 1000)
    report = measure([Subject(name="a", open=always_open(lambda: None))], plan)
    assert len(report.subjects[0].samples_ns) + sum(b.dropped for b in report.subjects[0].blocks) >= 20
    for rate in (0, 1e-300, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=f"the rate is {rate} fps.*of 0.001 or more"):
            choose_plan(fps=rate)
