from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from calibration.table import CalibrationImage, CalibrationTable, save_table
from edge_dsc.infer.live_page.monitoring import (
    FEWEST,
    RECENT,
    Monitor,
    reference_levels,
    stability_index,
)
from engines.images import LEVEL_BINS

LABELS = ("dark", "light")
DARK = np.eye(LEVEL_BINS, dtype=np.int64)[0] * 1000
EVEN = np.full(LEVEL_BINS, 50, np.int64)


def samples(monitor: Monitor) -> dict[str, float]:
    """Every sample of the text as ``name{label="value"}``, without the times of creation."""
    text, content_type = monitor.render()
    assert content_type.startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return {name: value for name, value in found.items() if "_created" not in name}


def test_answers_errors_and_times_are_counted() -> None:
    monitor = Monitor(LABELS, {"engine": "dsc.engine"}, unsure_below=0.7)
    monitor.observe((0.9, 0.1), latency_s=0.002)
    monitor.observe((0.4, 0.6), latency_s=0.03, age_s=0.04, dropped=2)
    monitor.observe(None, latency_s=5.0)
    found = samples(monitor)
    assert found["edge_dsc_engine_info{engine=dsc.engine}"] == 1
    assert found["edge_dsc_answers_total{label=dark}"] == found["edge_dsc_answers_total{label=light}"] == 1
    assert found["edge_dsc_errors_total{}"] == 1
    assert found["edge_dsc_latency_seconds_count{}"] == 2
    assert found["edge_dsc_latency_seconds_sum{}"] == pytest.approx(0.032)
    assert found["edge_dsc_latency_seconds_bucket{le=0.0025}"] == 1
    assert found["edge_dsc_age_seconds_count{}"] == 1
    assert found["edge_dsc_dropped_frames_total{}"] == 2
    assert found["edge_dsc_unsure_answers_total{}"] == 1
    assert (found["edge_dsc_unsure_share{}"], found["edge_dsc_unsure_threshold{}"]) == (0.5, 0.7)
    assert not any(name.startswith(("edge_dsc_input_drift", "python_", "process_")) for name in found)


def test_every_class_stands_there_before_its_first_answer() -> None:
    found = samples(Monitor(LABELS, {}))
    assert found["edge_dsc_answers_total{label=light}"] == 0
    assert math.isnan(found["edge_dsc_unsure_share{}"])


def test_dropped_frames_go_on_where_a_camera_was_opened_anew() -> None:
    monitor = Monitor(LABELS, {})
    for dropped in (0, 3, 3, 7, 1, 2):
        monitor.observe((1.0, 0.0), dropped=dropped)
    assert samples(monitor)["edge_dsc_dropped_frames_total{}"] == 9


def test_the_share_of_unsure_answers_forgets_old_ones() -> None:
    monitor = Monitor(LABELS, {})
    for probability in (0.5, *[1.0] * RECENT):
        monitor.observe((probability, 0.0))
    found = samples(monitor)
    assert (found["edge_dsc_unsure_share{}"], found["edge_dsc_unsure_answers_total{}"]) == (0, 1)


def test_the_index_is_that_of_its_formula() -> None:
    assert stability_index(EVEN, EVEN * 7) == 0
    expected = 0.25 * math.log(0.75 / 0.5) - 0.25 * math.log(0.25 / 0.5)
    assert stability_index(np.array([50, 50]), np.array([30, 10])) == pytest.approx(expected)
    emptied = (1 - 0.5) * math.log(1 / 0.5) + (1e-4 - 0.5) * math.log(1e-4 / 0.5)
    assert stability_index(np.array([50, 50]), np.array([10, 0])) == pytest.approx(emptied)
    for seen in (np.zeros(2, np.int64), np.ones(3, np.int64)):
        with pytest.raises(ValueError, match="no index of"):
            stability_index(np.array([50, 50]), seen)


def test_drift_is_over_recent_pictures_and_not_of_a_few() -> None:
    monitor = Monitor(LABELS, {}, reference=EVEN)
    for _ in range(FEWEST - 1):
        monitor.observe((1.0, 0.0), levels=DARK)
    assert math.isnan(monitor.drift())
    monitor.observe(None, levels=DARK)
    assert samples(monitor)["edge_dsc_input_drift_psi{}"] == stability_index(EVEN, DARK) > 0.25
    for _ in range(RECENT):
        monitor.observe((1.0, 0.0), levels=EVEN)
    assert monitor.drift() == 0


@pytest.fixture
def engine(tmp_path: Path) -> tuple[Path, Any, CalibrationTable]:
    """An engine's path, what its record says, and the table beside it."""
    images = tuple(CalibrationImage(f"{index}.png", "dark", f"{index}") for index in range(128))
    table = CalibrationTable(
        method="minmax",
        parameters={},
        seed=0,
        onnx_sha256="a" * 64,
        preprocess_sha256="b" * 64,
        versions={},
        ranges={"x": (0.0, 1.0)},
        images=images,
        pixel_levels=tuple(EVEN.tolist()),
    )
    record = SimpleNamespace(calibration="tables/own.json", onnx="../model.onnx", onnx_sha256="a" * 64)
    (tmp_path / "run" / "tables").mkdir(parents=True)
    save_table(tmp_path / "run" / "tables" / "own.json", table)
    return tmp_path / "run" / "dsc.engine", record, table


def test_the_reference_is_that_of_the_table_of_the_record_or_beside_the_model(engine: Any) -> None:
    path, record, table = engine
    levels, origin = reference_levels(path, record)
    np.testing.assert_array_equal(levels, EVEN)
    assert Path(origin) == path.parent / "tables" / "own.json"
    record.calibration = None
    save_table(path.parents[1] / "calibration.json", replace(table, pixel_levels=tuple(DARK.tolist())))
    np.testing.assert_array_equal(reference_levels(path, record)[0], DARK)


def test_there_is_no_reference_without_a_table_that_fits(engine: Any) -> None:
    path, record, table = engine
    own = path.parent / "tables" / "own.json"
    save_table(own, replace(table, pixel_levels=()))
    assert reference_levels(path, record) == (
        None,
        f"{own} was made before tables kept grey levels: calibrate again",
    )
    save_table(own, replace(table, onnx_sha256="c" * 64))
    assert reference_levels(path, record) == (None, f"{own} is of another model")
    own.unlink()
    assert reference_levels(path, record)[0] is None
