"""Reports and comparisons as tables of text: the one place where latencies become words."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from bench.bootstrap import block_medians
from bench.compare import Comparison, Ratio, compare_subjects
from bench.control import find_controls
from bench.machine_state import throttling
from bench.pass_tables import pass_tables, scenario_tables
from bench.report import Report, SubjectReport
from bench.stability import unstable_subjects
from bench.statistics import (
    DETECTED,
    PERCENTILES,
    Summary,
    Verdict,
    stage_medians,
    summarise,
    summarise_tails,
)
from bench.table import Table as Table
from bench.table import milliseconds as milliseconds
from bench.variance import build_spreads
from engines.errors import NotComparableError, UnstableError

_SLIGHT = (Verdict.SLIGHTLY_FASTER, Verdict.SLIGHTLY_SLOWER)
TOO_SMALL = "n too small"
DISCLAIMER = "For research and engineering only; not a medical device."
_ENVIRONMENT_NAMES = {
    "cpu": "CPU",
    "cpu_limit": "CPU limit",
    "gpu": "GPU",
    "gpu_driver": "GPU driver",
    "os": "OS",
    "l4t": "L4T",
    "jetpack": "JetPack",
    "power_mode": "power mode (nvpmodel)",
    "clocks_fixed": "clocks fixed",
    "gpu_mhz": "GPU, MHz",
    "nvml": "NVML",
    "frequency_mhz": "frequency, MHz",
    "memory_gib": "memory, GiB",
    "memory_limit_gib": "memory limit, GiB",
    "temperatures_c": "temperatures, °C",
}


def report_tables(report: Report, *, baseline: str | None = None) -> tuple[Table, ...]:
    """Return the tables of a report: latencies, bounds of their tails, ratios to one subject, the machine.

    Args:
        report: The report.
        baseline: The subject that the others are compared with; the first one by default.
    """
    tables = [latency_table(report), tail_table(report)]
    tables += scenario_tables(report)
    tables += [stage_table(report)] if has_stages(report) else []
    tables += [build_table(report)] if build_spreads(report) else []
    tables += pass_tables(report)
    if len(report.measured) > 1:
        ratios, notes = report_ratios(report, baseline=baseline)
        tables.append(ratio_table(ratios, notes=notes))
    tables.append(environment_table(report))
    return tuple(tables)


def report_ratios(
    report: Report, *, baseline: str | None = None
) -> tuple[tuple[Ratio, ...], tuple[str, ...]]:
    """Compare every subject with the baseline, the first by default.

    Returns:
        The ratios, and a line for each control and for each subject that cannot be compared: why.
    """
    names = [subject.name for subject in report.measured]
    against = baseline if baseline is not None else names[0]
    ratios: list[Ratio] = []
    notes: list[str] = []
    for name in names:
        if name != against:
            try:
                ratios.append(compare_subjects(report, against, name))
            except (NotComparableError, UnstableError) as error:
                what = error.what.removeprefix(f"{name}: ")
                notes.append(f"{name}: {what}")
    return tuple(ratios), (*notes, *(control.words() for control in find_controls(report, test=True)))


def latency_table(report: Report) -> Table:
    """Return the latencies of all subjects, in milliseconds."""
    percentiles = tuple(f"p{percentile:g}" for percentile in PERCENTILES)
    header = ("engine", "samples", "median", "95 % interval", "mean", *percentiles, "min", "max")
    rows = tuple(_latency_row(subject) for subject in report.subjects if subject.control_of is None)
    return Table(
        title=f"Latency, ms ({_plan_words(report)})", header=header, rows=rows, notes=_cautions(report)
    )


def tail_table(report: Report) -> Table:
    """Return what bounds the tail of each subject, in milliseconds."""
    rows = []
    for subject in report.measured:
        tails = summarise_tails(subject).values()
        cells = (TOO_SMALL if tail is None else f"{milliseconds(tail.bound)}" for tail in tails)
        rows.append((subject.name, *cells))
    return Table(
        title="Bounds of the tail, ms: the true percentile is below, with 99 % confidence",
        header=("engine", *(f"p{percentile:g} below" for percentile in PERCENTILES)),
        rows=tuple(rows),
        notes=("the early-stopping rule of MLPerf: so many slow calls would have been seen otherwise",),
    )


def has_stages(report: Report) -> bool:
    """Say whether any subject tells the times of its stages."""
    return any(block.stages_ns for subject in report.measured for block in subject.blocks)


def stage_table(report: Report) -> Table:
    """Return the time of each stage, in milliseconds: the median over the blocks of the blocks' medians."""
    found = {subject.name: stage_medians(subject) for subject in report.measured}
    stages = tuple(dict.fromkeys(stage for medians in found.values() for stage in medians))
    rows = tuple(
        (name, *(milliseconds(medians[stage]) if stage in medians else "-" for stage in stages))
        for name, medians in found.items()
    )
    return Table(title="Stages, median ms", header=("engine", *stages), rows=rows)


def build_table(report: Report) -> Table:
    """Return how much builds of one engine differ, apart from how much one build varies."""
    rows = tuple(
        (
            spread.engine,
            str(spread.builds),
            f"{spread.within:.2%}",
            f"{spread.between:.2%}",
            f"{spread.slowest:.3f}",
            chance_words(spread.chance),
        )
        for spread in build_spreads(report)
    )
    return Table(
        title="Spread within a build and between builds",
        header=("engine", "builds", "within", "between", "slowest / fastest", "p"),
        rows=rows,
        notes=("standard deviations of block medians, rounds taken out; p: of equal builds, by an F test",),
    )


def drift_table(report: Report) -> Table:
    """Return the median of the blocks in each quarter of the run, in milliseconds."""
    rows = []
    for subject in report.measured:
        medians = list(block_medians(subject).values())
        edges = [len(medians) * quarter // 4 for quarter in range(5)]
        parts = (medians[first:last] for first, last in pairwise(edges))
        cells = (milliseconds(statistics.median(part)) if part else "-" for part in parts)
        rows.append((subject.name, *cells))
    header = ("engine", "first quarter", "second", "third", "last")
    return Table(title="Median of the blocks by quarter of the run, ms", header=header, rows=tuple(rows))


def ratio_table(ratios: Sequence[Ratio], *, title: str = "Compared", notes: Sequence[str] = ()) -> Table:
    """Return ratios of latencies with their verdicts."""
    header = ("engine", "against", "median, ms", "was, ms", "ratio", "95 % interval", "p", "verdict")
    rows = tuple(
        (
            ratio.candidate,
            ratio.baseline,
            milliseconds(ratio.candidate_ns),
            milliseconds(ratio.baseline_ns),
            f"{ratio.ratio.value:.3f}",
            f"{ratio.ratio.low:.3f} to {ratio.ratio.high:.3f}",
            chance_words(ratio.p_value),
            verdict_words(ratio),
        )
        for ratio in ratios
    )
    lines = [f"faster or slower: the whole interval is beyond {ratios[0].margin * 100:g} %"] if ratios else []
    if any(ratio.verdict in _SLIGHT for ratio in ratios):
        lines.append(
            f"slightly: surely different (p below {DETECTED:g}), but perhaps by less than {ratios[0].margin * 100:g} %"
        )
    if any(ratio.paired for ratio in ratios):
        lines.append("ratio: the median over the rounds of the ratio within a round")
        lines.append("p: Wilcoxon's signed-rank test over the rounds, of no difference at all")
    lines += [f"{ratio.candidate}: {', '.join(ratio.allowed)} differ" for ratio in ratios if ratio.allowed]
    return Table(title=title, header=header, rows=rows, notes=(*lines, *notes))


def comparison_table(comparison: Comparison) -> Table:
    """Return the comparison of two reports."""
    table = ratio_table(comparison.rows, title="Compared")
    controls = (control.words() for control in comparison.controls)
    notes = [*table.notes, *dict.fromkeys((*comparison.cautions, *controls))]
    if comparison.allowed:
        notes.append(f"allowed to differ: {', '.join(comparison.allowed)}")
    if comparison.only_baseline:
        notes.append(f"only in the baseline: {', '.join(comparison.only_baseline)}")
    if comparison.only_candidate:
        notes.append(f"only in the candidate: {', '.join(comparison.only_candidate)}")
    return Table(title=table.title, header=table.header, rows=table.rows, notes=tuple(notes))


def environment_table(report: Report) -> Table:
    """Return the machine at the start and, where it changed, at the end; what is unknown is left out."""
    rows = []
    for key, value in report.environment.items():
        start, end = _words(value), _words(report.environment_end.get(key))
        if start or end:
            rows.append((_ENVIRONMENT_NAMES.get(key, key), start, "" if end == start else end))
    return Table(title="Machine", header=("", "start", "end"), rows=tuple(rows), numeric=False)


def chance_words(chance: float | None) -> str:
    """Say a chance: three decimals, or that it is below them."""
    if chance is None:
        return "-"
    return "<0.001" if chance < 0.001 else f"{chance:.3f}"


def verdict_words(ratio: Ratio) -> str:
    """Say a verdict in words: ``3.42 times faster``, ``slightly slower (1.9 %)``, ``no significant difference``."""
    if ratio.verdict is Verdict.FASTER:
        return f"{1 / ratio.ratio.value:.2f} times faster"
    if ratio.verdict is Verdict.SLOWER:
        return f"{ratio.ratio.value:.2f} times slower"
    if ratio.verdict in _SLIGHT:
        return f"{ratio.verdict.value} ({abs(ratio.ratio.value - 1) * 100:.1f} %)"
    return str(ratio.verdict.value)


def _latency_row(subject: SubjectReport) -> tuple[str, ...]:
    if not subject.blocks:
        return (subject.name, "0", *(["-"] * (7 + len(PERCENTILES) - 2)))
    summary = summarise(subject)
    tails = (summary.tails[percentile] for percentile in PERCENTILES)
    return (
        subject.name,
        f"{summary.count:,}",
        milliseconds(summary.median),
        _interval_words(summary),
        milliseconds(summary.mean),
        *(TOO_SMALL if tail is None else milliseconds(tail.value) for tail in tails),
        milliseconds(summary.minimum),
        milliseconds(summary.maximum),
    )


def _interval_words(summary: Summary) -> str:
    interval = summary.median_interval
    return TOO_SMALL if interval is None else f"{milliseconds(interval.low)} to {milliseconds(interval.high)}"


def _plan_words(report: Report) -> str:
    plan = report.plan
    length = f"{plan.seconds:g} s" if plan.iterations is None else f"{plan.iterations:,} calls"
    return f"{plan.scenario}, {plan.name} plan, {length} each, interleaved in rounds"


def _cautions(report: Report) -> tuple[str, ...]:
    notes = []
    if report.interrupted:
        notes.append("interrupted: this is what was measured until then")
    bits = report.storage.significant_bits
    if bits is not None:
        notes.append(f"every call is kept, rounded to {bits} significant bits ({50 / 2 ** (bits - 1):.2g} %)")
    for subject in report.subjects:
        if subject.error is not None:
            notes.append(f"{subject.name} failed: {subject.error}")
        if subject.refused:
            notes.append(f"{subject.name}: {subject.refused} samples refused, the clock jumped backwards")
        if subject.blocks and not subject.warmup.stable and report.plan.warmup_seconds:
            notes.append(f"{subject.name}: the warm-up ended before the median came to rest")
    notes += throttling(report.states)
    return (*notes, *(f"unstable: {line}" for line in unstable_subjects(report)))


def _words(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return " to ".join(dict.fromkeys(_words(item) for item in value))
    return f"{value:g}" if isinstance(value, float) else str(value)
