from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from bench.compare import (
    Ratio,
    Rules,
    compare_reports,
    compare_subjects,
    compare_within,
    control_subject,
    find_controls,
    regressions,
    require_fit_controls,
    require_no_regression,
    require_stable,
    unstable_subjects,
)
from bench.measure import Subject, always_open
from bench.report import Report, SubjectReport
from bench.statistics import Interval, Verdict
from bench.tables import render_comparison, render_report
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
    assert (found.ratio.low, found.ratio.value, found.ratio.high) == pytest.approx([1 / 3] * 3)
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


def test_a_report_of_one_opening_calls_nothing_slight_and_says_why(subject: Make, report: Make) -> None:
    made = report(
        subject("a", steady(1000), openings=1),
        subject("b", steady(1020), openings=1),
        subject("c", steady(1100), openings=1),
    )
    found = compare_within(made)
    assert [row.verdict for row in found.rows] == [Verdict.NO_DIFFERENCE, Verdict.SLOWER]
    assert [row.p_value for row in found.rows] == [None, None]
    (caution,) = found.cautions
    assert caution.startswith("each engine was opened once: what two openings of one file differ by")
    for text in (render_comparison(found), render_report(made)):
        assert f"* {caution}" in text.splitlines()
        assert "Spread of the ratios" not in text
    often = compare_within(report(subject("a", steady(1000)), subject("b", steady(1020))))
    assert often.cautions == () and "Spread of the ratios" in render_comparison(often)


def test_openings_that_disagree_are_no_difference_however_many_rounds_agree(
    subject: Make, report: Make
) -> None:
    # Three openings of five are 2 % slower to the nanosecond, two are 1 % faster.
    ratios = [ratio for ratio in (1020, 1020, 1020, 990, 990) for _ in range(40)]
    made = report(subject("a", steady(1000, 200)), subject("b", [[ratio] * 3 for ratio in ratios]))
    (row,) = compare_within(made).rows
    assert row.verdict is Verdict.NO_DIFFERENCE and row.ratio.low < 1 < row.ratio.high
    assert row.paired is not None and row.paired.openings == 5
    (spread,) = (line for line in render_comparison(compare_within(made)).splitlines() if "0.990 to" in line)
    assert spread.split() == ["b", "a", "5", "0.00%", "1.64%", "0.990", "to", "1.020"]


def test_subjects_of_different_batch_need_allowance(subject: Make, report: Make) -> None:
    made = report(
        subject("one", steady(1000), description={"batch": 1, "precision": "fp32"}),
        subject("eight", steady(1000), description={"batch": 8, "precision": "int8"}),
    )
    with pytest.raises(NotComparableError, match="eight: not comparable: batch is 1 and 8") as caught:
        compare_subjects(made, "one", "eight")
    assert caught.value.remedy.endswith("--allow batch")
    assert compare_subjects(made, "one", "eight", Rules(allow={"batch"})).allowed == ("batch",)


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
    found = compare_reports(before, after, Rules(allow={key}))
    assert found.allowed == (key,)
    assert found.rows[0].verdict is Verdict.FASTER


def test_the_margin_is_that_of_the_rules(subject: Make, report: Make) -> None:
    before, after = report(subject("a", steady(1000))), report(subject("a", steady(1020)))
    wide, narrow = (compare_reports(before, after, Rules(margin=margin)).rows[0] for margin in (0.03, 0.01))
    assert (wide.verdict, narrow.verdict) == (Verdict.NO_DIFFERENCE, Verdict.SLOWER)
    assert (wide.margin, narrow.margin) == (0.03, 0.01)


def test_every_differing_key_is_named(subject: Make, report: Make) -> None:
    before = report(subject("a", steady(1000)))
    after = report(subject("a", steady(1000)), environment={**MACHINE, "cpu": "x", "cores": 2})
    with pytest.raises(NotComparableError, match="cpu is 'Cortex-A78AE' and 'x'; cores is 6 and 2"):
        compare_reports(before, after)
    with pytest.raises(NotComparableError, match="comparable: cores is 6 and 2"):
        compare_reports(before, after, Rules(allow={"cpu"}))


def test_switches_are_compared_one_by_one(subject: Make, report: Make) -> None:
    before = report(subject("a", steady(1000), description={"switches": {"cuda_graph": True, "spin": False}}))
    after = report(subject("a", steady(1000), description={"switches": {"cuda_graph": False, "spin": False}}))
    with pytest.raises(
        NotComparableError, match=r"a: not comparable: switches\.cuda_graph is True and False"
    ):
        compare_reports(before, after)
    for allow in ({"switches"}, {"switches.cuda_graph"}):
        assert compare_reports(before, after, Rules(allow=allow)).rows[0].allowed == ("switches.cuda_graph",)


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
    assert compare_reports(graph, plain, Rules(allow={"runs"})).rows[0].allowed == ("runs.execution",)
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


@pytest.fixture
def controlled(subject: Make, report: Make) -> Callable[[int], Report]:
    """A report of two engines whose control takes so many nanoseconds; the baseline takes 1000."""

    def make(control_ns: int, rounds: int = 10) -> Report:
        control: SubjectReport = subject("cnn (control)", [[control_ns] * 3] * rounds)
        made: Report = report(
            subject("cnn", [[1000] * 3] * 10),
            subject("dsc", [[500] * 3] * 10),
            replace(control, control_of="cnn"),
        )
        return made

    return make


def test_a_control_is_the_same_subject_under_another_name() -> None:
    subject = Subject(name="a", open=always_open(lambda: None), description={"batch": 2})
    control = control_subject(subject)
    assert (control.name, control.control_of) == ("a (control)", "a")
    assert control.open is subject.open and control.description == {"batch": 2}


def test_a_control_is_hidden_from_the_tables_and_its_ratio_is_told(
    controlled: Callable[..., Report],
) -> None:
    made = controlled(1010)
    (found,) = find_controls(made)
    assert (found.subject, found.ratio.value, found.differs) == ("cnn", pytest.approx(1.01), False)
    assert [subject.name for subject in made.measured] == ["cnn", "dsc"]
    line = (
        "control: cnn opened and measured twice, ratio 1.010 (1.010 to 1.010): slightly slower than itself: "
        "other differences as small may be the machine's, too"
    )
    for text in (render_report(made), render_comparison(compare_within(made))):
        assert f"* {line}" in text.splitlines()
        assert "cnn (control)" not in text
    assert unstable_subjects(made) == ()
    require_fit_controls(compare_within(made).controls)


def test_a_control_that_differs_makes_everything_unstable(controlled: Callable[..., Report]) -> None:
    made = controlled(1040)
    line = "control: cnn opened and measured twice, ratio 1.040 (1.040 to 1.040): differs from itself"
    assert find_controls(made)[0].verdict is Verdict.SLOWER
    with pytest.raises(UnstableError, match="differs from itself"):
        require_stable(made)
    for comparison in (compare_within(made), compare_reports(made, controlled(1000))):
        with pytest.raises(UnstableError) as caught:
            require_fit_controls(comparison.controls)
        assert caught.value.what.startswith(line)
        assert caught.value.remedy == "quieten the machine, fix its clocks, and measure again"
    assert render_comparison(compare_within(made)).count("differs from itself") == 1


def test_a_control_that_equals_its_subject(controlled: Callable[..., Report]) -> None:
    line = "control: cnn opened and measured twice, ratio 1.000 (1.000 to 1.000): no significant difference"
    assert [control.words() for control in compare_within(controlled(1000)).controls] == [line]


def test_a_control_of_one_session_is_not_called_an_opening(subject: Make, report: Make) -> None:
    control = replace(subject("a (control)", [[1000] * 3] * 10, openings=1), control_of="a")
    (found,) = find_controls(report(subject("a", [[1000] * 3] * 10, openings=1), control))
    assert found.words().startswith("control: a measured twice, ratio 1.000")


def test_the_margin_of_the_comparison_judges_its_control(controlled: Callable[..., Report]) -> None:
    assert find_controls(controlled(1010), Rules(margin=0.005))[0].differs
    assert compare_within(controlled(1010), rules=Rules(margin=0.005)).controls[0].differs
    assert not compare_within(controlled(1040), rules=Rules(margin=0.05)).controls[0].differs


def test_a_control_with_too_few_rounds_or_without_its_subject_says_nothing(
    controlled: Callable[..., Report], subject: Make, report: Make
) -> None:
    assert find_controls(controlled(2000, rounds=4)) == ()
    alone = replace(subject("a (control)", [[1000]] * 10), control_of="a")
    assert find_controls(report(subject("a", [], error="gone"), alone)) == ()
    assert find_controls(report(subject("a", [[0]] * 10), alone)) == ()


def test_steady_blocks_are_stable_whatever_their_tail(subject: Make, report: Make) -> None:
    made = report(subject("a", [[100, 100, 10_000], [101, 101, 90_000], [99, 99, 99], [100], [100]]))
    assert unstable_subjects(made) == ()
    require_stable(made)


def test_scattered_and_few_blocks_are_named(subject: Make, report: Make) -> None:
    made = report(
        subject("noisy", [[100], [150], [100], [60], [130], [80]]),
        subject("short", [[100]] * 4),
        subject("fine", [[100]] * 5),
        subject("dead", [], error="gone"),
    )
    assert unstable_subjects(made) == (
        "noisy's block medians scatter by 37 %, 10 % is the limit",
        "short has 4 blocks, 5 are needed",
    )
    with pytest.raises(UnstableError, match=r"noisy's block medians .*; short has 4 blocks") as caught:
        require_stable(made)
    assert caught.value.remedy


def test_a_crowded_measurement_is_unstable_and_says_so(subject: Make, report: Make) -> None:
    steady = (subject("a", [[5]] * 6), subject("b", [[6]] * 6))
    start, calm, busy = ({"ran_ns": ran, "waited_ns": waited} for ran, waited in ((0, 0), (97, 3), (60, 40)))
    require_stable(report(*steady, states=(start, calm)))
    made = report(*steady, states=(start, busy))
    (line,) = unstable_subjects(made)
    assert line.startswith("other programs had the processor for 40% of the time")
    with pytest.raises(UnstableError, match="other programs had the processor for 40%"):
        require_stable(made)
    assert f"* unstable: {line}" in render_report(made).splitlines()
    assert compare_within(made).cautions == (line,)
