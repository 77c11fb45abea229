from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

from calibration.collect import CHUNK, calibrate
from calibration.layers import tensors_to_calibrate
from calibration.select import select_images
from calibration.table import METHODS, CalibrationOptions, CalibrationTable, save_table
from engines.contract import ModelContract
from engines.errors import ArtefactError, BadInputError, EdgeDscError
from engines.graph import load_model
from engines.images import read_input

Items = list[tuple[Path, str]]
Lister = Callable[[Path], Items]


@pytest.fixture
def items(textures: Path, list_items: Lister) -> Items:
    return select_images(list_items(textures), 128, 0)


def network_inputs(items: Items, model: Path) -> list[np.ndarray]:
    metadata = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
    contract = ModelContract.from_metadata(metadata, source="test")
    return [read_input(path, contract) for path, _ in sorted(items)]


def test_minmax_ranges_are_the_extremes_of_each_tensor(
    small_table: CalibrationTable, small_model: Path, items: Items
) -> None:
    model = onnx.load(small_model)
    names = ["pixels", "features", "hidden"]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    values = session.run(names, {"image": np.stack(network_inputs(items, small_model))})
    expected = {
        name: (float(value.min()), float(value.max())) for name, value in zip(names, values, strict=True)
    }
    assert dict(small_table.ranges) == expected
    assert set(expected) == set(tensors_to_calibrate(model))


class Chunks(CalibrationDataReader):
    """Hands one chunk of images to onnxruntime's calibrator, one image at a time."""

    def __init__(self, images: list[np.ndarray]) -> None:
        self._images: Iterator[np.ndarray] = iter(images)

    def get_next(self) -> Any:
        image = next(self._images, None)
        return None if image is None else {"image": image[None]}


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_the_ranges_are_those_of_onnxruntimes_own_calibrator(
    small_model: Path, items: Items, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = calibrate(load_model(small_model), items, CalibrationOptions(method=method, percentile=99.0))
    kind = {"entropy": CalibrationMethod.Entropy, "percentile": CalibrationMethod.Percentile}[method]
    calibrator = create_calibrator(
        shutil.copy(small_model, tmp_path / "model.onnx"),
        ["MatMul"],
        str(tmp_path / "augmented.onnx"),
        kind,
        extra_options={"num_bins": 2048, "num_quantized_bins": 256, "percentile": 99.0, "symmetric": False},
    )
    images = network_inputs(items, small_model)
    for start in range(0, len(images), CHUNK):
        calibrator.collect_data(Chunks(images[start : start + CHUNK]))
    if method == "entropy":  # the one thing that is done to their histogram: see _level_zero
        counts = calibrator.collector.histogram_dict["features"][0]
        counts[counts.size // 2] = counts[counts.size // 2 + 1]
    theirs = calibrator.compute_data()
    expected = tuple(float(bound) for bound in theirs["features"].range_value)
    np.testing.assert_allclose(table.ranges["features"], expected, rtol=1e-5, atol=0)
    capsys.readouterr()


def test_the_methods_differ(small_table: CalibrationTable, small_model: Path, items: Items) -> None:
    tables = {
        m: calibrate(load_model(small_model), items, CalibrationOptions(method=m, percentile=99.9))
        for m in METHODS
    }
    assert tables["minmax"] == small_table
    tops = {method: tables[method].ranges["features"][1] for method in METHODS}
    assert len(set(tops.values())) == 4
    assert max(tops["entropy"], tops["percentile"]) < tops["minmax"]
    assert tables["mse"].parameters == {"searched_images": 96}
    assert set(tables["mse"].channel_factors) <= {"features"}
    assert tables["entropy"].parameters == {"histogram_bins": 2048, "quantized_bins": 256}
    assert tables["percentile"].parameters == {"percentile": 99.9, "histogram_bins": 2048}
    for table in tables.values():  # never cut
        assert table.ranges["pixels"] == small_table.ranges["pixels"]
        assert table.ranges["hidden"] == small_table.ranges["hidden"]


def test_same_inputs_give_the_same_bytes_wherever_the_folder_lies(
    small_model: Path, items: Items, textures: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(textures, tmp_path / "elsewhere"))
    there = [(moved / path.relative_to(textures), label) for path, label in items]
    options = CalibrationOptions(method="percentile", seed=5)
    save_table(tmp_path / "a.json", calibrate(load_model(small_model), items, options))
    save_table(tmp_path / "b.json", calibrate(load_model(small_model), list(reversed(there)), options))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_table_tells_what_it_was_made_of(small_table: CalibrationTable, items: Items) -> None:
    assert len(small_table.images) == 128
    assert {(image.name, image.label) for image in small_table.images} == {
        (f"{label}/{path.name}", label) for path, label in items
    }
    assert dict(small_table.versions) == {"numpy": np.__version__, "onnxruntime": onnxruntime.__version__}
    assert small_table.skipped == ()


def test_nothing_is_printed_and_no_file_is_left(
    small_model: Path,
    items: Items,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(small_model.parent.iterdir())
    calibrate(load_model(small_model), items, CalibrationOptions(method="percentile"))
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert sorted(small_model.parent.iterdir()) == before


def test_progress_is_told_by_chunks(small_model: Path, items: Items) -> None:
    calls: list[tuple[str, int, int]] = []
    calibrate(
        load_model(small_model), items, CalibrationOptions(method="minmax"), lambda *call: calls.append(call)
    )
    assert calls == [("calibrate", done, 128) for done in range(CHUNK, 129, CHUNK)]


def test_damaged_images_are_skipped_and_named(small_model: Path, copied: Path, list_items: Lister) -> None:
    (copied / "clear" / "000.png").write_bytes(b"")
    (copied / "focal" / "001.png").write_text("not an image")
    table = calibrate(load_model(small_model), list_items(copied), CalibrationOptions(method="minmax"))
    assert len(table.images) == 148
    assert [image.name for image in table.skipped] == ["clear/000.png", "focal/001.png"]
    assert table.skipped[0].reason == "clear/000.png is empty (0 bytes)"
    assert str(copied) not in table.skipped[1].reason


def test_too_few_readable_images_are_refused(small_model: Path, copied: Path, list_items: Lister) -> None:
    for path in sorted((copied / "clear").iterdir())[:23]:
        path.write_bytes(b"")
    with pytest.raises(BadInputError, match=r"^127 usable images .*23 cannot be read: .* is empty"):
        calibrate(load_model(small_model), list_items(copied), CalibrationOptions(method="minmax"))


def test_copies_do_not_make_up_for_images(small_model: Path, items: Items) -> None:
    with pytest.raises(BadInputError, match=r"^100 usable images .*\(60 copies\)"):
        calibrate(load_model(small_model), items[:100] + items[:60], CalibrationOptions(method="minmax"))


def test_black_images_are_refused(small_model: Path, tmp_path: Path) -> None:
    blacks = []
    for side in range(32, 32 + 128):  # of different sizes: no copies
        path = tmp_path / f"{side}.png"
        cv2.imwrite(str(path), np.zeros((side, side), np.uint8))
        blacks.append((path, "black"))
    with pytest.raises(
        BadInputError, match=r"^calibration saw only the constant value 0 in the images' pixels"
    ) as caught:
        calibrate(load_model(small_model), blacks, CalibrationOptions(method="entropy"))
    assert caught.value.remedy == "give real images: these leave the network without a signal"


def test_a_dead_tensor_is_refused_by_name(small_model: Path, items: Items, tmp_path: Path) -> None:
    model = onnx.load(small_model)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "dense.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(8, -1e6, np.float32), bias.name))
    dead = tmp_path / "dead.onnx"
    onnx.save(model, dead)
    with pytest.raises(BadInputError, match=r"^calibration saw only the constant value 0 in hidden"):
        calibrate(load_model(dead), items, CalibrationOptions(method="minmax"))


def test_arrays_cannot_stand_in_for_images(small_model: Path) -> None:
    arrays = [(np.zeros((32, 32, 1), np.uint8), "clear")] * 128
    with pytest.raises((TypeError, AttributeError)):
        calibrate(load_model(small_model), arrays, CalibrationOptions())  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [None, b"not onnx"])
def test_a_model_that_is_none_is_refused(tmp_path: Path, items: Items, content: bytes | None) -> None:
    model = tmp_path / "model.onnx"
    if content is not None:
        model.write_bytes(content)
    with pytest.raises(ArtefactError) as caught:
        calibrate(load_model(model), items, CalibrationOptions())
    assert isinstance(caught.value, EdgeDscError)
