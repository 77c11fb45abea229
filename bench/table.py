"""A table of text, and times as text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text.

    Attributes:
        title: What it shows.
        header: Column names; the first column is text, the others are numbers where ``numeric``.
        rows: Cells, one tuple a row, as many as the header has.
        notes: Lines below it.
        numeric: Whether all columns but the first are set flush right.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    numeric: bool = True


def milliseconds(nanoseconds: float) -> str:
    """Return a time in milliseconds with four significant digits or more."""
    value = nanoseconds / 1e6
    if value < 0.1:
        return f"{value:.5f}"
    if value < 10:
        return f"{value:.3f}"
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"
