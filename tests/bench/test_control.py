from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bench.compare import (
    compare_reports,
    compare_within,
    control_subject,
    find_controls,
    require_fit_controls,
    require_stable,
    unstable_subjects,
)
from bench.measure import Subject
from bench.report import Report, SubjectReport
from bench.statistics import Interval, Verdict
from bench.tables import render_comparison, render_report
from engines.errors import UnstableError

Make = Callable[..., Any]


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
    subject = Subject(name="a", call=lambda: None, description={"batch": 2})
    control = control_subject(subject)
    assert (control.name, control.control_of) == ("a (control)", "a")
    assert control.call is subject.call and control.description == {"batch": 2}


def test_a_control_is_hidden_from_the_tables_and_its_ratio_is_told(
    controlled: Callable[..., Report],
) -> None:
    made = controlled(1010)
    (found,) = find_controls(made)
    assert (found.subject, found.ratio, found.differs) == ("cnn", Interval(1.01, 1.01, 1.01), False)
    assert [subject.name for subject in made.measured] == ["cnn", "dsc"]
    line = (
        "control: cnn measured twice, ratio 1.010 (1.010 to 1.010): slightly slower than itself: "
        "other differences as small may be the machine's, too"
    )
    for text in (render_report(made), render_comparison(compare_within(made))):
        assert f"* {line}" in text.splitlines()
        assert "cnn (control)" not in text
    assert unstable_subjects(made) == ()
    require_fit_controls(compare_within(made).controls)


def test_a_control_that_differs_makes_everything_unstable(controlled: Callable[..., Report]) -> None:
    made = controlled(1040)
    line = "control: cnn measured twice, ratio 1.040 (1.040 to 1.040): differs from itself"
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
    line = "control: cnn measured twice, ratio 1.000 (1.000 to 1.000): no significant difference"
    assert [control.words() for control in compare_within(controlled(1000)).controls] == [line]


def test_the_margin_of_the_comparison_judges_its_control(controlled: Callable[..., Report]) -> None:
    assert find_controls(controlled(1010), margin=0.005)[0].differs
    assert compare_within(controlled(1010), margin=0.005).controls[0].differs
    assert not compare_within(controlled(1040), margin=0.05).controls[0].differs


def test_a_control_with_too_few_rounds_or_without_its_subject_says_nothing(
    controlled: Callable[..., Report], subject: Make, report: Make
) -> None:
    assert find_controls(controlled(2000, rounds=4)) == ()
    alone = replace(subject("a (control)", [[1000]] * 10), control_of="a")
    assert find_controls(report(subject("a", [], error="gone"), alone)) == ()
    assert find_controls(report(subject("a", [[0]] * 10), alone)) == ()
