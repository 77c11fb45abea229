"""Text that is safe to show, and tables of it: on a terminal, in Markdown, in HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Controls (C0, DEL, C1), marks and overrides of direction, line and paragraph separators, and bytes that were no UTF-8.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""Return a name or message as one line that a terminal only shows: ``\x1b``, ``\n`` and the like become visible.

    Names of files, classes and engines and fields of documents come from strangers. A text that went through it once
    stays as it is.
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text.

    Attributes:
        title: What it shows.
        header: Column names; the first column is text, the others are numbers where ``numeric``.
        rows: Cells, one tuple per row, as many as the header has.
        notes: Lines below it.
        numeric: Whether all columns but the first are set flush right.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    numeric: bool = True


def render_text(table: Table) -> str:
    """Return a table with aligned columns, without colour codes."""
    rows = align_rows(table.header, table.rows, numeric=table.numeric)
    return "\n".join([printable(table.title), "", rows, *(f"* {printable(note)}" for note in table.notes)])


def align_rows(header: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: bool = True) -> str:
    """Return a header, a rule and rows with aligned columns: the first flush left, numbers flush right."""
    lines = [tuple(map(printable, row)) for row in (header, *rows)]
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


def render_html(table: Table) -> str:
    """Return a table with its title and notes as HTML; every text is escaped, and the first column heads its row."""
    style = ' class="numeric"' if table.numeric else ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    lines = [
        f'<p class="caption">{escape(table.title)}</p>',
        f'<div class="scroll"><table{style} aria-label="{escape(table.title)}">',
        f"<thead><tr>{head}</tr></thead>",
        "<tbody>",
        *map(_html_row, table.rows),
        "</tbody>",
        "</table></div>",
        *([f'<ul class="notes">{notes}</ul>'] if notes else []),
    ]
    return "\n".join(lines)


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
    text = printable(text.replace("\n", " "))
    for plain, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;")):
        text = text.replace(plain, escaped)
    return text


def _html_row(row: tuple[str, ...]) -> str:
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
    return f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>'
