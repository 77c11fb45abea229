"""A CUDA device and four releases of TensorRT that run on the CPU; see tests/doubles."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from double_cuda import DoubleCuda, DoubleDriver
from double_tensorrt import RELEASES, DoubleTensorRt

from engines.record import BatchRange, EngineRecord, Precision
from engines.runtimes import BuildOptions, BuildResult, RunnerOptions
from engines.trt import run
from engines.trt.build import build_plan
from engines.trt.run import TrtRunner

BATCH = BatchRange(1, 4, 8)


@pytest.fixture
def cuda() -> Iterator[DoubleCuda]:
    double = DoubleCuda()
    yield double
    gc.collect()  # what a failed test's traceback kept alive goes before the next test


@pytest.fixture
def driver(cuda: DoubleCuda, monkeypatch: pytest.MonkeyPatch) -> DoubleDriver:
    double = DoubleDriver(cuda)
    monkeypatch.setattr(run, "load_driver", lambda: double)
    return double


@pytest.fixture(params=list(RELEASES))
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def trt(release: str, cuda: DoubleCuda) -> DoubleTensorRt:
    return DoubleTensorRt(release, cuda)


@pytest.fixture
def build(graph_in: Callable[..., bytes]) -> Callable[..., bytes]:
    """``build(trt, "dsc", "fp32")``: the plan of a network, built by our own builder on a double."""

    def make(
        trt: Any, architecture: str = "dsc", precision: str = "fp32", batch: BatchRange = BATCH
    ) -> bytes:
        options = BuildOptions(precision=Precision(precision), batch=batch)
        needs_gpu = trt.__version__.startswith("8.")  # a weakly typed build is proven by its inspector
        with current(trt._cuda):
            return bytes(build_plan(trt, graph_in(architecture, precision), options, has_gpu=needs_gpu).data)

    return make


class current:
    """A context for what a builder loads to inspect."""

    def __init__(self, cuda: DoubleCuda) -> None:
        self.cuda = cuda

    def __enter__(self) -> None:
        self.cuda.init()
        self.context = self.cuda.Device(0).retain_primary_context()
        self.context.push()

    def __exit__(self, *_: object) -> None:
        gc.collect()
        self.context.pop()
        self.context.detach()
        self.cuda.log.clear()


@pytest.fixture
def plan(trt: DoubleTensorRt, build: Callable[..., bytes]) -> bytes:
    return build(trt)


@pytest.fixture
def record(
    trt: DoubleTensorRt, deployed_models: dict[str, Path], record_of: Callable[..., EngineRecord]
) -> EngineRecord:
    result = BuildResult(layers={"FP32": 9}, layers_source="", platform={})
    runtime = trt.__name__.replace("_", "-")
    return record_of(deployed_models["dsc"], "dsc", "fp32", result, BATCH, runtime=runtime)


@pytest.fixture
def open_runner(
    trt: DoubleTensorRt, cuda: DoubleCuda, driver: DoubleDriver, plan: bytes, record: EngineRecord
) -> Callable[..., TrtRunner]:
    """``open_runner(slots=2, ...)``: a runner with these options."""

    def make(place: Path | None = None, clock: Callable[[], int] | None = None, **options: Any) -> TrtRunner:
        more = {"clock": clock} if clock is not None else {}
        return TrtRunner(trt, cuda, plan, record, RunnerOptions(**options), place=place, **more)

    return make
