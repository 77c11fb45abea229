"""What our plots are made of: axes, ticks, series colours, and the SVG around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

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
