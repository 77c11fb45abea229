"""The pycuda loop: one thread owns the context, buffers are allocated once, copies and execution share a stream."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import Any

from engines import packages
from engines.batches import BatchCheck
from engines.errors import ArtefactError, EnvironmentProblem
from engines.record import EngineRecord
from engines.runtimes import Array
from engines.tickets import DirectSubmission
from engines.trt.log import first_error, make_logger


class TrtRunner(DirectSubmission):
    """A loaded TensorRT engine with its buffers, bound to the thread that opened it.

    The device's primary context is retained for the runner's life and current only while one of its methods
    runs, so that several runners can live in one thread and close in any order.

    Attributes:
        record: The engine's record.
        thread_safe: False.
    """

    thread_safe = False
    description: Mapping[str, str] = MappingProxyType({"execution": "enqueue", "memory": "device"})

    def __init__(self, trt: Any, cuda: Any, plan: bytes, record: EngineRecord) -> None:
        """Load an engine on the first GPU.

        Args:
            trt: The module ``tensorrt`` or ``tensorrt_rtx``.
            cuda: The module ``pycuda.driver``.
            plan: The serialised engine, checked against its record.
            record: The engine's record.

        Raises:
            ArtefactError: TensorRT refuses the engine, or it is not of this contract.
            EnvironmentProblem: CUDA fails.
        """
        self.record = record
        self._cuda = cuda
        self._check = BatchCheck(record)
        self._owner = threading.get_ident()
        self._logger = make_logger(trt)
        self._batch_size = 0
        self._closed = False
        self._frees = contextlib.ExitStack()  # what must happen while the context is current, last first
        self._device_context: Any = None
        try:
            with self._cuda_errors("open"):
                cuda.init()
                self._device_context = cuda.Device(0).retain_primary_context()
            with self._current("open"):
                self._load(trt, plan)
                self._allocate(cuda)
        except BaseException:
            self.close()
            raise

    def run(self, batch: Array) -> Array:
        """Classify a batch; returns after the stream has finished.

        Args:
            batch: ``uint8 [N, height, width, 1]`` with N within the engine's batch range.

        Returns:
            Probabilities, ``float32 [N, classes]``, owned by the caller.

        Raises:
            BadInputError: Another type, shape or size.
            EnvironmentProblem: CUDA or TensorRT failed.
            RuntimeError: Called from another thread than the one that opened the runner.
            ValueError: The runner is closed.
        """
        self._check_owner()
        if self._closed:
            raise ValueError(f"the runner of {self.record.engine} is closed")
        self._check(batch)
        size = len(batch)
        with self._current("run"):
            if size != self._batch_size:
                self._set_batch_size(size)
            self._host_input[:size] = batch
            self._cuda.memcpy_htod_async(self._device_input, self._host_input[:size], self._stream)
            if not self._execution.execute_async_v3(self._stream.handle):
                raise self._problem("run", "execute_async_v3 gives False")
            self._cuda.memcpy_dtoh_async(self._host_output[:size], self._device_output, self._stream)
            self._stream.synchronize()
        return self._host_output[:size].copy()

    def close(self) -> None:
        """Free everything, buffers before the engine's context; a second call does nothing.

        Raises:
            EnvironmentProblem: CUDA fails while freeing; everything else is freed all the same.
            RuntimeError: Called from another thread than the one that opened the runner.
        """
        self._check_owner()
        if self._closed:
            return
        self._closed = True
        if self._device_context is None:
            return
        try:
            with self._current("close"):
                self._frees.close()
        finally:
            with self._cuda_errors("close"):
                self._device_context.detach()
            self._device_context = None

    def __enter__(self) -> TrtRunner:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _load(self, trt: Any, plan: bytes) -> None:
        """Make the runtime, engine and execution context; they are dropped in the opposite order."""
        runtime = trt.Runtime(self._logger)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._refused(first_error(self._logger))
        execution = engine.create_execution_context()
        if execution is None:
            raise self._problem("open", "no execution context")
        self._runtime, self._engine, self._execution = runtime, engine, execution
        for name in ("_runtime", "_engine", "_execution"):
            self._frees.callback(setattr, self, name, None)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        contract = self.record.contract
        if (inputs, outputs) != ([contract.input_name], [contract.output_name]):
            raise self._refused(f"it takes {inputs} and gives {outputs}")
        types = (engine.get_tensor_dtype(contract.input_name), engine.get_tensor_dtype(contract.output_name))
        if types != (trt.DataType.UINT8, trt.DataType.FLOAT):
            raise self._refused(f"it takes {types[0]} and gives {types[1]}")

    def _allocate(self, cuda: Any) -> None:
        """Allocate for the largest batch, once: page-locked on the host, and on the device."""
        numpy = packages.load("numpy")
        contract, largest = self.record.contract, self.record.batch.largest
        self._stream = cuda.Stream()
        self._frees.callback(setattr, self, "_stream", None)
        self._host_input = self._page_locked((largest, *contract.input_shape), numpy.uint8)
        self._host_output = self._page_locked((largest, len(contract.labels)), numpy.float32)
        self._device_input = cuda.mem_alloc(self._host_input.nbytes)
        self._frees.callback(self._device_input.free)
        self._device_output = cuda.mem_alloc(self._host_output.nbytes)
        self._frees.callback(self._device_output.free)
        for name, memory in (
            (contract.input_name, self._device_input),
            (contract.output_name, self._device_output),
        ):
            if not self._execution.set_tensor_address(name, int(memory)):
                raise self._problem("open", f"set_tensor_address refuses {name}")

    def _page_locked(self, shape: tuple[int, ...], dtype: Any) -> Array:
        array = self._cuda.pagelocked_empty(shape, dtype)
        self._frees.callback(array.base.free)
        return array

    def _set_batch_size(self, size: int) -> None:
        contract = self.record.contract
        if not self._execution.set_input_shape(contract.input_name, (size, *contract.input_shape)):
            raise self._problem("run", f"set_input_shape refuses a batch of {size}")
        self._batch_size = size

    @contextlib.contextmanager
    def _current(self, action: str) -> Iterator[None]:
        """Make the device's context current for a block."""
        with self._cuda_errors(action):
            self._device_context.push()
            try:
                yield
            finally:
                self._device_context.pop()

    @contextlib.contextmanager
    def _cuda_errors(self, action: str) -> Iterator[None]:
        """Turn CUDA's errors into ours."""
        try:
            yield
        except self._cuda.Error as error:
            raise self._problem(action, str(error)) from error

    def _check_owner(self) -> None:
        if threading.get_ident() != self._owner:
            raise RuntimeError(f"the runner of {self.record.engine} belongs to the thread that opened it")

    def _problem(self, action: str, reason: str) -> EnvironmentProblem:
        logged = first_error(self._logger, "")
        return EnvironmentProblem(
            f"{self.record.runtime} cannot {action} {self.record.engine}: {reason}"
            + (f"; first error logged: {logged}" if logged else ""),
            remedy="see edge-dsc doctor; free GPU memory, or use a smaller batch",
        )

    def _refused(self, reason: str) -> ArtefactError:
        return ArtefactError(
            f"{self.record.runtime} refuses {self.record.engine}: {reason}",
            remedy=f"rebuild it: {self.record.build_command}",
        )
