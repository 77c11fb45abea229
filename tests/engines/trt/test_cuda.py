from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from double_cuda import DoubleCuda, DoubleDriver, current

from engines.errors import EnvironmentProblem
from engines.record import EngineRecord
from engines.trt import cuda as driver_module
from engines.trt.cuda import (
    BUFFERS,
    CudaGraph,
    Gpu,
    GraphError,
    bound_device,
    capture_graph,
    find_gpu,
    missing_functions,
    primary_context,
)


def fake_driver(*, start: int = 0, devices: int = 1, name: int = 0) -> Any:
    def count(out: Any) -> int:
        out._obj.value = devices
        return 0

    def get_name(buffer: Any, size: int, device: Any) -> int:
        buffer.value = b"Orin"
        return name

    def attribute(out: Any, number: int, device: Any) -> int:
        out._obj.value = {75: 8, 76: 7, 16: 4}[number]
        return 0

    def total(out: Any, device: Any) -> int:
        assert isinstance(out._obj, ctypes.c_size_t)
        out._obj.value = 7620 << 20
        return 0

    def bus_id(buffer: Any, size: int, device: Any) -> int:
        buffer.value = b"0000:01:00.0"
        return 0

    return SimpleNamespace(
        cuInit=lambda flags: start,
        cuDeviceGetCount=count,
        cuDeviceGet=lambda out, index: 0,
        cuDeviceGetName=get_name,
        cuDeviceGetAttribute=attribute,
        cuDeviceTotalMem_v2=total,
        cuDeviceGetPCIBusId=bus_id,
    )


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (
            fake_driver(),
            (Gpu("Orin", "8.7", 4, 7620, "NVIDIA Jetson Orin Nano Developer Kit", "0000:01:00.0"), ""),
        ),
        (fake_driver(start=100), (None, "the CUDA driver does not start: cuInit gives error 100")),
        (fake_driver(devices=0), (None, "the CUDA driver finds no GPU")),
        (fake_driver(name=1), (None, "the CUDA driver does not describe its GPU: errors (0, 1, 0, 0, 0, 0)")),
    ],
)
def test_what_the_driver_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: Any, expected: object
) -> None:
    board = tmp_path / "model"
    board.write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    monkeypatch.setattr(driver_module, "_BOARD", board)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert find_gpu() == expected


def test_each_gpu_is_found_by_its_number(driver: DoubleDriver) -> None:
    first, second = (find_gpu(device)[0] for device in (0, 1))
    assert first is not None and second is not None
    assert (first.name, first.compute_capability, first.multiprocessors, first.bus_id) == (
        ("Double", "8.9", 4, "0000:01:00.0")
    )
    assert (second.name, second.compute_capability, second.multiprocessors, second.bus_id) == (
        ("Second double", "8.7", 2, "0000:41:00.0")
    )
    assert second.facts() == {
        "gpu": "Second double",
        "compute_capability": "8.7",
        "multiprocessors": "2",
        "memory": "128 MiB",
    }


@pytest.mark.parametrize(("devices", "numbers"), [(1, "0"), (2, "0 to 1")])
def test_a_gpu_that_is_not_there_is_refused_with_how_many_are(
    monkeypatch: pytest.MonkeyPatch, devices: int, numbers: str
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake_driver(devices=devices))
    with pytest.raises(EnvironmentProblem) as caught:
        find_gpu(devices)
    assert caught.value.what == (
        f"there is no GPU {devices}: the CUDA driver finds {devices}, numbered {numbers}"
    )
    assert f"--device {numbers}" in caught.value.remedy
    assert caught.value.exit_code == 3


def test_a_driver_that_does_not_tell_the_place_on_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_driver()
    del library.cuDeviceGetPCIBusId
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    gpu, _ = find_gpu()
    assert gpu is not None and gpu.bus_id == ""


@pytest.mark.parametrize("fails", [False, True])
def test_a_bound_device_is_current_for_the_block_alone(
    cuda: DoubleCuda, driver: DoubleDriver, fails: bool
) -> None:
    with contextlib.suppress(KeyboardInterrupt), bound_device(1):
        assert (cuda.here, cuda.references, driver.flags_of) == (1, [0, 1], [0, 1])
        with primary_context(cuda):  # a calibrator's batches go where the builder works
            assert int(cuda.mem_alloc(4)) == cuda.live[0].address
            assert (cuda.live[0].device, cuda.references) == (1, [0, 2])
            cuda.live[0].free()
        if fails:
            raise KeyboardInterrupt
    assert cuda.idle


@pytest.mark.parametrize("call", ["cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2"])
def test_a_device_that_the_driver_does_not_give(cuda: DoubleCuda, driver: DoubleDriver, call: str) -> None:
    driver.refuse[call] = 2
    words = f"GPU 1 cannot be used: {call} failed: CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(EnvironmentProblem, match=words), bound_device(1):
        pytest.fail("it was bound")  # TensorRT would build on the first GPU
    assert cuda.idle


def test_a_machine_without_a_device_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(driver_module, "_BOARD", tmp_path / "none")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake_driver())
    gpu, _ = find_gpu()
    assert gpu is not None and gpu.board == ""


@pytest.mark.parametrize("bound", [False, True])
def test_releasing_a_context_leaves_the_stack_as_it_was(cuda: DoubleCuda, bound: bool) -> None:
    """The CUDA runtime may have made the very same context current, as TensorRT has it do."""
    library = DoubleDriver(cuda)
    cuda.init()
    context = cuda.Device(0).retain_primary_context()
    if bound:
        cuda.stack().append(context)
    driver_module.release_context(library, context)
    assert cuda.stack() == [context] * bound
    assert cuda.retained == 0
    cuda.stack().clear()


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "_LIBRARY", "libcuda-that-is-not-there.so.1")
    assert find_gpu() == (None, "no CUDA driver: libcuda-that-is-not-there.so.1 not found")


class Driver:
    """Notes every call; answers what it is told to."""

    def __init__(self, **answers: int) -> None:
        self.calls: list[str] = []
        self.answers = answers

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            for argument in arguments:
                assert not isinstance(argument, int), f"{name}: ctypes would cut a handle to 32 bits"
                if hasattr(argument, "_obj") and isinstance(argument._obj, ctypes.c_void_p):
                    argument._obj.value = 2**40 + len(self.calls)
            return self.answers.get(name, 0)

        return call


HANDLE = 0x7F00_1234_5678


def test_the_order_of_calls() -> None:
    driver = Driver()
    graph = capture_graph(driver, HANDLE, lambda: driver.calls.append("work"))
    assert isinstance(graph, CudaGraph)
    graph.launch()
    graph.destroy()
    assert driver.calls == [
        "cuStreamBeginCapture_v2",
        "work",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "cuGraphDestroy",
        "cuGraphLaunch",
        "cuGraphExecDestroy",
    ]


def test_work_that_fails_ends_the_capture_and_keeps_its_error() -> None:
    driver = Driver()

    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture_graph(driver, HANDLE, work)
    assert driver.calls == ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphDestroy"]


def test_an_instance_that_is_refused_frees_the_graph() -> None:
    driver = Driver(cuGraphInstantiateWithFlags=2, cuGetErrorName=1)
    with pytest.raises(GraphError, match=r"^cuGraphInstantiateWithFlags failed: error 2$"):
        capture_graph(driver, HANDLE, lambda: None)
    assert sorted(driver.calls[-2:]) == ["cuGetErrorName", "cuGraphDestroy"]


def test_a_driver_before_cuda_11_4() -> None:
    assert missing_functions(Driver()) == ""
    old = type("Old", (), {"cuStreamBeginCapture_v2": 1, "cuStreamEndCapture": 1, "cuGraphDestroy": 1})
    assert missing_functions(old()) == "cuGraphInstantiateWithFlags, cuGraphLaunch, cuGraphExecDestroy"


@pytest.mark.parametrize("kind", ["device", "mapped"])
def test_buffers_hold_the_largest_batch_and_are_freed(
    cuda: DoubleCuda, record: EngineRecord, kind: str
) -> None:
    cuda.init()
    with current(cuda):
        with contextlib.ExitStack() as frees:
            buffers = BUFFERS[kind](cuda, record, frees)
            assert buffers.kind == kind
            assert (buffers.host_input.shape, buffers.host_input.dtype) == ((8, 224, 224, 1), np.uint8)
            (answers,) = buffers.host_outputs
            assert (answers.shape, answers.dtype) == ((8, 3), np.float32)
            assert len(cuda.live) == (4 if kind == "device" else 2)
        assert not cuda.live
