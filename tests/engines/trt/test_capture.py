from __future__ import annotations

import ctypes
from typing import Any

import pytest

from engines.trt.cuda import CudaGraph, GraphError, capture_graph, missing_functions


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
