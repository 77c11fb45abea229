from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib
import pytest

from bench.report import Report
from bench.tables import report_ratios
from edge_dsc.page import CSS
from edge_dsc.page.charts import (
    Plot,
    accuracy_plot,
    difference_plot,
    distribution_plot,
    ratio_plot,
    roofline_plot,
    stage_plot,
    time_plot,
)

MakeReport = Callable[..., Report]
LIMITS = {"multiply_adds": 8e6, "bytes": 1e6, "multiply_adds_per_s": 8e9, "bytes_per_s": 4e9}
NASTY = "<script>alert('x')</script> $x^$ & \"胸\"\x07"
SHOWN = "<script>alert('x')</script> $x^$ & \"胸\"\N{REPLACEMENT CHARACTER}"


def drawn(plot: Plot | None) -> ElementTree.Element:
    assert plot is not None
    return ElementTree.fromstring(plot.svg("p"))


def found(root: ElementTree.Element, name: str) -> ElementTree.Element:
    (element,) = root.findall(f".//*[@id='p-{name}']")
    return element


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter("text")]


def corners(root: ElementTree.Element, name: str) -> list[tuple[float, float]]:
    """Return the places of a line or of a bar's corners, in the drawing's units; y grows downwards."""
    numbers = re.findall(r"-?[\d.]+", found(root, name).find("path").get("d"))  # type: ignore[union-attr, arg-type]
    return [(float(x), float(y)) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]


def dot(root: ElementTree.Element, name: str) -> tuple[float, float]:
    (use,) = found(root, name).iter("use")
    return float(use.attrib["x"]), float(use.attrib["y"])


def all_plots(report: Report) -> list[Plot]:
    plots = (
        distribution_plot(report),
        ratio_plot(report_ratios(report)[0]),
        stage_plot(report),
        time_plot(report),
        roofline_plot(report),
        accuracy_plot(report, {subject.name: 0.5 for subject in report.measured}),
    )
    assert all(plots)
    return [plot for plot in plots if plot is not None]


@pytest.fixture
def full_report(make_report: MakeReport) -> Report:
    return make_report({"a": 1.0, NASTY: 2.0}, stages={NASTY: 1e6}, passes={"limits": LIMITS})


def test_a_curve_runs_from_the_fastest_call_to_the_slowest(make_report: MakeReport) -> None:
    report = make_report({"a": 1.0, "b": [2.0] * 40}, samples=1000, spread=0.01)
    report.subjects[1].blocks[7].samples_ns[500] = 50_000_000  # a single slow call of 40,000
    root = drawn(distribution_plot(report))
    first, second = corners(root, "data-0"), corners(root, "data-1")
    for places in (first, second):
        assert places == sorted(places, key=lambda place: (place[0], -place[1]))
        assert (places[0][1], places[-1][1]) == (226, 26)  # 0 and 100 %
        assert 200 <= len(places) < 300
    assert first[0][0] == 54  # the left end
    assert second[-1][0] == 448  # the right end
    assert second[-2][0] < 250


def test_the_legend_names_each_curve_with_its_median(make_report: MakeReport) -> None:
    plot = distribution_plot(make_report({"a": 1.0, "b": 2.0}))
    assert plot is not None
    assert [key.text for key in plot.legend] == ["a, median 1.000 ms", "b, median 2.000 ms"]
    assert len({key.style for key in plot.legend}) == 2
    root = drawn(plot)
    for index, key in enumerate(plot.legend):
        colour = re.findall(r"stroke: (var\(--s\d\))", key.style)
        assert colour[0] in str(found(root, f"data-{index}").find("path").get("style"))  # type: ignore[union-attr]
    assert {"0 %", "50 %", "100 %", "1", "2", "calls answered"} <= {*texts(root)}


def test_a_ratio_is_a_dot_on_its_interval_beside_its_margin(make_report: MakeReport) -> None:
    report = make_report({"a": 1.0, "b": 2.0, "c": 1.0}, samples=50, spread=0.01)
    ratios = report_ratios(report)[0]
    root = drawn(ratio_plot(ratios))
    twice, same = dot(root, "data-0"), dot(root, "data-1")
    assert same[0] < twice[0]
    assert same[1] == twice[1] + 46  # below
    (name,) = (element for element in root.iter("text") if element.text == "b")
    assert "font-weight" in name.attrib["style"]
    for ratio in ratios:
        assert f"{ratio.ratio.value:.3f} [{ratio.ratio.low:.3f}, {ratio.ratio.high:.3f}]" in texts(root)
    label = root.get("aria-label")
    assert label is not None and label.startswith("b against a: 2.00 times slower; c against a: ")
    assert ratio_plot(()) is None


def test_intervals_and_margins_are_to_scale(make_report: MakeReport) -> None:
    (ratio,) = report_ratios(make_report({"a": 1.0, "b": 1.2}, samples=50, spread=0.05))[0]
    plot = ratio_plot((replace(ratio, margin=0.1),))
    assert plot is not None
    (axes,) = plot.figure.axes
    interval = next(line for line in axes.lines if len(line.get_xdata()) == 2)  # type: ignore[arg-type]
    assert list(interval.get_xdata()) == [ratio.ratio.low, ratio.ratio.high]  # type: ignore[arg-type]
    (band,) = axes.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((1 / 1.1, 1.1))  # type: ignore[attr-defined]
    low, high = axes.get_xlim()
    assert low < 1 / 1.1 and high > ratio.ratio.high


def test_differences_are_dots_on_their_intervals_beside_what_may_be_lost() -> None:
    plot = difference_plot({"dsc against cnn": (-1.5, -4.0, 1.25), NASTY: (0.5, 0.25, 0.75)}, margin=2)
    root = drawn(plot)
    first, second = dot(root, "data-0"), dot(root, "data-1")
    assert first[0] < second[0] and second[1] == first[1] + 46
    assert {"dsc against cnn", "-1.50 [-4.00, +1.25]", "+0.50 [+0.25, +0.75]"} <= set(texts(root))
    assert plot is not None
    (axes,) = plot.figure.axes
    band = axes.patches[0]
    assert (band.get_x(), band.get_width()) == (-2, 2)  # type: ignore[attr-defined]
    assert [list(line.get_xdata()) for line in axes.lines[::2]] == [[-4.0, 1.25], [0.25, 0.75]]  # type: ignore[arg-type]
    low, high = axes.get_xlim()
    assert low < -4 and high > 1.25
    assert difference_plot({}, margin=2) is None


def test_stages_are_bars_on_a_common_scale(make_report: MakeReport) -> None:
    plot = stage_plot(make_report({"a": 1.0}, stages={"h2d": 1e6, "execute": 2e6, "d2h": 1e6}))
    assert plot is not None and [key.text for key in plot.legend] == ["h2d", "execute", "d2h"]
    root = drawn(plot)
    ends = [{x for x, _ in corners(root, f"data-0-{index}")} for index in range(3)]
    assert ends == [{0, 115}, {115, 345}, {345, 460}]
    assert {"a", "4.000 ms"} <= {*texts(root)}
    assert stage_plot(make_report({"a": 1.0})) is None


def test_throttling_is_shaded_where_it_happened(make_report: MakeReport) -> None:
    states = tuple(
        {"at_ns": second * 10**9, "throttle_events": events, "cooling": []}
        for second, events in enumerate((0, 0, 3, 3, 3))
    )
    medians = [1.0, 1.0, 2.0, 2.0, 1.0]
    plot = time_plot(make_report({"a": medians}, states=states))
    assert plot is not None and plot.caption.endswith("shaded: the machine throttled.")
    root = drawn(plot)
    assert {x for x, _ in corners(root, "throttled-0")} == {
        152.5,
        251,
    }  # the second of the four seconds from 54 to 448
    places = corners(root, "data-0")
    assert [x for x, _ in places] == [54, 152.5, 251, 349.5, 448]
    assert places[0][1] == places[4][1] > places[2][1]  # slower is further up
    assert "p-throttled-1" not in ElementTree.tostring(root, encoding="unicode")
    calm = time_plot(make_report({"a": medians}))
    assert calm is not None and "throttled" not in calm.caption + calm.svg("p")
    assert time_plot(make_report({"a": [1.0]})) is None


def test_an_engine_at_its_roof_lies_on_the_roof(make_report: MakeReport) -> None:
    root = drawn(roofline_plot(make_report({"a": 1.0, "b": 2.0}, passes={"limits": LIMITS})))
    start, ridge, end = corners(root, "roof")
    assert ridge[1] == end[1] < start[1]
    assert dot(root, "data-0")[1] == end[1] < dot(root, "data-1")[1]
    assert {"8 G multiply-adds/s", "4 GB/s", "1", "2"} <= {*texts(root)}
    assert roofline_plot(make_report({"a": 1.0})) is None


def test_accuracy_stands_over_latency(make_report: MakeReport) -> None:
    report = make_report({"slow": 4.0, "fast": 1.0, "unknown": 1.0, "useless": 1.0})
    plot = accuracy_plot(report, {"slow": 0.8, "fast": 0.7, "useless": 0.0})
    assert plot is not None and [key.text for key in plot.legend] == ["1 slow", "2 fast", "3 useless"]
    root = drawn(plot)
    slow, fast, useless = (dot(root, f"data-{index}") for index in range(3))
    assert slow[0] > fast[0] and slow[1] < fast[1] < useless[1]
    assert {"0", "80", "accuracy, %"} <= {*texts(root)}
    assert accuracy_plot(report, {"other": 0.5}) is None


def test_names_are_text_whatever_they_hold(full_report: Report) -> None:
    for plot in all_plots(full_report):
        root = drawn(plot)
        words = [str(root.get("aria-label")), *texts(root), *(key.text for key in plot.legend)]
        assert "<script>alert('x')</script> $x^$ &" in " ".join(words)
        assert not list(root.iter("script"))
    ratios = drawn(ratio_plot(report_ratios(full_report)[0]))
    assert SHOWN[:15] + "…" + SHOWN[-14:] in texts(ratios)
    assert ratios.get("aria-label") == f"{SHOWN} against a: 2.00 times slower"


def test_long_names_are_cut_in_their_middle(make_report: MakeReport) -> None:
    root = drawn(stage_plot(make_report({"x" * 60: 1.0, "y" * 30: 1.0}, stages={"run": 1e6})))
    assert {"x" * 15 + "…" + "x" * 14, "y" * 30} <= {*texts(root)}


def test_every_colour_is_a_variable_of_the_style_sheet(full_report: Report) -> None:
    defined = {*re.findall(r"(--\w+):", CSS)}
    for plot in all_plots(full_report):
        svg = plot.svg("p")
        assert not re.search(r"#[0-9a-f]{6}|rgb|\bblack\b", svg)
        assert {*re.findall(r"var\((--\w+)\)", svg)} <= defined
        for element in ElementTree.fromstring(svg).iter("text"):
            assert "fill: var(--" in element.attrib["style"]
            assert "font-family" not in element.attrib["style"]  # the page's own


def test_plots_of_one_page_share_no_id(full_report: Report) -> None:
    page = "".join(plot.svg(f"plot-{number}") for number, plot in enumerate(all_plots(full_report)))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len({*ids}) > 10
    referred = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)
    assert referred and {first or second for first, second in referred} <= {*ids}


def test_a_plot_is_a_labelled_picture_of_no_fixed_size(full_report: Report) -> None:
    for plot in all_plots(full_report):
        root = drawn(plot)
        assert root.tag == "svg"
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert {*root.attrib} == {"viewBox", "role", "aria-label"}


def test_the_same_report_gives_the_same_bytes_on_any_machine(full_report: Report) -> None:
    once = [plot.svg("p") for plot in all_plots(full_report)]
    with matplotlib.rc_context(
        {
            "axes.grid": False,
            "axes.spines.bottom": False,
            "xtick.labelsize": 30,
            "font.size": 30,
            "svg.hashsalt": "other",
            "lines.linewidth": 9,
        }
    ):
        assert [plot.svg("p") for plot in all_plots(full_report)] == once


@pytest.mark.parametrize("medians", [{"a": 1.0}, {"a": 0.0}, {"a": 1e-6, "b": 1e6}, {"a": [5.0]}])
def test_odd_latencies_still_make_a_plot(make_report: MakeReport, medians: dict[str, float]) -> None:
    report = make_report(medians)
    for plot in (distribution_plot(report), time_plot(report), accuracy_plot(report, {"a": 1.0})):
        for element in drawn(plot).iter() if plot else ():
            assert "nan" not in " ".join(element.attrib.values())
            for number in re.findall(r"-?\d+(?:\.\d+)?", element.get("d", "")):
                assert -10 <= float(number) <= 470
    assert distribution_plot(make_report({})) is None


def test_tick_labels_do_not_overlap(make_report: MakeReport) -> None:
    for medians in ({"a": 1.0, "b": 1e6}, {"a": 1.0, "b": 1.3}, {"a": 1.0, "b": 9.9}):
        root = drawn(distribution_plot(make_report(medians)))
        numbers = [element for element in root.iter("text") if re.fullmatch(r"[\d.e+]+", element.text or "")]
        places = [float(element.attrib["x"]) for element in numbers]
        assert len(places) >= 3
        assert all(right - left >= 34 for left, right in pairwise(places))
