from __future__ import annotations

import json
import re
from array import array
from pathlib import Path
from typing import Any

import pytest

from bench.plan import Plan
from bench.report import BlockSamples, Report, SubjectReport
from edge_dsc.evaluate.evaluation import read_accuracies
from edge_dsc.page.charts import accuracy_plot, roofline_plot, stage_plot, time_plot
from edge_dsc.page.document import make_page, report_sections
from engines.errors import ArtefactError

SECOND = 10**9
NASTY = '<b>&"'


def make(
    medians_ms: dict[str, list[float]],
    *,
    stages: dict[str, float] | None = None,
    passes: dict[str, Any] | None = None,
    states: tuple[Any, ...] = (),
) -> Report:
    subjects = tuple(
        SubjectReport(
            name=name,
            description={},
            blocks=tuple(
                BlockSamples(
                    round=index,
                    start_ns=index * SECOND,
                    samples_ns=array("q", [round(median * 1e6)] * 3),
                    stages_ns=stages or {},
                )
                for index, median in enumerate(medians)
            ),
            passes=passes or {},
        )
        for name, medians in medians_ms.items()
    )
    return Report(
        subjects=subjects, plan=Plan(), environment={}, environment_end={}, created="x", states=states
    )


def state(seconds: float, events: int) -> dict[str, Any]:
    return {"at_ns": round(seconds * SECOND), "throttle_events": events, "cooling": []}


def test_throttling_is_shaded_where_it_happened() -> None:
    states = (state(0, 0), state(1, 0), state(2, 3), state(3, 3), state(4, 3))
    drawn = time_plot(make({"a": [1.0, 1.0, 2.0, 2.0, 1.0]}, states=states))
    (band,) = re.findall(r'class="throttled" x="([\d.]+)" y="10" width="([\d.]+)"', drawn)
    assert band == ("152.5", "98.5")  # the second of the four seconds of an axis from 54 to 448
    (points,) = re.findall(r'<polyline[^>]* points="([^"]+)"', drawn)
    places = [tuple(map(float, point.split(","))) for point in points.split(" ")]
    assert [x for x, _ in places] == [54.0, 152.5, 251.0, 349.5, 448.0]
    assert places[0][1] == places[4][1] > places[2][1]  # slower is further up
    assert time_plot(make({"a": [1.0]})) == ""


def test_stages_are_bars_on_a_common_scale() -> None:
    drawn = stage_plot(make({"a": [1.0]}, stages={"h2d": 1e6, "execute": 3e6}))
    assert re.findall(r'<rect class="fill c(\d)" x="([\d.]+)" y="29" width="([\d.]+)"', drawn) == [
        ("0", "0.0", "114.0"),
        ("1", "115.0", "344.0"),
    ]
    assert "4.000 ms" in drawn and "execute" in drawn
    assert stage_plot(make({"a": [1.0]})) == ""


def test_an_engine_at_its_roof_lies_on_the_roof() -> None:
    limits = {"multiply_adds": 8e6, "bytes": 1e6, "multiply_adds_per_s": 8e9, "bytes_per_s": 4e9}
    drawn = roofline_plot(make({"a": [1.0]}, passes={"limits": limits}))
    (roof,) = re.findall(r'<polyline class="series roof" points="([^"]+)"', drawn)
    flat = roof.split(" ")[-1].split(",")[1]
    (height,) = re.findall(r'<circle class="dot c0" cx="[\d.]+" cy="([\d.]+)"', drawn)
    assert height == flat
    assert roofline_plot(make({"a": [1.0]})) == ""


def test_accuracy_stands_over_latency() -> None:
    report = make({"slow": [4.0], "fast": [1.0], "unknown": [1.0]})
    drawn = accuracy_plot(report, {"slow": 0.8, "fast": 0.7})
    (slow, fast) = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert float(slow[0]) > float(fast[0]) and float(slow[1]) < float(fast[1])
    page = make_page("t", report_sections(report, accuracies={"slow": 0.8, "fast": 0.7}))
    assert "80.00%" in page and "70.00%" in page
    assert accuracy_plot(report, {"other": 0.5}) == ""


def test_nothing_breaks_out_of_the_plots() -> None:
    limits = {"multiply_adds": 8e6, "bytes": 1e6, "multiply_adds_per_s": 8e9, "bytes_per_s": 4e9}
    report = make({NASTY: [1.0, 2.0]}, stages={NASTY: 1.0}, passes={"limits": limits})
    drawings = (
        time_plot(report),
        stage_plot(report),
        roofline_plot(report),
        accuracy_plot(report, {NASTY: 0.5}),
    )
    for drawn in drawings:
        assert "&lt;b&gt;&amp;&quot;" in drawn
        assert "<b>" not in drawn


def test_a_page_of_a_long_report_of_eight_engines_is_small() -> None:
    medians = [1 + index % 7 / 100 for index in range(300)]
    report = make({f"engine{index}": medians for index in range(8)})
    assert len(make_page("t", report_sections(report))) < 1 << 18


def test_accuracies_are_read_from_what_evaluate_wrote(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    body = {"kind": "edge-dsc/evaluation", "schema_version": 1, "engine": "runs/dsc-int8.onnxruntime.engine"}
    path.write_text(json.dumps({**body, "metrics": {"accuracy": 0.825}}))
    assert read_accuracies([path]) == {"dsc-int8.onnxruntime": 0.825}
    path.write_text(json.dumps({**body, "metrics": {}}))
    with pytest.raises(ArtefactError, match="holds no accuracy"):
        read_accuracies([path])
