"""One batch in flight: a stream, buffers, and for every batch size in use an execution context with its graph."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import EnvironmentProblem
from engines.record import EngineRecord
from engines.runtimes import EngineLayer, RunnerOptions
from engines.trt import versions
from engines.trt.census import describe_layers
from engines.trt.cuda import BUFFERS, CudaGraph, GraphError, capture_graph
from engines.trt.faults import Faults
from engines.trt.loaded import LoadedEngine

if TYPE_CHECKING:
    from engines.images import InputPixels

# Batch sizes with a graph at a time, for each slot: the full batch and the rest at the end of a folder.
SIZES = 2
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no waiting for the default stream. Source: cuda.h, CUstream_flags
STAGES = ("h2d", "execute", "d2h")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the slots of a runner share.

    Attributes:
        cuda: The module ``pycuda.driver``.
        driver: The CUDA driver library for graphs; None enqueues.
        no_graph: Why there is none.
        engine: The loaded engine.
        record: Its record.
        options: How to run it.
        faults: Words the failures.
        size: The usual batch size: its context goes last where another takes its place.
    """

    cuda: Any
    driver: Any
    no_graph: str
    engine: LoadedEngine
    record: EngineRecord
    options: RunnerOptions
    faults: Faults
    size: int


class _Prepared:
    """An execution context whose input shape is set, and its graph once there is one."""

    def __init__(self, execution: Any) -> None:
        self.execution = execution
        self.graph: CudaGraph | None = None
        self.refusal = ""  # why there is no graph
        self.uses = 0


class Slot:
    """Answers one batch at a time; the GPU's context must be current in every call."""

    def __init__(self, parts: Parts, memory: str, frees: contextlib.ExitStack) -> None:
        """Allocate everything; what fails half-way is freed by the stack.

        Args:
            parts: What the slots share.
            memory: ``device`` or ``mapped``.
            frees: Takes what must be freed, while the context is current.

        Raises:
            EnvironmentProblem: TensorRT gives no execution context, or does not take the buffers.
        """
        self._parts = parts
        cuda = parts.cuda
        self.stream = cuda.Stream(_NON_BLOCKING)
        frees.callback(setattr, self, "stream", None)
        self.buffers = BUFFERS[memory](cuda, parts.record, frees)
        self._timed = parts.options.time_stages
        # Without them the stream itself is waited for: nothing but this slot's batch is on it.
        needed = 4 if self._timed else 1 if parts.options.blocking_wait else 0
        self._events = [cuda.Event(_event_flags(cuda, parts.options)) for _ in range(needed)]
        frees.callback(self._events.clear)
        self._last_size = 0
        self._last_graph: CudaGraph | None = None
        self._prepared: OrderedDict[int, _Prepared] = OrderedDict()
        self._spare: list[Any] = []  # contexts without a shape
        self._alone = False  # whether TensorRT refused a second context
        self._scratch: Any = None  # device memory that the contexts share: only one of them runs at a time
        self.scratch_bytes = 0
        frees.callback(self._free_scratch)
        frees.callback(self._release)
        self._spare.append(self._new_execution(parts.size))

    def warm(self, size: int, runs: int = 2) -> None:
        """Answer a batch of zeros; at the second time lazy initialisation is over, and the graph is captured."""
        contract = self._parts.record.contract
        batch = np.zeros((size, *contract.input_shape), contract.dtype)
        for _ in range(runs):
            self.enqueue(batch)
            self.wait(size)

    def inspect_layers(self, runs: int) -> tuple[tuple[EngineLayer, ...], str | None]:
        """Return the layers that run for the usual batch size, timed, and the engine inspector's report on them."""
        size, loaded = self._parts.size, self._parts.engine
        execution = self._prepare(size).execution
        times = loaded.time_layers(execution)
        self.warm(size, runs)
        report = loaded.report_layers(execution)
        return describe_layers(report, execution.active_optimization_profile, times), report

    def enqueue(self, batch: InputPixels) -> None:
        """Copy a batch into the slot's own memory and enqueue all of its work.

        Raises:
            EnvironmentProblem: TensorRT or CUDA refuses; nothing of the batch is left on the stream.
        """
        size = len(batch)
        try:
            self.buffers.host_input[:size] = batch
            if size == self._last_size and self._last_graph is not None:
                self._last_graph.launch()
            else:
                self._enqueue_prepared(self._prepare(size), size)
            if self._events:
                self._events[-1].record(self.stream)
        except BaseException:
            self._drain()
            raise

    def wait(self, size: int) -> NDArray[np.float32]:
        """Wait for the batch and return its answers: ``float32 [size, classes]``, the caller's own."""
        try:
            (self._events[-1] if self._events else self.stream).synchronize()
        except BaseException:  # Ctrl-C too
            self._drain()
            raise
        answers: NDArray[np.float32] = self.buffers.host_outputs[0][:size].copy()
        return answers

    def maps(self, size: int) -> NDArray[np.float32]:
        """Return the class activation maps of the batch just waited for, the caller's own."""
        maps: NDArray[np.float32] = self.buffers.host_outputs[1][:size].copy()
        return maps

    def stages_ns(self) -> dict[str, int]:
        """Return the time that each stage of the batch just waited for took on the device, nanoseconds."""
        pairs = zip(self._events, self._events[1:], strict=False)
        times = (round(end.time_since(start) * 1e6) for start, end in pairs)  # CUDA gives milliseconds
        return dict(zip(STAGES, times, strict=True))

    def execution_words(self) -> str:
        """Say how batches are executed: those of the usual size, where that one is in use."""
        prepared = self._prepared.get(self._parts.size)
        if self._parts.driver is None:
            return f"enqueue (no CUDA graph: {self._parts.no_graph})"
        if prepared is None or prepared.graph is None:
            refusal = prepared.refusal or "not captured yet" if prepared else "another batch size has it"
            return f"enqueue (no CUDA graph: {refusal})"
        return "CUDA graph of the execution" if self._timed else "CUDA graph"

    def _drain(self) -> None:
        """Leave nothing of a failed batch on the stream: the buffers are about to be used again."""
        with contextlib.suppress(self._parts.cuda.Error):
            self.stream.synchronize()

    def _enqueue_prepared(self, prepared: _Prepared, size: int) -> None:
        if self._timed:
            self._enqueue_timed(prepared, size)
            return
        # The short way for the next batch of this size.
        self._last_size, self._last_graph = size, prepared.graph
        if prepared.graph is not None:
            prepared.graph.launch()
        else:
            self._enqueue_all(prepared, size)

    def _enqueue_all(self, prepared: _Prepared, size: int) -> None:
        self.buffers.copy_in(size, self.stream)
        self._execute(prepared)
        self.buffers.copy_out(size, self.stream)

    def _enqueue_timed(self, prepared: _Prepared, size: int) -> None:
        """The same work with an event after each stage; a graph holds the execution alone."""
        self._events[0].record(self.stream)
        self.buffers.copy_in(size, self.stream)
        self._events[1].record(self.stream)
        if prepared.graph is not None:
            prepared.graph.launch()
        else:
            self._execute(prepared)
        self._events[2].record(self.stream)
        self.buffers.copy_out(size, self.stream)

    def _execute(self, prepared: _Prepared) -> None:
        execution = prepared.execution
        if not execution.execute_async_v3(self.stream.handle):
            raise self._parts.faults.problem("run", "execute_async_v3 gives False")

    def _prepare(self, size: int) -> _Prepared:
        """Return the context for a batch size; from its second use on with a graph.

        The first use is a plain enqueue: TensorRT finishes what a new shape needs there, which cannot be captured.
        """
        prepared = self._prepared.get(size)
        if prepared is None:
            prepared = _Prepared(self._shaped_execution(size))
            self._prepared[size] = prepared
        self._prepared.move_to_end(size)
        prepared.uses += 1
        if prepared.uses == 2 and self._parts.driver is not None:
            self._capture(prepared, size)
        return prepared

    def _capture(self, prepared: _Prepared, size: int) -> None:
        """Give a context its graph, or note why it has none and go on enqueueing."""
        faults, handle = self._parts.faults, self.stream.handle
        self.stream.synchronize()
        if not versions.is_capturable(prepared.execution, handle):
            prepared.refusal = "the engine cannot be captured; it works in memory of its own"
            return
        try:
            prepared.graph = capture_graph(
                self._parts.driver, handle, lambda: self._enqueue_captured(prepared, size)
            )
        except (GraphError, self._parts.cuda.Error) as error:
            prepared.refusal = str(error)
        except EnvironmentProblem as error:
            prepared.refusal = error.what
        faults.forget()

    def _enqueue_captured(self, prepared: _Prepared, size: int) -> None:
        """Enqueue what a graph replays: everything, or the execution alone where the copies are timed."""
        if self._timed:
            self._execute(prepared)
        else:
            self._enqueue_all(prepared, size)

    def _shaped_execution(self, size: int) -> Any:
        """Return a context with the shape set; a context that a graph was captured from is never reshaped."""
        execution = self._free_execution(size)
        contract = self._parts.record.contract
        try:
            if not self._parts.engine.choose_profile(execution, size, self.stream.handle):
                raise self._parts.faults.problem("run", f"no optimisation profile for a batch of {size}")
            if not execution.set_input_shape(contract.input_name, (size, *contract.input_shape)):
                raise self._parts.faults.problem("run", f"set_input_shape refuses a batch of {size}")
            self._provide_scratch(execution)
        except BaseException:
            self._spare.append(execution)
            raise
        return execution

    def _provide_scratch(self, execution: Any) -> None:
        """Give a context the slot's scratch memory; where that is too small, all contexts get a larger one.

        Contexts with memory of their own would hold several times what runs at once.
        """
        needed = max(1, self._parts.engine.memory_needed(execution))  # an address must be given all the same
        others = list(self._prepared.values())
        if needed > self.scratch_bytes:
            larger = self._parts.cuda.mem_alloc(needed)
            self.stream.synchronize()
            for prepared in others:  # their graphs work in the old memory
                self._drop_graph(prepared)
                versions.set_memory(prepared.execution, int(larger), needed)
                prepared.uses = 0
            self._free_scratch()
            self._scratch, self.scratch_bytes = larger, needed
        versions.set_memory(execution, int(self._scratch), self.scratch_bytes)

    def _free_scratch(self) -> None:
        scratch, self._scratch = self._scratch, None
        if scratch is not None:
            scratch.free()

    def _drop_graph(self, prepared: _Prepared) -> None:
        """Free a context's graph; the stream must have finished."""
        self._last_graph = None
        graph, prepared.graph = prepared.graph, None
        if graph is not None:
            graph.destroy()

    def _free_execution(self, size: int) -> Any:
        if self._spare:
            return self._spare.pop()
        limit = SIZES if self._parts.driver is not None and not self._alone else 1
        if len(self._prepared) < limit:
            try:
                return self._new_execution(size)
            except EnvironmentProblem:
                # One context for all sizes: the graph is captured again when the size changes.
                self._alone = True
        usual = self._parts.size
        oldest = self._prepared.pop(next((other for other in self._prepared if other != usual), usual))
        self.stream.synchronize()
        self._drop_graph(oldest)
        return oldest.execution

    def _new_execution(self, size: int) -> Any:
        parts = self._parts
        execution = parts.engine.create_execution()
        if execution is None or not parts.engine.choose_profile(execution, size, self.stream.handle):
            raise parts.faults.problem("open", "no execution context")
        contract, buffers = parts.record.contract, self.buffers
        names = [contract.input_name, *(name for name, _ in contract.outputs)]
        for name, address in zip(names, (buffers.input_address, *buffers.output_addresses), strict=True):
            if not execution.set_tensor_address(name, address):
                raise parts.faults.problem("open", f"set_tensor_address refuses {name}")
        return execution

    def _release(self) -> None:
        """Let the stream finish, then drop graphs before the contexts that they were captured from."""
        with contextlib.ExitStack() as all_of_it:
            self._last_graph = None
            all_of_it.callback(self._spare.clear)
            all_of_it.callback(self._prepared.clear)
            for prepared in self._prepared.values():
                all_of_it.callback(self._drop_graph, prepared)
            all_of_it.callback(self.stream.synchronize)


def _event_flags(cuda: Any, options: RunnerOptions) -> int:
    flags = cuda.event_flags
    return int(
        (flags.BLOCKING_SYNC if options.blocking_wait else flags.DEFAULT)
        | (flags.DEFAULT if options.time_stages else flags.DISABLE_TIMING)
    )
