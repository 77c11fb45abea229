"""CUDA graphs through the driver's own interface: pycuda (2026.1 and before) cannot capture a stream."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

# Source: cuda.h, CUstreamCaptureMode. Other threads of this process may allocate and synchronise meanwhile.
_THREAD_LOCAL = 1
_NEEDED = (
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",  # CUDA 11.4
    "cuGraphLaunch",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
)


class GraphError(Exception):
    """The driver refused a step of capturing or launching a graph."""


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
    return ", ".join(name for name in _NEEDED if not hasattr(driver, name))


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


def _call(driver: Any, name: str, *arguments: Any) -> None:
    status = getattr(driver, name)(*arguments)
    if status != 0:
        raise GraphError(f"{name} failed: {_describe(driver, status)}")


def _describe(driver: Any, status: int) -> str:
    text = ctypes.c_char_p()
    if driver.cuGetErrorName(ctypes.c_int(status), ctypes.byref(text)) != 0 or text.value is None:
        return f"error {status}"
    return text.value.decode()
