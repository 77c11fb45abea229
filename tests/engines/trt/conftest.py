"""A CUDA device and four releases of TensorRT that run on the CPU; see tests/doubles."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from double_cuda import DoubleCuda, DoubleDriver, current
from double_tensorrt import DoubleTensorRt
from onnx import TensorProto, helper, numpy_helper

from engines.contract import ModelContract
from engines.files import sha256_bytes
from engines.record import BatchRange, EngineRecord, Precision
from engines.runtimes import BuildOptions, RunnerOptions
from engines.trt import cuda as cuda_driver
from engines.trt.builder import build_plan
from engines.trt.cuda import Gpu
from engines.trt.loaded import StoredEngine
from engines.trt.runner import TrtRunner

BATCH = BatchRange(1, 4, 8)


@pytest.fixture
def cuda() -> Iterator[DoubleCuda]:
    double = DoubleCuda()
    yield double
    if not double.idle:
        gc.collect()  # what a failed test kept alive goes before the next test


@pytest.fixture
def driver(cuda: DoubleCuda, monkeypatch: pytest.MonkeyPatch) -> DoubleDriver:
    double = DoubleDriver(cuda)
    monkeypatch.setattr(cuda_driver, "load_driver", lambda: double)
    return double


@pytest.fixture
def release(request: pytest.FixtureRequest) -> str:
    """10.3; a test of what differs between releases parametrises it with RELEASES, or with the ones it means."""
    return str(getattr(request, "param", "10.3"))


@pytest.fixture
def trt(release: str, cuda: DoubleCuda) -> DoubleTensorRt:
    return DoubleTensorRt(release, cuda)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with the deployed network's ends and next to nothing between: what is tested is the loop."""
    contract = ModelContract(labels=("clear", "focal", "diffuse"), architecture="dsc")
    rng = np.random.default_rng(5)
    constants = {
        "planes": np.array([-1, 1, 224, 224], np.int64),
        "flat": np.array([-1, 49], np.int64),
        "weight": (rng.standard_normal((49, 3)) / 300).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", [contract.input_name], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["a", "planes"], ["b"]),
        helper.make_node("AveragePool", ["b"], ["c"], kernel_shape=[32, 32], strides=[32, 32]),
        helper.make_node("Reshape", ["c", "flat"], ["d"]),
        helper.make_node("MatMul", ["d", "weight"], ["e"]),
        helper.make_node("Softmax", ["e"], [contract.output_name], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(contract.input_name, TensorProto.UINT8, ["N", 224, 224, 1])],
        [helper.make_tensor_value_info(contract.output_name, TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, contract.to_metadata())
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def plans(small_model: Path) -> Callable[[str], bytes]:
    """``plans(release)``: the small model, built by our own builder on a double of that release."""

    @functools.cache
    def build(release: str) -> bytes:
        trt = DoubleTensorRt(release, DoubleCuda())
        options = BuildOptions(precision=Precision.FP32, batch=BATCH)
        needs_gpu = release.startswith("8")  # a weakly typed build is proven by its inspector
        with current(trt._cuda):
            return bytes(build_plan(trt, small_model.read_bytes(), options, has_gpu=needs_gpu).data)

    return build


@pytest.fixture
def plan(release: str, plans: Callable[[str], bytes]) -> bytes:
    return plans(release)


@pytest.fixture
def record(release: str, plan: bytes) -> EngineRecord:
    return EngineRecord(
        engine="dsc.engine",
        engine_sha256=sha256_bytes(plan),
        engine_bytes=len(plan),
        runtime="tensorrt-rtx" if release == "rtx" else "tensorrt",
        runtime_version=release,
        platform={},
        precision=Precision.FP32,
        batch=BATCH,
        contract=ModelContract(labels=("clear", "focal", "diffuse"), architecture="dsc"),
        onnx="small.onnx",
        onnx_sha256="0" * 64,
        calibration_sha256=None,
        layers={"FP32": 1},
        layers_source="",
        build_seconds=0.1,
        build_command="edge-dsc build-engine model.onnx",
        edge_dsc="0.1.0",
        created="2026-01-01T00:00:00+00:00",
    )


@pytest.fixture
def turns() -> Callable[[int, int], Callable[[], int]]:
    """``turns(device_us, mapped_us)``: a clock for a trial of both kinds of memory, after five turns that count not."""

    def clock(device_us: int, mapped_us: int) -> Callable[[], int]:
        now = [0]
        for turn in range(25):
            kinds = [device_us, mapped_us] if turn >= 5 else [9000 * mapped_us, 9000 * device_us]
            for microseconds in kinds if turn % 2 == 0 else reversed(kinds):
                now += [now[-1] + 1000 * microseconds, now[-1] + 1000 * microseconds]
        times = iter(now)
        return lambda: next(times)

    return clock


@pytest.fixture
def open_runner(
    trt: DoubleTensorRt, cuda: DoubleCuda, driver: DoubleDriver, plan: bytes, record: EngineRecord
) -> Callable[..., TrtRunner]:
    """``open_runner(slots=2, ...)``: a runner with these options."""

    def make(
        place: Path | None = None,
        clock: Callable[[], int] | None = None,
        gpu: Gpu | None = None,
        **options: Any,
    ) -> TrtRunner:
        more = {"clock": clock} if clock is not None else {}
        return TrtRunner(trt, cuda, StoredEngine(plan, record, place, gpu), RunnerOptions(**options), **more)

    return make
