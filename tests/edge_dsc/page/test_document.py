from __future__ import annotations

import re
import struct
import zlib
from array import array
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bench.compare import compare_reports
from bench.plan import Plan
from bench.report import BlockSamples, Report, SubjectReport
from bench.tables import latency_table, ratio_table, report_ratios
from edge_dsc.page.document import (
    LatencyPlot,
    Picture,
    RatioPlot,
    Section,
    comparison_sections,
    make_page,
    report_sections,
    save_page,
)
from engines.text_table import Table

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


def make_report(medians_ns: dict[str, float], samples: int = 50) -> Report:
    rng = np.random.default_rng(3)
    subjects = []
    for name, median in medians_ns.items():
        blocks = tuple(
            BlockSamples(
                round=index,
                start_ns=index,
                samples_ns=array("q", (median * rng.lognormal(0, 0.01, samples)).astype(int).tolist()),
            )
            for index in range(20)
        )
        subjects.append(SubjectReport(name=name, description={}, blocks=blocks))
    machine = {"cpu": NASTY, "cores": 2, "load": 0.5}
    return Report(
        subjects=tuple(subjects),
        plan=Plan(),
        environment=machine,
        environment_end=machine,
        created="2026-11-01T12:00:00+00:00",
    )


@pytest.fixture
def report() -> Report:
    return make_report({"cnn.fp32": 3.1e6, "dsc.fp32": 0.9e6, NASTY: 2.2e6})


def png(width: int = 3, height: int = 2) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x80" * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_every_number_of_the_tables_is_text_on_the_page(report: Report) -> None:
    page = Reader(make_page("A run", report_sections(report)))
    ratios, _ = report_ratios(report)
    for table in (latency_table(report), ratio_table(ratios)):
        for row in (table.header, *table.rows):
            for cell in row:
                assert cell in page.words, cell
    for ratio in ratios:
        assert f"{ratio.ratio.value:.3f} [{ratio.ratio.low:.3f}, {ratio.ratio.high:.3f}]" in page.words
    assert page.tags.count("svg") == 9  # three in each of two legends, three plots
    assert page.tags.count("polyline") == 6
    assert page.tags.count("circle") == 2


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
    assert len(targets) == 1
    assert targets[0].startswith("data:image/png;base64,")
    assert not re.search(r"url\(|@import|https?://", source)
    assert "default-src 'none'" in source


def test_light_dark_phone_and_print_are_provided_for() -> None:
    source = make_page("A run", ())
    for needed in ("prefers-color-scheme: dark", "max-width: 34rem", "@media print", "width=device-width"):
        assert needed in source
    assert "this is not a medical device" in Reader(source).text


def test_curves_run_from_the_fastest_to_the_slowest_call() -> None:
    report = make_report({"a": 1e6}, samples=1000)
    source = make_page("A run", (Section("Latency", (LatencyPlot(report),)),))
    (points,) = re.findall(r'<polyline[^>]* points="([^"]+)"', source)
    places = [tuple(map(float, point.split(","))) for point in points.split(" ")]
    assert places == sorted(places, key=lambda place: (place[0], -place[1]))
    assert (places[0], places[-1]) == ((54.0, 230.0), (448.0, 10.0))
    assert len(places) < 300


@pytest.mark.parametrize("medians", [{"a": 1e6}, {"a": 0}, {"a": 1, "b": 1e12}, {}])
def test_odd_reports_still_make_a_page(medians: dict[str, float]) -> None:
    report = make_report(medians)
    Reader(make_page("A run", (Section("Latency", (LatencyPlot(report), RatioPlot(()))),)))


def test_identical_samples_still_make_a_plot() -> None:
    block = BlockSamples(round=0, start_ns=0, samples_ns=array("q", [5_000_000] * 3))
    report = make_report({})
    subject = SubjectReport(name="a", description={}, blocks=(block,))
    source = make_page("t", report_sections(msgspec.structs.replace(report, subjects=(subject,))))
    assert "nan" not in Reader(source).text
    assert "polyline" in source


def test_a_comparison_page(tmp_path: Path) -> None:
    before, after = make_report({"a": 1e6, "b": 2e6}), make_report({"a": 2e6, "b": 2e6})
    save_page(tmp_path / "c.html", "Two runs", comparison_sections(compare_reports(before, after)))
    page = Reader((tmp_path / "c.html").read_text(encoding="utf-8"))
    assert page.tags.count("circle") == 2
    assert any(word.endswith("times slower") for word in page.words)
    assert "no significant difference" in page.words


def test_long_names_are_shortened_in_the_plot_only() -> None:
    long = "x" * 60
    report = make_report({"a": 1e6, long: 2e6})
    words = Reader(make_page("t", report_sections(report))).words
    assert long in words
    assert "x" * 15 + "…" + "x" * 14 in words


def test_a_large_report_makes_a_small_page() -> None:
    report = make_report({f"engine{index}": 1e6 * (index + 1) for index in range(8)}, samples=1000)
    assert len(make_page("t", report_sections(report))) < 100_000


def test_only_png_pictures_are_embedded() -> None:
    with pytest.raises(ValueError, match="the picture 'c' is no PNG"):
        Picture(png=b"<svg onload=alert(1)>", caption="c")
