"""Engines for the Deep Learning Accelerator, on stand-ins of the releases that build for it, and refused elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from double_tensorrt import DoubleTensorRt

from edge_dsc.build.calibrate import CalibrationRun
from edge_dsc.build.engine import BuildRequest, build_again, build_engine
from edge_dsc.checks.inspection import format_record
from engines.errors import AccuracyGateError, EnvironmentProblem, UsageError
from engines.record import BatchRange, Precision, Tuning, load_record
from engines.runtimes import open_engine
from engines.trt import versions

Machine = Callable[[str], DoubleTensorRt]
CONVOLUTIONS = ("Conv_2", "Conv_5", "Conv_6", "Conv_9", "Conv_10", "Conv_13", "Conv_14")


def request_of(model: Path, out: Path, **more: Any) -> BuildRequest:
    return BuildRequest(
        model=model,
        out=out / "dsc.engine",
        **{
            "precision": Precision.FP16,
            "runtime": "tensorrt",
            "batch": BatchRange(2, 2, 2),
            "tuning": Tuning(dla=1),
        }
        | more,
    )


def restore_dla(trt: DoubleTensorRt) -> None:
    """11.4.1 has it again; the surface is of 11.4.0."""
    if trt.__version__.startswith("11.4.0"):
        trt.__version__ = "11.4.1.7"


@pytest.mark.parametrize("release", ["8.6", "10.3", "11.4"])
def test_fp16_on_a_core(
    machine: Machine, deployed_models: dict[str, Path], tmp_path: Path, release: str
) -> None:
    trt = machine(release)
    restore_dla(trt)
    built = build_engine(request_of(deployed_models["dsc"], tmp_path))
    record = load_record(built.path)
    assert record.tuning.dla == 1
    assert record.contract.dtype == "float16"  # no Cast in front
    assert record.layers == {"FP16": 9}
    assert set(record.gpu_layers).isdisjoint(CONVOLUTIONS)
    assert "MatMul_18" in record.gpu_layers
    assert not any("Cast_0" in name or name == "pixels" for name in record.gpu_layers)
    assert f"  DLA core 1, on the GPU: {', '.join(record.gpu_layers)}\n" in format_record(record) + "\n"
    assert "--dla 1 --input float16" in record.build_command
    placed = json.loads(built.path.read_bytes().split(b"\n", 2)[1])  # the stand-in's own words
    assert placed["dla"] == 1 and set(placed["on_dla"]) >= set(CONVOLUTIONS)
    with open_engine(built.path) as runner:
        assert runner.run(np.zeros((2, 1, 224, 224), np.float16)).shape == (2, 3)
    again = build_again(built.path, tmp_path / "again.engine")
    assert again.path.read_bytes() == built.path.read_bytes()
    assert again.record.gpu_layers == record.gpu_layers


@pytest.mark.slow
def test_int8_by_the_entropy_calibrator(
    machine: Machine,
    calibrated: Callable[..., CalibrationRun],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pixels stay uint8, and what was set for the accelerator's layers is their proof."""
    machine("10.3")
    run = calibrated("10.3")
    request = request_of(run.model.path, tmp_path, precision=Precision.INT8, calibration=run.path)
    record = build_engine(request).record
    assert record.contract == run.model.contract
    assert record.layers == {"INT8": 8, "FP16": 1}
    assert record.gpu_layers[0] == "Cast_0"
    insist = versions.insist_on_int8
    monkeypatch.setattr(
        versions, "insist_on_int8", lambda *asked: insist(*asked[:2], record.layer_types.keys() - {"Conv_2"})
    )
    with pytest.raises(AccuracyGateError, match="would run Conv_2 in FP16, not INT8"):
        build_engine(request)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"precision": Precision.FP32}, "DLA computes in FP16 and INT8, not fp32"),
        ({"precision": Precision.INT8}, "needs ranges by tensorrt-entropy, these are by minmax"),
        ({"batch": BatchRange(1, 8, 32)}, "DLA runs one batch size, 1:8:32 was asked for"),
        ({"runtime": "onnxruntime"}, "onnxruntime has no --dla"),
        ({"input": "int8"}, "--input int8 is for int8 and mixed, not fp16"),
    ],
)
def test_what_it_cannot_do_is_refused(
    machine: Machine, calibrated_run: Path, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    machine("10.3")
    table = calibrated_run / "calibration.json"
    with pytest.raises(UsageError, match=message):
        build_engine(request_of(calibrated_run / "model.onnx", tmp_path, calibration=table, **more))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("release", "version", "name"),
    [
        ("10.3", "10.8.0", "tensorrt 10.8.0"),
        ("11.4", "11.4.0.106", "tensorrt 11.4.0.106"),
        ("rtx", "1.7.1", "tensorrt_rtx 1.7.1"),
    ],
)
def test_releases_without_it(
    machine: Machine, deployed_models: dict[str, Path], tmp_path: Path, release: str, version: str, name: str
) -> None:
    trt = machine(release)
    trt.__version__ = version
    runtime = "tensorrt-rtx" if release == "rtx" else "tensorrt"
    with pytest.raises(UsageError, match=f"^{name} has no --dla"):
        build_engine(request_of(deployed_models["dsc"], tmp_path, runtime=runtime))


def test_devices_without_it(machine: Machine, deployed_models: dict[str, Path], tmp_path: Path) -> None:
    trt = machine("10.3")
    request = request_of(deployed_models["dsc"], tmp_path)
    with pytest.raises(EnvironmentProblem, match="finds the DLA cores 0, 1 on this device, not core 2"):
        build_engine(replace(request, tuning=Tuning(dla=2)))
    built = build_engine(request)
    trt._dla_cores = 0
    with pytest.raises(EnvironmentProblem, match="finds no DLA on this device, not core 1"):
        build_engine(request)
    with pytest.raises(EnvironmentProblem, match=r"dsc.engine runs on DLA core 1, this device has 0 of them"):
        open_engine(built.path)


def test_an_accelerator_that_runs_nothing_is_no_build(
    machine: Machine, deployed_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("10.3")
    monkeypatch.setattr("double_tensorrt.runs_on_dla", lambda *layer, **more: False)
    with pytest.raises(EnvironmentProblem, match="DLA core 1 runs no layer with weights"):
        build_engine(request_of(deployed_models["dsc"], tmp_path))
    assert list(tmp_path.iterdir()) == []
