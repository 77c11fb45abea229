from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.compare import compare_reports
from bench.plan import Plan
from bench.report import WarmUp
from bench.tables import milliseconds, render_comparison, render_report
from engines.text_table import Table, render_markdown, render_text

Make = Callable[..., Any]


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
        "Latency, ms (single-stream, standard plan, 100 calls each, interleaved in rounds)\n\n"
    )
    lines = words(text)
    assert lines[2] == "engine samples median 95 % interval mean p90 p95 p99 p99.9 min max"
    small = "n too small n too small n too small"
    assert lines[4] == f"cnn 100 3.000 3.000 to 3.000 3.000 3.000 {small} 3.000 3.000"
    assert lines[7] == "Bounds of the tail, ms: the true percentile is below, with 99 % confidence"
    assert lines[9] == "engine p90 below p95 below p99 below p99.9 below"
    assert lines[11] == f"cnn 3.000 {small}"
    assert lines[17] == "engine against median, ms was, ms ratio 95 % interval p verdict"
    assert lines[19] == "dsc cnn 1.000 3.000 0.333 0.333 to 0.333 0.002 3.00 times faster"
    assert "load 0.5 0.75" in words(text)
    assert text.endswith("For research and engineering only; not a medical device.\n")
    assert "\x1b" not in text


def test_the_baseline_can_be_chosen(subject: Make, report: Make) -> None:
    made = report(subject("cnn", blocks(3_000_000)), subject("dsc", blocks(1_000_000)))
    assert "cnn dsc 3.000 1.000 3.000 3.000 to 3.000 0.002 3.00 times slower" in words(
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
    made = compare_reports(before, after, allow={"machine", "architecture", "cpu", "cores"})
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
