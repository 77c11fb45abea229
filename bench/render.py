"""Tables as plain text for a terminal and as Markdown. Returns text, prints nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.compare import Comparison
from bench.fleet import Fleet
from bench.fleet_tables import fleet_tables
from bench.report import Report
from bench.tables import DISCLAIMER, Table, comparison_table, report_tables


def render_report(report: Report, *, markdown: bool = False, baseline: str | None = None) -> str:
    """Return a report as text: latencies, ratios to the baseline (the first subject by default), the machine."""
    return _render(report_tables(report, baseline=baseline), markdown)


def render_comparison(comparison: Comparison | Fleet, *, markdown: bool = False) -> str:
    """Return the comparison of two reports, or of many, as text."""
    if isinstance(comparison, Fleet):
        return _render(fleet_tables(comparison), markdown)
    return _render([comparison_table(comparison)], markdown)


def render_text(table: Table) -> str:
    """Return a table with aligned columns, without colour codes."""
    rows = align_rows(table.header, table.rows, numeric=table.numeric)
    return "\n".join([table.title, "", rows, *(f"* {note}" for note in table.notes)])


def align_rows(header: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: bool = True) -> str:
    """Return a header, a rule and rows with aligned columns: the first flush left, numbers flush right."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rule = tuple("-" * width for width in widths)
    return "\n".join(_align(line, widths, numeric) for line in (lines[0], rule, *lines[1:]))


def render_markdown(table: Table) -> str:
    """Return a table in GitHub's Markdown; cells cannot break out of it."""
    mark = "---:" if table.numeric else "---"
    lines = [
        _markdown_row(table.header),
        "| --- |" + "".join(f" {mark} |" for _ in table.header[1:]),
        *(_markdown_row(row) for row in table.rows),
    ]
    notes = [f"- {_markdown_cell(note)}" for note in table.notes]
    return "\n".join([f"### {_markdown_cell(table.title)}", "", *lines, *(["", *notes] if notes else [])])


def _render(tables: Iterable[Table], markdown: bool) -> str:
    one = render_markdown if markdown else render_text
    return "\n\n".join([*(one(table) for table in tables), DISCLAIMER]) + "\n"


def _align(row: tuple[str, ...], widths: list[int], numeric: bool) -> str:
    cells = [row[0].ljust(widths[0])]
    cells += [
        cell.rjust(width) if numeric else cell.ljust(width)
        for cell, width in zip(row[1:], widths[1:], strict=True)
    ]
    return "  ".join(cells).rstrip()


def _markdown_row(row: tuple[str, ...]) -> str:
    return "| " + " | ".join(_markdown_cell(cell) for cell in row) + " |"


def _markdown_cell(text: str) -> str:
    for plain, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\n", " ")):
        text = text.replace(plain, escaped)
    return text
