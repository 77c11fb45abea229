from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from bench import machine as nvml
from bench.machine import Gpu, first_gpu, read_state, throttling


class Library:
    """A stand-in with the C functions that are used, and their calling convention."""

    def __init__(self, *, init: int = 0, missing: str = "") -> None:
        self.init = init
        self.missing = missing

    def __getattr__(self, name: str) -> Any:
        values = {
            "nvmlDeviceGetPowerManagementLimit": 350_000,
            "nvmlDeviceGetPowerUsage": 71_500,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x4 | 0x1 | 0x40,
        }
        clocks = {0: 1980, 2: 2619}
        if name == self.missing:
            raise AttributeError(name)
        if name == "nvmlInit_v2":
            return lambda: self.init
        if name == "nvmlDeviceGetHandleByIndex_v2":
            return lambda index, handle: 0
        if name == "nvmlDeviceGetName":

            def name_of(_device: Any, buffer: Any, _length: int) -> int:
                buffer.value = b"NVIDIA H100"
                return 0

            return name_of

        def number(_device: Any, *arguments: Any) -> int:
            target = arguments[-1]._obj
            if name == "nvmlDeviceGetMemoryInfo":
                target[:] = [80 << 30, 77 << 30, 3 << 30]
            elif name == "nvmlDeviceGetClockInfo":
                target.value = clocks[arguments[0]]
            elif name in values:
                target.value = values[name]
            else:
                return 3  # NVML_ERROR_NOT_SUPPORTED
            return 0

        return number


@pytest.fixture(autouse=True)
def fresh() -> Any:
    first_gpu.cache_clear()
    yield
    first_gpu.cache_clear()


def test_a_gpu_describes_itself() -> None:
    gpu = first_gpu(lambda name: Library())
    assert gpu is not None
    assert gpu.describe() == {
        "name": "NVIDIA H100",
        "graphics_mhz": 1980,
        "memory_mhz": 2619,
        "temperature_c": None,
        "power_limit_w": 350.0,
        "throttled_by": ["power cap", "hardware thermal slowdown"],
    }
    assert gpu.power_w() == 71.5
    assert gpu.memory_used() == 3 << 30


def test_a_gpu_that_is_held_back_is_part_of_the_machines_state(tmp_path: Path) -> None:
    found = read_state(tmp_path, first_gpu(lambda name: Library()))
    assert (found["gpu_mhz"], found["cooling"]) == (1980, ["GPU power cap", "GPU hardware thermal slowdown"])
    assert throttling([found]) == (
        "held back by GPU hardware thermal slowdown, GPU power cap during the run",
    )


def test_what_an_older_library_lacks_is_none() -> None:
    gpu = first_gpu(lambda name: Library(missing="nvmlDeviceGetCurrentClocksThrottleReasons"))
    assert gpu is not None and gpu.throttled_by() is None
    gpu = Gpu(Library(missing="nvmlDeviceGetMemoryInfo"), None)
    assert gpu.memory_used() is None


def test_no_library_and_no_gpu_are_none() -> None:
    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    assert first_gpu(absent) is None
    first_gpu.cache_clear()
    assert first_gpu(lambda name: Library(init=9)) is None


def test_the_real_library_answers_or_is_absent() -> None:
    assert nvml.first_gpu(ctypes.CDLL) is None or nvml.first_gpu(ctypes.CDLL).describe()["name"]
