from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.compare import (
    Ratio,
    compare_reports,
    compare_subjects,
    compare_within,
    regressions,
    require_no_regression,
)
from bench.report import Report
from bench.statistics import Interval, Verdict
from bench.tables import render_comparison
from engines.errors import LatencyRegressionError, NotComparableError, UnstableError, UsageError

Make = Callable[..., Any]
MACHINE = {"machine": "Jetson Orin Nano", "architecture": "aarch64", "cpu": "Cortex-A78AE", "cores": 6}


def steady(value: int, count: int = 10) -> list[list[int]]:
    return [[value - 1, value, value + 1]] * count


@pytest.fixture
def pair(subject: Make, report: Make) -> Report:
    made: Report = report(
        subject("cnn", steady(3000)), subject("dsc", steady(1000)), subject("bad", [], error="gone")
    )
    return made


def test_two_subjects_of_a_report(pair: Report) -> None:
    found = compare_subjects(pair, "cnn", "dsc")
    third = 1000 / 3000
    assert found.ratio == Interval(third, third, third)
    assert (found.baseline_ns, found.candidate_ns) == (3000, 1000)
    assert found.verdict is Verdict.FASTER
    assert compare_subjects(pair, "dsc", "cnn").verdict is Verdict.SLOWER
    assert compare_subjects(pair, "cnn", "cnn").verdict is Verdict.NO_DIFFERENCE
    with pytest.raises(UsageError, match="no samples of 'bad'") as caught:
        compare_subjects(pair, "cnn", "bad")
    assert caught.value.remedy == "choose one of cnn, dsc"


def test_a_slight_difference_is_told_within_a_report_and_not_between_two(subject: Make, report: Make) -> None:
    made = report(subject("a", steady(1000)), subject("b", steady(1020)), subject("c", steady(990)))
    found = compare_within(made)
    assert [row.verdict for row in found.rows] == [Verdict.SLIGHTLY_SLOWER, Verdict.SLIGHTLY_FASTER]
    lines = render_comparison(found).splitlines()
    assert [line.split("  ")[-1] for line in lines[4:6]] == [
        "slightly slower (2.0 %)",
        "slightly faster (1.0 %)",
    ]
    assert "* slightly: surely different (p below 0.01), but perhaps by less than 3 %" in lines
    plain = compare_reports(report(subject("a", steady(1000))), report(subject("a", steady(1020))))
    assert plain.rows[0].verdict is Verdict.NO_DIFFERENCE
    assert not any("slightly" in line for line in render_comparison(plain).splitlines())


def test_subjects_of_different_batch_need_allowance(subject: Make, report: Make) -> None:
    made = report(
        subject("one", steady(1000), description={"batch": 1, "precision": "fp32"}),
        subject("eight", steady(1000), description={"batch": 8, "precision": "int8"}),
    )
    with pytest.raises(NotComparableError, match="eight: not comparable: batch is 1 and 8") as caught:
        compare_subjects(made, "one", "eight")
    assert caught.value.remedy.endswith("--allow batch")
    assert compare_subjects(made, "one", "eight", allow={"batch"}).allowed == ("batch",)


def test_two_reports_are_paired_by_name(subject: Make, report: Make) -> None:
    before = report(subject("a", steady(1000)), subject("b", steady(500)), subject("old", steady(1)))
    after = report(subject("new", steady(1)), subject("b", steady(600)), subject("a", steady(1010)))
    found = compare_reports(before, after)
    assert [(row.candidate, row.ratio.value, row.verdict) for row in found.rows] == [
        ("a", 1.01, Verdict.NO_DIFFERENCE),
        ("b", 1.2, Verdict.SLOWER),
    ]
    assert (found.only_baseline, found.only_candidate, found.allowed) == (("old",), ("new",), ())


@pytest.mark.parametrize("key", ["machine", "architecture", "cpu", "cores", "cpu_limit", "gpu", "power_mode"])
def test_another_machine_is_refused_by_key(subject: Make, report: Make, key: str) -> None:
    before = report(subject("a", steady(1000)))
    after = report(subject("a", steady(900)), environment={**MACHINE, key: "other", "load": 9, "kernel": "7"})
    with pytest.raises(
        NotComparableError, match=f"not comparable: {key} is .* and 'other' .measure"
    ) as caught:
        compare_reports(before, after)
    assert caught.value.remedy.endswith(f"--allow {key}")
    found = compare_reports(before, after, allow={key})
    assert found.allowed == (key,)
    assert found.rows[0].verdict is Verdict.FASTER


def test_every_differing_key_is_named(subject: Make, report: Make) -> None:
    before = report(subject("a", steady(1000)))
    after = report(subject("a", steady(1000)), environment={**MACHINE, "cpu": "x", "cores": 2})
    with pytest.raises(NotComparableError, match="cpu is 'Cortex-A78AE' and 'x'; cores is 6 and 2"):
        compare_reports(before, after)
    with pytest.raises(NotComparableError, match="comparable: cores is 6 and 2"):
        compare_reports(before, after, allow={"cpu"})


def test_switches_are_compared_one_by_one(subject: Make, report: Make) -> None:
    before = report(subject("a", steady(1000), description={"switches": {"cuda_graph": True, "spin": False}}))
    after = report(subject("a", steady(1000), description={"switches": {"cuda_graph": False, "spin": False}}))
    with pytest.raises(
        NotComparableError, match=r"a: not comparable: switches\.cuda_graph is True and False"
    ):
        compare_reports(before, after)
    for allow in ({"switches"}, {"switches.cuda_graph"}):
        assert compare_reports(before, after, allow=allow).rows[0].allowed == ("switches.cuda_graph",)


def test_how_an_engine_ran_must_be_equal_between_reports_where_both_tell(subject: Make, report: Make) -> None:
    graph, plain, silent = (
        report(subject("a", steady(1000), description=description))
        for description in (
            {"runs": {"execution": "CUDA graph"}},
            {"runs": {"execution": "enqueue"}},
            {},
        )
    )
    with pytest.raises(NotComparableError, match=r"runs\.execution is 'CUDA graph' and 'enqueue'"):
        compare_reports(graph, plain)
    assert compare_reports(graph, plain, allow={"runs"}).rows[0].allowed == ("runs.execution",)
    assert compare_reports(graph, silent).rows[0].allowed == ()


def test_reports_without_a_common_name_or_with_few_blocks_are_refused(subject: Make, report: Make) -> None:
    with pytest.raises(NotComparableError, match="no name in common: a against b"):
        compare_reports(report(subject("a", steady(1))), report(subject("b", steady(1))))
    with pytest.raises(UnstableError, match="4 blocks are too few"):
        compare_reports(report(subject("a", steady(1000, 4))), report(subject("a", steady(1000))))


def test_every_subject_of_a_report_against_one(pair: Report, subject: Make, report: Make) -> None:
    assert [(row.baseline, row.candidate) for row in compare_within(pair).rows] == [("cnn", "dsc")]
    assert [(row.baseline, row.candidate) for row in compare_within(pair, baseline="dsc").rows] == [
        ("dsc", "cnn")
    ]
    with pytest.raises(NotComparableError, match="the report measured a, two engines are needed"):
        compare_within(report(subject("a", steady(1000))))


def test_unfirm_ground_is_told(subject: Make, report: Make) -> None:
    noisy = [[100], [150], [100], [60], [130], [80]]
    before, after = report(subject("a", noisy)), report(subject("a", steady(100)), interrupted=True)
    assert compare_reports(before, after).cautions == (
        "baseline: a's block medians scatter by 37 %, 10 % is the limit",
        "candidate: the measurement was interrupted",
    )


def row(value: float, low: float, high: float) -> Ratio:
    return Ratio(
        baseline="a",
        candidate=f"a{value}",
        baseline_ns=1.0,
        candidate_ns=value,
        ratio=Interval(value, low, high),
        verdict=Verdict.NO_DIFFERENCE,
    )


def test_a_regression_is_beyond_the_percentage_and_beyond_chance() -> None:
    rows = [row(1.06, 1.02, 1.10), row(1.04, 1.03, 1.05), row(1.5, 0.9, 2.0), row(0.5, 0.4, 0.6)]
    assert regressions(rows, 5) == (rows[0],)
    with pytest.raises(LatencyRegressionError, match=r"slower than the allowed 5 %: a1\.06 by 6\.0 %"):
        require_no_regression(rows, 5)
    require_no_regression(rows, 7)
    with pytest.raises(UsageError, match="--fail-if-slower is -1"):
        regressions(rows, -1)
    with pytest.raises(UsageError, match="--fail-if-slower is nan"):
        regressions(rows, float("nan"))
