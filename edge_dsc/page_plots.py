"""Plots as inline SVG: the distribution of latencies, and ratios with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from bench.compare import Ratio
from bench.report import Report
from bench.tables import milliseconds, verdict_words
from engines.packages import load

if TYPE_CHECKING:
    from bench.report import SubjectReport

_WIDTH, _LEFT, _RIGHT, _TOP = 460, 54, 12, 10
_CURVE_HEIGHT, _ROW, _STRIP = 220, 50, 20
_STEPS = 200  # points of a curve; extremes are always among them
_COLOURS = 6
_DASHES = ("", "7 4", "2 4", "10 4 2 4")


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
    axis = _Axis(low, high)
    bottom = _TOP + _CURVE_HEIGHT
    parts = [_grid(axis, _TOP, bottom), _tick_labels(axis, bottom)]
    for share in (0, 25, 50, 75, 100):
        y = bottom - share / 100 * _CURVE_HEIGHT
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{share} %</text>')
    for index, curve in enumerate(curves):
        points = " ".join(
            f"{axis.place(value):.1f},{bottom - share * _CURVE_HEIGHT:.1f}" for value, share in curve
        )
        parts.append(f'<polyline class="series {_series(index)}"{_dash(index)} points="{points}"/>')
    label = "Share of calls answered within a time, for " + ", ".join(subject.name for subject in subjects)
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{bottom + 38}" text-anchor="middle">latency, ms (logarithmic)</text>'
    )
    return _legend(subjects) + _svg(parts, bottom + 46, label)


def ratio_plot(ratios: Sequence[Ratio]) -> str:
    """Draw each ratio as a dot with its interval on a logarithmic axis; the band is the margin around 1."""
    if not ratios:
        return ""
    margin = max(ratio.margin for ratio in ratios)
    low = min(1 / (1 + margin), *(ratio.ratio.low for ratio in ratios))
    high = max(1 + margin, *(ratio.ratio.high for ratio in ratios))
    axis = _Axis(low / 1.05, high * 1.05, left=_RIGHT)
    bottom = _TOP + _ROW * len(ratios)
    parts = [_tick_labels(axis, bottom)]
    parts += [_ratio_row(ratio, axis, _TOP + _ROW * index) for index, ratio in enumerate(ratios)]
    middle = _WIDTH / 2
    words = "latency ratio (logarithmic); below 1 is faster"
    parts.append(f'<text x="{middle}" y="{bottom + 38}" text-anchor="middle">{words}</text>')
    label = "; ".join(
        f"{ratio.candidate} against {ratio.baseline}: {verdict_words(ratio)}" for ratio in ratios
    )
    return _svg(parts, bottom + 46, label)


class _Axis:
    """A logarithmic x axis."""

    def __init__(self, low: float, high: float, *, left: float = _LEFT) -> None:
        low = max(low, 1e-6)
        if high < low * 1.02:  # a single value still needs a width
            low, high = low / 1.01, max(high, low) * 1.01
        self.low, self.high, self.left = low, high, left
        self._scale = (_WIDTH - _RIGHT - left) / math.log(high / low)

    def place(self, value: float) -> float:
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


def _grid(axis: _Axis, top: float, bottom: float) -> str:
    places = (axis.place(value) for value in axis.ticks())
    return "".join(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>' for x in places)


def _tick_labels(axis: _Axis, bottom: float) -> str:
    labels = []
    last = -math.inf
    for value in axis.ticks():
        x = axis.place(value)
        if x - last > 34:  # room for one label
            labels.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{value:.6g}</text>')
            last = x
    return "".join(labels)


def _ratio_row(ratio: Ratio, axis: _Axis, top: float) -> str:
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
        f'<text class="name" x="0" y="{top + 20}">{escape(_shortened(ratio.candidate))}</text>'
        f'<text class="value" x="{_WIDTH}" y="{top + 20}" text-anchor="end">{numbers}</text>'
        f'<rect class="band" x="{left:.1f}" y="{above}" width="{right - left:.1f}" height="{_STRIP}"/>'
        f"{_grid(axis, above, below)}"
        f'<line class="axis" x1="{one:.1f}" x2="{one:.1f}" y1="{above}" y2="{below}"/>'
        f'<line class="bar" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>{caps}'
        f'<circle class="mark" cx="{value:.1f}" cy="{y}" r="3.5"/>'
    )


def _ecdf(subject: SubjectReport) -> list[tuple[float, float]]:
    """Return (latency in ms, share of calls) from the fastest call to the slowest."""
    np = load("numpy")
    ordered = np.sort(np.frombuffer(subject.samples_ns, dtype=np.int64)) / 1e6
    last = len(ordered) - 1
    wanted = [*(step / _STEPS for step in range(_STEPS + 1)), 0.999, 0.9999]
    ranks = sorted({round(share * last) for share in wanted})
    return [(float(ordered[0]), 0.0), *((float(ordered[rank]), (rank + 1) / (last + 1)) for rank in ranks)]


def _legend(subjects: Sequence[SubjectReport]) -> str:
    np = load("numpy")
    items = []
    for index, subject in enumerate(subjects):
        median = float(np.median(np.frombuffer(subject.samples_ns, dtype=np.int64)))
        line = f'<line class="series {_series(index)}"{_dash(index)} x1="0" x2="30" y1="5" y2="5"/>'
        swatch = f'<svg viewBox="0 0 30 10" aria-hidden="true">{line}</svg>'
        items.append(f"<li>{swatch}{escape(subject.name)}, median {milliseconds(median)} ms</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _series(index: int) -> str:
    return f"c{index % _COLOURS}"


def _dash(index: int) -> str:
    dash = _DASHES[(index + index // _COLOURS) % len(_DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _shortened(name: str) -> str:
    return name if len(name) <= 30 else f"{name[:15]}…{name[-14:]}"
