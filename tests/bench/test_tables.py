from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from bench.compare import Rules, compare_reports, compare_within
from bench.plan import Plan, choose_plan
from bench.report import WarmUp
from bench.tables import Roof, milliseconds, pass_tables, render_comparison, render_report, scenario_tables
from engines.text_table import Table, render_markdown, render_text

Make = Callable[..., Any]


MS = 1_000_000


def blocks(value: int) -> list[list[int]]:
    return [[value] * 10] * 10


def words(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_a_report_as_text(subject: Make, report: Make) -> None:
    made = report(
        subject("cnn", blocks(3_000_000)), subject("dsc", blocks(1_000_000)), plan=Plan(iterations=100)
    )
    text = render_report(made)
    assert text.startswith(
        "Latency, ms (single-stream, standard plan, 100 calls each, opened 40 times, interleaved)\n\n"
    )
    lines = words(text)
    assert lines[2] == "engine samples median 95 % interval mean p90 p95 p99 p99.9 min max"
    small = "n too small n too small n too small"
    assert lines[4] == f"cnn 100 3.000 3.000 to 3.000 3.000 3.000 {small} 3.000 3.000"
    assert lines[7] == "Bounds of the tail, ms: the true percentile is below, with 99 % confidence"
    assert lines[9] == "engine p90 below p95 below p99 below p99.9 below"
    assert lines[11] == f"cnn 3.000 {small}"
    assert lines[17] == "engine against median, ms was, ms ratio 95 % interval p verdict"
    assert lines[19] == "dsc cnn 1.000 3.000 0.333 0.333 to 0.333 <0.001 3.00 times faster"
    assert "load 0.5 0.75" in words(text)
    assert text.endswith("For research and engineering only; not a medical device.\n")
    assert "\x1b" not in text


def test_the_baseline_can_be_chosen(subject: Make, report: Make) -> None:
    made = report(subject("cnn", blocks(3_000_000)), subject("dsc", blocks(1_000_000)))
    assert "cnn dsc 3.000 1.000 3.000 3.000 to 3.000 <0.001 3.00 times slower" in words(
        render_report(made, baseline="dsc")
    )


def test_what_the_reader_must_know_stands_below_the_table(subject: Make, report: Make) -> None:
    made = report(
        subject("a", [[5], [6]], refused=3, warmup=WarmUp(seconds=5, calls=1, stable=False)),
        subject("b", [], error="RuntimeError: gone"),
        interrupted=True,
    )
    text = render_report(made)
    for note in (
        "* interrupted: this is what was measured until then",
        "* a: 3 samples refused, the clock jumped backwards",
        "* a: the warm-up ended before the median came to rest",
        "* b failed: RuntimeError: gone",
        "* unstable: a has 2 blocks, 5 are needed",
    ):
        assert note in text.splitlines()


def test_a_subject_that_cannot_be_compared_is_named(subject: Make, report: Make) -> None:
    made = report(
        subject("a", blocks(10)),
        subject("b", blocks(10), description={"batch": 8, "threads": 1}),
        subject("c", [[10]]),
    )
    lines = render_report(made).splitlines()
    assert "* b: not comparable: batch is 1 and 8" in lines
    assert "* c: 1 blocks are too few for an interval, 5 are needed" in lines


def test_a_report_in_which_everything_failed_renders(subject: Make, report: Make) -> None:
    assert "* a failed: gone" in render_report(report(subject("a", [], error="gone")))


def test_a_comparison_as_text_and_markdown(subject: Make, report: Make) -> None:
    before = report(subject("a|b", blocks(1_000_000)), subject("old", blocks(1)))
    after = report(subject("a|b", blocks(1_200_000)), environment={"cpu": "x"})
    made = compare_reports(before, after, Rules(allow={"machine", "architecture", "cpu", "cores"}))
    text = render_comparison(made)
    assert "a|b a|b 1.200 1.000 1.200 1.200 to 1.200 - 1.20 times slower" in words(text)
    assert "* allowed to differ: machine, architecture, cpu, cores" in text
    assert "* only in the baseline: old" in text
    markdown = render_comparison(made, markdown=True)
    assert "| a\\|b | a\\|b | 1.200 | 1.000 | 1.200 | 1.200 to 1.200 | - | 1.20 times slower |" in markdown
    assert "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |" in markdown
    assert "- only in the baseline: old" in markdown


def test_tables_are_aligned_and_cells_cannot_break_out() -> None:
    table = Table(
        title="T", header=("name", "n"), rows=(("a", "1"), ("long|er\n<b>", "1,000")), notes=("note",)
    )
    assert render_text(Table(title="T", header=("name", "n"), rows=(("a", "1"), ("longer", "1,000")))) == (
        "T\n\nname        n\n------  -----\na           1\nlonger  1,000"
    )
    assert render_markdown(table) == (
        "### T\n\n| name | n |\n| --- | ---: |\n| a | 1 |\n| long\\|er &lt;b> | 1,000 |\n\n- note"
    )


MILLISECONDS = {
    0: "0.00000",
    1234: "0.00123",
    99_000: "0.09900",
    123_456: "0.123",
    1_234_567: "1.235",
    12_345_678: "12.35",
    123_456_789: "123.5",
    12_345_678_901: "12345.7",
}


@pytest.mark.parametrize(("nanoseconds", "text"), MILLISECONDS.items())
def test_milliseconds_keep_four_digits(nanoseconds: float, text: str) -> None:
    assert milliseconds(nanoseconds) == text


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


def test_throttling_stands_below_the_table_and_the_comparison(subject: Make, report: Make) -> None:
    made = report(
        subject("a", [[5]] * 6),
        subject("b", [[6]] * 6),
        states=({"throttle_events": 1}, {"throttle_events": 4}),
    )
    assert "* throttled 3 times during the run" in render_report(made).splitlines()
    assert compare_within(made).cautions == ("throttled 3 times during the run",)


def test_power_is_a_table(subject: Make, report: Make) -> None:
    power = {"rail": "VDD", "idle_w": 3.0, "busy_w": 5.0, "joules": 0.0125, "calls": 320, "seconds": 2.0}
    made = report(replace(subject("a", blocks(MS)), passes={"power": [power]}), subject("b", blocks(MS)))
    (table,) = pass_tables(made)
    assert table.rows == (("a", "VDD", "3.00", "5.00", "12.500", "160.0"),)
    assert "mJ a request" in render_report(made)
    assert pass_tables(report(subject("a", blocks(MS)))) == ()


def test_memory_is_a_table_that_says_why_a_figure_is_missing(subject: Make, report: Make) -> None:
    host = {"host_peak_bytes": 80 << 20, "host_before_bytes": 70 << 20}
    found = {
        "jetson": host,  # as reports of the first release have it
        "cpu": {**host, "device_bytes": None},
        "gpu": {**host, "device_bytes": 300 << 20},
        "dead": {"error": "the process was killed by signal 9"},
    }
    made = report(
        *(replace(subject(name, blocks(MS)), passes={"memory": memory}) for name, memory in found.items())
    )
    (table,) = pass_tables(made)
    assert table.rows == (
        ("jetson", "80.0", "10.0", "-"),
        ("cpu", "80.0", "10.0", "-"),
        ("gpu", "80.0", "10.0", "300.0"),
        ("dead", "-", "-", "-"),
    )
    assert table.notes[-1] == "dead was not measured: the process was killed by signal 9"


@pytest.mark.parametrize(
    ("adds", "moved", "bound", "nanoseconds"), [(1000, 10, "compute", 500), (10, 1000, "memory", 250)]
)
def test_the_roof_is_the_longer_of_computing_and_moving(
    adds: int, moved: int, bound: str, nanoseconds: float
) -> None:
    roof = Roof.of({"multiply_adds": adds, "bytes": moved, "multiply_adds_per_s": 2e9, "bytes_per_s": 4e9})
    assert (roof.bound, roof.nanoseconds, roof.intensity) == (bound, nanoseconds, adds / moved)


def test_limits_are_a_table(subject: Make, report: Make) -> None:
    limits = {
        "multiply_adds": 36_000_000,
        "bytes": 18_000_000,
        "multiply_adds_per_s": 36e9,
        "bytes_per_s": 9e9,
    }
    (table,) = pass_tables(report(replace(subject("a", blocks(4 * MS)), passes={"limits": limits})))
    assert table.rows == (("a", "36.0", "18.00", "2.0", "memory", "2.000", "4.000", "50%"),)
    assert "36.0 G multiply-adds/s" in table.notes[0] and "9.0 GB/s" in table.notes[0]
