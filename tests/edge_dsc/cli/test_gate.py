"""An INT8 engine is proven, or it is not shipped: accuracy, precision, table and model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from calibration.qdq import quantize
from calibration.table import load_table, save_table
from edge_dsc.build import engine as engine_builder
from engines.files import canonical_json, sha256_bytes
from engines.record import RECORD, EngineRecord, load_record, record_path, save_record

ORT = ("--backend", "onnxruntime")
LABELS = ("clear", "focal", "diffuse")


def refused(done: Any, code: int, *words: str) -> None:
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert (done.code, len(errors)) == (code, 1), done.err
    for word in words:
        assert word in errors[0]
    assert done.out == ""


@pytest.fixture(scope="module")
def answered(deployed_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 new images in folders named after the FP32 model's own answers: its accuracy on them is 100 %."""
    root = tmp_path_factory.mktemp("answered")
    session = onnxruntime.InferenceSession(deployed_models["dsc"], providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(5)
    for index in range(90):
        coarse = rng.integers(0, 60 + index % 3 * 90, (8, 8), dtype=np.uint8)
        pixels = cv2.resize(coarse, (224, 224), interpolation=cv2.INTER_LINEAR)
        (answer,) = session.run(None, {"image": pixels[None, :, :, None]})
        folder = root / LABELS[int(answer.argmax())]
        folder.mkdir(exist_ok=True)
        cv2.imwrite(str(folder / f"{index:02}.png"), pixels)
    assert len(list(root.iterdir())) == 3
    return root


@pytest.fixture
def int8(run: Path) -> Path:
    return run / "dsc-int8.onnxruntime.engine"


def clip_ranges(run: Path, factor: float) -> None:
    """Seal a table whose ranges cut most values off: no check of files can see that."""
    path = run / "calibration.json"
    table = load_table(path)
    ranges = {name: (low * factor, high * factor) for name, (low, high) in table.ranges.items()}
    save_table(path, msgspec.structs.replace(table, ranges=ranges))


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir()}


def test_an_engine_within_the_budget_carries_its_proof(
    edge_dsc: Any, run: Path, int8: Path, answered: Path
) -> None:
    done = edge_dsc("build-engine", run, "--int8", *ORT, "--validate", answered, "--max-drop", 10)
    assert done.code == 0, done.err
    assert "accuracy gate: " in done.out and "within the budget of 10" in done.out
    record = load_record(int8)
    found = record.validation
    assert found is not None and found.passed
    assert (found.max_drop, found.skipped, found.images) == (10, 0, f"all of {answered}")
    assert found.answered_by == f"the engine on onnxruntime {onnxruntime.__version__}"
    assert (found.agreement.images, found.agreement.accuracy.reference) == (90, 1.0)
    assert found.agreement.lost == len(found.agreement.flipped) == 90 - found.agreement.same_top1
    assert f"--validate {answered} --max-drop 10" in record.build_command
    shown = edge_dsc("inspect", int8)
    assert "mcnemar_p" in shown.out
    assert edge_dsc("inspect", int8, "--json").json["record"]["validation"] == json.loads(
        msgspec.json.encode(found)
    )


def test_an_engine_beyond_the_budget_is_not_shipped(
    edge_dsc: Any, run: Path, int8: Path, answered: Path
) -> None:
    clip_ranges(run, 0.05)
    before = files(run)
    done = edge_dsc("build-engine", run, "--int8", *ORT, "--validate", answered, "--json")
    refused(done, 5, "INT8 loses", "points of accuracy on 90 images, 0.5 are allowed; nothing was written")
    table = done.err.partition("accuracy gate: ")[2]
    for words in ("BEYOND the budget of 0.5", "100.00 %", "McNemar's exact p = ", ".png is "):
        assert words in table
    assert files(run) == before


def test_the_first_engine_beyond_the_budget_leaves_no_file(edge_dsc: Any, run: Path, answered: Path) -> None:
    clip_ranges(run, 0.05)
    before = files(run)
    out = run / "new" / "mine.engine"
    refused(
        edge_dsc("build-engine", run, "--int8", *ORT, "--validate", answered, "--out", out), 5, "INT8 loses"
    )
    assert list(out.parent.iterdir()) == []
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_fp32_loses_nothing(edge_dsc: Any, run: Path, answered: Path) -> None:
    done = edge_dsc("build-engine", run, "--fp32", *ORT, "--validate", answered, "--max-drop", 0, "--json")
    assert done.code == 0, done.err
    agreement = done.json["record"]["validation"]["agreement"]
    assert (agreement["same_top1"], agreement["flipped"]) == (90, [])
    assert agreement["largest_difference"] < 1e-5


@pytest.mark.slow
def test_an_engine_that_cannot_run_here_is_judged_by_its_graph(
    edge_dsc: Any, run: Path, answered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("engines.trt.runtime.find_gpu", lambda *_: (None, "no CUDA driver: none here"))
    rtx = ("--backend", "tensorrt-rtx", "--validate", answered)
    done = edge_dsc("build-engine", run, "--int8", *rtx, "--max-drop", 20)
    assert done.code == 0, done.err
    assert "its graph on ONNX Runtime, because the engine cannot run here: no CUDA driver" in done.out
    clip_ranges(run, 0.05)
    before = files(run)
    refused(edge_dsc("build-engine", run, "--int8", *rtx), 5, "INT8 loses")
    assert files(run) == before


def test_a_budget_needs_images(edge_dsc: Any, run: Path, tmp_path: Path) -> None:
    refused(edge_dsc("build-engine", run, "--int8", *ORT, "--max-drop", 1), 2, "--max-drop", "--validate DIR")
    nowhere = tmp_path / "nowhere"
    refused(edge_dsc("build-engine", run, "--int8", *ORT, "--validate", nowhere), 9, "does not exist")


def test_the_layers_are_named(edge_dsc: Any, run: Path, int8: Path) -> None:
    done = edge_dsc("build-engine", run, "--int8", *ORT)
    assert done.code == 0, done.err
    types = load_record(int8).layer_types
    names = [
        node.name for node in onnx.load(run / "model.onnx").graph.node if node.op_type in ("Conv", "MatMul")
    ]
    assert types == {name: "FP32" if name == names[-1] else "INT8" for name in names}
    assert f"INT8: {', '.join(names[:-1])}" in done.out
    assert f"  layer_types:\n    {names[0]}: INT8\n" in edge_dsc("inspect", int8).out


def test_a_record_of_an_older_version_is_read(int8: Path) -> None:
    record = load_record(int8)
    path = record_path(int8)
    body = msgspec.to_builtins(record)
    for name in ("layer_types", "float_layers", "validation", "calibration", "workspace_mib", "tuning"):
        del body[name]
    head = {"kind": RECORD.name, "schema_version": 1}
    path.write_text(json.dumps({**head, **body, "record_sha256": sha256_bytes(canonical_json(body))}))
    old = load_record(int8)
    assert (old.layer_types, old.float_layers, old.validation) == ({}, (), None)
    assert (old.calibration, old.workspace_mib) == (None, 1024)
    save_record(int8, old)
    assert load_record(int8) == old


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt-rtx"])
def test_a_layer_silently_left_in_fp32(
    edge_dsc: Any, run: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph lost one layer's Q/DQ pair on its way: the build names the layer."""
    if backend != "onnxruntime":
        pytest.importorskip("tensorrt_rtx")

    def forgetful(model: Any, precision: Any, table: Any, runtime: Any, **more: Any) -> Any:
        return quantize(model, table, signed_activations=runtime.signed_activations, float_layers=("Conv_6",))

    before = files(run)
    monkeypatch.setattr(engine_builder, "graph_in_precision", forgetful)
    done = edge_dsc("build-engine", run, "--int8", "--backend", backend)
    refused(done, 5, "the engine would run Conv_6 in FP32, not INT8", "nothing was written")
    assert files(run) == before


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt-rtx"])
def test_fp32_under_an_int8_name(
    edge_dsc: Any, run: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "onnxruntime":
        pytest.importorskip("tensorrt_rtx")
    before = files(run)
    monkeypatch.setattr(engine_builder, "graph_in_precision", lambda model, *rest, **more: model)
    done = edge_dsc("build-engine", run, "--int8", "--backend", backend)
    refused(done, 5, "asked for a layer in INT8, the engine would have 9 in FP32", "nothing was written")
    assert files(run) == before


def test_a_table_of_another_model(edge_dsc: Any, run: Path, deployed_models: dict[str, Path]) -> None:
    other = run / "other"
    other.mkdir()
    shutil.copy(deployed_models["cnn"], other / "model.onnx")
    done = edge_dsc("build-engine", other, "--int8", *ORT, "--calibration", run / "calibration.json")
    refused(done, 4, "calibration table is of another model", f"edge-dsc calibrate {other / 'model.onnx'}")
    assert [path.name for path in other.iterdir()] == ["model.onnx"]


def test_weights_changed_after_calibration(edge_dsc: Any, run: Path) -> None:
    """One weight of one layer, by a billionth part of its size more than nothing."""
    model = onnx.load(run / "model.onnx")
    stem = next(tensor for tensor in model.graph.initializer if tensor.name == "stem.weight")
    values = numpy_helper.to_array(stem).copy()
    values.flat[0] = np.nextafter(values.flat[0], np.float32(1))
    stem.CopyFrom(numpy_helper.from_array(values, stem.name))
    onnx.save(model, run / "model.onnx")
    before = files(run)
    refused(edge_dsc("build-engine", run, "--int8", *ORT), 4, "of another model", "edge-dsc calibrate")
    assert files(run) == before


def test_ranges_edited_by_hand(edge_dsc: Any, run: Path) -> None:
    path = run / "calibration.json"
    document = json.loads(path.read_text())
    name = next(iter(document["ranges"]))
    document["ranges"][name][1] *= 2
    path.write_text(json.dumps(document))
    refused(
        edge_dsc("build-engine", run, "--int8", *ORT), 4, "was edited after it was made", "edge-dsc calibrate"
    )


@pytest.mark.slow
def test_evaluate_shows_the_paired_figures(edge_dsc: Any, run: Path, int8: Path, answered: Path) -> None:
    reference = run / "dsc-fp32.onnxruntime.engine"
    done = edge_dsc("evaluate", int8, answered, "--reference", reference)
    assert done.code == 0, done.err
    for words in (
        "90 images",
        "calibration error",
        "95 % interval",
        "McNemar's exact p = ",
        "same class for",
    ):
        assert words in done.out
    agreement = edge_dsc("evaluate", int8, answered, "--reference", reference, "--json").json["agreement"]
    assert agreement["accuracy"]["reference"] == 1.0
    assert agreement["lost"] == len(agreement["flipped"])


def mixed_record(run: Path, backend: str = "onnxruntime") -> EngineRecord:
    return load_record(run / f"dsc-mixed.{backend}.engine")


@pytest.fixture
def two_float_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the search leave two layers in floating point; its calls are counted by the images they got."""
    calls: list[int] = []

    def search(model: Any, table: Any, pixels: Any, labels: Any, **more: Any) -> Any:
        calls.append(len(labels))
        return SimpleNamespace(float_layers=("Conv_6", "MatMul_18"), text="mixed precision: as searched")

    monkeypatch.setattr("edge_dsc.build.assign.search", search)
    return calls


@pytest.mark.slow
def test_mixed_searches_and_is_judged_on_other_images(edge_dsc: Any, run: Path, answered: Path) -> None:
    mixed = ("--precision", "mixed", "--validate", answered, "--max-drop", 10)
    done = edge_dsc("build-engine", run, *mixed, *ORT)
    assert done.code == 0, done.err
    record = mixed_record(run)
    assert record.precision.value == "mixed"
    assert any("of 256 mixes tried on 45 images" in note for note in record.notes)
    assert record.validation is not None and record.validation.agreement.images == 45
    assert record.validation.images == f"all of {answered} but 45 that the model has seen"
    left = {name for name, kind in record.layer_types.items() if kind == "FP32"}
    assert left == {*record.float_layers, "MatMul_21"}
    assert "--precision mixed" in record.build_command


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "kind"), [("onnxruntime", "FP32"), ("tensorrt-rtx", "FP16")])
def test_a_layer_left_in_float_runs_in_float(
    edge_dsc: Any, run: Path, answered: Path, backend: str, kind: str, two_float_layers: list[int]
) -> None:
    if backend != "onnxruntime":
        pytest.importorskip("tensorrt_rtx")
    mixed = ("--precision", "mixed", "--validate", answered, "--max-drop", 50, "--backend", backend)
    done = edge_dsc("build-engine", run, *mixed)
    assert done.code == 0, done.err
    record = mixed_record(run, backend)
    assert record.float_layers == ("Conv_6", "MatMul_18")
    others = {name for name, found in record.layer_types.items() if found == kind}
    assert others == {"Conv_6", "MatMul_18", "MatMul_21"}
    assert record.layers == {"INT8": 6, kind: 3}


@pytest.mark.slow
def test_the_next_build_repeats_the_assignment(
    edge_dsc: Any, run: Path, answered: Path, two_float_layers: list[int]
) -> None:
    mixed = ("--precision", "mixed", "--validate", answered, *ORT)
    assert edge_dsc("build-engine", run, *mixed, "--max-drop", 50).code == 0
    first = (run / "dsc-mixed.onnxruntime.engine").read_bytes()
    done = edge_dsc("build-engine", run, *mixed, "--max-drop", 50)
    assert two_float_layers == [45]
    assert "Conv_6, MatMul_18 in floating point, as in the engine before" in done.out
    assert (run / "dsc-mixed.onnxruntime.engine").read_bytes() == first
    other = run / "other.engine"
    layers = ("--layers", run / "dsc-mixed.onnxruntime.engine", "--out", other)
    assert edge_dsc("build-engine", run, *mixed, "--max-drop", 60, *layers).code == 0
    assert two_float_layers == [45]
    assert load_record(other).float_layers == ("Conv_6", "MatMul_18")
    assert edge_dsc("build-engine", run, *mixed, "--max-drop", 60).code == 0
    assert two_float_layers == [45, 45]  # another budget is another question


def test_a_mixed_engine_beyond_the_budget_is_not_shipped(
    edge_dsc: Any, run: Path, answered: Path, two_float_layers: list[int]
) -> None:
    clip_ranges(run, 0.05)
    before = files(run)
    refused(
        edge_dsc("build-engine", run, "--precision", "mixed", "--validate", answered, *ORT), 5, "MIXED loses"
    )
    assert files(run) == before


def test_a_layer_that_should_be_float_but_is_not(
    edge_dsc: Any, run: Path, answered: Path, two_float_layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ONNX Runtime's own optimiser would do to them, were it let."""
    monkeypatch.setattr("engines.cpu.ort._DISABLED", ())
    before = files(run)
    done = edge_dsc("build-engine", run, "--precision", "mixed", "--validate", answered, *ORT)
    refused(done, 5, "the engine would run Conv_6 in INT8, not float")
    assert files(run) == before


def test_precision_by_name_and_by_flag(edge_dsc: Any, run: Path, answered: Path) -> None:
    done = edge_dsc("build-engine", run, "--precision", "int8", "--int8", *ORT, "--json")
    assert done.json["record"]["precision"] == "int8"
    refused(
        edge_dsc("build-engine", run, "--precision", "mixed", "--int8", *ORT),
        2,
        "--int8 and --precision mixed exclude each other",
    )
    refused(edge_dsc("build-engine", run, "--precision", "mixed", *ORT), 2, "mixed", "--validate DIR")
    refused(
        edge_dsc("build-engine", run, "--int8", "--layers", run / "dsc-int8.onnxruntime.engine", *ORT),
        2,
        "--layers has no use in int8",
    )
    engine = ("--layers", run / "dsc-int8.onnxruntime.engine")
    mixed = ("--precision", "mixed", "--validate", answered, *ORT)
    refused(edge_dsc("build-engine", run, *mixed, *engine), 2, "is in int8: it has no assignment of layers")
    (run / "calibration.json").unlink()
    refused(edge_dsc("build-engine", run, *mixed), 2, "mixed precision needs calibration", "--calib-data DIR")
