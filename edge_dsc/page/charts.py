"""Plots of latency reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

from bench.compare import Ratio
from bench.machine import throttled_between
from bench.report import Report
from bench.statistics import block_medians, sample_median, stage_medians
from bench.tables import Roof, milliseconds, verdict_words

if TYPE_CHECKING:
    from bench.report import SubjectReport


WIDTH, LEFT, RIGHT, TOP = 460, 54, 12, 10  # of a drawing, in its own units
_COLOURS = 6
_DASHES = ("", "7 4", "2 4", "10 4 2 4")


class LogAxis:
    """A logarithmic axis.

    Attributes:
        low: Value at its start.
        high: Value at its end.
    """

    def __init__(self, low: float, high: float, *, left: float = LEFT, end: float = WIDTH - RIGHT) -> None:
        """Lay ``low`` to ``high`` between two places of the drawing; a vertical axis ends above its start."""
        low = max(low, 1e-6)
        if high < low * 1.02:  # a single value still needs a width
            low, high = low / 1.01, max(high, low) * 1.01
        self.low, self.high, self.left = low, high, left
        self._scale = (end - left) / math.log(high / low)

    def place(self, value: float) -> float:
        """Return where a value lies, in the drawing's units."""
        return self.left + math.log(max(value, self.low) / self.low) * self._scale

    def ticks(self) -> list[float]:
        """Return three to nine round values: 1-2-5 of each decade, or even steps where the range is short."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for digits in ((1,), (1, 2, 5)):
            found = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) >= 4:
                return found
        width = self.high - self.low
        step = 10.0 ** math.floor(math.log10(width))
        step *= next(factor for factor in (0.1, 0.2, 0.5, 1, 2) if width / (step * factor) <= 6.5)
        start = math.ceil(self.low / step)
        return [index * step for index in range(start, math.floor(self.high / step) + 1)]


def grid_lines(axis: LogAxis, top: float, bottom: float) -> str:
    """Draw a vertical line at each tick."""
    places = (axis.place(value) for value in axis.ticks())
    return "".join(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>' for x in places)


def tick_labels(axis: LogAxis, bottom: float) -> str:
    """Write the ticks' values below a horizontal axis, as many as have room."""
    labels = []
    last = -math.inf
    for value in axis.ticks():
        x = axis.place(value)
        if x - last > 34:  # room for one label
            labels.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{value:.6g}</text>')
            last = x
    return "".join(labels)


def draw_svg(parts: Sequence[str], height: float, label: str) -> str:
    """Return an inline picture; ``label`` says in words what it shows."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def series_class(index: int) -> str:
    """Name the style of a series' colour."""
    return f"c{index % _COLOURS}"


def dash_attribute(index: int) -> str:
    """Return the dash that tells a series apart without its colour."""
    dash = _DASHES[(index + index // _COLOURS) % len(_DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def shortened(name: str) -> str:
    """Cut a long name in its middle."""
    return name if len(name) <= 30 else f"{name[:15]}…{name[-14:]}"


def side_labels(axis: LogAxis) -> str:
    """Write the ticks' values left of a vertical axis, each with a line across the drawing."""
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis.place(value):.1f}" '
        f'y2="{axis.place(value):.1f}"/>'
        f'<text x="{LEFT - 7}" y="{axis.place(value) + 4:.1f}" text-anchor="end">{value:.6g}</text>'
        for value in axis.ticks()
    )


def key_list(names: Sequence[str]) -> str:
    """Return the legend of some series as a list."""
    items = []
    for index, name in enumerate(names):
        line = f'<line class="series {series_class(index)}"{dash_attribute(index)} x1="0" x2="30" y1="5" y2="5"/>'
        items.append(f'<li><svg viewBox="0 0 30 10" aria-hidden="true">{line}</svg>{escape(name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


_CURVE_HEIGHT, _PLOT_ROW, _STRIP = 220, 50, 20
_STEPS = 200  # points of a curve; extremes are always among them


def distribution_plot(report: Report) -> str:
    """Draw the share of calls answered within a time, one curve a subject: an ECDF on a logarithmic axis.

    Nothing is clipped: the slowest call is where a curve ends.
    """
    subjects = report.measured
    if not subjects:
        return ""
    curves = [_ecdf(subject) for subject in subjects]
    low = min(curve[0][0] for curve in curves)
    high = max(curve[-1][0] for curve in curves)
    axis = LogAxis(low, high)
    bottom = TOP + _CURVE_HEIGHT
    parts = [grid_lines(axis, TOP, bottom), tick_labels(axis, bottom)]
    for share in (0, 25, 50, 75, 100):
        y = bottom - share / 100 * _CURVE_HEIGHT
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{share} %</text>')
    for index, curve in enumerate(curves):
        points = " ".join(
            f"{axis.place(value):.1f},{bottom - share * _CURVE_HEIGHT:.1f}" for value, share in curve
        )
        parts.append(
            f'<polyline class="series {series_class(index)}"{dash_attribute(index)} points="{points}"/>'
        )
    label = "Share of calls answered within a time, for " + ", ".join(subject.name for subject in subjects)
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{bottom + 38}" text-anchor="middle">latency, ms (logarithmic)</text>'
    )
    return _legend(subjects) + draw_svg(parts, bottom + 46, label)


def ratio_plot(ratios: Sequence[Ratio]) -> str:
    """Draw each ratio as a dot with its interval on a logarithmic axis; the band is the margin around 1."""
    if not ratios:
        return ""
    margin = max(ratio.margin for ratio in ratios)
    low = min(1 / (1 + margin), *(ratio.ratio.low for ratio in ratios))
    high = max(1 + margin, *(ratio.ratio.high for ratio in ratios))
    axis = LogAxis(low / 1.05, high * 1.05, left=RIGHT)
    bottom = TOP + _PLOT_ROW * len(ratios)
    parts = [tick_labels(axis, bottom)]
    parts += [_ratio_row(ratio, axis, TOP + _PLOT_ROW * index) for index, ratio in enumerate(ratios)]
    middle = WIDTH / 2
    words = "latency ratio (logarithmic); below 1 is faster"
    parts.append(f'<text x="{middle}" y="{bottom + 38}" text-anchor="middle">{words}</text>')
    label = "; ".join(
        f"{ratio.candidate} against {ratio.baseline}: {verdict_words(ratio)}" for ratio in ratios
    )
    return draw_svg(parts, bottom + 46, label)


def _ratio_row(ratio: Ratio, axis: LogAxis, top: float) -> str:
    """Draw name and numbers, and below them a strip with the margin as a band, the interval and the estimate."""
    y = top + _PLOT_ROW - _STRIP / 2
    low, value, high = (axis.place(end) for end in (ratio.ratio.low, ratio.ratio.value, ratio.ratio.high))
    left, one, right = (axis.place(end) for end in (1 / (1 + ratio.margin), 1, 1 + ratio.margin))
    numbers = f"{ratio.ratio.value:.3f} [{ratio.ratio.low:.3f}, {ratio.ratio.high:.3f}]"
    above, below = y - _STRIP / 2, y + _STRIP / 2
    caps = "".join(
        f'<line class="bar" x1="{end:.1f}" x2="{end:.1f}" y1="{y - 5}" y2="{y + 5}"/>' for end in (low, high)
    )
    return (
        f'<text class="name" x="0" y="{top + 20}">{escape(shortened(ratio.candidate))}</text>'
        f'<text class="value" x="{WIDTH}" y="{top + 20}" text-anchor="end">{numbers}</text>'
        f'<rect class="band" x="{left:.1f}" y="{above}" width="{right - left:.1f}" height="{_STRIP}"/>'
        f"{grid_lines(axis, above, below)}"
        f'<line class="axis" x1="{one:.1f}" x2="{one:.1f}" y1="{above}" y2="{below}"/>'
        f'<line class="bar" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>{caps}'
        f'<circle class="mark" cx="{value:.1f}" cy="{y}" r="3.5"/>'
    )


def _ecdf(subject: SubjectReport) -> list[tuple[float, float]]:
    """Return (latency in ms, share of calls) from the fastest call to the slowest."""
    ordered = subject.ordered_ns / 1e6
    last = len(ordered) - 1
    wanted = [*(step / _STEPS for step in range(_STEPS + 1)), 0.999, 0.9999]
    ranks = sorted({round(share * last) for share in wanted})
    return [(float(ordered[0]), 0.0), *((float(ordered[rank]), (rank + 1) / (last + 1)) for rank in ranks)]


def _legend(subjects: Sequence[SubjectReport]) -> str:
    items = []
    for index, subject in enumerate(subjects):
        median = sample_median(subject)
        line = f'<line class="series {series_class(index)}"{dash_attribute(index)} x1="0" x2="30" y1="5" y2="5"/>'
        swatch = f'<svg viewBox="0 0 30 10" aria-hidden="true">{line}</svg>'
        items.append(f"<li>{swatch}{escape(subject.name)}, median {milliseconds(median)} ms</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


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
