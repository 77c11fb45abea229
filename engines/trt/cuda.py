"""The CUDA driver: which GPU there is, the memory that a batch needs, and graphs captured from a stream.

Contexts, memory and copies go through pycuda; what pycuda does not offer is asked of the driver's own library.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import EnvironmentProblem
from engines.record import EngineRecord

if TYPE_CHECKING:
    from engines.images import InputPixels

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
# Source: cuda.h, CUdevice_attribute
_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
_MINOR = 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
_MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_SPIN, _SLEEP = 1, 4  # CU_CTX_SCHED_SPIN, CU_CTX_SCHED_BLOCKING_SYNC. Source: cuda.h, CUctx_flags
_SCHEDULE = 7  # CU_CTX_SCHED_MASK
_SET_FLAGS = "cuDevicePrimaryCtxSetFlags_v2"  # CUDA 11.0
_DOCTOR = "see edge-dsc doctor"
_BOARD = Path("/proc/device-tree/model")
# Source: cuda.h, CUstreamCaptureMode. Other threads of this process may allocate and synchronise meanwhile.
_THREAD_LOCAL = 1
_GRAPH_FUNCTIONS = (
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",  # CUDA 11.4
    "cuGraphLaunch",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
)


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine.

    Attributes:
        name: Such as ``Orin``.
        compute_capability: Such as ``8.7``.
        multiprocessors: How many it has switched on; 0 where that is not known.
        memory_mib: Its memory, MiB; 0 where that is not known.
        board: The board's name in the device tree, such as ``NVIDIA Jetson Orin Nano Developer Kit``; empty on a PC.
        bus_id: Where it sits, by which NVML knows it too, such as ``0000:01:00.0``; empty where that is not known.
    """

    name: str
    compute_capability: str
    multiprocessors: int = 0
    memory_mib: int = 0
    board: str = ""
    bus_id: str = ""

    def facts(self) -> dict[str, str]:
        """Return what tells this kind of GPU from others, by topic; what is not known is left out.

        All Orin modules have one name and one capability (NVIDIA/TensorRT#2900), so size and board belong to it.
        """
        known = {
            "gpu": self.name,
            "compute_capability": self.compute_capability,
            "multiprocessors": str(self.multiprocessors or ""),
            "memory": f"{self.memory_mib} MiB" if self.memory_mib else "",
            "board": self.board,
        }
        return {key: value for key, value in known.items() if value}


def find_gpu(device: int = 0) -> tuple[Gpu | None, str]:
    """Look for a GPU.

    Args:
        device: Which one, as CUDA numbers them from 0.

    Returns:
        The GPU and an empty text, or None and the reason why none can be used.

    Raises:
        EnvironmentProblem: There are GPUs, but not so many.
    """
    try:
        cuda = load_driver()
    except OSError:
        return None, f"no CUDA driver: {_LIBRARY} not found"
    status = cuda.cuInit(0)
    if status != 0:
        return None, f"the CUDA driver does not start: cuInit gives error {status}"
    count = ctypes.c_int(0)
    if cuda.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value < 1:
        return None, "the CUDA driver finds no GPU"
    if device >= count.value:
        numbers = "0" if count.value == 1 else f"0 to {count.value - 1}"
        raise EnvironmentProblem(
            f"there is no GPU {device}: the CUDA driver finds {count.value}, numbered {numbers}",
            remedy=f"give --device {numbers}; CUDA_VISIBLE_DEVICES may hide others",
        )
    handle = ctypes.c_int(0)
    name = ctypes.create_string_buffer(256)
    major, minor, processors = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    memory = ctypes.c_size_t(0)
    steps = (
        cuda.cuDeviceGet(ctypes.byref(handle), device),
        cuda.cuDeviceGetName(name, len(name), handle),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, handle),
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, handle),
        cuda.cuDeviceGetAttribute(ctypes.byref(processors), _MULTIPROCESSORS, handle),
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle),
    )
    if any(steps):
        return None, f"the CUDA driver does not describe its GPU: errors {steps}"
    found = Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=f"{major.value}.{minor.value}",
        multiprocessors=processors.value,
        memory_mib=memory.value >> 20,
        board=_board_name(),
        bus_id=_bus_id(cuda, handle),
    )
    return found, ""


def _bus_id(cuda: Any, handle: ctypes.c_int) -> str:
    text = ctypes.create_string_buffer(32)
    if not hasattr(cuda, "cuDeviceGetPCIBusId") or cuda.cuDeviceGetPCIBusId(text, len(text), handle) != 0:
        return ""
    return text.value.decode(errors="replace")


def _board_name() -> str:
    try:
        return _BOARD.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def load_driver() -> ctypes.CDLL:
    """Return the CUDA driver's library.

    Raises:
        OSError: There is none.
    """
    return ctypes.CDLL(_LIBRARY)


def set_wait(driver: Any, device: int, *, sleep: bool) -> str:
    """Decide how threads wait for a GPU, before its primary context is made.

    Where that is there already, as with a second runner, it keeps what it was made with. Left alone the driver
    chooses by the number of processors and contexts, and may let threads sleep on a Jetson.
    Source: CUDA driver API, CU_CTX_SCHED_AUTO.

    Args:
        driver: The CUDA driver library.
        device: Which GPU, as CUDA numbers them.
        sleep: Give the processor away instead of spinning.

    Returns:
        Why it could not be decided; empty where it was.
    """
    if not hasattr(driver, _SET_FLAGS):
        return f"the driver lacks {_SET_FLAGS}"
    handle = ctypes.c_int(0)
    status = driver.cuDeviceGet(ctypes.byref(handle), device)
    wanted, flags, active = _SLEEP if sleep else _SPIN, ctypes.c_uint(0), ctypes.c_int(0)
    if status == 0:
        status = driver.cuDevicePrimaryCtxGetState(handle, ctypes.byref(flags), ctypes.byref(active))
    if status == 0 and active.value and flags.value & _SCHEDULE == wanted:
        return ""
    if status == 0:
        status = driver.cuDevicePrimaryCtxSetFlags_v2(handle, ctypes.c_uint(wanted))
    return "" if status == 0 else f"{_SET_FLAGS} failed: {_describe(driver, status)}"


def release_context(driver: Any, context: Any) -> None:
    """Detach a primary context of pycuda's and leave the thread's stack of contexts as it was.

    To detach a context that is not current, pycuda (up to 2026.1 at least) pushes it and trusts that this takes
    it off the stack again. That holds for contexts that were created; releasing a primary one never pops it, so
    the thread would be left with a context that is gone. Whether it was pushed cannot be told from what is current:
    the CUDA runtime may have made the same context current before, as TensorRT does. So the stack is emptied first.

    Args:
        driver: The CUDA driver library; None where it has none for us.
        context: From ``retain_primary_context``, not current.
    """
    before = _empty_stack(driver)
    try:
        context.detach()
    finally:
        _empty_stack(driver)
        for handle in reversed(before):
            driver.cuCtxPushCurrent_v2(handle)


def _empty_stack(driver: Any) -> list[ctypes.c_void_p]:
    """Pop all contexts of this thread and return them, the current one first."""
    popped: list[ctypes.c_void_p] = []
    while driver is not None:
        handle = ctypes.c_void_p()
        if driver.cuCtxPopCurrent_v2(ctypes.byref(handle)) != 0:
            break
        popped.append(handle)
    return popped


class DeviceBuffers:
    """Page-locked host memory, device memory, and asynchronous copies.

    Attributes:
        host_input: ``[largest, *contract.input_shape]`` of the contract's type.
        host_outputs: ``float32 [largest, ...]`` for each of :attr:`engines.contract.ModelContract.outputs`.
        input_address: Where TensorRT reads, a device pointer.
        output_addresses: Where it writes, likewise.
    """

    kind = "device"

    def __init__(self, cuda: Any, record: EngineRecord, frees: contextlib.ExitStack) -> None:
        """Allocate for the largest batch.

        Args:
            cuda: The module ``pycuda.driver``.
            record: Gives the shapes.
            frees: Takes what must be freed.
        """
        self._cuda = cuda
        self.host_input, self.host_outputs = _host_arrays(cuda, record, frees, flags=0)
        self._device_input = cuda.mem_alloc(self.host_input.nbytes)
        frees.callback(self._device_input.free)
        self._device_outputs = []
        for host in self.host_outputs:
            self._device_outputs.append(cuda.mem_alloc(host.nbytes))
            frees.callback(self._device_outputs[-1].free)
        self.input_address = int(self._device_input)
        self.output_addresses = [int(memory) for memory in self._device_outputs]

    def copy_in(self, size: int, stream: Any) -> None:
        """Enqueue the copy of the first ``size`` images to the device."""
        self._cuda.memcpy_htod_async(self._device_input, self.host_input[:size], stream)

    def copy_out(self, size: int, stream: Any) -> None:
        """Enqueue the copy of the first ``size`` answers to the host."""
        for host, memory in zip(self.host_outputs, self._device_outputs, strict=True):
            self._cuda.memcpy_dtoh_async(host[:size], memory, stream)


class MappedBuffers:
    """Host memory that the GPU reads and writes in place: no copies. For GPUs that share the host's memory.

    The attributes are those of :class:`DeviceBuffers`.
    """

    kind = "mapped"

    def __init__(self, cuda: Any, record: EngineRecord, frees: contextlib.ExitStack) -> None:
        """Allocate for the largest batch; arguments as for :class:`DeviceBuffers`."""
        flags = cuda.host_alloc_flags.DEVICEMAP
        self.host_input, self.host_outputs = _host_arrays(cuda, record, frees, flags=flags)
        self.input_address = _device_address(self.host_input)
        self.output_addresses = [_device_address(host) for host in self.host_outputs]

    def copy_in(self, size: int, stream: Any) -> None:
        """Do nothing: the GPU reads what the host wrote."""

    def copy_out(self, size: int, stream: Any) -> None:
        """Do nothing: the GPU wrote where the host reads."""


BUFFERS: dict[str, type[DeviceBuffers] | type[MappedBuffers]] = {
    "device": DeviceBuffers,
    "mapped": MappedBuffers,
}


def _device_address(array: NDArray[Any]) -> int:
    memory: Any = array.base  # pycuda's, not an array
    return int(memory.get_device_pointer())


def _host_arrays(
    cuda: Any, record: EngineRecord, frees: contextlib.ExitStack, flags: int
) -> tuple[InputPixels, list[NDArray[np.float32]]]:
    """Allocate page-locked memory for the largest batch and for each of its outputs."""
    largest = record.batch.largest
    contract = record.contract
    images = cuda.pagelocked_empty((largest, *contract.input_shape), contract.dtype, mem_flags=flags)
    frees.callback(images.base.free)  # the array over it is dead from then on
    outputs = []
    for _, shape in contract.outputs:
        outputs.append(cuda.pagelocked_empty((largest, *shape), np.float32, mem_flags=flags))
        frees.callback(outputs[-1].base.free)
    return images, outputs


class GraphError(Exception):
    """The driver refused a call, such as a step of capturing or launching a graph."""


class CudaGraph:
    """A captured and instantiated graph: one launch replays all the work, at the addresses it was captured with."""

    def __init__(self, driver: Any, handle: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        """Take over an instantiated graph and the stream that it was captured on."""
        self._driver = driver
        self._handle: ctypes.c_void_p | None = handle
        self._stream = stream
        self._launch = driver.cuGraphLaunch  # looked up once: this is the call of every batch

    def launch(self) -> None:
        """Enqueue the whole graph on its stream.

        Raises:
            GraphError: The driver refuses.
        """
        status = self._launch(self._handle, self._stream)
        if status != 0:
            raise GraphError(f"cuGraphLaunch failed: {_describe(self._driver, status)}")

    def destroy(self) -> None:
        """Free the graph; it must not be running. A second call does nothing.

        Raises:
            GraphError: The driver refuses.
        """
        handle, self._handle = self._handle, None
        if handle is not None:
            _call(self._driver, "cuGraphExecDestroy", handle)


def missing_functions(driver: Any) -> str:
    """Return which of the functions for graphs a CUDA driver library lacks, or an empty text."""
    return ", ".join(name for name in _GRAPH_FUNCTIONS if not hasattr(driver, name))


def capture_graph(driver: Any, stream_handle: int, work: Callable[[], None]) -> CudaGraph:
    """Capture the work that a function enqueues on a stream, without running it.

    Args:
        driver: The CUDA driver library.
        stream_handle: The stream; not the default one, and with nothing of another stream waiting on it.
        work: Enqueues on that stream alone; may raise.

    Returns:
        The graph, ready to launch.

    Raises:
        GraphError: The driver refuses, for example because something in the work cannot be captured.
    """
    stream = ctypes.c_void_p(stream_handle)
    graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
    _call(driver, "cuStreamBeginCapture_v2", stream, ctypes.c_int(_THREAD_LOCAL))
    try:
        work()
    except BaseException:
        # The stream must leave capture mode even where the work failed; the graph, if any, is of no use.
        if driver.cuStreamEndCapture(stream, ctypes.byref(graph)) == 0 and graph:
            driver.cuGraphDestroy(graph)
        raise
    _call(driver, "cuStreamEndCapture", stream, ctypes.byref(graph))
    try:
        _call(driver, "cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
    finally:
        driver.cuGraphDestroy(graph)
    return CudaGraph(driver, executable, stream)


@contextlib.contextmanager
def bound_device(device: int) -> Iterator[None]:
    """Make a GPU's primary context current in this thread for the block, as cudaSetDevice does.

    The CUDA runtime, and with it TensorRT's builder, then works on that GPU. It needs no pycuda, which a machine that
    only builds may lack.

    Args:
        device: Which GPU, as CUDA numbers them.

    Raises:
        EnvironmentProblem: The driver refuses.
    """
    driver = load_driver()
    handle, context = ctypes.c_int(0), ctypes.c_void_p()
    with contextlib.ExitStack() as frees:
        try:
            _call(driver, "cuInit", 0)
            _call(driver, "cuDeviceGet", ctypes.byref(handle), device)
            set_wait(
                driver, device, sleep=False
            )  # the CUDA runtime keeps this context, and later runners get it
            _call(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
            frees.callback(driver.cuDevicePrimaryCtxRelease_v2, handle)
            _call(driver, "cuCtxPushCurrent_v2", context)
            frees.callback(driver.cuCtxPopCurrent_v2, ctypes.byref(ctypes.c_void_p()))
        except GraphError as error:
            raise EnvironmentProblem(f"GPU {device} cannot be used: {error}", remedy=_DOCTOR) from error
        yield


@contextlib.contextmanager
def primary_context(cuda: Any) -> Iterator[None]:
    """Have pycuda work, for the block, on the GPU that this thread works on: the one of the current context.

    pycuda allocates only in contexts that it has pushed itself.

    Args:
        cuda: The module ``pycuda.driver``.
    """
    cuda.init()
    context = cuda.Context.get_device().retain_primary_context()
    context.push()
    try:
        yield
    finally:
        context.pop()
        release_context(load_driver(), context)


@contextlib.contextmanager
def fill_memory(cuda: Any, device: int = 0) -> Iterator[int]:
    """Hold all free memory of a GPU, to the last MiB, while the block runs; give the bytes.

    Args:
        cuda: The module ``pycuda.driver``.
        device: Which GPU, as CUDA numbers them.

    Raises:
        EnvironmentProblem: The GPU shares the host's memory: filling that would end other programs.
    """
    cuda.init()
    gpu = cuda.Device(device)
    if gpu.get_attribute(cuda.device_attribute.INTEGRATED):
        raise EnvironmentProblem(
            "the GPU shares the host's memory", remedy="filling that would end other programs"
        )
    context = gpu.retain_primary_context()
    context.push()
    held, size = [], 1 << 30
    while size >= 1 << 20:
        size = min(size, max(cuda.mem_get_info()[0], 1))  # a fault must not take more than there is
        try:
            held.append((cuda.mem_alloc(size), size))
        except cuda.MemoryError:
            size //= 2
    context.pop()
    try:
        yield sum(size for _, size in held)
    finally:
        context.push()
        for memory, _ in held:
            memory.free()
        context.pop()
        release_context(load_driver(), context)


def _call(driver: Any, name: str, *arguments: Any) -> None:
    status = getattr(driver, name)(*arguments)
    if status != 0:
        raise GraphError(f"{name} failed: {_describe(driver, status)}")


def _describe(driver: Any, status: int) -> str:
    text = ctypes.c_char_p()
    if driver.cuGetErrorName(ctypes.c_int(status), ctypes.byref(text)) != 0 or text.value is None:
        return f"error {status}"
    return text.value.decode()
