"""Where a batch lies: page-locked and device memory with copies between, or host memory that the GPU maps."""

from __future__ import annotations

import contextlib
from typing import Any

from engines import packages
from engines.record import EngineRecord

Array = Any


class DeviceBuffers:
    """Page-locked host memory, device memory, and asynchronous copies.

    Attributes:
        host_input: ``uint8 [largest, height, width, 1]``.
        host_output: ``float32 [largest, classes]``.
        input_address: Where TensorRT reads, a device pointer.
        output_address: Where it writes.
    """

    kind = "device"

    def __init__(self, cuda: Any, record: EngineRecord, frees: contextlib.ExitStack) -> None:
        """Allocate for the largest batch.

        Args:
            cuda: The module ``pycuda.driver``.
            record: Tells the shapes.
            frees: Takes what must be freed.
        """
        self._cuda = cuda
        self.host_input, self.host_output = _host_arrays(cuda, record, frees, flags=0)
        self._device_input = cuda.mem_alloc(self.host_input.nbytes)
        frees.callback(self._device_input.free)
        self._device_output = cuda.mem_alloc(self.host_output.nbytes)
        frees.callback(self._device_output.free)
        self.input_address, self.output_address = int(self._device_input), int(self._device_output)

    def copy_in(self, size: int, stream: Any) -> None:
        """Enqueue the copy of the first ``size`` images to the device."""
        self._cuda.memcpy_htod_async(self._device_input, self.host_input[:size], stream)

    def copy_out(self, size: int, stream: Any) -> None:
        """Enqueue the copy of the first ``size`` answers to the host."""
        self._cuda.memcpy_dtoh_async(self.host_output[:size], self._device_output, stream)


class MappedBuffers:
    """Host memory that the GPU reads and writes in place: no copies. For GPUs that share the host's memory.

    The attributes are those of :class:`DeviceBuffers`.
    """

    kind = "mapped"

    def __init__(self, cuda: Any, record: EngineRecord, frees: contextlib.ExitStack) -> None:
        """Allocate for the largest batch; arguments as for :class:`DeviceBuffers`."""
        flags = cuda.host_alloc_flags.DEVICEMAP
        self.host_input, self.host_output = _host_arrays(cuda, record, frees, flags=flags)
        self.input_address = int(self.host_input.base.get_device_pointer())
        self.output_address = int(self.host_output.base.get_device_pointer())

    def copy_in(self, size: int, stream: Any) -> None:
        """Do nothing: the GPU reads what the host wrote."""

    def copy_out(self, size: int, stream: Any) -> None:
        """Do nothing: the GPU wrote where the host reads."""


Buffers = DeviceBuffers | MappedBuffers
BUFFERS: dict[str, type[DeviceBuffers] | type[MappedBuffers]] = {
    "device": DeviceBuffers,
    "mapped": MappedBuffers,
}


def _host_arrays(cuda: Any, record: EngineRecord, frees: contextlib.ExitStack, flags: int) -> list[Array]:
    numpy = packages.load("numpy")
    largest = record.batch.largest
    arrays = []
    for shape, dtype in (
        ((largest, *record.contract.input_shape), numpy.uint8),
        ((largest, len(record.contract.labels)), numpy.float32),
    ):
        array = cuda.pagelocked_empty(shape, dtype, mem_flags=flags)
        frees.callback(array.base.free)  # the array over it is dead from then on
        arrays.append(array)
    return arrays
