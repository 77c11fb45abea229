"""What the runtimes' tests share: pixels, the three graphs of a network, and the record of a built engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from calibration.layers import tensors_to_calibrate
from calibration.qdq import quantize
from calibration.table import CalibrationTable
from engines.graph import cast_to_fp16, load_model
from engines.record import BatchRange, EngineRecord, Precision
from engines.runtimes import BuildResult, get_runtime

Graphs = Callable[..., bytes]
Records = Callable[..., EngineRecord]


def make_pixels(count: int, seed: int = 0) -> np.ndarray:
    """``uint8 [count, 224, 224, 1]``: blobs with noise, in the range of X-ray pixels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(20, 230, (count, 7, 7, 1)).repeat(32, axis=1).repeat(32, axis=2)
    noise = rng.integers(-20, 21, (count, 224, 224, 1))
    return (coarse + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def pixels() -> Callable[..., np.ndarray]:
    return make_pixels


def measured_ranges(model: onnx.ModelProto) -> dict[str, tuple[float, float]]:
    """The smallest and largest value of every tensor that INT8 needs a range of."""
    names = list(tensors_to_calibrate(model))
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    for name in names:
        opened.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(opened.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(names, {"image": make_pixels(4)})
    return {name: (float(v.min()), float(v.max())) for name, v in zip(names, found, strict=True)}


@pytest.fixture(scope="session")
def graph_in(deployed_models: dict[str, Path]) -> Graphs:
    """``graph_in("dsc", "int8", signed=True)``: the serialised graph of a network in a precision."""
    ranges: dict[str, dict[str, tuple[float, float]]] = {}

    def make(architecture: str, precision: str, *, signed: bool = True) -> bytes:
        model = load_model(deployed_models[architecture]).proto
        if precision == "fp16":
            return cast_to_fp16(model).SerializeToString()
        if precision == "int8":
            if architecture not in ranges:
                ranges[architecture] = measured_ranges(model)
            table = CalibrationTable(
                method="minmax",
                parameters={},
                seed=0,
                ranges=ranges[architecture],
                onnx_sha256="",
                preprocess_sha256="",
                images=(),
                versions={},
            )
            return quantize(model, table, signed_activations=signed).SerializeToString()
        return model.SerializeToString()

    return make


@pytest.fixture
def record_of(deployed_models: dict[str, Path]) -> Records:
    """``record_of(engine, "dsc", "fp32", result, batch)``: the record that belongs to a built engine."""

    def make(
        engine: Path,
        architecture: str,
        precision: str,
        result: BuildResult,
        batch: BatchRange,
        runtime: str = "onnxruntime",
    ) -> EngineRecord:
        data = engine.read_bytes()
        model = deployed_models[architecture]
        return EngineRecord(
            engine=engine.name,
            engine_sha256=hashlib.sha256(data).hexdigest(),
            engine_bytes=len(data),
            runtime=runtime,
            runtime_version=get_runtime(runtime).availability().version or "",
            platform=result.platform,
            precision=Precision(precision),
            batch=batch,
            contract=load_model(model).contract,
            onnx=model.name,
            onnx_sha256="0" * 64,
            calibration_sha256=None,
            layers=result.layers,
            layers_source=result.layers_source,
            build_seconds=0.1,
            build_command="edge-dsc build-engine model.onnx",
            edge_dsc="0.1.0",
            created="2026-01-01T00:00:00+00:00",
        )

    return make
