from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from msgspec import structs
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

from calibration import collect
from calibration.collect import CHUNK, RANGE_CUTS, calibrate, watch_tensors
from calibration.layers import tensors_to_calibrate
from calibration.rewrites import fold_norms
from calibration.select import CalibrationSet, Candidate, read_set, select_images
from calibration.table import HISTOGRAM_BINS, METHODS, CalibrationOptions, CalibrationTable, save_table
from engines.errors import ArtefactError, BadInputError, UsageError
from engines.graph import OnnxModel, load_model

Paths = dict[str, Path]
Tables = dict[str, CalibrationTable]
Lister = Callable[[Path], list[Candidate]]


@pytest.fixture(scope="module")
def model(small_model: Path) -> OnnxModel:
    return load_model(small_model)


def test_minmax_ranges_are_the_extremes_of_each_tensor(
    small_table: CalibrationTable, small_model: Path, small_set: CalibrationSet
) -> None:
    model = onnx.load(small_model)
    names = ["pixels", "features", "hidden"]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    values = session.run(names, {"image": small_set.pixels})
    expected = {
        name: (float(value.min()), float(value.max())) for name, value in zip(names, values, strict=True)
    }
    assert dict(small_table.ranges) == expected
    assert set(expected) == set(tensors_to_calibrate(model))


class Chunks(CalibrationDataReader):
    """Hands one chunk of images to onnxruntime's calibrator, one image at a time."""

    def __init__(self, images: np.ndarray) -> None:
        self._images: Iterator[np.ndarray] = iter(images)

    def get_next(self) -> Any:
        image = next(self._images, None)
        return None if image is None else {"image": image[None]}


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_the_ranges_are_those_of_onnxruntimes_own_calibrator(
    model: OnnxModel,
    small_set: CalibrationSet,
    tmp_path: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bins = {"entropy": 512, "percentile": HISTOGRAM_BINS}[method]  # entropy takes time with their square
    monkeypatch.setattr(collect, "HISTOGRAM_BINS", bins)
    table = calibrate(model, small_set, CalibrationOptions(method=method, percentile=99.0))
    kind = {"entropy": CalibrationMethod.Entropy, "percentile": CalibrationMethod.Percentile}[method]
    calibrator = create_calibrator(
        shutil.copy(model.path, tmp_path / "model.onnx"),
        ["MatMul"],
        str(tmp_path / "augmented.onnx"),
        kind,
        extra_options={"num_bins": bins, "num_quantized_bins": 256, "percentile": 99.0, "symmetric": False},
    )
    for start in range(0, 128, CHUNK):
        calibrator.collect_data(Chunks(small_set.pixels[start : start + CHUNK]))
    if method == "entropy":  # the one thing that is done to their histogram: see _level_zero
        counts = calibrator.collector.histogram_dict["features"][0]
        counts[counts.size // 2] = counts[counts.size // 2 + 1]
    theirs = calibrator.compute_data()
    expected = tuple(float(bound) for bound in theirs["features"].range_value)
    np.testing.assert_allclose(table.ranges["features"], expected, rtol=1e-5, atol=0)
    capsys.readouterr()


@pytest.mark.parametrize("method", ["minmax", "entropy"])
def test_a_graph_that_cannot_run_is_an_artefact_that_is_refused(
    model: OnnxModel, small_set: CalibrationSet, method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([3], np.int64), "three"))
    node = proto.graph.node[0]
    proto.graph.node.insert(
        0, onnx.helper.make_node("Reshape", [node.input[0], "three"], ["cut"], name="cut")
    )
    proto.graph.node[1].input[0] = "cut"
    with pytest.raises(ArtefactError, match=r"onnxruntime cannot run .*\.onnx: .*") as refused:
        calibrate(replace(model, proto=proto), small_set, CalibrationOptions(method=method))
    assert refused.value.remedy == "export it again: edge-dsc export RUN"
    assert capfd.readouterr().err == ""


def test_the_methods_differ(
    small_table: CalibrationTable, model: OnnxModel, small_set: CalibrationSet
) -> None:
    tables = {
        method: calibrate(model, small_set, CalibrationOptions(method=method, percentile=99.9))
        for method in METHODS
    }
    assert tables["minmax"] == small_table
    tops = {method: tables[method].ranges["features"][1] for method in METHODS}
    assert len(set(tops.values())) == 4
    assert max(tops["entropy"], tops["percentile"]) < tops["minmax"]
    assert tables["mse"].parameters == {"searched_images": 96}
    assert set(tables["mse"].channel_factors) <= {"features"}
    assert {method: bool(table.corrections) for method, table in tables.items()} == {
        "mse": True,
        "entropy": False,
        "minmax": False,
        "percentile": False,
    }
    assert tables["entropy"].parameters == {"histogram_bins": 2048, "quantized_bins": 256}
    assert tables["percentile"].parameters == {"percentile": 99.9, "histogram_bins": 2048}
    for table in tables.values():  # never cut
        assert table.ranges["pixels"] == small_table.ranges["pixels"]
        assert table.ranges["hidden"] == small_table.ranges["hidden"]


def test_roundings_and_biases_are_learnt_as_they_are_asked_for(
    small_table: CalibrationTable, model: OnnxModel, small_set: CalibrationSet
) -> None:
    def learnt(**asked: Any) -> dict[str, tuple[bool, bool]]:
        table = calibrate(model, small_set, CalibrationOptions(method="minmax", **asked))
        assert structs.replace(table, corrections={}) == small_table
        return {name: (bool(each.rounded_up), bool(each.bias)) for name, each in table.corrections.items()}

    assert learnt(rounding="nearest", bias_correction=False) == {}
    assert learnt(rounding="adaround") == {"stem": (True, False)}
    assert learnt(bias_correction=True) == {"stem": (False, True), "dense": (False, True)}


@pytest.mark.parametrize(
    ("asked", "named"),
    [({"rounding": "adaround"}, "--rounding adaround"), ({"bias_correction": True}, "--bias-correction")],
)
def test_what_is_learnt_layer_by_layer_is_refused_where_branches_meet(
    branched_models: Paths, branched_set: CalibrationSet, asked: dict[str, Any], named: str
) -> None:
    model = load_model(branched_models["residual"])
    with pytest.raises(UsageError, match=f"^{named} looks at one layer after the other") as caught:
        calibrate(model, branched_set, CalibrationOptions(**asked))
    assert caught.value.remedy == f"leave {named} out"


def test_same_inputs_give_the_same_bytes_wherever_the_folder_lies(
    model: OnnxModel, small_set: CalibrationSet, textures: Path, list_images: Lister, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(textures, tmp_path / "elsewhere"))
    there = select_images(list_images(moved), 128, 0)
    options = CalibrationOptions(method="percentile", seed=5)
    save_table(tmp_path / "a.json", calibrate(model, small_set, options))
    turned = read_set(list(reversed(there)), model.contract)
    save_table(tmp_path / "b.json", calibrate(model, turned, options))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_table_names_what_it_was_made_of(
    small_table: CalibrationTable, small_set: CalibrationSet, model: OnnxModel
) -> None:
    assert small_table.images == small_set.images
    assert small_table.skipped == ()
    assert small_table.onnx_sha256 == model.sha256
    assert dict(small_table.versions) == {"numpy": np.__version__, "onnxruntime": onnxruntime.__version__}


def test_nothing_is_printed_and_no_file_is_left(
    model: OnnxModel,
    small_set: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(model.path.parent.iterdir())
    calibrate(model, small_set, CalibrationOptions(method="percentile"))
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert sorted(model.path.parent.iterdir()) == before


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_progress_is_reported_by_chunks(model: OnnxModel, small_set: CalibrationSet, method: str) -> None:
    calls: list[tuple[str, int, int]] = []
    calibrate(model, small_set, CalibrationOptions(method=method), lambda *call: calls.append(call))
    assert calls == [("calibrate", done, 128) for done in range(CHUNK, 129, CHUNK)]


@pytest.mark.parametrize("method", ["minmax", "entropy"])
def test_black_images_are_refused(model: OnnxModel, small_set: CalibrationSet, method: str) -> None:
    black = CalibrationSet(
        np.zeros_like(small_set.pixels), small_set.images, small_set.skipped, small_set.drawn
    )
    with pytest.raises(
        BadInputError, match=r"^calibration saw only the constant value 0 in the images' pixels"
    ) as caught:
        calibrate(model, black, CalibrationOptions(method=method))
    assert caught.value.remedy == "give real images: these leave the network without a signal"


def test_a_dead_tensor_is_refused_by_name(
    small_model: Path, small_set: CalibrationSet, tmp_path: Path
) -> None:
    model = onnx.load(small_model)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "dense.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(8, -1e6, np.float32), bias.name))
    dead = tmp_path / "dead.onnx"
    onnx.save(model, dead)
    with pytest.raises(BadInputError, match=r"^calibration saw only the constant value 0 in hidden"):
        calibrate(load_model(dead), small_set, CalibrationOptions())


def test_each_tensor_of_a_branched_graph_gets_the_range_of_least_error(
    branched_models: Paths, branched_set: CalibrationSet, branched_tables: Tables
) -> None:
    """Tried again with every value in hand, instead of a histogram."""
    model, table = load_model(branched_models["residual"]), branched_tables["residual"]
    assert (table.method, table.parameters, table.channel_factors) == ("mse", {"histogram_bins": 2048}, {})
    graph = fold_norms(model.proto)
    assert set(table.ranges) == set(tensors_to_calibrate(graph))
    names = ["one_relu.out", "three_relu.out", "four_a.out"]  # none shares its range
    seen = watch_tensors(graph, names, branched_set.pixels, list)
    for name, *parts in zip(names, *seen, strict=True):
        values = np.concatenate(parts).astype(np.float64).ravel()
        span = max(-values.min(), values.max())

        def error(cut: float, values: np.ndarray = values, span: float = span) -> float:
            scale = cut * span / 127
            return float(((np.clip(np.rint(values / scale), -127, 127) * scale - values) ** 2).sum())

        low, high = table.ranges[name]
        found = max(-low, high) / span
        assert min(abs(found - cut) for cut in RANGE_CUTS) < 1e-5
        assert error(found) <= 1.02 * min(map(error, RANGE_CUTS)) < error(1.0)


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_every_method_finds_ranges_for_a_branched_graph(
    branched_models: Paths, branched_set: CalibrationSet, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "HISTOGRAM_BINS", 512)  # entropy takes time with their square
    model = load_model(branched_models["inception"])
    table = calibrate(model, branched_set, CalibrationOptions(method=method))
    assert set(table.ranges) == set(tensors_to_calibrate(fold_norms(model.proto)))
    assert (
        len({table.ranges[name] for name in ("a_relu.out", "c_relu.out", "branches.out", "reduced.out")}) == 1
    )


def test_a_branch_that_is_silent_among_others_does_not_stop_calibration(
    branched_models: Paths, branched_set: CalibrationSet
) -> None:
    model = load_model(branched_models["inception"])
    for tensor in model.proto.graph.initializer:
        if tensor.name == "b1.bias":  # ReLU lets nothing through
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(16, -1e4, np.float32), tensor.name))
    for method in ("mse", "percentile"):
        table = calibrate(model, branched_set, CalibrationOptions(method=method))
        assert table.ranges["b1_relu.out"] == (0.0, 1.0)


def test_as_many_images_run_at_once_as_their_tensors_leave_room_for(
    branched_models: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sizes(path: Path) -> list[int]:
        model = load_model(path)
        pixels = np.zeros((20, *model.contract.input_shape), np.uint8)
        names = tensors_to_calibrate(model.proto)[:2]
        return [len(part) for part in watch_tensors(model.proto, names, pixels, lambda values: values[0])]

    assert sizes(branched_models["mobile"]) == [8, 8, 4]
    monkeypatch.setattr(collect, "MOST_VALUES", 3 * (64 * 8 * 8 + 64 * 16 * 16))
    assert sizes(branched_models["mobile"]) == [3] * 6 + [2]
    monkeypatch.setattr(collect, "MOST_VALUES", 1)
    assert sizes(branched_models["mobile"]) == [1] * 20
