"""What the CUDA driver says of this machine, asked without any CUDA package."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

# Source: cuda.h, CUdevice_attribute
_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
_MINOR = 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


@dataclass(frozen=True)
class Gpu:
    """The first GPU.

    Attributes:
        name: Such as ``Orin``.
        compute_capability: Such as ``8.7``.
    """

    name: str
    compute_capability: str


def load_driver() -> ctypes.CDLL:
    """Return the CUDA driver's library.

    Raises:
        OSError: There is none.
    """
    return ctypes.CDLL(_LIBRARY)


def release_context(driver: Any, context: Any) -> None:
    """Detach a primary context of pycuda's and leave the thread's stack of contexts as it was.

    To detach a context that is not current, pycuda (up to 2026.1 at least) pushes it and trusts that this takes
    it off the stack again. That holds for contexts that were created; releasing a primary one never pops it, so
    the thread would be left with a context that is gone.

    Args:
        driver: The CUDA driver library; None where it has none for us.
        context: From ``retain_primary_context``, not current.
    """
    before = _current_context(driver)
    try:
        context.detach()
    finally:
        if _current_context(driver) != before:
            driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def _current_context(driver: Any) -> int | None:
    current = ctypes.c_void_p()
    if driver is None or driver.cuCtxGetCurrent(ctypes.byref(current)) != 0:
        return None
    return current.value


def find_gpu() -> tuple[Gpu | None, str]:
    """Look for a GPU.

    Returns:
        The first GPU and an empty text, or None and the reason why none can be used.
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
    device = ctypes.c_int(0)
    name = ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(0), ctypes.c_int(0)
    steps = (
        cuda.cuDeviceGet(ctypes.byref(device), 0),
        cuda.cuDeviceGetName(name, len(name), device),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
    )
    if any(steps):
        return None, f"the CUDA driver does not describe its GPU: errors {steps}"
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}"), ""
