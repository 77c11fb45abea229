"""Stands for ``pycuda.driver`` and the CUDA driver library of two GPUs, on the CPU, strict where the real ones are not.

Work waits on its stream until something waits for it, as late as CUDA allows: what reads too early sees poison.
What a real GPU would answer with garbage or a crash is a :class:`Misuse` here: freed memory, a wrong thread or no
current context, a context of the other GPU, memory that is too small, pageable memory in an asynchronous copy, a
graph whose buffers or contexts are gone. What CUDA itself refuses raises :class:`Error`, and ``fail`` makes any call
do so.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

API = json.loads(Path(__file__).with_name("pycuda_api.json").read_text())["names"]
POISON, FREED = 0xAB, 0xDD
DEVICE_BYTES = 128 << 20  # of memory that the device has
COST_NS = {"h2d": 100_000, "execute": 1_000_000, "d2h": 50_000}  # of the virtual clock that events read
CAPTURE_INVALIDATED, NOT_PERMITTED, OUT_OF_MEMORY, INVALID_CONTEXT = 901, 800, 2, 201
NOT_INITIALIZED, PRIMARY_CONTEXT_ACTIVE, INVALID_DEVICE = 3, 708, 101
# Name, place on the bus and what find_gpu asks of each: capability 8.9 and 8.7, processors. Source: cuda.h,
# CUdevice_attribute
NAMES = ("Double", "Second double")
BUSES = ("0000:01:00.0", "0000:41:00.0")
ATTRIBUTES = ({75: 8, 76: 9, 16: 4}, {75: 8, 76: 7, 16: 2})


class Misuse(AssertionError):
    """The caller did what CUDA would not forgive."""


class Error(Exception):
    """Stands for pycuda.driver.Error."""


class MemoryError(Error):
    """Stands for pycuda.driver.MemoryError."""


@dataclass(eq=False)
class Work:
    """One step on a stream; ``check`` looks at its buffers and contexts when it is enqueued and when it runs."""

    kind: str
    step: Callable[[], None]
    check: Callable[[], None] = lambda: None
    touches: tuple[Any, ...] = ()


class Allocation:
    """Memory of a kind; ``memory`` is its bytes."""

    def __init__(self, cuda: DoubleCuda, kind: str, size: int, address: int) -> None:
        self.cuda = cuda
        self.device = cuda.here
        self.kind = kind
        self.address = address
        self.memory = np.full(size, POISON, np.uint8)
        self.alive = True

    def free(self) -> None:
        self.cuda.need_context("free")
        if not self.alive:
            raise Misuse(f"{self.kind} memory is freed twice")
        if any(self in work.touches for stream in self.cuda.streams() for work in stream.pending):
            raise Misuse(f"{self.kind} memory is freed while work on it waits")
        self.alive = False
        self.memory[:] = FREED
        self.cuda.live.remove(self)
        self.cuda.log.append(f"free {self.kind}")


class DeviceAllocation(Allocation):
    def __int__(self) -> int:
        return self.address


class PagelockedHostAllocation(Allocation):
    """The base of the array that ``pagelocked_empty`` gives."""

    def __init__(self, cuda: DoubleCuda, shape: tuple[int, ...], dtype: Any, flags: int) -> None:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        super().__init__(cuda, "host", size, next(cuda.addresses))
        self.flags = flags
        self.__array_interface__ = self.memory.view(dtype).reshape(shape).__array_interface__

    def get_device_pointer(self) -> int:
        if not self.flags & self.cuda.host_alloc_flags.DEVICEMAP:
            raise Error("cuMemHostGetDevicePointer failed: invalid argument")
        return self.address


class Stream:
    def __init__(self, cuda: DoubleCuda, flags: int = 0) -> None:
        cuda.need_context("Stream")
        self.cuda = cuda
        self.device = cuda.here
        self.flags = flags
        self.handle = next(cuda.addresses)
        self.pending: list[Work] = []
        self.captured: list[Work] | None = None
        self.invalid = False
        self.clock_ns = 0
        cuda.by_handle[self.handle] = self

    def synchronize(self) -> None:
        self.cuda.need_context("synchronize")
        if self.captured is not None:
            self.invalid = True
            raise Error("cuStreamSynchronize failed: operation not permitted when stream is capturing")
        self.finish()

    def is_done(self) -> bool:
        return not self.pending

    def enqueue(self, work: Any) -> None:
        if self.cuda.here != self.device:
            raise Misuse(f"a stream of GPU {self.device} is used while GPU {self.cuda.here} is current")
        work.check()
        (self.pending if self.captured is None else self.captured).append(work)

    def finish(self, until: object = None) -> None:
        while self.pending:
            work = self.pending.pop(0)
            self.cuda.need_healthy()
            work.check()
            work.step()
            self.clock_ns += COST_NS.get(work.kind, 0)
            if work is until:
                return


class Event:
    def __init__(self, cuda: DoubleCuda, flags: int = 0) -> None:
        cuda.need_context("Event")
        self.cuda = cuda
        self.flags = flags
        self.stream: Stream | None = None
        self.marker: Any = None
        self.time_ns: int | None = None

    def record(self, stream: Stream) -> Event:
        self.cuda.need_context("record")
        self.time_ns = None
        self.stream = stream

        def stamp() -> None:
            self.time_ns = stream.clock_ns

        self.marker = Work("event", stamp)
        stream.enqueue(self.marker)
        return self

    def synchronize(self) -> Event:
        self.cuda.need_context("event synchronize")
        if self.stream is None:
            raise Misuse("waiting for an event that was never recorded")
        if self.time_ns is None:
            self.stream.finish(until=self.marker)
        return self

    def time_since(self, start: Event) -> float:
        disable = self.cuda.event_flags.DISABLE_TIMING
        if (self.flags | start.flags) & disable:
            raise Error("cuEventElapsedTime failed: invalid resource handle")
        if self.time_ns is None or start.time_ns is None:
            raise Error("cuEventElapsedTime failed: device not ready")
        return (self.time_ns - start.time_ns) / 1e6


class Context:
    def __init__(self, cuda: DoubleCuda, device: int = 0) -> None:
        self.cuda = cuda
        self.device = device
        self.alive = True
        self.pushed = 0  # by pycuda

    def push(self) -> None:
        if not self.alive:
            raise Misuse("a detached context is pushed")
        self.cuda.may_fail("push")
        self.cuda.stack().append(self)
        self.pushed += 1

    def pop(self) -> None:
        self.cuda.stack().pop()
        self.pushed -= 1

    def detach(self) -> None:
        if not self.alive:
            raise Misuse("a context is detached twice")
        self.alive = False
        # As pycuda 2026.1 does for a context that pycuda itself has not pushed, whoever else made it current.
        # Releasing a primary context does not pop it.
        if not self.pushed:
            self.cuda.stack().append(self)
        self.cuda.log.append("detach")
        self.cuda.release(self.device)


class DoubleCuda:
    """The module ``pycuda.driver``.

    Attributes:
        fail: A call's name and the number of times that it works before it raises: ``{"mem_alloc": 3}``.
        live: Memory that is allocated.
        graphs: Graphs that are instantiated, by handle.
        log: What was freed, in order.
        integrated: Whether the GPUs share the host's memory.
        references: How often the primary context of each GPU is retained.
    """

    Error, MemoryError = Error, MemoryError
    host_alloc_flags = SimpleNamespace(PORTABLE=1, DEVICEMAP=2, WRITECOMBINED=4)
    event_flags = SimpleNamespace(DEFAULT=0, BLOCKING_SYNC=1, DISABLE_TIMING=2)
    device_attribute = SimpleNamespace(INTEGRATED="INTEGRATED", CAN_MAP_HOST_MEMORY="CAN_MAP_HOST_MEMORY")

    def __init__(self) -> None:
        self.addresses = itertools.count(1 << 20, 1 << 28)
        self.live: list[Allocation] = []
        self.by_handle: dict[int, Stream] = weakref.WeakValueDictionary()  # type: ignore[assignment]
        self.graphs: dict[int, list[Any]] = {}
        self.stacks: dict[int, list[Context]] = {}
        self.references = [0 for _ in NAMES]
        self.allocations = 0
        self.launches = 0
        self.log: list[str] = []
        self.fail: dict[str, int] = {}
        self.fail_on_device: dict[str, str] = {}  # kind of work -> the error that surfaces later, for good
        self.sick = ""
        self.integrated = False
        self.initialised = False
        self.Context = SimpleNamespace(get_device=self.current_device)

    def init(self, flags: int = 0) -> None:
        self.may_fail("init")
        self.initialised = True

    def Device(self, index: int) -> Any:
        if not self.initialised:
            raise Error("cuDeviceGet failed: initialization error")

        if index >= len(NAMES):
            raise Error("cuDeviceGet failed: invalid device ordinal")

        def retain() -> Context:
            self.may_fail("retain_primary_context")
            self.references[index] += 1
            return Context(self, index)

        return SimpleNamespace(
            retain_primary_context=retain,
            get_attribute=lambda attribute: int(self.integrated or attribute != "INTEGRATED"),
        )

    def current_device(self) -> Any:
        """``Context.get_device``: the GPU of the current context, whoever pushed it (cuCtxGetDevice)."""
        if not self.stack():
            raise Error("cuCtxGetDevice failed: invalid device context")
        return self.Device(self.here)

    @property
    def here(self) -> int:
        """The GPU of the current context; without one the CUDA runtime takes the first."""
        return self.stack()[-1].device if self.stack() else 0

    @property
    def retained(self) -> int:
        return sum(self.references)

    def release(self, device: int) -> None:
        """Let go of a primary context; the last one takes all that is left of its GPU with it."""
        self.references[device] -= 1
        failing = bool(self.sick or self.fail)  # nothing can be freed then
        left = [memory for memory in self.live if memory.device == device]
        if not failing and self.references[device] == 0 and (left or (not self.retained and self.graphs)):
            raise Misuse(f"the last context goes before {left} and {self.graphs}")

    def Stream(self, flags: int = 0) -> Stream:
        return Stream(self, flags)

    def Event(self, flags: int = 0) -> Event:
        return Event(self, flags)

    def pagelocked_empty(
        self, shape: tuple[int, ...], dtype: Any, order: str = "C", mem_flags: int = 0
    ) -> np.ndarray:
        self.need_context("pagelocked_empty", MemoryError)
        return np.asarray(self.keep(PagelockedHostAllocation(self, shape, dtype, mem_flags)))

    def mem_alloc(self, size: int) -> DeviceAllocation:
        self.need_context("mem_alloc", MemoryError)
        for stream in self.streams():
            if stream.captured is not None:
                stream.invalid = True
                raise Error("cuMemAlloc failed: operation would make the capture invalid")
        if size > self.mem_get_info()[0]:
            raise MemoryError("cuMemAlloc failed: out of memory")
        return self.keep(DeviceAllocation(self, "device", size, next(self.addresses)))

    def mem_get_info(self) -> tuple[int, int]:
        self.need_context("mem_get_info")
        here = [memory for memory in self.live if memory.kind == "device" and memory.device == self.here]
        held = sum(len(memory.memory) for memory in here)
        return DEVICE_BYTES - held, DEVICE_BYTES

    def memcpy_htod_async(self, dest: Any, src: np.ndarray, stream: Stream) -> None:
        self.need_context("memcpy_htod_async")
        self._copy("h2d", host=src, device=dest, stream=stream)

    def memcpy_dtoh_async(self, dest: np.ndarray, src: Any, stream: Stream) -> None:
        self.need_context("memcpy_dtoh_async")
        self._copy("d2h", host=dest, device=src, stream=stream)

    def _copy(self, kind: str, host: np.ndarray, device: Any, stream: Stream) -> None:
        locked = self.host_allocation(host)
        address, size = int(device), host.nbytes

        def check() -> None:
            self.need_memory(address, size)
            if not locked.alive:
                raise Misuse("a copy touches freed host memory")

        def step() -> None:
            memory, plain = self.need_memory(address, size), host.reshape(-1).view(np.uint8)
            if kind == "h2d":
                memory[:] = plain
            else:
                plain[:] = memory

        if kind == "d2h" and stream.captured is None:
            check()
            host.reshape(-1).view(np.uint8)[:] = POISON  # whoever reads before synchronising sees this
        stream.enqueue(Work(kind, step, check, (locked, self.owner_of(address))))

    def host_allocation(self, array: np.ndarray) -> PagelockedHostAllocation:
        base: Any = array
        while isinstance(base, np.ndarray):
            base = base.base
        if not isinstance(base, PagelockedHostAllocation):
            raise Misuse("an asynchronous copy of pageable memory")
        return base

    def owner_of(self, address: int) -> Allocation:
        for item in self.live:
            if item.address <= address < item.address + item.memory.nbytes:
                return item
        raise Misuse(f"nothing is allocated at {address:#x}")

    def need_memory(self, address: int, size: int) -> np.ndarray:
        """The bytes at a device pointer: device memory, or host memory that is mapped."""
        item = self.owner_of(address)
        if isinstance(item, PagelockedHostAllocation) and not item.flags & self.host_alloc_flags.DEVICEMAP:
            raise Misuse("the device is given an address of host memory that is not mapped")
        if item.kind == "device" and item.device != self.here:
            raise Misuse(f"memory of GPU {item.device} is used while GPU {self.here} is current")
        start = address - item.address
        if start + size > item.memory.nbytes:
            raise Misuse(f"{size} bytes are wanted where {item.memory.nbytes - start} are allocated")
        return item.memory[start : start + size]

    def streams(self) -> list[Stream]:
        return list(self.by_handle.values())

    def stack(self) -> list[Context]:
        return self.stacks.setdefault(threading.get_ident(), [])

    def need_context(self, call: str, failure: type[Error] = Error) -> None:
        self.may_fail(call, failure)
        self.need_healthy()
        if not self.stack():
            raise Misuse(f"{call} without a current context in this thread")
        # pycuda allocates only in contexts that it pushed itself: cuda.hpp, explicit_context_dependent
        if call in ("Stream", "Event", "pagelocked_empty", "mem_alloc") and not any(
            context.pushed for context in self.stack()
        ):
            raise Error(f"{call}: invalid device context - no currently active context?")

    def need_healthy(self) -> None:
        if self.sick:
            raise Error(self.sick)

    def may_fail(self, call: str, failure: type[Error] = Error) -> None:
        if call not in self.fail:
            return
        if self.fail[call] > 0:
            self.fail[call] -= 1
            return
        raise failure(f"{call} failed: out of memory")

    def keep(self, memory: Any) -> Any:
        self.allocations += 1
        self.live.append(memory)
        return memory

    @property
    def idle(self) -> bool:
        """Whether nothing is left of anybody."""
        return not (self.live or self.graphs or self.retained or any(self.stacks.values()))


class DoubleDriver:
    """The library libcuda, as far as graphs and choosing a GPU need it. Arguments are what ctypes would pass."""

    def __init__(self, cuda: DoubleCuda) -> None:
        self.cuda = cuda
        self.refuse: dict[str, int] = {}  # function -> status
        self.handles = itertools.count(1)
        self.caught: dict[int, list[Any]] = {}
        self.contexts: dict[int, Context] = {}
        self.flags_of = [0 for _ in NAMES]  # of each primary context

    def cuGetErrorName(self, status: ctypes.c_int, out: Any) -> int:
        names = {
            CAPTURE_INVALIDATED: b"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
            NOT_PERMITTED: b"CUDA_ERROR_NOT_PERMITTED",
            OUT_OF_MEMORY: b"CUDA_ERROR_OUT_OF_MEMORY",
            PRIMARY_CONTEXT_ACTIVE: b"CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE",
            INVALID_DEVICE: b"CUDA_ERROR_INVALID_DEVICE",
        }
        if status.value not in names:
            return 1
        out._obj.value = names[status.value]
        return 0

    @property
    def flags(self) -> int:
        return self.flags_of[0]

    def cuInit(self, flags: int) -> int:
        self.cuda.initialised = True
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = len(NAMES)
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:
        if not self.cuda.initialised:
            return NOT_INITIALIZED
        out._obj.value = index
        return 0 if index < len(NAMES) else INVALID_DEVICE

    def cuDeviceGetName(self, buffer: Any, size: int, device: ctypes.c_int) -> int:
        buffer.value = NAMES[device.value].encode()
        return 0

    def cuDeviceGetPCIBusId(self, buffer: Any, size: int, device: ctypes.c_int) -> int:
        buffer.value = BUSES[device.value].encode()
        return 0

    def cuDeviceGetAttribute(self, out: Any, number: int, device: ctypes.c_int) -> int:
        out._obj.value = ATTRIBUTES[device.value][number]
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, device: ctypes.c_int) -> int:
        out._obj.value = DEVICE_BYTES
        return 0

    def cuDevicePrimaryCtxRetain(self, out: Any, device: ctypes.c_int) -> int:
        if "cuDevicePrimaryCtxRetain" in self.refuse:
            return self.refuse["cuDevicePrimaryCtxRetain"]
        self.cuda.references[device.value] += 1
        context = Context(self.cuda, device.value)
        self.contexts[id(context)] = context
        out._obj.value = id(context)
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: ctypes.c_int) -> int:
        self.cuda.release(device.value)
        return 0

    def cuDevicePrimaryCtxGetState(self, device: ctypes.c_int, flags: Any, active: Any) -> int:
        flags._obj.value = self.flags_of[device.value]
        active._obj.value = int(self.cuda.references[device.value] > 0)
        return 0

    # Source: cuda.h, CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE: it "has already been initialized"
    def cuDevicePrimaryCtxSetFlags_v2(self, device: ctypes.c_int, flags: ctypes.c_uint) -> int:
        if not self.cuda.initialised:
            return NOT_INITIALIZED
        if self.cuda.references[device.value]:
            return PRIMARY_CONTEXT_ACTIVE
        self.flags_of[device.value] = flags.value
        return 0

    def cuCtxPopCurrent_v2(self, out: Any) -> int:
        if not self.cuda.stack():
            return INVALID_CONTEXT
        popped = self.cuda.stack().pop()
        self.contexts[id(popped)] = popped
        out._obj.value = id(popped)
        return 0

    def cuCtxPushCurrent_v2(self, context: ctypes.c_void_p) -> int:
        if "cuCtxPushCurrent_v2" in self.refuse:
            return self.refuse["cuCtxPushCurrent_v2"]
        self.cuda.stack().append(self.contexts[context.value or 0])
        return 0

    def cuStreamBeginCapture_v2(self, stream: ctypes.c_void_p, mode: ctypes.c_int) -> int:
        self.cuda.need_context("cuStreamBeginCapture")
        if mode.value != 1:
            raise Misuse("a capture that forbids other threads their work")
        found = self.cuda.by_handle[stream.value or 0]
        if found.captured is not None:
            return NOT_PERMITTED
        if "cuStreamBeginCapture_v2" in self.refuse:
            return self.refuse["cuStreamBeginCapture_v2"]
        found.captured, found.invalid = [], False
        return 0

    def cuStreamEndCapture(self, stream: ctypes.c_void_p, out: Any) -> int:
        found = self.cuda.by_handle[stream.value or 0]
        works, found.captured = found.captured, None
        if works is None:
            return NOT_PERMITTED
        if found.invalid:
            return CAPTURE_INVALIDATED
        handle = next(self.handles)
        self.caught[handle] = works
        out._obj.value = handle
        return self.refuse.get("cuStreamEndCapture", 0)

    def cuGraphInstantiateWithFlags(self, out: Any, graph: ctypes.c_void_p, flags: ctypes.c_ulonglong) -> int:
        if "cuGraphInstantiateWithFlags" in self.refuse:
            return self.refuse["cuGraphInstantiateWithFlags"]
        handle = next(self.handles)
        self.cuda.graphs[handle] = self.caught[graph.value or 0]
        out._obj.value = handle
        return 0

    def cuGraphDestroy(self, graph: ctypes.c_void_p) -> int:
        del self.caught[graph.value or 0]  # raises when destroyed twice
        return 0

    def cuGraphLaunch(self, graph: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
        self.cuda.need_context("cuGraphLaunch")
        if "cuGraphLaunch" in self.refuse:
            return self.refuse["cuGraphLaunch"]
        if (graph.value or 0) not in self.cuda.graphs:
            raise Misuse("a destroyed graph is launched")
        target = self.cuda.by_handle[stream.value or 0]
        for work in self.cuda.graphs[graph.value or 0]:
            target.enqueue(work)
        self.cuda.launches += 1
        return 0

    def cuGraphExecDestroy(self, graph: ctypes.c_void_p) -> int:
        self.cuda.need_context("cuGraphExecDestroy")
        works = self.cuda.graphs.pop(graph.value or 0)  # raises when destroyed twice
        if any(work in stream.pending for work in works for stream in self.cuda.streams()):
            raise Misuse("a graph is destroyed while it runs")
        self.cuda.log.append("destroy graph")
        return 0


class current:
    """A context for what a builder loads to inspect; on a GPU the CUDA runtime brings its own."""

    def __init__(self, cuda: DoubleCuda) -> None:
        self.cuda = cuda

    def __enter__(self) -> None:
        self.cuda.init()
        self.context = self.cuda.Device(0).retain_primary_context()
        self.context.push()

    def __exit__(self, *_: object) -> None:
        gc.collect()
        self.context.detach()
        self.context.pop()
        self.cuda.log.clear()
