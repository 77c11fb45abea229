"""Plots of latency reports and of accuracy: matplotlib figures that become inline SVG in the colours of the page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree

from bench.compare import Ratio
from bench.machine import throttled_between
from bench.report import Report, SubjectReport
from bench.statistics import block_medians, sample_median, stage_medians
from bench.tables import Roof, milliseconds, verdict_words
from edge_dsc.page.figures import drawing_style
from engines.packages import load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Lengths are in units of the drawing. A figure has 72 of them per inch, so that matplotlib's points are units too.
_WIDTH = 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 26, 44
_PLOT_HEIGHT, _ROW = 200, 46

# A figure is drawn in colours that stand for variables of the page's style sheet and for nothing else; when it becomes
# SVG each is replaced by its variable, and the plot follows the light and the dark scheme and the printer.
_SERIES = ("s0", "s1", "s2", "s3", "s4", "s5")
_COLOUR = {
    name: f"#ed00{number:02x}"
    for number, name in enumerate(("paper", "ink", "soft", "line", "band", *_SERIES))
}
_VARIABLE = {colour: f"var(--{name})" for name, colour in _COLOUR.items()}
_DASHES = ((), (7, 4), (2, 4), (10, 4, 2, 4))

_STYLE = {
    "font.size": 12,
    "text.color": _COLOUR["ink"],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _COLOUR["line"],
    "axes.linewidth": 1,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelcolor": _COLOUR["soft"],
    "axes.labelpad": 6,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    "grid.color": _COLOUR["line"],
    "grid.linewidth": 1,
    "lines.linewidth": 2,
    "lines.scale_dashes": False,
    **{f"{axis}tick.{key}": value for axis in "xy" for key, value in (("major.size", 0), ("major.pad", 7))},
    **{f"{axis}tick.labelcolor": _COLOUR["soft"] for axis in "xy"},
    "path.simplify": False,  # curves are thinned here, where the extremes are kept
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "edge-dsc",  # ids are the same each time
}
_POINTS = 200  # of a distribution curve; the fastest and the slowest call are always among them
_SHORTEST_MS = 1e-6  # a logarithmic axis cannot show a zero


@dataclass(frozen=True)
class Key:
    """An entry of a plot's legend.

    Attributes:
        text: What the line or bar stands for.
        style: CSS of a line that looks like it.
    """

    text: str
    style: str


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot of a page.

    Attributes:
        figure: The plot. Lines, marks and bars of the data have the ids ``data-0``, ``data-1``, and so on.
        label: What it shows, in words, for readers who do not see it.
        caption: A line below it.
        legend: A list above it.
    """

    figure: Figure
    label: str
    caption: str
    legend: tuple[Key, ...] = ()

    @drawing_style(_STYLE)
    def svg(self, prefix: str) -> str:
        """Return the plot as an ``svg`` element for an HTML page.

        Args:
            prefix: Put before every id; no other plot of the page may have it.
        """
        written = io.StringIO()
        with warnings.catch_warnings():  # the browser has glyphs that matplotlib's font lacks
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            self.figure.savefig(written, format="svg", metadata={"Date": None})
        return _inline(written.getvalue(), prefix, self.label)


@drawing_style(_STYLE)
def distribution_plot(report: Report) -> Plot | None:
    """Draw the share of calls answered within a time, one curve per subject: an ECDF on a logarithmic axis.

    Nothing is clipped: the slowest call is where a curve ends.
    """
    subjects = report.measured
    if not subjects:
        return None
    curves = [_ecdf(subject) for subject in subjects]
    figure, axes = _new_axes("calls answered")
    _log_scale(axes, "x", [times[end] for times, _ in curves for end in (0, -1)])
    axes.set_xlabel("latency, ms (logarithmic)")
    axes.set(
        ylim=(0, 100), yticks=range(0, 101, 25), yticklabels=[f"{share} %" for share in range(0, 101, 25)]
    )
    for index, curve in enumerate(curves):
        _draw_line(axes, index, *curve)
    return Plot(
        figure=figure,
        label="Share of calls answered within a time, for " + ", ".join(subject.name for subject in subjects),
        caption="Share of calls answered within a time.",
        legend=_line_keys(
            [f"{subject.name}, median {milliseconds(sample_median(subject))} ms" for subject in subjects]
        ),
    )


@drawing_style(_STYLE)
def ratio_plot(ratios: Sequence[Ratio]) -> Plot | None:
    """Draw each ratio as a dot with its interval on a logarithmic axis; the band is the margin around 1."""
    if not ratios:
        return None
    figure, axes = _new_rows(
        [
            (ratio.candidate, f"{ratio.ratio.value:.3f} [{ratio.ratio.low:.3f}, {ratio.ratio.high:.3f}]")
            for ratio in ratios
        ],
        side=_RIGHT,
        bottom=_BOTTOM,
    )
    margin = max(ratio.margin for ratio in ratios)
    ends = [end for ratio in ratios for end in (ratio.ratio.low, ratio.ratio.high)]
    _log_scale(axes, "x", [*ends, 1 / (1 + margin), 1 + margin], beyond=1.05)
    axes.set_xlabel("latency ratio (logarithmic); below 1 is faster")
    axes.grid(visible=False)
    for row, ratio in enumerate(ratios):
        found, least = ratio.ratio, 1 / (1 + ratio.margin)
        axes.barh(row, 1 + ratio.margin - least, 0.4, least, color=_COLOUR["band"])
        axes.vlines(axes.get_xticks(), row - 0.2, row + 0.2, color=_COLOUR["line"], linewidth=1)
        axes.vlines(1, row - 0.2, row + 0.2, color=_COLOUR["soft"], linewidth=1)
        axes.plot([found.low, found.high], [row, row], "|-", color=_COLOUR["s0"], markersize=10, mew=2)
        axes.plot([found.value], [row], "o", color=_COLOUR["s0"], markersize=7, gid=f"data-{row}")
    words = (f"{ratio.candidate} against {ratio.baseline}: {verdict_words(ratio)}" for ratio in ratios)
    return Plot(
        figure=figure,
        label="; ".join(words),
        caption="Ratio of the medians with its 95 % interval; a difference within the grey band is too small to count.",
    )


@drawing_style(_STYLE)
def difference_plot(differences: Mapping[str, tuple[float, float, float]], *, margin: float) -> Plot | None:
    """Draw differences of accuracy as dots with their intervals; the band is what may be lost.

    Args:
        differences: By name: the difference, and the lower and upper end of its interval, percentage points.
        margin: What may be lost, percentage points.
    """
    if not differences:
        return None
    texts = [
        (name, f"{value:+.2f} [{low:+.2f}, {high:+.2f}]") for name, (value, low, high) in differences.items()
    ]
    figure, axes = _new_rows(texts, side=_RIGHT, bottom=_BOTTOM)
    ends = [-margin, 0.0, *(end for _, low, high in differences.values() for end in (low, high))]
    room = (max(ends) - min(ends)) * 0.04
    axes.set_xlim(min(ends) - room, max(ends) + room)
    axes.set_xlabel("difference of accuracy, percentage points; above 0 is better")
    axes.grid(visible=False)
    for row, (value, low, high) in enumerate(differences.values()):
        axes.barh(row, margin, 0.4, -margin, color=_COLOUR["band"])
        axes.vlines(0, row - 0.2, row + 0.2, color=_COLOUR["soft"], linewidth=1)
        axes.plot([low, high], [row, row], "|-", color=_COLOUR["s0"], markersize=10, mew=2)
        axes.plot([value], [row], "o", color=_COLOUR["s0"], markersize=7, gid=f"data-{row}")
    return Plot(
        figure=figure,
        label="; ".join(f"{name}: {text}" for name, text in texts),
        caption=f"Differences with their 95 % intervals; the grey band is the margin of {margin:g} points.",
    )


@drawing_style(_STYLE)
def stage_plot(report: Report) -> Plot | None:
    """Draw the stages of a request as one bar per engine, on a common scale."""
    found = {subject.name: stage_medians(subject) for subject in report.measured}
    found = {name: medians for name, medians in found.items() if sum(medians.values()) > 0}
    if not found:
        return None
    stages = list(dict.fromkeys(stage for medians in found.values() for stage in medians))
    totals = [sum(medians.values()) for medians in found.values()]
    figure, axes = _new_rows(
        [(name, f"{milliseconds(total)} ms") for name, total in zip(found, totals, strict=True)],
        side=0,
        bottom=0,
    )
    axes.set(xlim=(0, max(totals)), xticks=[])
    for row, medians in enumerate(found.values()):
        start = 0.0
        for stage, value in medians.items():
            index = stages.index(stage)
            bars = axes.barh(row, value, 0.4, start, color=_COLOUR[_series(index)])
            bars[0].set(edgecolor=_COLOUR["paper"], linewidth=0.5, gid=f"data-{row}-{index}")
            start += value
    return Plot(
        figure=figure,
        label="Stages of a request: " + ", ".join(stages),
        caption="Stages of a request, one bar per engine.",
        legend=tuple(
            Key(stage, f"stroke: var(--{_series(index)}); stroke-width: 10")
            for index, stage in enumerate(stages)
        ),
    )


@drawing_style(_STYLE)
def time_plot(report: Report) -> Plot | None:
    """Draw the median of each block over the time of the run; stretches in which the machine throttled are shaded."""
    subjects = [subject for subject in report.measured if len(subject.blocks) > 1]
    if not subjects:
        return None
    starts = [[block.start_ns / 1e9 for block in subject.blocks] for subject in subjects]
    medians = [[_shown_ms(median) for median in block_medians(subject).values()] for subject in subjects]
    last = max(max(times) for times in starts) or 1.0
    figure, axes = _new_axes("median of a block, ms (logarithmic)")
    axes.set(xlim=(0, last), xlabel="time since the start, s")
    _log_scale(axes, "y", [median for line in medians for median in line], beyond=1.05)
    throttled = [
        (before["at_ns"] / 1e9, after["at_ns"] / 1e9)
        for before, after in pairwise(report.states)
        if throttled_between(before, after)
    ]
    thinnest = last / (_WIDTH - _LEFT - _RIGHT)  # a moment is one unit wide
    for number, (start, end) in enumerate(throttled):
        end = min(max(end, start + thinnest), last)
        axes.axvspan(
            max(start, 0), end, color=_COLOUR["s1"], alpha=0.25, linewidth=0, gid=f"throttled-{number}"
        )
    for index, (times, line) in enumerate(zip(starts, medians, strict=True)):
        _draw_line(axes, index, times, line)
    return Plot(
        figure=figure,
        label="Median of each block in ms over the run",
        caption="Median of each block over the run"
        + ("; shaded: the machine throttled." if throttled else "."),
        legend=_line_keys([subject.name for subject in subjects]),
    )


@drawing_style(_STYLE)
def roofline_plot(report: Report) -> Plot | None:
    """Draw each engine below the machine's roof: multiply-adds per second over multiply-adds per byte, logarithmic."""
    limits = {
        subject.name: (subject.passes["limits"], sample_median(subject))
        for subject in report.measured
        if subject.passes.get("limits")
    }
    if not limits:
        return None
    first = next(iter(limits.values()))[0]
    peak, stream = first["multiply_adds_per_s"] / 1e9, first["bytes_per_s"] / 1e9
    points = {
        name: (Roof.of(found).intensity, found["multiply_adds"] / median)
        for name, (found, median) in limits.items()
    }
    ridge = peak / stream
    figure, axes = _new_axes("G multiply-adds per second")
    axes.set_xlabel("multiply-adds per byte moved")
    low, high = _log_scale(axes, "x", [ridge, *(intensity for intensity, _ in points.values())], beyond=3)
    start = min(low * stream, peak)
    _log_scale(axes, "y", [start, peak, *(rate for _, rate in points.values())], beyond=1.5)
    axes.plot([low, ridge, high], [start, peak, peak], color=_COLOUR["soft"], gid="roof")
    for place, words, below in (
        ((ridge, peak), f"{peak:.3g} G multiply-adds/s", False),
        ((low, start), f"{stream:.3g} GB/s", True),
    ):
        axes.annotate(
            words,
            place,
            (4, -6) if below else (0, 5),
            textcoords="offset points",
            va="top" if below else "bottom",
            color=_COLOUR["soft"],
            zorder=1,
        )
    _draw_points(axes, [*points.values()])
    return Plot(
        figure=figure,
        label="Rate of multiply-adds over multiply-adds per byte moved, for " + ", ".join(points),
        caption="Each engine below the roof that was measured on this machine.",
        legend=_point_keys(points),
    )


@drawing_style(_STYLE)
def accuracy_plot(report: Report, accuracies: Mapping[str, float]) -> Plot | None:
    """Draw the accuracy of engines, percent, over their median latency, ms: up and to the left is better."""
    points = {
        subject.name: (_shown_ms(sample_median(subject)), accuracies[subject.name] * 100)
        for subject in report.measured
        if subject.name in accuracies
    }
    if not points:
        return None
    figure, axes = _new_axes("accuracy, %")
    _log_scale(axes, "x", [time for time, _ in points.values()], beyond=1.3)
    axes.set_xlabel("median latency, ms (logarithmic)")
    shares = [share for _, share in points.values()]
    beyond = max(0.5, (max(shares) - min(shares)) / 5)
    axes.set_ylim(min(shares) - beyond, max(shares) + beyond)
    _draw_points(axes, [*points.values()])
    return Plot(
        figure=figure,
        label="Accuracy in percent over median latency in ms, for " + ", ".join(points),
        caption="Up and to the left is better.",
        legend=_point_keys(points),
    )


@drawing_style(_STYLE)
def roc_plot(curves: Mapping[str, Sequence[tuple[float, float, float, float]]]) -> Plot:
    """Draw ROC curves with their intervals: sensitivity over the share of false alarms.

    Args:
        curves: By name, points (share of false alarms, sensitivity, lower and upper end of its interval).
    """
    figure, axes = _new_axes("sensitivity, %")
    _percent_axes(axes, "false alarms (1 - specificity), %")
    axes.plot([0, 100], [0, 100], color=_COLOUR["line"], linewidth=1)
    for index, points in enumerate(curves.values()):
        x, y, low, high = ([100 * value for value in column] for column in zip(*points, strict=True))
        axes.fill_between(x, low, high, color=_COLOUR[_series(index)], alpha=0.15, linewidth=0)
        _draw_line(axes, index, x, y)
    return Plot(
        figure=figure,
        label="ROC curves of " + "; ".join(curves),
        caption="Each class against the rest; bands are 95 % intervals at each share of false alarms.",
        legend=_line_keys(list(curves)),
    )


@drawing_style(_STYLE)
def reliability_plot(bins: Sequence[tuple[float, float, float, float]], *, caption: str) -> Plot:
    """Draw how often answers are right over how sure they are.

    Args:
        bins: Points (mean confidence, accuracy, lower and upper end of its interval).
        caption: The temperature and the error.
    """
    figure, axes = _new_axes("right, %")
    _percent_axes(axes, "probability of the most probable class, %")
    axes.plot([0, 100], [0, 100], color=_COLOUR["line"], linewidth=1)
    for index, point in enumerate(bins):
        x, y, low, high = (100 * value for value in point)
        axes.plot([x, x], [low, high], "_-", color=_COLOUR["s0"], markersize=8, mew=2, clip_on=False)
        axes.plot([x], [y], "o", color=_COLOUR["s0"], markersize=7, gid=f"data-{index}", clip_on=False)
    return Plot(
        figure=figure,
        label="How often answers are right over how sure they are",
        caption=f"On the diagonal answers are right as often as they say; bars are 95 % intervals. {caption}.",
    )


def _percent_axes(axes: Axes, words: str) -> None:
    ticks = range(0, 101, 25)
    axes.set(xlim=(0, 100), ylim=(0, 100), xticks=ticks, yticks=ticks, xlabel=words)


def _ecdf(subject: SubjectReport) -> tuple[list[float], list[float]]:
    """Return latencies, ms, and the percentage of calls answered within each, from the fastest to the slowest."""
    ordered = subject.ordered_ns
    last = len(ordered) - 1
    wanted = [*(step / _POINTS for step in range(_POINTS + 1)), 0.999, 0.9999]
    ranks = sorted({round(share * last) for share in wanted})
    return [_shown_ms(float(ordered[rank])) for rank in (0, *ranks)], [
        0.0,
        *(100 * (rank + 1) / (last + 1) for rank in ranks),
    ]


def _shown_ms(nanoseconds: float) -> float:
    """Return a time in milliseconds for a logarithmic axis."""
    return max(nanoseconds / 1e6, _SHORTEST_MS)


def _new_axes(words: str) -> tuple[Figure, Axes]:
    """Return a figure with axes; ``words`` above them name the vertical one."""
    figure, axes = _new_figure(_PLOT_HEIGHT, left=_LEFT, right=_RIGHT, top=_TOP, bottom=_BOTTOM)
    figure.text(0, 1, words, va="top", color=_COLOUR["soft"])
    return figure, axes


def _new_rows(rows: Sequence[tuple[str, str]], *, side: float, bottom: float) -> tuple[Figure, Axes]:
    """Return a figure with a line of text per row, a name and a number, and room for bars below it at y = 0, 1, ..."""
    height = _ROW * len(rows)
    figure, axes = _new_figure(height, left=side, right=side, top=0, bottom=bottom)
    axes.set(ylim=(len(rows) - 0.7, -0.7), yticks=[])
    axes.spines["bottom"].set_visible(False)
    for row, (name, value) in enumerate(rows):
        y = 1 - (row * _ROW + 12) / (height + bottom)
        figure.text(0, y, _shortened(name), va="center", weight="bold")
        figure.text(1, y, value, va="center", ha="right")
    return figure, axes


def _new_figure(
    height: float, *, left: float, right: float, top: float, bottom: float
) -> tuple[Figure, Axes]:
    whole = top + height + bottom
    figure: Figure = load("matplotlib.figure").Figure(figsize=(_WIDTH / 72, whole / 72), dpi=72)
    axes = figure.add_axes((left / _WIDTH, bottom / whole, (_WIDTH - left - right) / _WIDTH, height / whole))
    return figure, axes


def _log_scale(
    axes: Axes, which: Literal["x", "y"], values: Sequence[float], *, beyond: float = 1.0
) -> tuple[float, float]:
    """Make an axis logarithmic, from the least value to the largest and by the factor ``beyond`` further.

    Returns:
        Both ends of the axis.
    """
    ticker = load("matplotlib.ticker")
    low, high = min(values) / beyond, max(values) * beyond
    if high < low * 1.02:  # a single value still needs a width
        low, high = low / 1.01, high * 1.01
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axes.minorticks_off()
    # Powers of ten, else so many numbers of each decade, else even steps: whatever first gives four ticks.
    decades = ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8))
    for locator in (*(ticker.LogLocator(subs=numbers) for numbers in decades), ticker.MaxNLocator(6)):
        ticks = [value for value in locator.tick_values(low, high) if low <= value <= high]
        if len(ticks) >= 4:
            break
    places = [axes.transData.transform((tick, tick))[0 if which == "x" else 1] for tick in ticks]
    labels, last, room = [], float("-inf"), 34 if which == "x" else 15
    for tick, place in zip(ticks, places, strict=True):
        fits = place - last >= room
        labels.append(f"{tick:.6g}" if fits else "")
        last = place if fits else last
    axes.set(**{f"{which}ticks": ticks, f"{which}ticklabels": labels})
    return low, high


def _series(index: int) -> str:
    """Return the name of a series' colour."""
    return _SERIES[index % len(_SERIES)]


def _dash(index: int) -> tuple[int, ...]:
    """Return the dash that tells a series apart without its colour."""
    return _DASHES[(index + index // len(_SERIES)) % len(_DASHES)]


def _draw_line(axes: Axes, index: int, x: Sequence[float], y: Sequence[float]) -> None:
    dash = _dash(index)
    axes.plot(
        x,
        y,
        color=_COLOUR[_series(index)],
        linestyle=(0, dash) if dash else "-",
        clip_on=False,
        gid=f"data-{index}",
    )


def _line_keys(texts: Sequence[str]) -> tuple[Key, ...]:
    return tuple(
        Key(
            text,
            f"stroke: var(--{_series(index)}); stroke-width: 2; "
            f"stroke-dasharray: {' '.join(map(str, _dash(index))) or 'none'}",
        )
        for index, text in enumerate(texts)
    )


def _draw_points(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Draw a dot per point with its number, from 1, beside it; neighbours have theirs at different corners."""
    corners = ((9, 9), (9, -9), (-9, -9), (-9, 9))
    for index, (x, y) in enumerate(points):
        axes.plot(
            [x], [y], "o", color=_COLOUR[_series(index)], markersize=10, mew=0, gid=f"data-{index}", zorder=3
        )
        place = corners[index % len(corners)]
        axes.annotate(
            str(index + 1), (x, y), place, textcoords="offset points", ha="center", va="center", zorder=4
        )


def _point_keys(names: Iterable[str]) -> tuple[Key, ...]:
    """Return a legend of numbered dots."""
    dot = "stroke-width: 10; stroke-linecap: round; stroke-dasharray: 0 30; stroke-dashoffset: -22"
    return tuple(
        Key(f"{index + 1} {name}", f"stroke: var(--{_series(index)}); {dot}")
        for index, name in enumerate(names)
    )


def _shortened(name: str) -> str:
    """Cut a long name in its middle."""
    shown = _printable(name)
    return shown if len(shown) <= 30 else f"{shown[:15]}…{shown[-14:]}"


def _printable(text: str) -> str:
    """Replace what XML cannot hold."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _inline(svg: str, prefix: str, label: str) -> str:
    """Turn an SVG file of matplotlib into an element of a page.

    Left out is what the page's style sheet says (fonts, line joins), what a page has no use for (metadata, ids that
    nothing refers to), and clipping: the axes of every plot include its data. Lengths are rounded to 0.01.
    """
    root = ElementTree.fromstring(svg)
    used = set(re.findall(r'href="#([^"]+)"', svg))
    for parent in root.iter():
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style", "clipPath"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text = (element.text or "").strip() or None
        element.tail = None
        attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        element.attrib.clear()
        for name, value in attributes.items():
            kept = _attribute(name, value, prefix, used)
            if kept:
                element.set(name, kept)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": _printable(label)}
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(name: str, value: str, prefix: str, used: set[str]) -> str:
    """Return the value of an attribute for the page; empty where it is not needed."""
    if name == "id":
        return (
            f"{prefix}-{value}" if value in used or value.startswith(("data-", "throttled-", "roof")) else ""
        )
    if name == "href":
        return f"#{prefix}-{value[1:]}"
    if name == "style":
        pairs = (part.split(":", 1) for part in value.split(";") if part.strip())
        return "; ".join(filter(None, (_declaration(key.strip(), text.strip()) for key, text in pairs)))
    if name == "clip-path" or value.startswith("rotate(-0"):
        return ""
    if name == "d" or name in ("x", "y"):
        return " ".join(re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", value).split())
    return value


def _declaration(name: str, value: str) -> str:
    if name == "font" and value.startswith(("700", "bold")):  # the short form of matplotlib before 3.10
        return "font-weight: 700"
    if name in ("font", "font-size", "font-family", "stroke-dashoffset"):
        return ""
    return f"{name}: {_VARIABLE.get(value, value)}"
