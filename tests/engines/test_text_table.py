from __future__ import annotations

from xml.etree import ElementTree

from engines.text_table import Table, render_html

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
