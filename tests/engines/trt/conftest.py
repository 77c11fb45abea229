"""A CUDA driver and a TensorRT runtime that run on the CPU, strict where the real ones are.

Copies and executions wait on their stream until it is synchronised. Using freed memory, working without a
current context, from another thread, or freeing twice is an error. The "engine" is an ONNX file.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest


class CudaError(Exception):
    """Stands for pycuda.driver.Error."""


class HostAllocation:
    """Page-locked memory; the array over it has this object as its base, as with pycuda."""

    def __init__(self, cuda: FakeCuda, shape: tuple[int, ...], dtype: Any) -> None:
        self.cuda = cuda
        self.memory = np.full(shape, 0xAB, dtype)
        self.__array_interface__ = self.memory.__array_interface__

    def free(self) -> None:
        self.cuda.release(self, "host")


class DeviceAllocation:
    def __init__(self, cuda: FakeCuda, size: int) -> None:
        self.cuda = cuda
        self.memory = np.zeros(size, np.uint8)
        self.address = next(cuda.addresses)

    def __int__(self) -> int:
        return self.address

    def free(self) -> None:
        self.cuda.release(self, "device")


class Stream:
    def __init__(self, cuda: FakeCuda) -> None:
        cuda.need_context("Stream")
        self.cuda = cuda
        self.handle = next(cuda.addresses)
        self.work: list[Callable[[], None]] = []
        cuda.streams[self.handle] = self

    def synchronize(self) -> None:
        self.cuda.need_context("synchronize")
        for step in self.work:
            step()
        self.work.clear()


class Context:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def push(self) -> None:
        self.cuda.stack().append(self)

    def pop(self) -> None:
        self.cuda.stack().pop()

    def detach(self) -> None:
        self.cuda.retained -= 1
        self.cuda.log.append("detach")


class FakeCuda:
    """Stands for the module pycuda.driver. ``fail`` names the call that raises."""

    Error = CudaError

    def __init__(self) -> None:
        self.addresses = itertools.count(4096, 4096)
        self.live: list[Any] = []
        self.streams: dict[int, Stream] = {}
        self.stacks: dict[int, list[Context]] = {}
        self.retained = 0
        self.allocations = 0
        self.log: list[str] = []
        self.fail = ""

    def init(self) -> None:
        self.may_fail("init")

    def Device(self, index: int) -> Any:
        def retain() -> Context:
            self.may_fail("retain_primary_context")
            self.retained += 1
            return Context(self)

        return SimpleNamespace(retain_primary_context=retain)

    def Stream(self) -> Stream:
        return Stream(self)

    def pagelocked_empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        self.need_context("pagelocked_empty")
        return np.asarray(self.keep(HostAllocation(self, shape, dtype)))

    def mem_alloc(self, size: int) -> DeviceAllocation:
        self.need_context("mem_alloc")
        return self.keep(DeviceAllocation(self, size))

    def memcpy_htod_async(self, target: DeviceAllocation, source: np.ndarray, stream: Stream) -> None:
        self.need_context("memcpy_htod_async")
        assert target in self.live

        def copy() -> None:
            target.memory[: source.nbytes] = source.reshape(-1).view(np.uint8)

        stream.work.append(copy)

    def memcpy_dtoh_async(self, target: np.ndarray, source: DeviceAllocation, stream: Stream) -> None:
        self.need_context("memcpy_dtoh_async")
        assert source in self.live

        def copy() -> None:
            target.reshape(-1).view(np.uint8)[:] = source.memory[: target.nbytes]

        stream.work.append(copy)

    def stack(self) -> list[Context]:
        return self.stacks.setdefault(threading.get_ident(), [])

    def need_context(self, call: str) -> None:
        self.may_fail(call)
        if not self.stack():
            raise CudaError(f"{call} failed: invalid device context")

    def may_fail(self, call: str) -> None:
        if self.fail == call:
            raise CudaError(f"{call} failed: out of memory")

    def keep(self, memory: Any) -> Any:
        self.allocations += 1
        self.live.append(memory)
        return memory

    def release(self, memory: Any, kind: str) -> None:
        self.need_context("free")
        self.live.remove(memory)  # raises when freed twice
        self.log.append(f"free {kind}")

    def at(self, address: int) -> DeviceAllocation:
        return next(item for item in self.live if isinstance(item, DeviceAllocation) and int(item) == address)


class FakeTrt:
    """Stands for the module tensorrt. ``fail`` names the call that answers None or False."""

    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    DataType = SimpleNamespace(UINT8="uint8", FLOAT="float")

    class ILogger:
        ERROR = 1
        INTERNAL_ERROR = 0

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.fail = ""
        self.names = ("image", "probabilities")
        self.types = {"image": "uint8", "probabilities": "float"}
        self.shapes_set = 0

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: self.engine(logger, plan))

    def engine(self, logger: Any, plan: bytes) -> Any:
        self.cuda.need_context("deserialize_cuda_engine")
        if self.fail == "deserialize_cuda_engine":
            logger.log(self.ILogger.ERROR, "the engine plan file is\n not compatible")
            logger.log(self.ILogger.ERROR, "a second error")
            return None
        session = onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"])
        return SimpleNamespace(
            num_io_tensors=len(self.names),
            get_tensor_name=lambda index: self.names[index],
            get_tensor_mode=lambda name: "input" if name == self.names[0] else "output",
            get_tensor_dtype=lambda name: self.types[name],
            create_execution_context=lambda: self.execution(session),
        )

    def execution(self, session: Any) -> Any:
        if self.fail == "create_execution_context":
            return None
        addresses: dict[str, int] = {}
        shape: list[int] = []

        def set_input_shape(name: str, new: tuple[int, ...]) -> bool:
            self.shapes_set += 1
            shape[:] = new
            return self.fail != "set_input_shape"

        def set_tensor_address(name: str, address: int) -> bool:
            addresses[name] = address
            return self.fail != "set_tensor_address"

        def execute_async_v3(handle: int) -> bool:
            self.cuda.need_context("execute_async_v3")

            def step() -> None:
                pixels = self.cuda.at(addresses["image"]).memory[: int(np.prod(shape))].reshape(shape)
                answer = session.run(None, {"image": pixels})[0]
                target = self.cuda.at(addresses["probabilities"]).memory
                target[: answer.nbytes] = answer.reshape(-1).view(np.uint8)

            self.cuda.streams[handle].work.append(step)
            return self.fail != "execute_async_v3"

        return SimpleNamespace(
            set_input_shape=set_input_shape,
            set_tensor_address=set_tensor_address,
            execute_async_v3=execute_async_v3,
        )


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def trt(cuda: FakeCuda) -> FakeTrt:
    return FakeTrt(cuda)
