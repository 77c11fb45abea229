from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.coverage import measure_coverage, save_coverage
from calibration.select import select_images
from calibration.table import CalibrationTable
from engines.contract import ModelContract
from engines.errors import BadInputError
from engines.graph import contract_of
from engines.images import read_input

Items = list[tuple[Path, str]]


@pytest.fixture
def items(textures: Path, list_items: Callable[[Path], Items]) -> Items:
    return select_images(list_items(textures), 128, 0)


@pytest.fixture
def contract(small_model: Path) -> ModelContract:
    return contract_of(onnx.load(small_model), "small")


def test_figures_are_those_of_the_pixels(
    small_model: Path, small_table: CalibrationTable, contract: ModelContract, items: Items, tmp_path: Path
) -> None:
    found = measure_coverage(onnx.load(small_model), contract, small_table, items)
    assert (found.images, found.patients, found.method) == (128, None, "minmax")
    assert found.classes == {"clear": 49, "diffuse": 49, "focal": 30}
    assert [tensor.name for tensor in found.tensors] == ["pixels", "features", "hidden"]
    pixels = np.stack([read_input(path, contract) for path, _ in items]).astype(np.float64)
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
    document = json.loads((tmp_path / "c.json").read_text())
    assert (document["kind"], document["schema_version"]) == ("edge-dsc/calibration-coverage", 1)
    assert document["tensors"][1]["name"] == "features"


def test_a_range_cut_short_saturates(
    small_model: Path, small_table: CalibrationTable, contract: ModelContract, items: Items
) -> None:
    ranges = {**small_table.ranges, "features": (0.0, small_table.ranges["features"][1] / 4)}
    cut = dataclasses.replace(small_table, ranges=ranges)
    found = measure_coverage(onnx.load(small_model), contract, cut, items)
    assert found.tensors[1].saturated > 0.01
    assert [line for line in found.warnings if line.startswith("features saturates in ")]


def test_one_class_alone_is_told(
    small_model: Path, small_table: CalibrationTable, contract: ModelContract, items: Items
) -> None:
    clear = [item for item in items if item[1] == "clear"]
    found = measure_coverage(onnx.load(small_model), contract, small_table, clear)
    assert found.warnings[0] == (
        "the set has no image of diffuse, focal: its values may lie beyond the ranges"
    )
    lopsided = clear + [item for item in items if item[1] != "clear"][:5]
    found = measure_coverage(onnx.load(small_model), contract, small_table, lopsided)
    assert any(line.startswith("the set is lopsided: 49 images of clear, ") for line in found.warnings)


def test_few_patients_are_told(
    small_model: Path, small_table: CalibrationTable, contract: ModelContract, items: Items
) -> None:
    patients = {path: f"p{index % 10}" for index, (path, _) in enumerate(items)}
    found = measure_coverage(onnx.load(small_model), contract, small_table, items, patients)
    assert found.patients == 10
    assert "128 images come from only 10 patients" in found.warnings


def test_ranges_that_still_move_are_told(
    small_model: Path, small_table: CalibrationTable, contract: ModelContract, items: Items
) -> None:
    ordered = sorted(items, key=lambda item: float(read_input(item[0], contract).mean()))
    found = measure_coverage(onnx.load(small_model), contract, small_table, ordered)
    drift = {tensor.name: tensor.drift for tensor in found.tensors}
    even = measure_coverage(onnx.load(small_model), contract, small_table, items)
    assert drift["features"] > 3 * {t.name: t.drift for t in even.tensors}["features"]


def test_too_few_images_are_refused(
    small_model: Path, small_table: CalibrationTable, contract: ModelContract, items: Items
) -> None:
    with pytest.raises(BadInputError, match=r"^7 readable images"):
        measure_coverage(onnx.load(small_model), contract, small_table, items[:7])
