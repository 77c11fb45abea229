"""Engines whose input is not grey uint8: what the host does, what is left of the graph, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from double_tensorrt import RELEASES, DoubleTensorRt

from edge_dsc.build.engine import BuildRequest, build_again, build_engine
from edge_dsc.build.gate import GateOptions
from edge_dsc.checks.inspection import format_record
from edge_dsc.evaluate.evaluation import EvaluationRequest, evaluate
from edge_dsc.infer.classify import classify_files
from edge_dsc.infer.inference import InferRequest, infer_source
from engines.contract import COLOUR_RULE, NVJPEG_RULE, ModelContract
from engines.errors import EnvironmentProblem, UsageError
from engines.graph import contract_of
from engines.images import shape_input
from engines.record import BatchRange, Precision, load_record
from engines.runtimes import open_engine
from engines.trt import nvjpeg

Machine = Callable[[str], DoubleTensorRt]
PIXELS = np.random.default_rng(4).integers(0, 256, (4, 224, 224, 1), dtype=np.uint8)


def request_of(run: Path, out: Path, precision: Precision, runtime: str, **more: Any) -> BuildRequest:
    calibrated = precision in (Precision.INT8, Precision.MIXED)
    return BuildRequest(
        model=run / "model.onnx",
        precision=precision,
        runtime=runtime,
        batch=more.pop("batch", BatchRange(1, 2, 4)),
        calibration=run / "calibration.json" if calibrated else None,
        out=out,
        **more,
    )


def answers_of(engine: Path) -> np.ndarray:
    with open_engine(engine) as runner:
        return runner.run(shape_input(PIXELS, runner.record.contract))


def test_int8_pixels_are_grey_minus_128_with_a_black_border() -> None:
    contract = ModelContract(labels=("a", "b"), architecture="dsc", height=2, width=3)
    grey = np.array([[0, 1, 127], [128, 254, 255]], np.uint8)[:, :, None]
    signed = shape_input(grey, contract.with_input("int8", 1))
    black = [-128] * 5
    assert (signed.dtype, signed.flags.c_contiguous) == (np.int8, True)
    assert signed.tolist() == [[black, [-128, -128, -127, -1, -128], [-128, 0, 126, 127, -128], black]]
    assert shape_input(grey, contract.with_input("int8")).tolist() == [[[-128, -127, -1], [0, 126, 127]]]
    half = shape_input(np.stack([grey, grey]), contract.with_input("float16"))
    assert (half.dtype, half.shape, half[1].tolist()) == (np.float16, (2, 1, 2, 3), [grey[:, :, 0].tolist()])
    assert np.shares_memory(shape_input(grey, contract), grey)
    colour = ModelContract(labels=("a", "b"), architecture="x", height=2, width=3, decode=COLOUR_RULE)
    planes = shape_input(
        np.stack([grey[:, :, 0], grey[:, :, 0] * 0, grey[:, :, 0]], axis=2), colour.with_input("int8", 1)
    )
    assert (planes.shape, planes.flags.c_contiguous) == ((3, 4, 5), True)
    assert planes[0].tolist() == planes[2].tolist() == signed[0].tolist()
    assert (planes[1] == -128).all()


@pytest.mark.slow
def test_an_engine_that_takes_int8_answers_as_the_one_that_takes_uint8(
    calibrated_run: Path, textures: Path, tmp_path: Path
) -> None:
    """On ONNX Runtime, bit by bit, through files too; the record tells the input, and a rebuild repeats it."""
    plain = build_engine(request_of(calibrated_run, tmp_path / "a.engine", Precision.INT8, "onnxruntime"))
    signed = build_engine(
        request_of(calibrated_run, tmp_path / "b.engine", Precision.INT8, "onnxruntime", input="int8")
    )
    np.testing.assert_array_equal(answers_of(signed.path), answers_of(plain.path))
    assert dict(signed.record.layer_types) == dict(plain.record.layer_types)
    assert signed.record.contract == plain.record.contract.with_input("int8", 1)
    assert "--input int8" in signed.record.build_command
    assert "--input" not in plain.record.build_command
    assert "  takes int8 [N, 1, 226, 226]\n" in format_record(signed.record)
    assert "  takes" not in format_record(plain.record)
    nodes = [node.op_type for node in onnx.load(signed.path).graph.node]
    assert nodes[:3] == ["DequantizeLinear", "QuantizeLinear", "QLinearConv"]
    files = sorted(textures.glob("*/*.png"))[:5]
    seen = []
    for engine in (plain, signed):
        with open_engine(engine.path) as runner:
            seen.append([answer.probabilities for answer in classify_files(files, runner, threads=2)])
    assert seen[0] == seen[1]
    again = build_again(signed.path, tmp_path / "again" / "b.engine")
    assert again.path.read_bytes() == signed.path.read_bytes()
    assert again.record.contract == signed.record.contract


@pytest.mark.slow
def test_the_gate_and_a_float_first_layer(
    calibrated_run: Path, textures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(float_layers=("Conv_2",), text="mixed precision: as searched")
    monkeypatch.setattr("edge_dsc.build.assign.search", lambda *arguments, **more: found)
    gate = GateOptions(data=textures, max_drop=100)
    engines = [
        build_engine(
            request_of(
                calibrated_run,
                tmp_path / f"{kind}.engine",
                Precision.MIXED,
                "onnxruntime",
                gate=gate,
                input=kind,
            )
        )
        for kind in ("uint8", "int8")
    ]
    assert engines[1].record.layer_types["Conv_2"] == "FP32"
    assert engines[0].record.validation == engines[1].record.validation
    np.testing.assert_array_equal(answers_of(engines[0].path), answers_of(engines[1].path))
    found.float_layers = tuple(name for name in engines[0].record.layer_types if name != "MatMul_20")
    with pytest.raises(UsageError, match="no layer of this mixed engine runs in INT8"):
        build_engine(
            request_of(
                calibrated_run, tmp_path / "c.engine", Precision.MIXED, "onnxruntime", gate=gate, input="int8"
            )
        )


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(("precision", "kind"), [(Precision.INT8, "int8"), (Precision.FP16, "float16")])
def test_every_release_takes_it(
    machine: Machine, calibrated_run: Path, tmp_path: Path, release: str, precision: Precision, kind: str
) -> None:
    trt = machine(release)
    runtime = "tensorrt-rtx" if release == "rtx" else "tensorrt"
    engines = [
        build_engine(request_of(calibrated_run, tmp_path / f"{name}.engine", precision, runtime, input=name))
        for name in ("uint8", kind)
    ]
    plain, other = engines
    assert dict(plain.record.layer_types) == dict(other.record.layer_types)
    assert other.record.contract.input_shape == ((1, 226, 226) if kind == "int8" else (1, 224, 224))
    with open_engine(other.path) as runner:
        seen = runner.run(shape_input(PIXELS, runner.record.contract))
    np.testing.assert_array_equal(seen, answers_of(plain.path))
    assert trt._ran


def test_the_real_rtx_builder_takes_it(calibrated_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    built = build_engine(
        request_of(calibrated_run, tmp_path / "a.engine", Precision.INT8, "tensorrt-rtx", input="int8")
    )
    assert built.record.layers["INT8"] == 8
    assert load_record(built.path).contract.dtype == "int8"
    half = build_engine(
        request_of(calibrated_run, tmp_path / "b.engine", Precision.FP16, "tensorrt-rtx", input="float16")
    )
    assert half.record.layers == {"FP16": 9}


@pytest.mark.parametrize(
    ("precision", "kind", "message"),
    [
        (Precision.FP32, "int8", "--input int8 is for int8 and mixed, not fp32"),
        (Precision.FP16, "int8", "--input int8 is for int8 and mixed, not fp16"),
        (Precision.INT8, "float16", "--input float16 is for fp16, not int8"),
    ],
)
def test_what_has_no_place_for_it_is_refused(
    calibrated_run: Path, tmp_path: Path, precision: Precision, kind: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build_engine(request_of(calibrated_run, tmp_path / "a.engine", precision, "onnxruntime", input=kind))


@pytest.fixture
def no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, whose threads have no decoder open."""
    monkeypatch.setattr(nvjpeg, "find_gpu", lambda: (None, "no CUDA driver"))
    monkeypatch.setattr(nvjpeg, "_OF_THREAD", threading.local())


@pytest.mark.usefixtures("no_decoder")
def test_an_engine_of_nvjpeg_is_refused_where_there_is_none(
    calibrated_run: Path, textures: Path, tmp_path: Path
) -> None:
    """It is built anywhere, judged and used only where its pixels can be had; the record says which they are."""
    request = request_of(
        calibrated_run, tmp_path / "a.engine", Precision.FP32, "onnxruntime", decode=NVJPEG_RULE
    )
    built = build_engine(request)
    assert built.record.contract.decode == NVJPEG_RULE
    assert "--decode nvjpeg" in built.record.build_command
    assert f"\n  JPEGs decoded by nvJPEG ({NVJPEG_RULE})" in format_record(built.record)
    assert contract_of(onnx.load(built.path), "engine") == built.record.contract
    rows = tmp_path / "rows.csv"
    rows.write_text("path\nkept\n")
    with pytest.raises(EnvironmentProblem, match="decoded by nvJPEG: no CUDA driver") as seen:
        infer_source(InferRequest(engine=built.path, source=str(textures), out=rows))
    assert seen.value.exit_code == 3 and "build an engine without --decode nvjpeg" in seen.value.remedy
    assert rows.read_text() == "path\nkept\n"
    with pytest.raises(EnvironmentProblem, match="decoded by nvJPEG"):
        evaluate(EvaluationRequest(engine=built.path, data=textures))
    with pytest.raises(EnvironmentProblem, match="decoded by nvJPEG"):
        build_engine(replace(request, gate=GateOptions(data=textures), out=tmp_path / "b.engine"))
    assert not (tmp_path / "b.engine").exists()
    again = build_again(built.path, tmp_path / "again.engine")
    assert (again.path.read_bytes(), again.record.contract) == (
        built.path.read_bytes(),
        built.record.contract,
    )


def test_the_gate_judges_with_the_engines_own_pixels(
    calibrated_run: Path, textures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP32 sees what it was trained on, the engine what nvJPEG makes of the same files."""
    jpegs = tmp_path / "jpegs"
    for path in sorted(textures.glob("*/00*.png")):
        (jpegs / path.parent.name).mkdir(parents=True, exist_ok=True)
        picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        cv2.imwrite(str(jpegs / path.parent.name / f"{path.stem}.jpg"), picture)
    monkeypatch.setattr(nvjpeg, "decode_jpeg", lambda data, name: np.full((64, 64), 200, np.uint8))
    monkeypatch.setattr(nvjpeg, "require_nvjpeg", lambda: None)
    request = request_of(
        calibrated_run,
        tmp_path / "a.engine",
        Precision.FP32,
        "onnxruntime",
        decode=NVJPEG_RULE,
        gate=GateOptions(data=jpegs, max_drop=100),
    )
    agreement = build_engine(request).record.validation
    assert agreement is not None
    assert agreement.agreement.largest_difference > 0.01  # the same graph, other pixels
    plain = build_engine(replace(request, decode=None, out=tmp_path / "b.engine")).record.validation
    assert plain is not None and plain.agreement.largest_difference == 0
