from __future__ import annotations

from xml.etree import ElementTree

from engines.errors import EdgeDscError
from engines.text_table import Table, printable, render_html, render_markdown, render_text

NASTY = "<script>alert('x')</script>&\"quoted\""


def test_html_has_every_cell_under_its_heading() -> None:
    table = Table(
        title="Times", header=("engine", "ms"), rows=(("a", "1.5"), ("b", "2.0")), notes=("one", "two")
    )
    root = ElementTree.fromstring(f"<div>{render_html(table)}</div>")
    assert root.findtext("p") == "Times"
    assert [cell.text for cell in root.iter("th")] == ["engine", "ms", "a", "b"]
    assert [cell.get("scope") for cell in root.iter("th")] == ["col", "col", "row", "row"]
    assert [cell.text for cell in root.iter("td")] == ["1.5", "2.0"]
    assert [note.text for note in root.iter("li")] == ["one", "two"]
    (found,) = root.iter("table")
    assert found.attrib == {"class": "numeric", "aria-label": "Times"}


def test_html_of_words_without_notes() -> None:
    table = Table(title="t", header=("", "start"), rows=(("cpu", "x"),), numeric=False)
    root = ElementTree.fromstring(f"<div>{render_html(table)}</div>")
    assert "class" not in next(root.iter("table")).attrib
    assert not list(root.iter("ul"))


def test_html_cannot_be_broken_out_of() -> None:
    table = Table(title=NASTY, header=(NASTY, NASTY), rows=((NASTY, NASTY),), notes=(NASTY,))
    html = render_html(table)
    assert "<script" not in html
    root = ElementTree.fromstring(f"<div>{html}</div>")
    assert [element.text for element in root.iter() if (element.text or "").strip()] == [NASTY] * 6
    assert next(root.iter("table")).get("aria-label") == NASTY


SHOWN = r"a\x1b[31mb\nerror: fake\r\u202e\x9b\x7f\udcff"
HOSTILE = "a\x1b[31mb\nerror: fake\r\u202e\x9b\x7f\udcff"


def test_a_hostile_name_is_one_line_of_visible_text() -> None:
    assert printable(HOSTILE) == SHOWN == printable(SHOWN)
    assert printable(r"ünï😀 c:\x ‑") == r"ünï😀 c:\x ‑"
    assert str(EdgeDscError(f"there is no {HOSTILE}", remedy="-")) == f"there is no {SHOWN} (-)"
    long = "a" * 500 + "b" * 10**6 + "c" * 500
    assert str(EdgeDscError(long, remedy=long)) == "{0} ({0})".format("a" * 500 + " ... " + "c" * 500)


def test_a_hostile_cell_keeps_its_place_in_a_table() -> None:
    table = Table(title=HOSTILE, header=("e", "ms"), rows=((HOSTILE, "1"), ("b", "22")), notes=(HOSTILE,))
    assert render_text(table).split("\n") == [
        SHOWN,
        "",
        "e".ljust(len(SHOWN)) + "  ms",
        "-" * len(SHOWN) + "  --",
        SHOWN + "   1",
        "b".ljust(len(SHOWN)) + "  22",
        f"* {SHOWN}",
    ]
    markdown = render_markdown(table)
    assert markdown.count("\n") == 7 and markdown.replace("\n", "").isprintable()
