from __future__ import annotations

import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.compare import compare_reports
from bench.report import Report
from bench.tables import environment_table, latency_table, ratio_table, report_ratios
from edge_dsc.page.charts import distribution_plot
from edge_dsc.page.document import (
    Picture,
    Section,
    comparison_sections,
    make_page,
    report_sections,
    save_page,
)
from engines.text_table import Table

MakeReport = Callable[..., Report]

NASTY = "<script>alert('x')</script>&\"quoted\""


class Reader(HTMLParser):
    """Collects the tags, attributes and text of a page, and checks that every tag is closed."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


@pytest.fixture
def report(make_report: MakeReport) -> Report:
    medians = {"cnn.fp32": 3.1, "dsc.fp32": 0.9, NASTY: 2.2}
    return make_report(medians, samples=50, spread=0.01, environment={"cpu": NASTY, "cores": 2})


def png(width: int = 3, height: int = 2) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x80" * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_every_number_of_the_tables_is_text_on_the_page(report: Report) -> None:
    page = Reader(make_page("A run", report_sections(report)))
    ratios, notes = report_ratios(report)
    for table in (latency_table(report), ratio_table(ratios, notes=notes), environment_table(report)):
        for row in (table.header, *table.rows, table.notes):
            for cell in row:
                assert not cell or cell in page.words, cell
    for ratio in ratios:
        assert f"{ratio.ratio.value:.3f} [{ratio.ratio.low:.3f}, {ratio.ratio.high:.3f}]" in page.words


def test_sections_stand_in_the_order_of_a_report(make_report: MakeReport) -> None:
    limits = {"multiply_adds": 8e6, "bytes": 1e6, "multiply_adds_per_s": 8e9, "bytes_per_s": 4e9}
    report = make_report({"a": 1.0, "b": 2.0}, stages={"run": 1e6}, passes={"limits": limits})
    source = make_page("A run", report_sections(report, accuracies={"a": 0.8, "b": 0.7}))
    headings = re.findall("<h2>(.*?)</h2>", source)
    assert headings == [
        "Latency",
        "Stages",
        "Compared",
        "Builds, limits, power, memory",
        "Accuracy against latency",
        "Over time",
        "Machine",
    ]
    plots = [section.count('role="img"') for section in source.split("<section>")[1:]]
    assert plots == [1, 1, 1, 1, 1, 1, 0]
    assert {"80.00%", "70.00%"} <= {*Reader(source).words}
    alone = make_page("A run", report_sections(make_report({"a": 1.0})))
    assert re.findall("<h2>(.*?)</h2>", alone) == ["Latency", "Over time", "Machine"]


def test_nothing_breaks_out_of_the_page(report: Report) -> None:
    table = Table(title=NASTY, header=(NASTY, NASTY), rows=((NASTY, NASTY),), notes=(NASTY,))
    section = Section(NASTY, (NASTY, table, Picture(png=png(), caption=NASTY)))
    source = make_page(NASTY, (section, *report_sections(report)), summary=NASTY)
    page = Reader(source)
    assert "script" not in page.tags
    assert page.words.count(NASTY) >= 9
    assert ("alt", NASTY) in page.attributes
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_the_page_needs_no_network(report: Report) -> None:
    picture = Picture(png=png(), caption="curves")
    source = make_page("A run", (*report_sections(report), Section("Pictures", (picture,))))
    page = Reader(source)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    targets = [value or "" for name, value in page.attributes if name in ("src", "href", "action")]
    assert targets[-1].startswith("data:image/png;base64,")
    assert all(target.startswith("#plot-") for target in targets[:-1])
    assert not re.search(r"url\(|@import|https?://", source)
    assert "default-src 'none'" in source


def test_light_dark_phone_and_print_are_provided_for() -> None:
    source = make_page("A run", ())
    for needed in ("prefers-color-scheme: dark", "max-width: 34rem", "@media print", "width=device-width"):
        assert needed in source
    light, dark = (set(re.findall(r"(--\w+):", block)) for block in re.findall(r":root {[^}]*}", source)[:2])
    assert light == dark != set()
    assert "this is not a medical device" in Reader(source).text


def test_a_plot_may_stand_on_a_page_twice(report: Report) -> None:
    plot = distribution_plot(report)
    source = make_page("A run", (Section("One", (plot, "text", plot)), Section("Two", (plot,))))
    ids = [value for name, value in Reader(source).attributes if name == "id"]
    assert len(ids) == len({*ids})
    assert [name for name in ids if name and name.endswith("data-0")] == [
        f"plot-{place}-data-0" for place in ("1-1", "1-3", "2-1")
    ]


def test_every_plot_is_valid_xml_and_the_page_is_made_the_same_each_time(report: Report) -> None:
    source = make_page("A run", report_sections(report))
    plots = re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL)
    assert len(plots) > 3
    for plot in plots:
        ElementTree.fromstring(plot)
    assert make_page("A run", report_sections(report)) == source


@pytest.mark.parametrize("medians", [{"a": 0.0}, {"a": 1e-6, "b": 1e6}, {}])
def test_odd_reports_still_make_a_page(make_report: MakeReport, medians: dict[str, float]) -> None:
    report = make_report(medians)
    source = make_page("A run", (Section("Latency", (latency_table(report), distribution_plot(report))),))
    assert "nan" not in Reader(source).text
    assert source.count("<figure>") == bool(medians)


def test_a_comparison_page(tmp_path: Path, make_report: MakeReport) -> None:
    before, after = (make_report({"a": a, "b": 2.0}, samples=50, spread=0.01) for a in (1.0, 2.0))
    save_page(tmp_path / "c.html", "Two runs", comparison_sections(compare_reports(before, after)))
    page = Reader((tmp_path / "c.html").read_text(encoding="utf-8"))
    assert "2.00 times slower" in page.words
    assert "no significant difference" in page.words
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert "a against a: 2.00 times slower; b against b: no significant difference" in labels


def test_long_names_are_shortened_in_the_plot_only(make_report: MakeReport) -> None:
    long = "x" * 60
    words = Reader(make_page("t", report_sections(make_report({"a": 1.0, long: 2.0})))).words
    assert long in words
    assert "x" * 15 + "…" + "x" * 14 in words


@pytest.mark.slow
def test_a_page_of_a_long_report_of_eight_engines_is_small(make_report: MakeReport) -> None:
    medians = [1 + index % 7 / 100 for index in range(300)]
    report = make_report({f"engine{index}": medians for index in range(8)}, samples=100, spread=0.1)
    assert len(make_page("t", report_sections(report))) < 300 * 1024


def test_only_png_pictures_are_embedded() -> None:
    with pytest.raises(ValueError, match="the picture 'c' is no PNG"):
        Picture(png=b"<svg onload=alert(1)>", caption="c")


def test_the_style_sheet_alone_needs_no_package() -> None:
    code = (
        "import sys, edge_dsc.page; assert '--ink' in edge_dsc.page.CSS; "
        "assert not {'bench', 'jinja2', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
