"""What the CUDA driver says of this machine, asked without any CUDA package."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

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
