from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from calibration.coverage import COVERAGE, Coverage, measure_coverage, save_coverage
from calibration.select import CalibrationSet
from calibration.table import CalibrationTable
from engines.graph import OnnxModel, load_model


@pytest.fixture(scope="module")
def model(small_model: Path) -> OnnxModel:
    return load_model(small_model)


@pytest.fixture(scope="module")
def found(model: OnnxModel, small_table: CalibrationTable, small_set: CalibrationSet) -> Coverage:
    return measure_coverage(model, small_table, small_set)


def subset(images: CalibrationSet, drawn: list[int]) -> CalibrationSet:
    """The images at these places, drawn in this order."""
    places = sorted(drawn)
    return CalibrationSet(
        images.pixels[places],
        tuple(images.images[place] for place in places),
        (),
        tuple(places.index(place) for place in drawn),
    )


def places_of(images: CalibrationSet, *labels: str) -> list[int]:
    return [place for place in images.drawn if images.images[place].label in labels]


def test_figures_are_those_of_the_pixels(found: Coverage, small_set: CalibrationSet, tmp_path: Path) -> None:
    assert (found.images, found.patients, found.method) == (128, None, "minmax")
    assert found.classes == {"clear": 49, "diffuse": 49, "focal": 30}
    assert [tensor.name for tensor in found.tensors] == ["pixels", "features", "hidden"]
    pixels = small_set.pixels[list(small_set.drawn)].astype(np.float64)
    seen = found.tensors[0]
    assert (seen.low, seen.high) == (0.0, 255.0)
    assert (seen.smallest, seen.largest) == (pixels.min(), pixels.max())
    assert seen.deviation == pytest.approx(pixels.std())
    tops = pixels.reshape(128, -1).max(axis=1)
    assert seen.growth == tuple(tops[: 16 * part].max() / tops.max() for part in range(1, 9))
    assert seen.drift == pytest.approx(abs(tops[:64].mean() / tops.mean() - 1))
    assert all(tensor.saturated == 0 for tensor in found.tensors)
    assert found.warnings == ()
    assert found.text().splitlines()[0] == "128 images: clear 49, diffuse 49, focal 30"
    assert found.text().splitlines()[-1] == "the set is even and its ranges have settled"
    save_coverage(tmp_path / "c.json", found)
    assert COVERAGE.load(tmp_path / "c.json") == found


def test_a_range_cut_short_saturates(
    model: OnnxModel, small_table: CalibrationTable, small_set: CalibrationSet
) -> None:
    ranges = {**small_table.ranges, "features": (0.0, small_table.ranges["features"][1] / 4)}
    found = measure_coverage(model, structs.replace(small_table, ranges=ranges), small_set)
    assert found.tensors[1].saturated > 0.01
    assert [line for line in found.warnings if line.startswith("features saturates in ")]


def test_one_class_alone_is_reported(
    model: OnnxModel, small_table: CalibrationTable, small_set: CalibrationSet
) -> None:
    clear = places_of(small_set, "clear")
    found = measure_coverage(model, small_table, subset(small_set, clear))
    assert found.warnings[0] == (
        "the set has no image of diffuse, focal: its values may lie beyond the ranges"
    )
    lopsided = clear + places_of(small_set, "diffuse", "focal")[:5]
    found = measure_coverage(model, small_table, subset(small_set, lopsided))
    assert any(line.startswith("the set is lopsided: 49 images of clear, ") for line in found.warnings)


def test_few_patients_are_reported(
    model: OnnxModel, small_table: CalibrationTable, small_set: CalibrationSet
) -> None:
    patients = {image.sha256: f"p{index % 10}" for index, image in enumerate(small_set.images)}
    found = measure_coverage(model, small_table, small_set, patients)
    assert found.patients == 10
    assert "128 images come from only 10 patients" in found.warnings
    assert found.text().startswith("128 images of 10 patients: clear 49")


def test_ranges_that_still_move_are_reported(
    model: OnnxModel, small_table: CalibrationTable, small_set: CalibrationSet, found: Coverage
) -> None:
    ordered = sorted(range(128), key=lambda place: float(small_set.pixels[place].mean()))
    rising = measure_coverage(model, small_table, subset(small_set, ordered))
    assert rising.tensors[1].name == "features"
    assert rising.tensors[1].drift > 3 * found.tensors[1].drift


def test_a_branched_graph_is_looked_at_in_every_tensor_that_has_a_range(
    branched_models: dict[str, Path],
    branched_tables: dict[str, CalibrationTable],
    branched_set: CalibrationSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, table = load_model(branched_models["inception"]), branched_tables["inception"]
    found = measure_coverage(model, table, branched_set)
    assert {tensor.name: (tensor.low, tensor.high) for tensor in found.tensors} == {
        **table.ranges,
        "planes.out": (0.0, 255.0),
    }
    assert all(tensor.smallest < tensor.largest for tensor in found.tensors)
    monkeypatch.setattr("calibration.coverage.MOST_ROWS", 5)
    lines = found.text().splitlines()
    assert f"and {len(found.tensors) - 5} more tensors that drift less" in lines
    assert len(found.shown) == 5
    assert min(tensor.drift for tensor in found.shown) >= sorted(tensor.drift for tensor in found.tensors)[-5]
