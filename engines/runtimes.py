"""The runtimes: one table, one Protocol each for what builds and what runs. No other code knows which it drives."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from engines.errors import AccuracyGateError, BadInputError, EdgeDscError, UsageError
from engines.record import BatchRange, EngineRecord, Precision, Tuning, peek_record

if TYPE_CHECKING:  # the help of the command line gets by without numpy
    import numpy as np
    from numpy.typing import NDArray

    from engines.images import InputPixels

Progress = Callable[[str, int, int], None]  # phase, steps done, steps in all
MEMORY_KINDS = ("auto", "device", "mapped")
LAYER_RUNS = 100  # of the smallest batch, for the time of each layer
# What a runner's description says beside how it runs: reports are comparable all the same.
FINDINGS = ("device", "memory_choice", "scratch", "warnings", "runtime_cache")
FLOAT = "float"  # FP32 or FP16, as check_layers takes it
_TABLE = {
    "onnxruntime": "engines.cpu.ort:RUNTIME",
    "openvino": "engines.cpu.vino:RUNTIME",
    "tensorrt": "engines.trt.runtime:TENSORRT",
    "tensorrt-rtx": "engines.trt.runtime:TENSORRT_RTX",
}
RUNTIME_NAMES = tuple(_TABLE)
REFUSED = "choose another precision or --backend; nothing was written"

_Tag = TypeVar("_Tag")


@dataclass(frozen=True, kw_only=True)
class ImplicitInt8:
    """INT8 without Q/DQ pairs: the builder rounds an FP32 graph, by ranges of its own calibrator.

    Attributes:
        calibrator: Given the runtime's module, holds its calibrator while the builder may call it; on leaving it raises
            what failed there.
        layers: Names of the layers that must run in INT8, the others with weights in FP16; none where the builder is
            only to calibrate.
    """

    calibrator: Callable[[Any], AbstractContextManager[Any]]
    layers: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What a build is asked for.

    Attributes:
        precision: What the graph already holds (FP16 is a cast graph, INT8 a Q/DQ graph) and what the
            built engine is proven against.
        batch: The optimisation profile.
        required_layers: How many layers with weights must run in that precision, or the build fails.
        workspace_mib: Scratch memory that the builder may use, MiB.
        tuning: What else the builder is told; a runtime refuses what it does not know.
        timing_cache: Folder in which the builder's timings of kernels are kept for the next build; None keeps none.
        progress: Called with (phase, done, total) where the runtime reports it.
        log: Called with each line of the builder's log.
        implicit: INT8 by the runtime's own calibration, of an FP32 graph; see :meth:`Runtime.require_calibrators`.
        device: Which GPU builds, and the engine belongs to, as CUDA numbers them.
    """

    precision: Precision
    required_layers: int = 1
    batch: BatchRange = field(default_factory=BatchRange)
    workspace_mib: int = 1024
    tuning: Tuning = field(default_factory=Tuning)
    timing_cache: Path | None = None
    progress: Progress | None = None
    log: Callable[[str], None] | None = None
    implicit: ImplicitInt8 | None = None
    device: int = 0


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What a build found out; it becomes part of the engine record.

    Attributes:
        layers: Layers with weights counted by the precision they run in.
        layers_source: Where that count comes from.
        platform: What the engine is tied to.
        notes: Warnings for the reader.
        layer_types: The same count by the layer's name; empty where the runtime does not tell them apart.
        gpu_layers: Layers of a build for the Deep Learning Accelerator that the GPU runs.
    """

    layers: Mapping[str, int]
    layers_source: str
    platform: Mapping[str, str]
    notes: tuple[str, ...] = ()
    layer_types: Mapping[str, str] = field(default_factory=dict)
    gpu_layers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EngineLayer:
    """A layer as its runtime runs it; texts are empty where the runtime does not say.

    Attributes:
        name: What the runtime calls it.
        onnx: The ONNX layers that went into it, where the runtime names them beside its own name.
        kind: Its operator or kind, such as ``QLinearConv`` or ``CaskConvolution``.
        precision: Such as ``INT8``; types joined by ``+`` where its inputs differ and nothing else tells.
        kernel: The kernel (tactic) that was chosen for it.
        microseconds: Median time; None where it was not timed.
    """

    name: str
    onnx: tuple[str, ...] = ()
    kind: str = ""
    precision: str = ""
    kernel: str = ""
    microseconds: float | None = None


@dataclass(frozen=True)
class Availability:
    """Whether a runtime works on this machine; a reason stands where it does not.

    Attributes:
        version: The runtime's version, or None where it is not installed.
        no_build: Why it cannot build, or None where it can.
        no_run: Why it cannot run, or None where it can.
    """

    version: str | None
    no_build: str | None
    no_run: str | None


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """How an engine is run. A runtime ignores what does not concern it.

    Attributes:
        threads: CPU threads for one run.
        slots: Batches in flight at once on a GPU, each with a stream, buffers and execution context of its own; None
            takes two, or one where a batch is answered before the next comes.
        graph: Replay a CUDA graph instead of enqueueing, where the release and the engine allow it.
        memory: ``device``: copy between page-locked and device memory; ``mapped``: let the GPU read and write
            host memory; ``auto``: whichever is faster in a short measurement where the GPU shares the host's
            memory (Jetson), which is kept beside the engine; else ``device``.
        time_stages: Time the copies and the execution of every batch with CUDA events.
        blocking_wait: Sleep instead of spinning while the GPU works: leaves a core to the decoding threads,
            answers some microseconds later.
        batch: The batch size that most runs will have: a GPU is warmed up for it. None takes the engine's best.
        device: Which GPU, as CUDA numbers them from 0.

    Raises:
        ValueError: No slot, no thread, no batch, a GPU before the first, or another kind of memory.
    """

    threads: int = 1
    slots: int | None = None
    graph: bool = True
    memory: str = "auto"
    time_stages: bool = False
    blocking_wait: bool = False
    batch: int | None = None
    device: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        counts = (self.threads, *(count for count in (self.slots, self.batch) if count is not None))
        if min(counts) < 1 or self.device < 0 or self.memory not in MEMORY_KINDS:
            raise ValueError(
                f"{self} has no slot, no thread, no batch, no GPU, or a memory that is none of {MEMORY_KINDS}"
            )


DEFAULT_OPTIONS = RunnerOptions()


class Ticket:
    """A batch that was submitted; :meth:`Runner.collect` gives its answers, once.

    Attributes:
        owner: The runner that issued it.
        stages_ns: After collecting, where the runner times them: nanoseconds on the device of ``h2d``,
            ``execute`` and ``d2h``. None where it does not.
    """

    __slots__ = ("_answers", "_taken", "owner", "stages_ns")

    def __init__(self, owner: object, answers: NDArray[np.float32] | None = None) -> None:
        """Issue a ticket.

        Args:
            owner: The runner that collects it.
            answers: The answers, where they are there already.
        """
        self.owner = owner
        self.stages_ns: Mapping[str, int] | None = None
        self._answers = answers
        self._taken = False

    def take(self, owner: object) -> NDArray[np.float32] | None:
        """Mark the ticket as collected and return the answers that it was issued with.

        Raises:
            ValueError: Another runner issued it, or it was collected before.
        """
        if owner is not self.owner:
            raise ValueError("this ticket is of another runner")
        if self._taken:
            raise ValueError("this ticket was collected before")
        self._taken = True
        answers, self._answers = self._answers, None
        return answers


class Runner(Protocol):
    """A loaded engine, ready to classify. Closed by the thread that opened it.

    Attributes:
        record: The engine's record.
        thread_safe: Whether several threads may call :meth:`run` at once. Where it is False, every call belongs
            to the thread that opened the runner.
        slots: How many tickets may be open, submitted and not yet collected.
        together: How many pictures a call of :meth:`run` shall hold where several threads call it and pictures are at
            hand: 1 where a picture costs least alone.
        description: How it runs, for records and reports, such as ``{"execution": "CUDA graph"}``.
    """

    record: EngineRecord
    thread_safe: bool
    slots: int
    together: int

    @property
    def description(self) -> Mapping[str, str]:
        """How it runs, by topic."""
        ...

    def run(self, batch: InputPixels) -> NDArray[np.float32]:
        """Classify a batch.

        Args:
            batch: ``[N, *contract.input_shape]`` of the contract's type, such as ``uint8 [N, height, width, 1]``,
                with N within the engine's batch range.

        Returns:
            Probabilities, ``float32 [N, classes]``, owned by the caller.
        """
        ...

    def explain(self, batch: InputPixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Classify a batch and give its class activation maps.

        Args:
            batch: As for :meth:`run`.

        Returns:
            Probabilities as :meth:`run`, and ``float32 [N, classes, *contract.cam]``: the evidence for each class at
            each place. Its sum over the places is the class's logit up to a constant of the image.

        Raises:
            UsageError: The engine was built without maps.
        """
        ...

    def submit(self, batch: InputPixels) -> Ticket:
        """Begin a batch and return, where the runtime can, before it is answered.

        Args:
            batch: As for :meth:`run`; copied, so the caller may reuse it at once.

        Raises:
            RuntimeError: ``slots`` tickets are open: collect one first.
        """
        ...

    def collect(self, ticket: Ticket) -> NDArray[np.float32]:
        """Wait for a batch and return its answers, as :meth:`run` does; tickets may be collected in any order.

        Raises:
            ValueError: The ticket is of another runner, or was collected before.
        """
        ...

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        ...

    def __enter__(self) -> Runner:
        """Return itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        ...


class Runtime(Protocol):
    """One way to build and run engines."""

    @property
    def name(self) -> str:
        """Its name in the table and on the command line."""
        ...

    @property
    def signed_activations(self) -> bool:
        """The INT8 graph it wants: signed symmetric activations, or unsigned ones.

        TensorRT takes signed ones only; ONNX Runtime on a CPU runs unsigned ones 1.3 to 1.4 times faster.
        """
        ...

    @property
    def float_precision(self) -> Precision:
        """What layers run in that a mixed engine leaves in floating point."""
        ...

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """What it builds wherever it works, and BF16 or FP16 where some devices have it."""
        ...

    @property
    def runs_on_cpu(self) -> bool:
        """Whether engines run on this machine's processor.

        Then ONNX Runtime can time their layers, and the processor's ceilings bound their latency.
        """
        ...

    def availability(self) -> Availability:
        """Say what works here; never raises."""
        ...

    def weight_bits(self) -> int:
        """How many bits the weights of an INT8 graph may have on this machine: 8; 7 where sums of 8 would overflow.

        Raises:
            EnvironmentProblem: That depends on this machine, and the package that tells is missing.
        """
        ...

    def rest_in_half(self) -> bool:
        """Whether an INT8 graph for it holds its other layers in FP16: a TensorRT that takes types as they stand.

        Raises:
            EnvironmentProblem: That depends on the installed version, and there is none.
        """
        ...

    def require_calibrators(self, method: str) -> None:
        """Refuse what has no calibrators of its own, for INT8 without Q/DQ pairs: all but TensorRT 8.6 to 10.x.

        Raises:
            EnvironmentProblem: The package is missing.
            UsageError: It has none.
        """
        ...

    def build(self, model: bytes, out: Path, options: BuildOptions) -> BuildResult:
        """Build an engine file from a serialised ONNX model that is already in the wanted precision.

        Raises:
            AccuracyGateError: The engine would not run in the precision asked for.
            EnvironmentProblem: Something needed for building is missing here.
        """
        ...

    def inspect_layers(
        self, engine: Path, record: EngineRecord, device: int = 0
    ) -> tuple[tuple[EngineLayer, ...], str | None]:
        """Run the engine's smallest batch :data:`LAYER_RUNS` times, each layer timed.

        Args:
            engine: The engine file.
            record: Its record.
            device: Which GPU, where it runs on one.

        Returns:
            The layers in their order, and the runtime's own report on them as JSON; None where it has none.

        Raises:
            ArtefactError: Not the engine of this record, built by another version or for another device.
            EnvironmentProblem: The engine cannot run on this machine.
        """
        ...

    def open_runner(
        self, engine: Path, record: EngineRecord, options: RunnerOptions = DEFAULT_OPTIONS
    ) -> Runner:
        """Load an engine, its content held against its record.

        Args:
            engine: The engine file.
            record: Its record, from :func:`engines.record.peek_record` or of a build.
            options: How to run it.

        Raises:
            ArtefactError: Not the engine of this record, built by another version or for another device.
            EnvironmentProblem: No GPU, no driver, a missing package.
        """
        ...


def get_runtime(name: str) -> Runtime:
    """Return the runtime of that name.

    Raises:
        UsageError: There is none.
    """
    if name not in _TABLE:
        raise UsageError(f"there is no runtime {name!r}", remedy=f"choose one of {', '.join(_TABLE)}")
    module, _, attribute = _TABLE[name].partition(":")
    return cast(Runtime, getattr(importlib.import_module(module), attribute))


def choose_runtime(name: str) -> tuple[Runtime, str]:
    """Resolve ``auto`` or a name.

    Returns:
        The runtime, and why it was chosen: one line for the reader.
    """
    if name != "auto":
        return get_runtime(name), f"{name}, as asked"
    tensorrt = get_runtime("tensorrt")
    found = tensorrt.availability()
    reason = found.no_build or found.no_run
    if reason is None:
        return tensorrt, f"tensorrt {found.version} and a GPU are here"
    return get_runtime("onnxruntime"), f"onnxruntime, because tensorrt does not work here: {reason}"


def open_engine(engine: Path, *, threads: int = 1, options: RunnerOptions = DEFAULT_OPTIONS) -> Runner:
    """Check an engine against its record and load it with its runtime.

    Args:
        engine: The engine file.
        threads: CPU threads for one run, where the runtime uses any.
        options: How else to run it.

    Raises:
        ArtefactError: The engine is foreign, stale, truncated, renamed, or its record is missing or edited.
        EnvironmentProblem: Its runtime does not work on this machine.
    """
    record = peek_record(engine)  # its content is checked as it is loaded
    return get_runtime(record.runtime).open_runner(engine, record, replace(options, threads=threads))


class DirectSubmission:
    """``submit`` and ``collect`` for a runner whose ``run`` does all the work in the calling thread.

    Attributes:
        slots: 1: nothing is gained by submitting ahead.
        together: 1: the weights of one network and the tensors of one picture fit into a processor's caches.
    """

    slots = 1
    together = 1

    def run(self, batch: InputPixels) -> NDArray[np.float32]:
        """Classify a batch; the runner's own."""
        raise NotImplementedError

    def explain(self, batch: InputPixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Classify a batch and give its class activation maps; a runner's own, where its runtime gives any.

        Raises:
            UsageError: It does not.
        """
        raise UsageError(
            f"{type(self).__name__} gives no class activation maps",
            remedy="build the engine with --cam for onnxruntime, openvino or tensorrt",
        )

    def submit(self, batch: InputPixels) -> Ticket:
        """Run the batch at once; the ticket holds the answers."""
        return Ticket(self, self.run(batch))

    def collect(self, ticket: Ticket) -> NDArray[np.float32]:
        """Return the answers of a ticket.

        Raises:
            ValueError: Another runner issued it, or it was collected before.
        """
        answers = ticket.take(self)
        assert answers is not None, "submit gave the ticket its answers"
        return answers


class BatchCheck:
    """Holds a batch against an engine's record; made once, called before every run."""

    def __init__(self, record: EngineRecord) -> None:
        """Note what the record says of its inputs."""
        self._shape = record.contract.input_shape
        self._dtype = record.contract.dtype
        self._smallest = record.batch.smallest
        self._largest = record.batch.largest
        self._engine = record.engine
        self._rebuild = record.build_command

    def __call__(self, batch: InputPixels) -> None:
        """Accept ``[N, *contract.input_shape]`` of the contract's type with N in the engine's range.

        Raises:
            BadInputError: Another type, shape or size.
        """
        shape: tuple[int, ...] = getattr(batch, "shape", ())
        if (
            len(shape) == 4
            and shape[1:] == self._shape
            and batch.dtype == self._dtype
            and self._smallest <= shape[0] <= self._largest
        ):
            return
        seen = f"{getattr(batch, 'dtype', type(batch).__name__)} {list(shape)}"
        sides = ", ".join(map(str, self._shape))
        largest = f"N from {self._smallest} to {self._largest}"
        raise BadInputError(
            f"{self._engine} takes {self._dtype} [N, {sides}], {largest}, not {seen}",
            remedy=f"give another batch, or build with another --batch: {self._rebuild}",
        )


def answer_batches(
    runner: Runner, batches: Iterable[tuple[_Tag, InputPixels]]
) -> Iterator[tuple[_Tag, NDArray[np.float32]]]:
    """Run tagged batches with as many in flight as the runner has slots, and yield them in order.

    While the device works on one batch, the next is taken from ``batches`` and copied in. When the caller stops
    early or a batch fails, the tickets still open are collected and dropped, so that the runner stays usable.

    Args:
        runner: Any runner.
        batches: A tag and its batch; the batch may be reused as soon as the next one is asked for.

    Yields:
        The tag, and ``float32 [N, classes]``.
    """
    waiting: deque[tuple[_Tag, Ticket]] = deque()

    def collect_oldest() -> tuple[_Tag, NDArray[np.float32]]:
        tag, ticket = waiting.popleft()
        return tag, runner.collect(ticket)

    try:
        for tag, batch in batches:
            done = collect_oldest() if len(waiting) >= runner.slots else None
            # Submitted before the caller gets its turn, so that the device stays busy.
            waiting.append((tag, runner.submit(batch)))
            if done is not None:
                yield done
        while waiting:
            yield collect_oldest()
    except BaseException:
        for _, ticket in waiting:
            with contextlib.suppress(EdgeDscError):  # the first failure is the one to report
                runner.collect(ticket)
        raise


def require_cam(record: EngineRecord) -> None:
    """Refuse an engine without class activation maps.

    Raises:
        UsageError: It has none.
    """
    if record.contract.cam is None:
        raise UsageError(
            f"{record.engine} was built without class activation maps",
            remedy=f"build it with them: {record.build_command} --cam",
        )


def check_tuning(tuning: Tuning, known: Collection[str], runtime: str) -> None:
    """Refuse what a runtime's builder cannot be told.

    Raises:
        UsageError: Something is asked for that is not in ``known``, names of :class:`Tuning`'s fields.
    """
    default = Tuning()
    for name in tuning.__struct_fields__:
        if name not in known and getattr(tuning, name) != getattr(default, name):
            raise UsageError(
                f"{runtime} has no --{name.replace('_', '-')}",
                remedy="leave it out, or choose another --backend",
            )


def refuse_on_processor(runtime: Runtime, options: Sequence[str], engine: Path | None = None) -> None:
    """Refuse options of a GPU where a runtime runs on the processor.

    Args:
        runtime: What runs.
        options: The options that were given; none is fine.
        engine: The engine that they were given for, where there is one already.

    Raises:
        UsageError: There are some, and no GPU is concerned.
    """
    if options and runtime.runs_on_cpu:
        subject = f"{engine} is of {runtime.name}, which" if engine is not None else runtime.name
        raise UsageError(
            f"{subject} runs on the processor: {options[0]} is for a GPU",
            remedy=f"leave {' and '.join(options)} out",
        )


def layer_times(layers: Iterable[EngineLayer], names: Collection[str]) -> dict[str, float]:
    """Return the time of each ONNX layer: of the runtime's layers that hold it and no other of these.

    What was fused with another of them has no time of its own and is left out. Where a layer was split, or its input is
    brought into another format first (``Reformatting CopyNode for Input Tensor 0 to stem``), the parts add up.

    Args:
        layers: Of :meth:`Runtime.inspect_layers`.
        names: ONNX layers, such as all those with weights.

    Returns:
        Milliseconds by name, in the order of ``names``.
    """
    words = {name: re.compile(rf"(?<![\w./]){re.escape(name)}(?![\w./])") for name in names}
    times: dict[str, float] = {}
    fused: set[str] = set()
    for layer in layers:
        held = [name for name in names if name in layer.onnx or words[name].search(layer.name)]
        if len(held) > 1:
            fused.update(held)
        elif held and layer.microseconds is not None:
            times[held[0]] = times.get(held[0], 0.0) + layer.microseconds / 1000
    return {name: times[name] for name in names if name in times and name not in fused}


def without_calibrators(runtime: str, method: str) -> UsageError:
    """Return the refusal of a runtime that cannot calibrate by itself."""
    return UsageError(
        f"{runtime} knows no ranges by {method}: TensorRT 8.6 to 10.x has such calibrators",
        remedy="calibrate with another --calib-method, or take --backend tensorrt on such a release",
    )


def check_precision(layers: Mapping[str, int], options: BuildOptions) -> None:
    """Hold the layers that a build gave against what was asked for.

    Raises:
        AccuracyGateError: Fewer layers with weights run in the precision asked for than required.
    """
    if layers.get(options.precision.name, 0) >= options.required_layers:
        return
    wanted = "a layer" if options.required_layers == 1 else f"{options.required_layers} layers"
    seen = ", ".join(f"{count} in {name}" for name, count in sorted(layers.items())) or "none"
    raise AccuracyGateError(
        f"asked for {wanted} in {options.precision.name}, the engine would have {seen}",
        remedy=REFUSED,
    )


def check_layers(result: BuildResult, wanted: Mapping[str, str]) -> None:
    """Hold every layer of a build against the precision that it was to have.

    Args:
        result: What the build found.
        wanted: Precision by the layer's name, such as ``{"stem": "INT8"}``, or :data:`FLOAT`.

    Raises:
        AccuracyGateError: A layer runs in another precision, or there are fewer layers in it than wanted.
    """
    if result.layer_types:
        wrong = [
            f"{name} in {result.layer_types.get(name, 'no precision that is known')}, not {kind}"
            for name, kind in wanted.items()
            if result.layer_types.get(name) not in (("FP32", "FP16") if kind == FLOAT else (kind,))
        ]
    else:
        asked = Counter(kind for kind in wanted.values() if kind != FLOAT)
        wrong = [
            f"{result.layers.get(kind, 0)} layers in {kind}, not {count}"
            for kind, count in sorted(asked.items())
            if result.layers.get(kind, 0) < count
        ]
    if wrong:
        raise AccuracyGateError(
            f"the engine would run {'; '.join(wrong)} ({result.layers_source})",
            remedy=REFUSED,
        )
