"""Building, running and comparing: on a GPU with TensorRT where there is one, and on the doubles everywhere.

The same tests: what the doubles pass is the code's logic, what a GPU passes is the claim. On a GPU:
``pytest -m gpu tests/engines/trt/test_gpu.py``.
"""

from __future__ import annotations

import gc
import json
import runpy
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from double_cuda import DoubleCuda, current
from double_tensorrt import RELEASES, DoubleTensorRt

from engines import packages
from engines.errors import ArtefactError
from engines.files import sha256_bytes
from engines.record import BatchRange, EngineRecord, Precision, save_record
from engines.runtimes import BuildOptions, Runner, RunnerOptions, answer_batches, get_runtime, open_engine
from engines.trt import cuda as cuda_driver
from engines.trt import runtime as runtime_module
from engines.trt.cuda import Gpu

BATCH = BatchRange(1, 2, 4)
LAYERS = {"dsc": 9, "cnn": 6}
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "int8": 5e-2}  # of a probability, against onnxruntime in FP32
REAL = [pytest.param(name, marks=pytest.mark.gpu) for name in ("tensorrt", "tensorrt-rtx")]


@dataclass
class Stack:
    """A runtime with what is below it.

    Attributes:
        name: In the runtimes' table.
        double: The CUDA double, or None on a GPU.
    """

    name: str
    double: DoubleCuda | None

    def free_bytes(self) -> int:
        """Device memory that nobody has."""
        if self.double is not None:
            return -sum(item.memory.nbytes for item in self.double.live)
        cuda = packages.load("pycuda.driver")
        context = cuda.Device(0).retain_primary_context()
        context.push()
        try:
            return int(cuda.mem_get_info()[0])
        finally:
            context.pop()
            cuda_driver.release_context(cuda_driver.load_driver(), context)


EVERY_RELEASE = pytest.mark.parametrize("stack", [*REAL, *RELEASES], indirect=True)


@pytest.fixture(params=[*REAL, "10.3"])
def stack(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    if request.param in ("tensorrt", "tensorrt-rtx"):
        found = get_runtime(request.param).availability()
        if found.no_build or found.no_run:
            pytest.skip(f"{request.param}: {found.no_build or found.no_run}")
        yield Stack(request.param, None)
        return
    cuda = request.getfixturevalue("cuda")
    request.getfixturevalue("driver")
    trt = DoubleTensorRt(request.param, cuda)
    modules = {trt.__name__: trt, "pycuda.driver": cuda}
    load = packages.load
    monkeypatch.setattr(packages, "load", lambda name: modules.get(name) or load(name))
    monkeypatch.setattr(packages, "installed_version", lambda name, *others: trt.__version__)
    monkeypatch.setattr(packages, "is_installed", lambda name: True)
    monkeypatch.setattr(runtime_module, "find_gpu", lambda *_: (Gpu("Double", "8.7"), ""))
    yield Stack("tensorrt-rtx" if request.param == "rtx" else "tensorrt", cuda)
    assert cuda.idle


@pytest.fixture
def engine_of(
    stack: Stack, tmp_path: Path, graph_in: Callable[..., bytes], record_of: Callable[..., EngineRecord]
) -> Callable[..., Path]:
    """``engine_of("dsc", "int8")``: an engine with its record, built by the runtime."""

    def build(architecture: str = "dsc", precision: str = "fp32") -> Path:
        engine = tmp_path / f"{architecture}.engine"
        required = LAYERS[architecture] - (precision == "int8")
        options = BuildOptions(precision=Precision(precision), required_layers=required, batch=BATCH)
        model = graph_in(architecture, precision)
        if stack.double is not None:
            with current(stack.double):  # on a GPU the CUDA runtime brings its own
                result = get_runtime(stack.name).build(model, engine, options)
        else:
            result = get_runtime(stack.name).build(model, engine, options)
        save_record(engine, record_of(engine, architecture, precision, result, BATCH, runtime=stack.name))
        return engine

    return build


def opened(engine: Path, **options: Any) -> Runner:
    return open_engine(engine, options=RunnerOptions(**options))


def answers_of(runner: Runner, batches: list[np.ndarray]) -> list[np.ndarray]:
    return [answers for _, answers in answer_batches(runner, enumerate(batches))]


@pytest.mark.slow
@EVERY_RELEASE
@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_engine_answers_like_onnxruntime(
    engine_of: Callable, graph_in: Callable, pixels: Callable, precision: str, architecture: str
) -> None:
    plain = onnxruntime.InferenceSession(graph_in(architecture, "fp32"), providers=["CPUExecutionProvider"])
    with opened(engine_of(architecture, precision)) as runner:
        assert runner.description["execution"] == "CUDA graph"
        for count in (1, 4):
            batch = pixels(count, seed=count)
            expected = plain.run(None, {"image": batch})[0]
            assert np.abs(runner.run(batch) - expected).max() < TOLERANCE[precision]


@pytest.mark.slow
@EVERY_RELEASE
def test_every_way_of_running_gives_the_same_answers(engine_of: Callable, pixels: Callable) -> None:
    engine = engine_of()
    batches = [pixels(count, seed=index) for index, count in enumerate((2, 1, 2, 4, 3, 3, 2, 1, 4, 4))]
    with opened(engine, slots=1, graph=False) as runner:
        expected = [runner.run(batch) for batch in batches]
    for options in (
        {"slots": 1},
        {"slots": 3},
        {"slots": 2, "graph": False},
        {"slots": 2, "memory": "mapped"},
        {"slots": 2, "time_stages": True, "blocking_wait": True},
    ):
        with opened(engine, **options) as runner:
            assert runner.slots == options["slots"]
            for seen, right in zip(answers_of(runner, batches), expected, strict=True):
                np.testing.assert_allclose(seen, right, atol=1e-6)


def test_stages_are_timed(engine_of: Callable, pixels: Callable) -> None:
    with opened(engine_of(), time_stages=True) as runner:
        for _ in range(3):
            ticket = runner.submit(pixels(2))
            runner.collect(ticket)
            assert list(ticket.stages_ns or {}) == ["h2d", "execute", "d2h"]
            assert (
                min((ticket.stages_ns or {"h2d": -1}).values()) >= 0
            )  # nothing is copied where memory is mapped
            assert (ticket.stages_ns or {})["execute"] > 0


def test_two_loops_in_two_threads(engine_of: Callable, pixels: Callable) -> None:
    engine = engine_of()
    batches = [pixels(2, seed=index) for index in range(4)]
    with opened(engine) as runner:
        expected = answers_of(runner, batches)
    failures: list[BaseException] = []

    def loop() -> None:
        try:
            with opened(engine) as runner:
                for _ in range(3):
                    for seen, right in zip(answers_of(runner, batches), expected, strict=True):
                        np.testing.assert_allclose(seen, right, atol=1e-6)
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=loop) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.slow
def test_nothing_leaks(stack: Stack, engine_of: Callable, pixels: Callable) -> None:
    engine = engine_of()
    free = []
    for _ in range(6):
        with opened(engine) as runner:
            runner.submit(pixels(3))  # closed with a batch in flight
        gc.collect()
        free.append(stack.free_bytes())
    assert free[1] - free[-1] < 8 << 20  # the first opening pays for libraries that stay


def test_an_engine_that_is_replaced_while_it_runs(engine_of: Callable, pixels: Callable) -> None:
    engine = engine_of("dsc", "fp32")
    batch = pixels(2)
    with opened(engine) as runner:
        before = runner.run(batch)
        engine_of("dsc", "fp16")  # the same name, written again and renamed into place
        np.testing.assert_array_equal(runner.run(batch), before)
        assert runner.record.precision is Precision.FP32
    with opened(engine) as runner:
        assert runner.record.precision is Precision.FP16
        np.testing.assert_allclose(runner.run(batch), before, atol=TOLERANCE["fp16"])


def test_an_engine_that_is_replaced_while_it_is_opened(
    engine_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    read = Path.read_bytes

    def replaced(path: Path) -> bytes:
        return read(path) + b"another" if path == engine else read(path)

    monkeypatch.setattr(Path, "read_bytes", replaced)
    with pytest.raises(ArtefactError, match="is not the engine of its record") as caught:
        opened(engine)
    assert caught.value.remedy.startswith("rebuild it: ")
    assert sha256_bytes(read(engine)) != sha256_bytes(replaced(engine))


@pytest.mark.slow
@pytest.mark.parametrize("switch", [[], ["--no-graph"]])
def test_the_measuring_script(
    engine_of: Callable,
    textures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    switch: list[str],
) -> None:
    out, engine = tmp_path / "stages.json", engine_of()
    script = str(Path(__file__).parents[3] / "scripts" / "gpu_stages.py")
    sizes = ["--blocks", "2", "--calls", "3", "--batch", "2"]
    arguments = [script, str(engine), "--images", str(textures / "focal"), *sizes, "--out", str(out), *switch]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.syspath_prepend(str(Path(script).parent))  # as Python itself does for a script
    runpy.run_path(script, run_name="__main__")
    report = json.loads(out.read_text())
    assert report["kind"] == "edge-dsc/gpu-stages"
    assert list(report["stages_us"]) == ["decode", "preprocess", "h2d", "execute", "d2h"]
    assert report["stages_us"]["execute"]["count"] == 6
    assert report["stages_us"]["execute"]["p99"] is None
    assert report["latency"]["ratio"]["median"] > 0
    assert report["latency"]["largest_difference"] < 1e-6
    assert report["latency"]["runner"]["execution"] == (
        "enqueue (no CUDA graph: as asked)" if switch else "CUDA graph"
    )
    assert min(report["images_per_second"].values()) > 0
    assert json.loads(capsys.readouterr().out)["batch"] == 2
