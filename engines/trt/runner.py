"""A loaded TensorRT engine that runs batches: opened, submitted to, collected from, closed."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import EnvironmentProblem
from engines.runtimes import DEFAULT_OPTIONS, BatchCheck, EngineLayer, RunnerOptions, Ticket, require_cam
from engines.trt import cuda as cuda_driver
from engines.trt.cache import MemoryFile
from engines.trt.cuda import BUFFERS
from engines.trt.faults import Faults, describe_warnings, process_logger
from engines.trt.loaded import LoadedEngine, StoredEngine
from engines.trt.slot import Parts, Slot

if TYPE_CHECKING:
    from engines.images import InputPixels

_SLOTS = 2  # one batch is copied while another is executed
# Batches of each kind of memory where the kind is measured: to warm up, and to be counted.
_WARM_TURNS, _TURNS = 5, 20


class TrtRunner:
    """A loaded TensorRT engine with its buffers, bound to the thread that opened it.

    The device's primary context is retained for the runner's life and current only while one of its methods
    runs, so that several runners can live in one process and close in any order.

    Attributes:
        record: The engine's record.
        thread_safe: False.
        slots: Batches that can be in flight at once.
        together: 1: no threads call it.
    """

    thread_safe = False
    together = 1

    def __init__(
        self,
        trt: Any,
        cuda: Any,
        stored: StoredEngine,
        options: RunnerOptions = DEFAULT_OPTIONS,
        *,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        """Load an engine on its GPU, run it for the first time and capture its graph.

        Args:
            trt: The module ``tensorrt`` or ``tensorrt_rtx``.
            cuda: The module ``pycuda.driver``.
            stored: The engine, checked against its record.
            options: How to run it.
            clock: Nanoseconds, for choosing the memory.

        Raises:
            ArtefactError: TensorRT refuses the engine, or it is not of this contract.
            EnvironmentProblem: TensorRT or CUDA fails, for lack of memory for example.
        """
        self.record = stored.record
        self.slots = 0
        self._cuda = cuda
        self._options = options
        self._clock = clock
        self._check = BatchCheck(stored.record)
        self._owner = threading.get_ident()
        self._faults = Faults(stored.record, process_logger(trt), cuda)
        name = f" ({stored.gpu.name})" if stored.gpu is not None else ""
        self._words = {"device": f"{options.device}{name}"}
        self._free: list[Slot] = []
        self._busy: dict[Ticket, tuple[Slot, int]] = {}
        self._closed = False
        self._frees = contextlib.ExitStack()  # what must happen while the context is current, last first
        self._device_context: Any = None
        self._driver = self._load_driver()
        try:
            with self._faults.told("open"):
                cuda.init()
                device = cuda.Device(options.device)
                self._set_wait()
                self._device_context = device.retain_primary_context()
            self._running = self._faults.current(self._device_context, "run")
            with self._faults.current(self._device_context, "open"):
                self._open(trt, stored, device)
        except BaseException:
            with contextlib.suppress(EnvironmentProblem):  # the first failure is the one to report
                self.close()
            raise

    @property
    def description(self) -> Mapping[str, str]:
        """How it runs: device, wait, execution, memory, slots, scratch memory, warnings, the runtime cache of RTX."""
        words = dict(self._words)
        slots = [*self._free, *(slot for slot, _ in self._busy.values())]
        if slots:
            words["execution"] = slots[0].execution_words()
            scratch = sum(slot.scratch_bytes for slot in slots)
            words["scratch"] = f"{scratch / (1 << 20):.1f} MiB of device memory for {len(slots)} slots"
        if not self._closed and self._loaded.cache is not None:
            words["runtime_cache"] = self._loaded.cache.state
        return words

    def run(self, batch: InputPixels) -> NDArray[np.float32]:
        """Classify a batch; returns when the device has answered. Arguments and errors as for submit and collect."""
        self._check_usable()
        self._check(batch)
        slot = self._free_slot()
        with self._running:
            slot.enqueue(batch)
            return slot.wait(len(batch))

    def explain(self, batch: InputPixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Classify a batch and give its class activation maps; see :meth:`engines.runtimes.Runner.explain`."""
        require_cam(self.record)
        answers = self.run(batch)
        return answers, self._free[0].maps(len(batch))

    def submit(self, batch: InputPixels) -> Ticket:
        """Copy a batch and enqueue its work; returns before the device has done it.

        Args:
            batch: ``[N, *contract.input_shape]`` of the contract's type, with N within the engine's batch range.

        Raises:
            BadInputError: Another type, shape or size.
            EnvironmentProblem: CUDA or TensorRT failed.
            RuntimeError: Called from another thread than the one that opened the runner, or no slot is free.
            ValueError: The runner is closed.
        """
        self._check_usable()
        self._check(batch)
        slot = self._free_slot()
        with self._running:
            slot.enqueue(batch)
        self._free.remove(slot)
        ticket = Ticket(self)
        self._busy[ticket] = (slot, len(batch))
        return ticket

    def collect(self, ticket: Ticket) -> NDArray[np.float32]:
        """Wait for a batch.

        Returns:
            Probabilities, ``float32 [N, classes]``, owned by the caller.

        Raises:
            EnvironmentProblem: CUDA failed.
            RuntimeError: Called from another thread than the one that opened the runner.
            ValueError: The runner is closed, or the ticket is of another or was collected before.
        """
        self._check_usable()
        ticket.take(self)
        slot, size = self._busy.pop(ticket)
        self._free.append(slot)
        with self._running:
            answers = slot.wait(size)
            if self._options.time_stages:
                ticket.stages_ns = slot.stages_ns()
        return answers

    def inspect_layers(self, runs: int) -> tuple[tuple[EngineLayer, ...], str | None]:
        """Answer black batches of the usual size, each layer timed; a runner with graphs gets no times.

        Returns:
            The layers, and the engine inspector's JSON report.

        Raises:
            EnvironmentProblem: CUDA or TensorRT failed.
            RuntimeError: Called from another thread than the one that opened the runner, or no slot is free.
            ValueError: The runner is closed.
        """
        self._check_usable()
        slot = self._free_slot()
        with self._running:
            return slot.inspect_layers(runs)

    def close(self) -> None:
        """Free everything, buffers before the engine's context; a second call does nothing. Open tickets are lost.

        Raises:
            EnvironmentProblem: CUDA fails while freeing; everything else is freed all the same.
            RuntimeError: Called from another thread than the one that opened the runner.
        """
        self._check_owner()
        if self._closed:
            return
        self._words = dict(self.description) if self.slots else {}
        self._closed = True
        if self._device_context is None:
            return
        try:
            with self._faults.current(self._device_context, "close"):
                self._frees.close()
        finally:
            with self._faults.told("close"):
                cuda_driver.release_context(self._driver, self._device_context)
            self._device_context = None
            self._free.clear()
            self._busy.clear()

    def __enter__(self) -> TrtRunner:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _open(self, trt: Any, stored: StoredEngine, device: Any) -> None:
        """Load the engine, open the slots and warm each; the context is current."""
        self._loaded = LoadedEngine(trt, stored, self._faults)
        self._loaded.register(self._frees)
        driver, no_graph = self._graph_driver()
        batch = self.record.batch
        size = min(max(self._options.batch or batch.best, batch.smallest), batch.largest)
        parts = Parts(
            cuda=self._cuda,
            driver=driver,
            no_graph=no_graph,
            engine=self._loaded,
            record=self.record,
            options=self._options,
            faults=self._faults,
            size=size,
        )
        kept = MemoryFile(stored.place, stored.record, stored.gpu, str(trt.__version__))
        memory = self._words["memory"] = self._choose_memory(parts, device, kept)
        wanted = self._options.slots or _SLOTS
        for index in range(wanted):
            with contextlib.ExitStack() as frees:
                try:
                    slot = Slot(parts, memory, frees)
                    slot.warm(size)
                except EnvironmentProblem as error:
                    if index == 0:
                        raise
                    self._words["slots"] = f"{index} of {wanted}: {error.what}"
                    break
                self._frees.push(frees.pop_all())
            self._free.append(slot)
        self.slots = len(self._free)
        self._words.setdefault("slots", str(self.slots))
        self._faults.forget()
        for warning in describe_warnings(self._faults.logger):
            self._words["warnings"] = warning
        self._keep_cache()
        self._frees.callback(self._keep_cache)

    def _keep_cache(self) -> None:
        if self._loaded.cache is not None:
            self._loaded.cache.save()

    def _choose_memory(self, parts: Parts, device: Any, kept: MemoryFile) -> str:
        """Return ``device`` or ``mapped``: as asked, by the kind of GPU, as kept beside the engine, or by a trial."""
        words, attributes = self._words, self._cuda.device_attribute
        if self._options.memory != "auto":
            words["memory_choice"] = "as asked"
            return self._options.memory
        if not device.get_attribute(attributes.INTEGRATED):
            words["memory_choice"] = "the GPU has its own"
            return "device"
        known = kept.find(parts.size)
        if known is not None:
            words["memory_choice"] = f"{known.words}, as kept beside the engine"
            return known.kind
        medians_us, refused = _try_kinds(parts, self._clock)
        if refused:  # perhaps for now alone: there is nothing to keep
            left = next(iter(medians_us), "device")
            reasons = "; ".join(f"{kind} memory failed: {why}" for kind, why in refused.items())
            words["memory_choice"] = f"{left} is left, {reasons}"
            return left
        choice, place = kept.keep(parts.size, medians_us)
        words["memory_choice"] = f"{choice.words}, {place}"
        return choice.kind

    def _set_wait(self) -> None:
        sleep = self._options.blocking_wait
        refusal = cuda_driver.set_wait(self._driver, self._options.device, sleep=sleep)
        wanted = "sleep" if sleep else "spin"
        self._words["wait"] = f"as the driver likes, not {wanted}: {refusal}" if refusal else wanted

    def _load_driver(self) -> Any:
        """Return the CUDA driver library; pycuda has it loaded already.

        Raises:
            EnvironmentProblem: There is none under its usual name.
        """
        try:
            return cuda_driver.load_driver()
        except OSError as error:
            raise self._faults.problem("open", str(error)) from error

    def _graph_driver(self) -> tuple[Any, str]:
        """Return the driver library for graphs, or None and why there are none."""
        if not self._options.graph:
            return None, "as asked"
        missing = cuda_driver.missing_functions(self._driver)
        return (None, f"the driver lacks {missing}") if missing else (self._driver, "")

    def _free_slot(self) -> Slot:
        if not self._free:
            raise RuntimeError(
                f"all {self.slots} slots of {self.record.engine} are in flight: collect a ticket"
            )
        return self._free[0]

    def _check_owner(self) -> None:
        if threading.get_ident() != self._owner:
            raise RuntimeError(f"the runner of {self.record.engine} belongs to the thread that opened it")

    def _check_usable(self) -> None:
        self._check_owner()
        if self._closed:
            raise ValueError(f"the runner of {self.record.engine} is closed")


def _try_kinds(parts: Parts, clock: Callable[[], int]) -> tuple[dict[str, float], dict[str, str]]:
    """Have batches of the usual size answered in turns with each kind of memory, alone on the device.

    In turns, because clocks rise and fall meanwhile: one kind after the other would compare two states of the GPU.

    Returns:
        Median time from host memory to host memory by kind, microseconds; and why a kind failed, by kind.
    """
    slots: dict[str, Slot] = {}
    taken: dict[str, list[int]] = {}
    refused: dict[str, str] = {}

    @contextlib.contextmanager
    def tried(kind: str) -> Iterator[None]:
        try:
            with parts.faults.told("open"):
                yield
        except EnvironmentProblem as error:
            refused[kind] = error.what
            taken.pop(kind, None)

    with contextlib.ExitStack() as all_of_it:
        for kind in BUFFERS:
            with tried(kind), contextlib.ExitStack() as frees:
                slots[kind] = Slot(parts, kind, frees)
                slots[kind].warm(parts.size)
                taken[kind] = []
                all_of_it.push(frees.pop_all())
        batch = np.zeros((parts.size, *parts.record.contract.input_shape), np.uint8)
        for turn in range(_WARM_TURNS + _TURNS if len(taken) > 1 else 0):
            for kind in list(reversed(taken)) if turn % 2 else list(taken):
                with tried(kind):
                    started = clock()
                    slots[kind].enqueue(batch)
                    slots[kind].wait(parts.size)
                    taken[kind].append(clock() - started)
    return {
        kind: statistics.median(times[_WARM_TURNS:] or [0]) / 1e3 for kind, times in taken.items()
    }, refused
