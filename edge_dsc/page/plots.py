"""Plots as inline SVG: the distribution of latencies, and ratios with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from bench.bootstrap import sample_median
from bench.compare import Ratio
from bench.report import Report
from bench.tables import milliseconds, verdict_words
from edge_dsc.page.drawing import (
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    LogAxis,
    dash_attribute,
    draw_svg,
    grid_lines,
    series_class,
    shortened,
    tick_labels,
)

if TYPE_CHECKING:
    from bench.report import SubjectReport

_CURVE_HEIGHT, _ROW, _STRIP = 220, 50, 20
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
    bottom = TOP + _ROW * len(ratios)
    parts = [tick_labels(axis, bottom)]
    parts += [_ratio_row(ratio, axis, TOP + _ROW * index) for index, ratio in enumerate(ratios)]
    middle = WIDTH / 2
    words = "latency ratio (logarithmic); below 1 is faster"
    parts.append(f'<text x="{middle}" y="{bottom + 38}" text-anchor="middle">{words}</text>')
    label = "; ".join(
        f"{ratio.candidate} against {ratio.baseline}: {verdict_words(ratio)}" for ratio in ratios
    )
    return draw_svg(parts, bottom + 46, label)


def _ratio_row(ratio: Ratio, axis: LogAxis, top: float) -> str:
    """Draw name and numbers, and below them a strip with the margin as a band, the interval and the estimate."""
    y = top + _ROW - _STRIP / 2
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
