"""Reports and comparisons as tables, for a terminal, Markdown and the page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bench.compare import (
    OPENED_ONCE,
    Comparison,
    Ratio,
    compare_subjects,
    find_controls,
    opened_often,
    unstable_subjects,
)
from bench.fleet import Device, Fleet
from bench.machine import throttling
from bench.report import Report, SubjectReport
from bench.statistics import (
    DETECTED,
    PERCENTILES,
    Summary,
    Verdict,
    block_medians,
    build_spreads,
    sample_median,
    stage_medians,
    summarise,
    summarise_tails,
)
from engines.errors import NotComparableError, UnstableError
from engines.text_table import Table, render_markdown, render_text

TOO_SMALL = "n too small"
DISCLAIMER = "For research and engineering only; not a medical device."
_MISSING = "-"
_MIB = 1 << 20
_SLIGHT = (Verdict.SLIGHTLY_FASTER, Verdict.SLIGHTLY_SLOWER)
_FLEET_VERDICTS = {verdict: verdict.value for verdict in Verdict} | {Verdict.NO_DIFFERENCE: "same"}
_BY_ROUND = (
    "ratio: of turns beside each other, its median over the turns of an opening, averaged over the openings"
)
_LATENCY_HEADER = (
    *("engine", "samples", "median", "95 % interval", "mean"),
    *(f"p{percentile:g}" for percentile in PERCENTILES),
    *("min", "max"),
)
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


def render_report(report: Report, *, markdown: bool = False, baseline: str | None = None) -> str:
    """Return a report as text: latencies, ratios to the baseline (the first subject by default), the machine."""
    return _render(report_tables(report, baseline=baseline), markdown)


def render_comparison(comparison: Comparison | Fleet, *, markdown: bool = False) -> str:
    """Return the comparison of two reports, or of many, as text."""
    if isinstance(comparison, Fleet):
        return _render(fleet_tables(comparison), markdown)
    return _render([comparison_table(comparison), *opening_tables(comparison.rows)], markdown)


def _render(tables: Iterable[Table], markdown: bool) -> str:
    one = render_markdown if markdown else render_text
    return "\n\n".join([*(one(table) for table in tables), DISCLAIMER]) + "\n"


def report_tables(report: Report, *, baseline: str | None = None) -> tuple[Table, ...]:
    """Return the tables of a report: latencies, bounds of their tails, ratios to one subject, the machine.

    Args:
        report: The report.
        baseline: The subject that the others are compared with; the first one by default.
    """
    tables = [latency_table(report), tail_table(report), *scenario_tables(report)]
    if has_stages(report):
        tables.append(stage_table(report))
    if (builds := build_table(report)).rows:
        tables.append(builds)
    tables += pass_tables(report)
    if len(report.measured) > 1:
        ratios, notes = report_ratios(report, baseline=baseline)
        tables += [ratio_table(ratios, notes=notes), *opening_tables(ratios)]
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
    return tuple(ratios), (*notes, *(control.words() for control in find_controls(report)))


def latency_table(report: Report) -> Table:
    """Return the latencies of all subjects, in milliseconds."""
    rows = tuple(_latency_row(subject) for subject in report.subjects if subject.control_of is None)
    title = f"Latency, ms ({_plan_words(report)})"
    return Table(title=title, header=_LATENCY_HEADER, rows=rows, notes=_cautions(report))


def _latency_row(subject: SubjectReport) -> tuple[str, ...]:
    if not subject.blocks:
        return (subject.name, "0", *[_MISSING] * (len(_LATENCY_HEADER) - 2))
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
    often = "once" if plan.openings == 1 else f"{min(plan.openings, plan.rounds)} times"
    return f"{plan.scenario}, {plan.name} plan, {length} each, opened {often}, interleaved"


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
    if report.measured and not opened_often(report):
        notes.append(OPENED_ONCE)
    notes += throttling(report.states)
    return (*notes, *(f"unstable: {line}" for line in unstable_subjects(report)))


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
    """Say whether any subject reports the times of its stages."""
    return any(block.stages_ns for subject in report.measured for block in subject.blocks)


def stage_table(report: Report) -> Table:
    """Return the time of each stage, in milliseconds: the median over the blocks of the blocks' medians."""
    found = {subject.name: stage_medians(subject) for subject in report.measured}
    stages = tuple(dict.fromkeys(stage for medians in found.values() for stage in medians))
    rows = tuple(
        (name, *(milliseconds(medians[stage]) if stage in medians else _MISSING for stage in stages))
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
        notes=(
            "standard deviations of openings, what hits all builds taken out; p: of equal builds, by an F test",
        ),
    )


def drift_table(report: Report) -> Table:
    """Return the median of the blocks in each quarter of the run, in milliseconds."""
    rows = []
    for subject in report.measured:
        medians = list(block_medians(subject).values())
        edges = [len(medians) * quarter // 4 for quarter in range(5)]
        parts = (medians[first:last] for first, last in pairwise(edges))
        cells = (milliseconds(statistics.median(part)) if part else _MISSING for part in parts)
        rows.append((subject.name, *cells))
    header = ("engine", "first quarter", "second", "third", "last")
    return Table(title="Median of the blocks by quarter of the run, ms", header=header, rows=tuple(rows))


def opening_tables(ratios: Sequence[Ratio]) -> tuple[Table, ...]:
    """Return what rounds and openings say of each ratio; no table where there were not several openings."""
    rows = tuple(
        (
            ratio.candidate,
            ratio.baseline,
            str(found.openings),
            f"{found.within:.2%}",
            f"{found.between:.2%}",
            f"{found.lowest:.3f} to {found.highest:.3f}",
        )
        for ratio in ratios
        if (found := ratio.paired) is not None and found.openings > 1
    )
    table = Table(
        title="Spread of the ratios",
        header=("engine", "against", "openings", "within", "between", "ratios of the openings"),
        rows=rows,
        notes=(
            "standard deviations: within, of a turn's ratio in one opening; between, of openings beyond that",
        ),
    )
    return (table,) if rows else ()


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
    if any(ratio.paired is not None for ratio in ratios):
        lines.append(_BY_ROUND)
    if any(ratio.p_value is not None for ratio in ratios):
        lines.append("p: Student's test over the openings, of no difference at all")
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


def fleet_tables(fleet: Fleet) -> tuple[Table, ...]:
    """Return the medians, device by engine, and each engine's ratio to the first one on the same device."""
    medians = Table(
        title="Median latency, ms: device by engine",
        header=("device", *fleet.engines),
        rows=tuple((device.name, *_fleet_medians(device, fleet)) for device in fleet.devices),
        notes=_fleet_notes(fleet),
    )
    if len(fleet.engines) < 2:
        return (medians,)
    ratios = Table(
        title=f"Ratio to {fleet.engines[0]} on the same device, 95 % interval",
        header=("device", *fleet.engines[1:]),
        rows=tuple((device.name, *_fleet_ratios(device, fleet)) for device in fleet.devices),
        notes=(
            f"faster or slower: the whole interval is beyond {fleet.margin * 100:g} %",
            _BY_ROUND,
        ),
    )
    return (medians, ratios)


def _fleet_medians(device: Device, fleet: Fleet) -> list[str]:
    found = (device.medians_ns.get(engine) for engine in fleet.engines)
    return [_MISSING if median is None else milliseconds(median) for median in found]


def _fleet_ratios(device: Device, fleet: Fleet) -> list[str]:
    cells = []
    for engine in fleet.engines[1:]:
        found = device.ratios.get(engine)
        if found is None:
            cells.append(_MISSING)
        else:
            ratio = found.ratio
            cells.append(
                f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) {_FLEET_VERDICTS[found.verdict]}"
            )
    return cells


def _fleet_notes(fleet: Fleet) -> tuple[str, ...]:
    notes = [f"{device.name}: {line}" for device in fleet.devices for line in device.cautions]
    if fleet.allowed:
        notes.append(f"allowed to differ: {', '.join(fleet.allowed)}")
    notes += [f"{device.name}: {control.words()}" for device in fleet.devices for control in device.controls]
    return tuple(dict.fromkeys(notes))


def environment_table(report: Report) -> Table:
    """Return the machine at the start and, where it changed, at the end; what is unknown is left out."""
    rows = []
    for key, value in report.environment.items():
        start, end = _words(value), _words(report.environment_end.get(key))
        if start or end:
            rows.append((_ENVIRONMENT_NAMES.get(key, key), start, "" if end == start else end))
    return Table(title="Machine", header=("", "start", "end"), rows=tuple(rows), numeric=False)


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


def scenario_tables(report: Report) -> tuple[Table, ...]:
    """Return what a scenario asks for beside latencies: drops and misses of a camera, throughput of a pile."""
    return tuple(table for table in (_camera_table(report), _throughput_table(report)) if table.rows)


def _camera_table(report: Report) -> Table:
    rows = []
    fps = report.plan.fps
    for subject in report.measured if fps else ():
        answered = len(subject.samples_ns)
        late = int((subject.ordered_ns > 1e9 / (fps or 1)).sum())
        dropped = sum(block.dropped for block in subject.blocks)
        cells = (
            f"{dropped:,}",
            f"{dropped / (answered + dropped):.2%}",
            f"{late:,}",
            f"{late / answered:.2%}",
        )
        rows.append((subject.name, f"{answered + dropped:,}", *cells))
    return Table(
        title=f"Frames at {fps:g} fps" if fps else "",
        header=("engine", "arrived", "dropped", "of arrived", "late", "of answered"),
        rows=tuple(rows),
        notes=("dropped: a newer frame had come; late: answered after the next frame had come",),
    )


def _throughput_table(report: Report) -> Table:
    rows = tuple(
        (
            subject.name,
            str(subject.description["engine_batch"]),
            str(subject.description["concurrency"]),
            f"{subject.description['batch'] / sample_median(subject) * 1e9:,.1f}",
        )
        for subject in report.measured
        if "engine_batch" in subject.description
    )
    return Table(
        title="Throughput of a pile of images", header=("engine", "batch", "threads", "images/s"), rows=rows
    )


@dataclass(frozen=True)
class Roof:
    """The best that a machine could do with some work.

    Attributes:
        intensity: Multiply-adds a byte.
        nanoseconds: The shortest time: all multiply-adds, or all bytes, at the ceiling's rate.
        bound: Which of the two takes longer: ``compute`` or ``memory``.
    """

    intensity: float
    nanoseconds: float
    bound: str

    @classmethod
    def of(cls, limits: Mapping[str, float]) -> Roof:
        """Derive it from a subject's pass ``limits``."""
        compute = limits["multiply_adds"] / limits["multiply_adds_per_s"] * 1e9
        memory = limits["bytes"] / limits["bytes_per_s"] * 1e9
        bound = "compute" if compute >= memory else "memory"
        return cls(limits["multiply_adds"] / limits["bytes"], max(compute, memory), bound)


def pass_tables(report: Report) -> tuple[Table, ...]:
    """Return a table for each kind of pass that the report holds."""
    return tuple(
        table for table in (_limits_table(report), _power_table(report), _memory_table(report)) if table.rows
    )


def _limits_table(report: Report) -> Table:
    rows, notes = [], list[str]()
    for subject in report.measured:
        limits = subject.passes.get("limits")
        if limits:
            rows.append((subject.name, *_limits_cells(limits, sample_median(subject))))
            notes = [  # the same of every engine
                f"ceilings measured here: {limits['multiply_adds_per_s'] / 1e9:.1f} G multiply-adds/s "
                f"(FP32 matrix product), {limits['bytes_per_s'] / 1e9:.1f} GB/s (copy)",
                "moved: input, output and weights of each layer, none kept in a cache; "
                "INT8 may pass an FP32 ceiling",
            ]
    return Table(
        title="Limits of the machine (roofline)",
        header=(
            *("engine", "M multiply-adds", "MB moved", "per byte"),
            *("bound by", "roof, ms", "median, ms", "of roof"),
        ),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _limits_cells(limits: Mapping[str, float], median_ns: float) -> tuple[str, ...]:
    roof = Roof.of(limits)
    return (
        f"{limits['multiply_adds'] / 1e6:,.1f}",
        f"{limits['bytes'] / 1e6:,.2f}",
        f"{roof.intensity:.1f}",
        roof.bound,
        milliseconds(roof.nanoseconds),
        milliseconds(median_ns),
        f"{roof.nanoseconds / median_ns:.0%}",
    )


def _power_table(report: Report) -> Table:
    rows = tuple(
        (
            subject.name,
            str(power["rail"]),
            f"{power['idle_w']:.2f}",
            f"{power['busy_w']:.2f}",
            f"{power['joules'] * 1e3:.3f}",
            f"{power['calls'] / power['seconds']:.1f}",
        )
        for subject in report.measured
        for power in subject.passes.get("power", ())
    )
    return Table(
        title="Power, in a pass of its own",
        header=("engine", "rail", "idle, W", "busy, W", "mJ a request", "requests a second"),
        rows=rows,
        notes=("energy of a request: (busy - idle) / throughput, of this rail alone",),
    )


def _memory_table(report: Report) -> Table:
    rows, failed = [], []
    for subject in report.measured:
        memory = subject.passes.get("memory")
        if memory is None:
            continue
        if "error" in memory:
            failed.append(f"{subject.name} was not measured: {memory['error']}")
        rows.append((subject.name, *_memory_cells(memory)))
    return Table(
        title="Memory of a process that runs only this engine",
        header=("engine", "host peak, MiB", "of it after start, MiB", "device, MiB"),
        rows=tuple(rows),
        notes=(
            "host: resident memory; before the engine is opened Python and its packages are loaded",
            "device: what the engine adds to the used memory of a discrete GPU (NVML)",
            *failed,
        ),
    )


def _memory_cells(memory: Mapping[str, Any]) -> list[str]:
    peak, before = memory.get("host_peak_bytes"), memory.get("host_before_bytes")
    after_start = None if peak is None or before is None else peak - before
    found = (peak, after_start, memory.get("device_bytes"))
    return [_MISSING if size is None else f"{size / _MIB:.1f}" for size in found]


def milliseconds(nanoseconds: float) -> str:
    """Return a time in milliseconds with four significant digits or more."""
    value = nanoseconds / 1e6
    if value < 0.1:
        return f"{value:.5f}"
    if value < 10:
        return f"{value:.3f}"
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


def chance_words(chance: float | None) -> str:
    """Say a chance: three decimals, or that it is below them."""
    if chance is None:
        return _MISSING
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
