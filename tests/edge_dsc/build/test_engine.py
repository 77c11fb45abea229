"""An engine is built from what is known once, and built again from what its record says."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from branched_networks import Network
from onnx import numpy_helper

from calibration.table import CalibrationImage, CalibrationTable, load_table, save_table
from edge_dsc.build.calibrate import CalibrationRequest, run_calibration
from edge_dsc.build.engine import BuildRequest, build_again, build_engine, rebuild_engine
from edge_dsc.build.gate import GateOptions
from engines.cpu import ort, vino
from engines.errors import ArtefactError, EnvironmentProblem, UsageError
from engines.files import canonical_json, sha256_bytes
from engines.graph import load_model, seal_model
from engines.record import RECORD, BatchRange, EngineRecord, Precision, Tuning, load_record, record_path
from engines.runtimes import BuildOptions, BuildResult, open_engine
from engines.trt.runtime import TENSORRT_RTX

FLOAT_LAYERS = ("Conv_6", "MatMul_18")


@pytest.fixture
def run(calibrated_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibrated_run, tmp_path / "run"))


def request_of(run: Path, precision: Precision = Precision.FP32, **more: Any) -> BuildRequest:
    table = run / "calibration.json" if precision in (Precision.INT8, Precision.MIXED) else None
    batch = BatchRange(1, 2, 4)
    return BuildRequest(
        model=run / "model.onnx",
        precision=precision,
        runtime="onnxruntime",
        batch=batch,
        calibration=table,
        workspace_mib=77,
        **more,
    )


@pytest.fixture
def mixed(run: Path, textures: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mixed engine whose search, which takes seconds, left two layers in floating point."""
    found = SimpleNamespace(float_layers=FLOAT_LAYERS, text="mixed precision: as searched")
    monkeypatch.setattr("edge_dsc.build.assign.search", lambda *arguments, **more: found)
    gate = GateOptions(data=textures, max_drop=100)
    return build_engine(request_of(run, Precision.MIXED, gate=gate)).path


def what_is_the_same(record: EngineRecord) -> dict[str, Any]:
    """All of a record but when, where and how long."""
    different = ("build_seconds", "build_command", "created", "validation", "notes", "onnx", "calibration")
    return {name: getattr(record, name) for name in record.__struct_fields__ if name not in different}


@pytest.mark.slow
def test_calibration_and_build_in_one_command_read_each_file_once(
    run: Path, textures: Path, reads: Counter[Path]
) -> None:
    model, table = run / "model.onnx", run / "calibration.json"
    made = run_calibration(CalibrationRequest(model=model, data=textures, method="minmax", images=128))
    gate = GateOptions(data=textures, max_drop=100)
    request = replace(request_of(run, Precision.INT8, gate=gate), calibration=None)
    built = build_engine(request, calibrated=made)
    assert (reads[model], reads[table]) == (1, 1)  # of the table only its hash is wanted
    images = Counter(reads[path] for path in textures.rglob("*.png"))
    # The head of every image once for the mark of synthetic ones, and the image once for its hash; then once for
    # calibration, or once each for FP32 and INT8 in the gate.
    assert images == {3: 128, 4: 22}
    assert built.record.calibration_sha256 == sha256_bytes(table.read_bytes())
    assert built.record.calibration == "calibration.json"


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_an_engine_is_built_again_from_any_folder(
    run: Path, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    built = build_engine(request_of(Path(), precision, out=Path("engines/dsc.engine")))
    assert "--workspace 77" in built.record.build_command
    assert built.record.onnx == "../model.onnx"
    assert built.record.calibration == (None if precision is Precision.FP32 else "../calibration.json")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = build_again(run / built.path, elsewhere / built.path.name)
    assert what_is_the_same(again.record) == what_is_the_same(built.record)
    assert again.record.workspace_mib == 77
    assert (run / built.path).read_bytes() == again.path.read_bytes()
    assert load_record(again.path) == again.record


def test_an_engine_is_built_again_as_its_builder_was_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    asked: list[BuildOptions] = []
    build = TENSORRT_RTX.build

    def note(runtime: object, model: bytes, out: Path, options: BuildOptions) -> BuildResult:
        asked.append(options)
        return build(model, out, options)

    monkeypatch.setattr(type(TENSORRT_RTX), "build", note)
    tuning = Tuning(optimization_level=1, max_aux_streams=0)
    built = build_engine(replace(request_of(run, tuning=tuning), runtime="tensorrt-rtx"))
    assert built.record.tuning == tuning
    assert "--workspace 77 --optimization-level 1 --max-aux-streams 0 --out" in built.record.build_command
    again = build_again(built.path, tmp_path / built.path.name)
    assert again.record.tuning == tuning
    # The first build keeps its timings, where a release has any; the second measures for itself.
    assert [options.timing_cache for options in asked] == [run, None]
    assert [options.tuning for options in asked] == [tuning, tuning]


def test_images_that_chose_the_layers_do_not_judge_them(
    run: Path, textures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[int] = []

    def search(model: Any, table: Any, pixels: Any, labels: list[int], **more: Any) -> Any:
        searched.append(len(labels))
        return SimpleNamespace(float_layers=FLOAT_LAYERS, text="mixed precision: as searched")

    monkeypatch.setattr("edge_dsc.build.assign.search", search)
    table = load_table(run / "calibration.json")
    others = tuple(msgspec.structs.replace(image, sha256=f"{image.sha256}x") for image in table.images)
    save_table(run / "calibration.json", msgspec.structs.replace(table, images=others))
    gate = GateOptions(data=textures, max_drop=100)
    found = build_engine(request_of(run, Precision.MIXED, gate=gate)).record.validation
    assert found is not None
    assert (searched, found.agreement.images) == ([75], 75)
    assert found.images == f"all of {textures} but 75 that the model has seen"


def test_a_mixed_engine_keeps_its_layers_without_a_search(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(*arguments: Any, **more: Any) -> None:
        raise AssertionError("it was searched again")

    monkeypatch.setattr("edge_dsc.build.assign.search", search)
    again = build_again(mixed, tmp_path / "again.engine").record
    first = load_record(mixed)
    assert first.validation is not None and again.validation is None  # built without its gate
    assert again.float_layers == first.float_layers == FLOAT_LAYERS
    assert again.engine_sha256 == first.engine_sha256
    assert f"mixed: Conv_6, MatMul_18 in floating point, as in {mixed.name}" in again.notes


def test_a_record_of_version_1_is_built_again_with_the_table_beside_its_model(
    run: Path, tmp_path: Path
) -> None:
    built = build_engine(request_of(run, Precision.INT8))
    body = msgspec.to_builtins(built.record)
    for name in ("calibration", "workspace_mib", "tuning"):
        del body[name]
    head = {"kind": RECORD.name, "schema_version": 1}
    seal = {"record_sha256": sha256_bytes(canonical_json(body))}
    record_path(built.path).write_text(json.dumps({**head, **body, **seal}))
    again = build_again(built.path, tmp_path / "again.engine").record
    assert (again.engine_sha256, again.workspace_mib) == (built.record.engine_sha256, 1024)


def test_another_table_than_the_engines_is_refused(run: Path, tmp_path: Path) -> None:
    built = build_engine(request_of(run, Precision.INT8))
    table = load_table(run / "calibration.json")
    save_table(run / "calibration.json", msgspec.structs.replace(table, seed=9))
    with pytest.raises(
        ArtefactError, match=r"calibration\.json is not the calibration table that .* was built with"
    ):
        build_again(built.path, tmp_path / "again.engine")
    assert not (tmp_path / "again.engine").exists()


@pytest.mark.slow
def test_another_process_builds_it_and_imports_nothing_from_the_callers_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build_engine(request_of(run))
    for stray in ("edge_dsc.py", "onnx.py", "calibration.py"):
        (tmp_path / stray).write_text("raise SystemExit('imported from the current folder')\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new").mkdir()
    again = rebuild_engine(built.path.relative_to(tmp_path), Path("new"))
    assert again == tmp_path / "new" / built.path.name
    assert what_is_the_same(load_record(again)) == what_is_the_same(built.record)
    (run / "model.onnx").unlink()
    with pytest.raises(
        EnvironmentProblem, match=r"cannot build .* again: cannot read .*model\.onnx"
    ) as caught:
        rebuild_engine(built.path, tmp_path / "new")
    assert built.record.build_command in caught.value.remedy


def test_a_search_needs_images(run: Path) -> None:
    with pytest.raises(UsageError, match="mixed precision is searched and judged on labelled images"):
        build_engine(request_of(run, Precision.MIXED))


def test_the_reference_of_the_gate_is_called_fp32_and_the_engine_by_its_name(
    run: Path, textures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    whole: Callable[..., Any] = ort.OrtRunner.__init__

    def noting(self: Any, session: Any, record: EngineRecord, *more: Any) -> None:
        opened.append(record.engine)
        whole(self, session, record, *more)

    monkeypatch.setattr(ort.OrtRunner, "__init__", noting)
    built = build_engine(request_of(run, gate=GateOptions(data=textures)))
    assert opened == ["FP32", built.path.name]
    assert built.record.validation is not None
    assert built.record.validation.agreement.reference == "FP32"


@pytest.fixture(scope="module")
def large_sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answer turns where two products of bytes are added in 16 bits, and its calibration beside it.

    The even channels of ``wide`` sum 64 equal values, which are as large as pairs of bytes may be; the odd ones every
    other of them, in which no pair overflows. Class 0 is the even channels times 1/16, class 1 the odd ones times 3/32:
    4 against 3, and about 2 against 3 where the even ones overflow.
    """
    net = Network("sums")
    weight = np.ones((64, 64, 1, 1), np.float32)
    weight[1::2, 1::2] = 0
    means = np.zeros((3, 64), np.float32)
    means[0, 0::2], means[1, 1::2] = 1 / (32 * 16), 3 / (32 * 32)
    net.store("stem.weight", np.full((64, 1, 1, 1), 1 / 255, np.float32))
    net.store("wide.weight", weight)
    x = net.add("Conv", "stem", net.pixels(), "stem.weight", kernel_shape=[1, 1])
    graph = net.finish(net.add("Conv", "wide", x, "wide.weight", kernel_shape=[1, 1]), 64)
    (stored,) = (tensor for tensor in graph.graph.initializer if tensor.name == "logits.weight")
    stored.CopyFrom(numpy_helper.from_array(means, stored.name))
    folder = tmp_path_factory.mktemp("sums")
    (folder / "model.onnx").write_bytes(seal_model(graph))
    model = load_model(folder / "model.onnx")
    table = CalibrationTable(
        method="minmax",
        parameters={},
        seed=0,
        ranges={"planes.out": (0, 255), "stem.out": (0, 1), "flatten.out": (0, 64)},
        onnx_sha256=model.sha256,
        preprocess_sha256=model.contract.preprocess_sha256,
        images=tuple(CalibrationImage(f"{index}.png", "clear", f"{index}") for index in range(128)),
        versions={},
    )
    save_table(folder / "calibration.json", table)
    return folder / "model.onnx"


def answer_of(model: Path, precision: Precision, out: Path) -> tuple[EngineRecord, np.ndarray]:
    table = model.with_name("calibration.json") if precision is Precision.INT8 else None
    built = build_engine(
        BuildRequest(model=model, precision=precision, runtime="openvino", calibration=table, out=out)
    )
    pixels = np.random.default_rng(0).integers(200, 256, (1, 32, 32, 1), np.uint8)
    with open_engine(built.path) as runner:
        return built.record, runner.run(pixels)[0]


def test_openvino_sums_exactly_on_any_processor(
    large_sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    exactly = vino._sums_exactly()
    plain, expected = answer_of(large_sums, Precision.FP32, tmp_path / "a.engine")
    record, seen = answer_of(large_sums, Precision.INT8, tmp_path / "b.engine")
    np.testing.assert_allclose(seen, expected, atol=0.02)
    assert expected.argmax() == 0 and (plain.weight_bits, record.weight_bits) == (None, 8 if exactly else 7)
    assert any("weights of 7 bits" in note for note in record.notes) != exactly
    if exactly:
        return
    # Taken for a processor that sums exactly, this one answers another class.
    monkeypatch.setattr(vino, "_sums_exactly", lambda: True)
    taken, wrong = answer_of(large_sums, Precision.INT8, tmp_path / "c.engine")
    assert (taken.weight_bits, wrong.argmax()) == (8, 1)
