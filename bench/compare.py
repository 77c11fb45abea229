"""Comparing reports: which may be compared, the ratio of every engine, the control, and whether to trust them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bench.machine import crowded, throttling
from bench.report import Report, SubjectReport
from bench.statistics import (
    LEAST_BLOCKS,
    MARGIN,
    Interval,
    PairedRatio,
    Verdict,
    block_medians,
    has_interval,
    judge,
    paired_ratio,
    sample_median,
    spread,
    unpaired_ratio,
)
from engines.errors import LatencyRegressionError, NotComparableError, UnstableError, UsageError

if TYPE_CHECKING:
    from bench.measure import Subject

ENVIRONMENT_KEYS = ("machine", "architecture", "cpu", "cores", "cpu_limit", "gpu", "power_mode")
SUBJECT_KEYS = ("batch", "threads", "switches")
# All that a comparison can be allowed to ignore.
CONDITIONS = (*ENVIRONMENT_KEYS, "scenario", *SUBJECT_KEYS, "runs")
OPENED_ONCE = (
    "each engine was opened once: what two openings of one file differ by, often 1 %, is in no interval here"
)
UNSTABLE_SPREAD = 0.10  # of the block medians, as a fraction of their median


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How latencies are compared.

    Attributes:
        allow: Conditions that may differ, such as ``cpu`` or ``threads``; the result is marked.
        margin: The smallest difference worth a word, as a fraction.
    """

    allow: Collection[str] = ()
    margin: float = MARGIN


DEFAULT_RULES = Rules()


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How a candidate's latency relates to a baseline's.

    Attributes:
        baseline: Name of the subject that is compared with.
        candidate: Name of the subject that is judged.
        baseline_ns: Median of all its samples, nanoseconds.
        candidate_ns: Likewise.
        ratio: Candidate / baseline with its 95 % interval; below 1 is faster.
        verdict: What that shows.
        margin: The margin it was judged by.
        paired: What rounds and openings say of it, where both were measured in one report; None between two.
        allowed: Conditions that differ and were allowed to: the ratio is not of the engines alone.
    """

    baseline: str
    candidate: str
    baseline_ns: float
    candidate_ns: float
    ratio: Interval
    verdict: Verdict
    margin: float = MARGIN
    paired: PairedRatio | None = None
    allowed: tuple[str, ...] = ()

    @property
    def p_value(self) -> float | None:
        """The chance that equals would differ so; None where there were not several openings to ask."""
        return _chance(self.paired)


@dataclass(frozen=True, kw_only=True)
class Control:
    """How a subject, opened and measured a second time, relates to itself.

    Attributes:
        subject: Name of the subject.
        ratio: Second / first with its 95 % interval, taken between turns beside each other.
        verdict: What that shows; faster or slower means that the machine was not steady.
        openings: In how many openings; with 1 it was the same session, as older reports have it.
    """

    subject: str
    ratio: Interval
    verdict: Verdict
    openings: int

    @property
    def differs(self) -> bool:
        """Whether the subject differs from itself by more than the margin."""
        return self.verdict in (Verdict.FASTER, Verdict.SLOWER)

    def words(self) -> str:
        """Say it in one line."""
        numbers = f"{self.ratio.value:.3f} ({self.ratio.low:.3f} to {self.ratio.high:.3f})"
        if self.differs:
            end = "differs from itself: the machine was not steady"
        elif self.verdict is Verdict.NO_DIFFERENCE:
            end = self.verdict.value
        else:
            end = f"{self.verdict.value} than itself: other differences as small may be the machine's, too"
        what = "opened and measured twice" if self.openings > 1 else "measured twice"
        return f"control: {self.subject} {what}, ratio {numbers}: {end}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two reports side by side, or the subjects of one report beside its first.

    Attributes:
        rows: One ratio for each subject that can be compared, in the baseline report's order.
        only_baseline: Names that only the baseline report measured.
        only_candidate: Names that only the candidate report measured.
        allowed: Conditions of the reports that differ and were allowed to.
        cautions: What makes the ground unfirm: unstable subjects, interrupted reports.
        controls: What was opened and measured twice, judged by the margin of the rows.
    """

    rows: tuple[Ratio, ...]
    only_baseline: tuple[str, ...] = ()
    only_candidate: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()
    controls: tuple[Control, ...] = ()


def compare_within(
    report: Report, *, baseline: str | None = None, rules: Rules = DEFAULT_RULES
) -> Comparison:
    """Compare every subject of a report with one of them: the first by default.

    Raises:
        UsageError: The report has no such subject.
        NotComparableError: There are not two subjects, or conditions differ.
        UnstableError: Too few rounds.
    """
    names = [subject.name for subject in report.measured]
    if len(names) < 2:
        raise NotComparableError(
            f"the report measured {', '.join(names) or 'nothing'}, two engines are needed",
            remedy="measure two engines, or compare two reports",
        )
    against = names[0] if baseline is None else baseline
    rows = tuple(compare_subjects(report, against, name, rules) for name in names if name != against)
    return Comparison(rows=rows, cautions=report_cautions(report), controls=find_controls(report, rules))


def compare_reports(baseline: Report, candidate: Report, rules: Rules = DEFAULT_RULES) -> Comparison:
    """Compare the subjects that two reports share by name.

    Args:
        baseline: The report that is compared with.
        candidate: The report that is judged.
        rules: How.

    Raises:
        NotComparableError: No name in common, or conditions that differ: the text names the keys.
        UnstableError: Too few blocks.
    """
    left = {subject.name: subject for subject in baseline.measured}
    right = {subject.name: subject for subject in candidate.measured}
    common = [name for name in left if name in right]
    if not common:
        raise NotComparableError(
            f"no name in common: {', '.join(left) or 'nothing'} against {', '.join(right) or 'nothing'}",
            remedy="measure the same engines in both reports",
        )
    allowed = check_conditions(_report_conditions(baseline), _report_conditions(candidate), rules.allow, "")
    return Comparison(
        rows=tuple(_compare_unpaired(left[name], right[name], rules) for name in common),
        only_baseline=tuple(name for name in left if name not in right),
        only_candidate=tuple(name for name in right if name not in left),
        allowed=allowed,
        cautions=(
            *(f"baseline: {line}" for line in report_cautions(baseline)),
            *(f"candidate: {line}" for line in report_cautions(candidate)),
        ),
        controls=(*find_controls(baseline, rules), *find_controls(candidate, rules)),
    )


def compare_subjects(report: Report, baseline: str, candidate: str, rules: Rules = DEFAULT_RULES) -> Ratio:
    """Compare two subjects of one report, round by round.

    Args:
        report: The report.
        baseline: The subject that is compared with.
        candidate: The subject that is judged.
        rules: How.

    Raises:
        UsageError: The report has no such subject.
        NotComparableError: Their batch, threads or switches differ and may not.
        UnstableError: Too few rounds.
    """
    below, above = _find_subject(report, baseline), _find_subject(report, candidate)
    conditions = subject_conditions(below), subject_conditions(above)
    allowed = check_conditions(*conditions, rules.allow, f"{candidate}: ")
    found = paired_ratio(below, above)
    return Ratio(
        baseline=baseline,
        candidate=candidate,
        baseline_ns=sample_median(below),
        candidate_ns=sample_median(above),
        ratio=found.interval,
        verdict=judge(found.interval, rules.margin, _chance(found)),
        margin=rules.margin,
        paired=found,
        allowed=allowed,
    )


def _chance(found: PairedRatio | None) -> float | None:
    return None if found is None or found.openings < 2 else found.chance


def _compare_unpaired(below: SubjectReport, above: SubjectReport, rules: Rules) -> Ratio:
    runs = _how_it_runs(below, above)
    left, right = subject_conditions(below) | runs[0], subject_conditions(above) | runs[1]
    allowed = check_conditions(left, right, rules.allow, f"{below.name}: ")
    ratio = unpaired_ratio(below, above)
    return Ratio(
        baseline=below.name,
        candidate=above.name,
        baseline_ns=sample_median(below),
        candidate_ns=sample_median(above),
        ratio=ratio,
        verdict=judge(ratio, rules.margin),
        margin=rules.margin,
        allowed=allowed,
    )


def _report_conditions(report: Report) -> dict[str, Any]:
    conditions = {key: report.environment.get(key) for key in ENVIRONMENT_KEYS}
    return {**conditions, "scenario": report.plan.scenario}


def subject_conditions(subject: SubjectReport) -> dict[str, Any]:
    """Return what must be equal for the latencies of two subjects to be comparable, by key."""
    conditions: dict[str, Any] = {}
    for key in SUBJECT_KEYS:
        value = subject.description.get(key)
        if isinstance(value, Mapping):
            conditions |= {f"{key}.{name}": setting for name, setting in value.items()}
        else:
            conditions[key] = value
    return conditions


def _how_it_runs(*subjects: SubjectReport) -> list[dict[str, Any]]:
    """How a runtime ran one engine in two reports, such as by a CUDA graph; nothing where a report does not say."""
    found = [subject.description.get("runs") for subject in subjects]
    if not all(isinstance(runs, Mapping) for runs in found):
        return [{} for _ in found]
    return [{f"runs.{key}": value for key, value in (runs or {}).items()} for runs in found]


def check_conditions(
    left: Mapping[str, Any], right: Mapping[str, Any], allow: Collection[str], prefix: str
) -> tuple[str, ...]:
    """Return the keys that differ and are allowed to.

    Raises:
        NotComparableError: Others differ; its text begins with ``prefix`` and names them.
    """
    keys = [key for key in {**left, **right} if left.get(key) != right.get(key)]
    refused = [key for key in keys if key not in allow and key.partition(".")[0] not in allow]
    if refused:
        seen = "; ".join(f"{key} is {left.get(key)!r} and {right.get(key)!r}" for key in refused)
        flags = " ".join(f"--allow {key}" for key in refused)
        raise NotComparableError(
            f"{prefix}not comparable: {seen}", remedy=f"measure both the same way, or allow it with {flags}"
        )
    return tuple(keys)


def _find_subject(report: Report, name: str) -> SubjectReport:
    for subject in report.measured:
        if subject.name == name:
            return subject
    names = ", ".join(subject.name for subject in report.measured)
    raise UsageError(f"the report has no samples of {name!r}", remedy=f"choose one of {names}")


def control_subject(subject: Subject) -> Subject:
    """Return the same subject once more, opened on its own, as its own control."""
    return replace(subject, name=f"{subject.name} (control)", control_of=subject.name)


def find_controls(report: Report, rules: Rules = DEFAULT_RULES) -> tuple[Control, ...]:
    """Judge every control of a report that shares at least 5 rounds with its subject, by the margin of the rules."""
    subjects = {subject.name: subject for subject in report.measured}
    found: list[Control] = []
    for control in report.controls:
        subject = subjects.get(control.control_of or "")
        if subject is not None and has_interval(subject, control):
            pair = paired_ratio(subject, control)
            verdict = judge(pair.interval, rules.margin, _chance(pair))
            found.append(
                Control(subject=subject.name, ratio=pair.interval, verdict=verdict, openings=pair.openings)
            )
    return tuple(found)


def unstable_subjects(report: Report) -> tuple[str, ...]:
    """Return why the report is no firm ground, one line per subject; empty when all is well.

    A subject is unstable when it has fewer than 5 blocks, or when its block medians scatter by more than 10 %; a
    report is when a subject differs from its own second measurement, or when other programs had the processor.

    Source:
        pyperf calls a benchmark unstable when the standard deviation is more than 10 % of the mean
        (``pyperf check``); here it is taken between blocks, with a robust estimate, because the tail
        within a block is the subject's own.
    """
    lines = []
    for subject in report.measured:
        medians = list(block_medians(subject).values())
        if len(medians) < LEAST_BLOCKS:
            lines.append(f"{subject.name} has {len(medians)} blocks, {LEAST_BLOCKS} are needed")
        elif (scatter := spread(medians)) > UNSTABLE_SPREAD:
            lines.append(
                f"{subject.name}'s block medians scatter by {scatter * 100:.0f} %, 10 % is the limit"
            )
    lines += crowded(report.states)
    return (*lines, *(control.words() for control in find_controls(report) if control.differs))


def report_cautions(report: Report, *others: str) -> tuple[str, ...]:
    """Return what makes a report no firm ground: interrupted, opened once, ``others``, throttled, unstable."""
    interrupted = ("the measurement was interrupted",) if report.interrupted else ()
    once = () if opened_often(report) else (OPENED_ONCE,)
    return (*interrupted, *once, *others, *throttling(report.states), *unstable_subjects(report))


def opened_often(report: Report) -> bool:
    """Say whether every subject was measured in two openings at least."""
    return all(len({block.opening for block in subject.blocks}) > 1 for subject in report.measured)


def require_stable(report: Report) -> None:
    """Fail where a subject is unstable.

    Raises:
        UnstableError: Names every such subject.
    """
    lines = unstable_subjects(report)
    if lines:
        raise UnstableError(
            "; ".join(lines), remedy="quieten the machine, fix its clocks, or measure for longer"
        )


def require_fit_controls(controls: Collection[Control]) -> None:
    """Fail where a subject differs from itself: what the machine did then shows in every ratio.

    Raises:
        UnstableError: Names every such control.
    """
    lines = [control.words() for control in controls if control.differs]
    if lines:
        raise UnstableError("; ".join(lines), remedy="quieten the machine, fix its clocks, and measure again")


def regressions(rows: Collection[Ratio], percent: float) -> tuple[Ratio, ...]:
    """Return the rows that are slower by more than ``percent`` and surely slower at all (interval above 1).

    Raises:
        UsageError: The percentage is negative or no number.
    """
    if not 0 <= percent < float("inf"):
        raise UsageError(f"--fail-if-slower is {percent}", remedy="give a percentage of 0 or more, such as 5")
    return tuple(row for row in rows if row.ratio.value > 1 + percent / 100 and row.ratio.low > 1)


def require_no_regression(rows: Collection[Ratio], percent: float) -> None:
    """Fail where a row is slower than allowed.

    Raises:
        LatencyRegressionError: Names every such row.
    """
    slower = regressions(rows, percent)
    if slower:
        named = ", ".join(f"{row.candidate} by {(row.ratio.value - 1) * 100:.1f} %" for row in slower)
        raise LatencyRegressionError(
            f"slower than the allowed {percent:g} %: {named}",
            remedy="rebuild or measure again if that surprises you",
        )
