from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bench.measure import Subject, measure, time_arrivals, wait_until
from bench.plan import Block, choose_plan
from bench.tables import render_report, scenario_tables
from engines.errors import UsageError

Make = Callable[..., Any]
MS = 1_000_000


def arrive(clock: Any, block: Block, *durations: int) -> tuple[array[int], int, int]:
    def wait(due: int) -> None:
        clock.now = due

    return time_arrivals(clock.takes(*durations), block, 100.0, clock=clock, wait=wait)


def test_a_fast_engine_answers_every_frame_when_it_comes(clock: Any) -> None:
    assert arrive(clock, Block(seconds=0.05), 4 * MS) == (array("q", [4 * MS] * 5), 0, 0)


def test_a_slow_engine_takes_the_newest_frame_and_drops_those_between(clock: Any) -> None:
    # Frames come every 10 ms. The first takes 35 ms: those of 10 and 20 ms are dropped, that of 30 ms is 5 ms old.
    found = arrive(clock, Block(seconds=0.05), 35 * MS, 4 * MS, 4 * MS)
    assert found == (array("q", [35 * MS, 9 * MS, 4 * MS]), 2, 0)


def test_a_frame_that_waits_for_the_one_before_is_late_not_dropped(clock: Any) -> None:
    found = arrive(clock, Block(calls=3), 12 * MS, 3 * MS, 3 * MS)
    assert found == (array("q", [12 * MS, 5 * MS, 3 * MS]), 0, 0)


def test_a_clock_that_jumps_backwards_costs_that_sample(clock: Any) -> None:
    samples, _, refused = arrive(clock, Block(calls=4), 2 * MS, -500 * MS, 2 * MS, 2 * MS)
    assert refused == 1 and len(samples) == 3


def test_waiting_ends_when_the_time_has_come() -> None:
    due = time.perf_counter_ns() + 3 * MS
    wait_until(due)
    assert time.perf_counter_ns() >= due


def test_a_measurement_at_a_fixed_rate_counts_drops() -> None:
    plan = choose_plan(seconds=0.02, warmup_seconds=0, fps=1000)
    assert (plan.scenario, plan.fps) == ("camera of 1000 fps", 1000)
    report = measure([Subject(name="a", call=lambda: None)], plan)
    assert len(report.subjects[0].samples_ns) + sum(b.dropped for b in report.subjects[0].blocks) >= 20
    with pytest.raises(UsageError, match="the rate is 0 fps"):
        choose_plan(fps=0)


def test_drops_and_misses_are_a_table(subject: Make, report: Make) -> None:
    made = subject("a", [[5 * MS, 12 * MS]] * 6)
    blocks = tuple(replace(block, dropped=1) for block in made.blocks)
    whole = report(replace(made, blocks=blocks), plan=choose_plan(fps=100))
    (table,) = scenario_tables(whole)
    assert table.title == "Frames at 100 fps"
    assert table.rows == (("a", "18", "6", "33.33%", "6", "50.00%"),)
    assert "camera of 100 fps" in render_report(whole)
    assert scenario_tables(report(made)) == ()


def test_throughput_is_a_table(subject: Make, report: Make) -> None:
    told = {"batch": 64, "engine_batch": 8, "concurrency": 2}
    (table,) = scenario_tables(report(subject("a b8 c2", [[16 * MS]] * 6, description=told)))
    assert table.rows == (("a b8 c2", "8", "2", "4,000.0"),)
