"""Plots of a report beside its distributions: latency over time, stages, the roofline, accuracy against latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from itertools import pairwise

from bench.bootstrap import block_medians, sample_median
from bench.machine_state import throttled_between
from bench.pass_tables import Roof
from bench.report import Report
from bench.statistics import stage_medians
from bench.table import milliseconds
from edge_dsc.page.drawing import (
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    LogAxis,
    dash_attribute,
    draw_svg,
    grid_lines,
    key_list,
    series_class,
    shortened,
    side_labels,
    tick_labels,
)

_HEIGHT, _BAR, _ROW = 200, 18, 46
_BOTTOM = TOP + _HEIGHT
_END = WIDTH - RIGHT


def time_plot(report: Report) -> str:
    """Draw the median of each block over the time of the run; stretches in which the machine throttled are shaded."""
    subjects = [subject for subject in report.measured if len(subject.blocks) > 1]
    if not subjects:
        return ""
    series = {
        subject.name: [
            (block.start_ns / 1e9, median / 1e6)
            for block, median in zip(subject.blocks, block_medians(subject).values(), strict=True)
        ]
        for subject in subjects
    }
    values = [value for points in series.values() for _, value in points]
    last = max(time for points in series.values() for time, _ in points) or 1.0
    axis = LogAxis(min(values) / 1.05, max(values) * 1.05, left=_BOTTOM, end=TOP)

    def across(seconds: float) -> float:
        return LEFT + min(1.0, max(0.0, seconds / last)) * (_END - LEFT)

    parts = [_throttled(report, across), side_labels(axis)]
    for index, points in enumerate(series.values()):
        line = " ".join(f"{across(time):.1f},{axis.place(value):.1f}" for time, value in points)
        parts.append(
            f'<polyline class="series {series_class(index)}"{dash_attribute(index)} points="{line}"/>'
        )
    for share in (0.0, 0.5, 1.0):
        anchor = ("start", "middle", "end")[int(share * 2)]
        parts.append(
            f'<text x="{across(share * last):.1f}" y="{_BOTTOM + 17}" text-anchor="{anchor}">'
            f"{share * last:.3g} s</text>"
        )
    return key_list(list(series)) + draw_svg(parts, _BOTTOM + 24, "Median of each block in ms over the run")


def stage_plot(report: Report) -> str:
    """Draw the stages of a request as one bar an engine, on a common scale."""
    found = {subject.name: stage_medians(subject) for subject in report.measured}
    found = {name: medians for name, medians in found.items() if sum(medians.values()) > 0}
    if not found:
        return ""
    stages = list(dict.fromkeys(stage for medians in found.values() for stage in medians))
    longest = max(sum(medians.values()) for medians in found.values())
    parts = []
    for row, (name, medians) in enumerate(found.items()):
        x, y = 0.0, TOP + row * _ROW
        total = milliseconds(sum(medians.values()))
        parts.append(f'<text class="name" x="0" y="{y + 12}">{escape(shortened(name))}</text>')
        parts.append(f'<text class="value" x="{WIDTH}" y="{y + 12}" text-anchor="end">{total} ms</text>')
        for stage, value in medians.items():
            width = value / longest * WIDTH
            parts.append(
                f'<rect class="fill {series_class(stages.index(stage))}" x="{x:.1f}" y="{y + 19}" '
                f'width="{max(0.0, width - 1):.1f}" height="{_BAR}"/>'
            )
            x += width
    label = "Stages of a request: " + ", ".join(stages)
    return key_list(stages) + draw_svg(parts, TOP + len(found) * _ROW, label)


def roofline_plot(report: Report) -> str:
    """Draw each engine below the machine's roof: rate of multiply-adds over multiply-adds a byte, both logarithmic."""
    limits = {
        subject.name: (subject.passes["limits"], sample_median(subject))
        for subject in report.measured
        if subject.passes.get("limits")
    }
    if not limits:
        return ""
    peak, stream = (next(iter(limits.values()))[0][key] for key in ("multiply_adds_per_s", "bytes_per_s"))
    points = {
        name: (Roof.of(found).intensity, found["multiply_adds"] / median)
        for name, (found, median) in limits.items()
    }
    ridge = peak / stream
    reach = [ridge, *(intensity for intensity, _ in points.values())]
    across = LogAxis(min(reach) / 3, max(reach) * 3)
    rates = [min(across.low * stream, peak) / 1e9, *(rate for _, rate in points.values())]
    up = LogAxis(min(rates) / 1.5, max(*rates, peak / 1e9) * 1.5, left=_BOTTOM, end=TOP)
    roof = " ".join(
        f"{across.place(at):.1f},{up.place(min(at * stream, peak) / 1e9):.1f}"
        for at in (across.low, ridge, across.high)
    )
    parts = [side_labels(up), grid_lines(across, TOP, _BOTTOM), tick_labels(across, _BOTTOM)]
    parts.append(f'<polyline class="series roof" points="{roof}"/>')
    return _scatter(parts, points, across, up, "multiply-adds a byte; upwards: G multiply-adds a second")


def accuracy_plot(report: Report, accuracies: Mapping[str, float]) -> str:
    """Draw the accuracy of engines, percent, over their median latency, ms: up and to the left is better."""
    points = {
        subject.name: (sample_median(subject) / 1e6, accuracies[subject.name] * 100)
        for subject in report.measured
        if accuracies.get(subject.name)
    }
    if not points:
        return ""
    times = [time for time, _ in points.values()]
    shares = [share for _, share in points.values()]
    across = LogAxis(min(times) / 1.3, max(times) * 1.3)
    up = LogAxis(min(shares) / 1.02, max(shares) * 1.02, left=_BOTTOM, end=TOP)
    parts = [side_labels(up), grid_lines(across, TOP, _BOTTOM), tick_labels(across, _BOTTOM)]
    return _scatter(parts, points, across, up, "median latency, ms; upwards: accuracy, %")


def _scatter(
    parts: list[str], points: Mapping[str, tuple[float, float]], across: LogAxis, up: LogAxis, words: str
) -> str:
    for index, (x, y) in enumerate(points.values()):
        left, top = across.place(x), up.place(y)
        parts.append(f'<circle class="dot {series_class(index)}" cx="{left:.1f}" cy="{top:.1f}" r="5"/>')
        below = 4 + (-9, 9)[index % 2]  # two engines of one kind often lie close
        parts.append(f'<text class="value" x="{left + 8:.1f}" y="{top + below:.1f}">{index + 1}</text>')
    middle = (LEFT + _END) / 2
    parts.append(f'<text x="{middle}" y="{_BOTTOM + 38}" text-anchor="middle">{words}</text>')
    return _numbered(points) + draw_svg(parts, _BOTTOM + 46, words)


def _numbered(points: Mapping[str, tuple[float, float]]) -> str:
    items = "".join(f"<li>{number} {escape(name)}</li>" for number, name in enumerate(points, start=1))
    return f'<ul class="legend">{items}</ul>'


def _throttled(report: Report, place: Callable[[float], float]) -> str:
    bands = []
    for before, after in pairwise(report.states):
        if throttled_between(before, after):
            left, right = place(before["at_ns"] / 1e9), place(after["at_ns"] / 1e9)
            bands.append(
                f'<rect class="throttled" x="{left:.1f}" y="{TOP}" width="{max(1.0, right - left):.1f}" '
                f'height="{_HEIGHT}"/>'
            )
    return "".join(bands)
