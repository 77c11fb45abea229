"""NVIDIA's management library by ctypes: what a discrete GPU says of itself. Optional, never with root."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

_LIBRARIES = ("libnvidia-ml.so.1", "nvml.dll")
_GRAPHICS_CLOCK, _MEMORY_CLOCK, _CORE_TEMPERATURE = 0, 2, 0
# nvmlClocksEventReasons that hold a GPU back: power cap, slowdowns by hardware, heat and power brake.
_THROTTLE = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


class Gpu:
    """The first GPU. Every reading is None where the library or the GPU does not tell."""

    def __init__(self, library: Any, device: Any) -> None:
        """Take over a library that was initialised and a device handle."""
        self._library = library
        self._device = device

    def describe(self) -> dict[str, Any]:
        """Return name, clocks, temperature, power limit and throttling as JSON values."""
        return {
            "name": self._text("nvmlDeviceGetName"),
            "graphics_mhz": self.graphics_mhz(),
            "memory_mhz": self._number("nvmlDeviceGetClockInfo", _MEMORY_CLOCK),
            "temperature_c": self._number("nvmlDeviceGetTemperature", _CORE_TEMPERATURE),
            "power_limit_w": _thousandth(self._number("nvmlDeviceGetPowerManagementLimit")),
            "throttled_by": self.throttled_by(),
        }

    def graphics_mhz(self) -> int | None:
        """Return the clock of the cores now, MHz."""
        return self._number("nvmlDeviceGetClockInfo", _GRAPHICS_CLOCK)

    def memory_used(self) -> int | None:
        """Return the memory that all processes together use on the device now, bytes."""
        info = (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free, used
        return int(info[2]) if self._filled("nvmlDeviceGetMemoryInfo", info) else None

    def power_w(self) -> float | None:
        """Return the power that the whole board draws now, watts."""
        return _thousandth(self._number("nvmlDeviceGetPowerUsage"))

    def throttled_by(self) -> list[str] | None:
        """Name what holds the clocks down now."""
        reasons = self._number("nvmlDeviceGetCurrentClocksThrottleReasons", kind=ctypes.c_ulonglong)
        return None if reasons is None else [name for bit, name in _THROTTLE.items() if reasons & bit]

    def _number(self, function: str, *arguments: int, kind: Any = ctypes.c_uint) -> int | None:
        value = kind()
        return int(value.value) if self._filled(function, value, *arguments) else None

    def _filled(self, function: str, target: Any, *arguments: int) -> bool:
        """Let a function of the library fill a C value; say whether it did."""
        try:
            return bool(getattr(self._library, function)(self._device, *arguments, ctypes.byref(target)) == 0)
        except AttributeError:
            return False

    def _text(self, function: str) -> str | None:
        buffer = ctypes.create_string_buffer(96)
        code = getattr(self._library, function)(self._device, buffer, len(buffer))
        return buffer.value.decode(errors="replace") if code == 0 else None


@functools.lru_cache(maxsize=1)
def first_gpu(open_library: Callable[[str], Any] = ctypes.CDLL) -> Gpu | None:
    """Return the first GPU that NVML knows, or None: no driver, no GPU, or a Jetson whose NVML is a stub."""
    for name in _LIBRARIES:
        try:
            library = open_library(name)
            device = ctypes.c_void_p()
            if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
                continue
            return Gpu(library, device)
        except (OSError, AttributeError):
            continue
    return None


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1000
