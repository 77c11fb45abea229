"""OpenVINO on a processor: FP32, BF16 where the processor has it, and INT8 whose Q/DQ pairs it fuses."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import platform
import statistics
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines import packages
from engines.errors import AccuracyGateError, ArtefactError, EdgeDscError, EnvironmentProblem
from engines.files import read_regular, sha256_bytes, write_bytes
from engines.record import EngineRecord, Precision, read_engine
from engines.runtimes import (
    DEFAULT_OPTIONS,
    LAYER_RUNS,
    REFUSED,
    Availability,
    BatchCheck,
    BuildOptions,
    BuildResult,
    DirectSubmission,
    EngineLayer,
    RunnerOptions,
    check_precision,
    check_tuning,
    require_cam,
    without_calibrators,
)

if TYPE_CHECKING:
    from onnx import ModelProto

    from engines.images import InputPixels

CACHE_SUFFIX = ".compiled"  # model.engine -> model.engine.b1.compiled
_KIND = "edge-dsc/compiled-model 2"  # 1 was proven by the precision of its layers alone
_DEVICE = "CPU"
_LAYERS_SOURCE = "execution graph of OpenVINO on this machine"
# What the float layers compute in. Left out, OpenVINO would take BF16 or FP16 by itself where the processor has it.
_FLOAT_TYPES = {Precision.BF16: "bf16", Precision.FP16: "f16"}
# As its execution graph names types.
_PRECISIONS = {"f32": "FP32", "f16": "FP16", "bf16": "BF16", "i8": "INT8", "u8": "INT8"}
_WEIGHTED_KINDS = frozenset({"Convolution", "FullyConnected", "MatMul"})
_NOT_RUN = frozenset({"Const", "Input", "Output"})
_INT8_NOTE = "INT8 gains most on a processor with VNNI: measure it and FP32 with edge-dsc bench"
_SEVEN_BITS_NOTE = (
    "INT8 weights of 7 bits in layers that sum over channels: OpenVINO adds products of 8 in 16 bits on this processor,"
    " which overflow; the coarser weights cost some networks as much: hold the engine to its accuracy with --validate"
)
# Of the network that says how this processor sums: each layer's sum is as large as 8 bits make it.
_PROBE_CHANNELS, _PROBE_SIDE = 64, 4
_PROBE_ERROR = 0.01  # of a sum; two products that overflow lose half of it
_REMEDY_MEMORY = "free some memory, or use a smaller batch"


class OpenVino:
    """Builds an ONNX file, FP32 or INT8 (Q/DQ), and runs it on an x86-64 or ARM64 processor.

    The engine is the graph as it was given: nothing in it is tied to a processor or a version. What OpenVINO makes of
    it is kept beside it, tied to both (:class:`_Compiler`); on another processor the precision of each layer is proven
    again before the engine answers, and whether it sums the engine's products exactly.
    """

    name = "openvino"
    # Either kind is fused. Unsigned activations meet signed weights in one instruction where the processor has VNNI,
    # and without it unsigned graphs were the nearer ones to FP32 (docs/openvino.md).
    signed_activations = False
    float_precision = Precision.FP32
    precisions = (Precision.FP32, Precision.BF16, Precision.INT8, Precision.MIXED)
    runs_on_cpu = True

    def availability(self) -> Availability:
        """Say what works here; never raises."""
        version = packages.installed_version("openvino", "openvino")
        reason = None if version else "openvino is not installed"
        return Availability(version, reason, reason)

    def weight_bits(self) -> int:
        """Say 7 where this processor adds two products of 8 bits in 16, which overflow: x86-64 without VNNI.

        Raises:
            EnvironmentProblem: ``openvino`` is missing.
        """
        return 8 if _sums_exactly() else 7

    def rest_in_half(self) -> bool:
        """Say no: what is not INT8 stays FP32."""
        return False

    def require_calibrators(self, method: str) -> None:
        """Refuse: it has none.

        Raises:
            UsageError: Always.
        """
        raise without_calibrators(self.name, method)

    def build(self, model: bytes, out: Path, options: BuildOptions) -> BuildResult:
        """Compile a model, prove the precision that it runs in here, and write it with what was compiled.

        Raises:
            AccuracyGateError: The engine would not run in the precision asked for, or the processor does not have it.
            ArtefactError: The model is none that OpenVINO can read.
            EnvironmentProblem: ``openvino`` or memory is missing, or ``out`` cannot be written.
        """
        check_tuning(options.tuning, (), self.name)
        from engines.graph import parse_model

        compiler = _Compiler(
            out, sha256_bytes(model), options.precision, remedy="export it again: edge-dsc export RUN"
        )
        compiler.require_type()
        source = parse_model(model, out).proto
        size = options.batch.smallest
        compiled = compiler.compile(model, size, DEFAULT_OPTIONS)
        named, layers = _census(compiled, source)
        check_precision(layers, options)
        write_bytes(out, model)
        compiler.keep(compiled, size)
        notes: tuple[str, ...] = ()
        if options.precision is Precision.INT8:
            notes = (_INT8_NOTE,) if self.weight_bits() == 8 else (_INT8_NOTE, _SEVEN_BITS_NOTE)
        return BuildResult(
            layers=layers,
            layers_source=_LAYERS_SOURCE,
            platform={
                "system": platform.system(),
                "machine": platform.machine(),
                "processor": compiler.processor,
            },
            notes=notes,
            layer_types=named,
        )

    def inspect_layers(
        self, engine: Path, record: EngineRecord, device: int = 0
    ) -> tuple[tuple[EngineLayer, ...], None]:
        """Return the nodes that run on this machine with OpenVINO's own times of them, on one thread.

        Raises:
            ArtefactError: Not the engine of this record, or damaged.
            EnvironmentProblem: ``openvino`` or memory is missing.
        """
        from engines.graph import parse_model

        data = read_engine(engine, record)
        compiler = _Compiler.of(engine, record)
        size = record.batch.smallest
        compiled = compiler.compile(data, size, DEFAULT_OPTIONS, profile=True)
        owners = _owners(compiled, parse_model(data, engine).proto)
        times = defaultdict[str, list[float]](list)
        with _failures(f"run {record.engine}", compiler.remedy):
            request = compiled.create_infer_request()
            for number in range(LAYER_RUNS + 1):
                request.infer()
                for node in request.profiling_info if number else ():
                    times[node.node_name].append(node.real_time.total_seconds() * 1e6)
        nodes = [_Node.of(op) for op in compiled.get_runtime_model().get_ordered_ops()]
        return tuple(
            EngineLayer(
                name=node.name,
                onnx=(owners[node.name],) if node.name in owners else (),
                kind=node.kind,
                precision=node.precision,
                kernel=node.kernel,
                microseconds=float(statistics.median(times[node.name])),
            )
            for node in nodes
            if node.kind not in _NOT_RUN
            and node.name in times  # what only weights go into ran when it was compiled
        ), None

    def open_runner(
        self, engine: Path, record: EngineRecord, options: RunnerOptions = DEFAULT_OPTIONS
    ) -> VinoRunner:
        """Load an engine, its content held against its record.

        Raises:
            ArtefactError: Not the engine of this record, damaged, with other inputs and outputs than its record says,
                or with layers that would run in another precision, or overflow, on this processor.
            EnvironmentProblem: ``openvino`` or memory is missing.
        """
        return VinoRunner(_Compiler.of(engine, record), read_engine(engine, record), record, options)


RUNTIME = OpenVino()


class _Compiler:
    """What OpenVINO makes of one engine, and the files beside it that keep that: one for each size of batch.

    A file is one line of JSON, which names the engine, the processor, OpenVINO's version and the content's hash, and
    the content, as ``export_model`` gives it. One that is missing, of something else or damaged costs the time of
    compiling again, and nothing else.

    Attributes:
        processor: What this one is, and what it computes in, as OpenVINO sees it.
        remedy: What to do about an engine that cannot be loaded.
        state: What became of the file that was looked at last, for the runner's description.
    """

    def __init__(self, engine: Path, engine_sha256: str, precision: Precision, *, remedy: str) -> None:
        """Start OpenVINO.

        Args:
            engine: The engine file, beside which the files lie.
            engine_sha256: Hash of its content.
            precision: What it was built in.
            remedy: See above.

        Raises:
            EnvironmentProblem: ``openvino`` is missing.
        """
        ov = packages.load("openvino")
        self._engine, self._engine_sha256, self._precision = engine, engine_sha256, precision
        self._core = ov.Core()
        self._version = str(ov.__version__)
        self._types = sorted(map(str, self._core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")))
        name = " ".join(str(self._core.get_property(_DEVICE, "FULL_DEVICE_NAME")).split())
        self.processor = f"{name} ({' '.join(self._types)})"
        self.remedy = remedy
        self.state = ""

    @classmethod
    def of(cls, engine: Path, record: EngineRecord) -> _Compiler:
        """Start OpenVINO for an engine that was built."""
        return cls(
            engine, record.engine_sha256, record.precision, remedy=f"rebuild it: {record.build_command}"
        )

    def require_type(self) -> None:
        """Refuse a floating-point type that this processor does not compute in.

        Raises:
            AccuracyGateError: It does not.
        """
        wanted = self._precision.name
        if self._precision in _FLOAT_TYPES and wanted not in self._types:
            raise AccuracyGateError(
                f"this processor has no {wanted}: OpenVINO sees {self.processor}, and would compute in FP32",
                remedy=REFUSED,
            )

    def compile(
        self, model: bytes, size: int | None, options: RunnerOptions, *, profile: bool = False
    ) -> Any:
        """Return the ``CompiledModel`` for batches of a size, of any size for None.

        Raises:
            ArtefactError: OpenVINO cannot read the model.
            EnvironmentProblem: Memory ran out.
        """
        settings = _settings(self._precision, options) | ({"PERF_COUNT": True} if profile else {})
        with _failures(f"load {self._engine}", self.remedy):
            read = self._core.read_model(io.BytesIO(model))
            if size is not None:
                read.reshape(
                    {0: [size, *(dim.get_length() for dim in list(read.inputs[0].partial_shape)[1:])]}
                )
            return self._core.compile_model(read, _DEVICE, settings)

    def open(
        self, model: bytes, size: int | None, options: RunnerOptions, prove: Callable[[Any], None]
    ) -> Any:
        """Return what :meth:`compile` does, from the file beside the engine where that is of this processor.

        Args:
            model: The engine's content.
            size: The size of the batches.
            options: How it runs.
            prove: Called with what was compiled anew, before it is kept; raises where it is not what it should be.
        """
        content = self._read(size)
        if content is not None:
            try:
                return self._core.import_model(
                    io.BytesIO(content), _DEVICE, _settings(self._precision, options)
                )
            except RuntimeError as error:
                self.state = (
                    f"{self._path(size).name} is refused by OpenVINO ({_reason(error)}): compiled again"
                )
        compiled = self.compile(model, size, options)
        prove(compiled)
        self.keep(compiled, size)
        return compiled

    def keep(self, compiled: Any, size: int | None) -> None:
        """Write what was compiled beside the engine; a place that cannot be written costs nothing else."""
        content = bytes(compiled.export_model().getvalue())
        head = json.dumps({**self._head(size), "content_sha256": sha256_bytes(content)})
        try:
            write_bytes(self._path(size), head.encode() + b"\n" + content)
        except EnvironmentProblem as error:
            self.state = f"{self.state}, not kept: {error.what}".removeprefix(", ")
            return
        self.state = f"{self.state}, kept in {self._path(size).name}".removeprefix(", ")

    def _path(self, size: int | None) -> Path:
        return self._engine.with_name(f"{self._engine.name}.b{size or 'N'}{CACHE_SUFFIX}")

    def _head(self, size: int | None) -> dict[str, object]:
        return {
            "kind": _KIND,
            "engine_sha256": self._engine_sha256,
            "processor": self.processor,
            "openvino": self._version,
            "machine": f"{platform.system()} {platform.machine()}",
            "batch": size,
        }

    def _read(self, size: int | None) -> bytes | None:
        """Return what was compiled, where the file is of this engine, processor and version; note what else it is."""
        path = self._path(size)
        try:
            line, _, content = read_regular(path).partition(b"\n")
            head = json.loads(line)
        except FileNotFoundError:
            self.state = "none beside the engine"
            return None
        except (OSError, ValueError):
            head, content = None, b""
        wanted = {**self._head(size), "content_sha256": sha256_bytes(content)}
        if head == wanted:
            self.state = f"read from {path.name}"
            return content
        where = (
            {name: (head.get(name), wanted[name]) for name in ("processor", "openvino")}
            if isinstance(head, dict)
            else {}
        )
        other = [f"{name} {seen}, here is {here}" for name, (seen, here) in where.items() if seen != here]
        why = f"was compiled for {'; '.join(other)}" if other else "is of another engine or damaged"
        self.state = f"{path.name} {why}: compiled again"
        return None


@functools.cache
def _sums_exactly() -> bool:
    """Run layers with the largest sums that 8 bits give, and say whether this processor's kernels sum them exactly.

    Without VNNI two products of an unsigned and a signed byte are added in 16 bits: 2 * 255 * 127 becomes 32,767.
    Asking the processor for its instructions would have to know which of them each release of OpenVINO uses.

    Source: Intel 64 and IA-32 Architectures Software Developer's Manual, PMADDUBSW: "saturated".

    Raises:
        EnvironmentProblem: ``openvino`` is missing.
    """
    ov = packages.load("openvino")
    pixels = np.full((1, _PROBE_CHANNELS, _PROBE_SIDE, _PROBE_SIDE), 255, np.float32)
    with _failures("say how it sums", "install another release of openvino, or choose another --backend"):
        core = ov.Core()
        compiled = core.compile_model(
            core.read_model(io.BytesIO(_probe_network())), _DEVICE, _settings(Precision.INT8, DEFAULT_OPTIONS)
        )
        found = compiled([pixels])
    # Each weight is 1, so each sum is 255 times the number of values that go into it.
    counts = (_PROBE_CHANNELS * 9, _PROBE_CHANNELS, pixels.size)
    return all(
        bool(np.all(np.abs(found[place].max() / (255 * count) - 1) < _PROBE_ERROR))
        for place, count in enumerate(counts)
    )


def _probe_network() -> bytes:
    """Return Q/DQ layers of the kinds that INT8 is made for, of 255s and weights of 127: 3x3, 1x1 and dense."""
    from onnx import TensorProto, helper, numpy_helper

    channels, side = _PROBE_CHANNELS, _PROBE_SIDE
    weights = {
        "wide": np.full((channels, channels, 3, 3), 127, np.int8),
        "narrow": np.full((channels, channels, 1, 1), 127, np.int8),
        "dense": np.full((channels * side * side, channels), 127, np.int8),
    }
    constants: dict[str, NDArray[Any]] = {
        "step": np.array(1, np.float32), "zero": np.array(0, np.uint8), "shape": np.array([1, -1]),
        "weight_step": np.array(1 / 127, np.float32), "weight_zero": np.array(0, np.int8), **weights,
    }  # fmt: skip
    pair, planes = ["step", "zero"], (1, channels, side, side)
    outputs: dict[str, tuple[int, ...]] = {"wide": planes, "narrow": planes, "dense": (1, channels)}
    nodes = [
        helper.make_node("QuantizeLinear", ["image", *pair], ["integers"]),
        helper.make_node("DequantizeLinear", ["integers", *pair], ["values"]),
        helper.make_node("Reshape", ["values", "shape"], ["row"]),
        *(
            helper.make_node("DequantizeLinear", [name, "weight_step", "weight_zero"], [f"{name}_weight"])
            for name in weights
        ),
        helper.make_node("Conv", ["values", "wide_weight"], ["wide_sum"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["values", "narrow_weight"], ["narrow_sum"]),
        helper.make_node("MatMul", ["row", "dense_weight"], ["dense_sum"]),
    ]
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, planes)],
        [
            helper.make_tensor_value_info(f"{name}_sum", TensorProto.FLOAT, shape)
            for name, shape in outputs.items()
        ],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialised: bytes = model.SerializeToString()
    return serialised


def _settings(precision: Precision, options: RunnerOptions) -> dict[str, object]:
    """Return how OpenVINO is to run: requests one after the other as quickly as may be, or as many at once as pay.

    Where one request is answered before the next comes (``options.slots`` is 1, as in ``bench`` and for cameras), one
    stream of ``options.threads`` threads; else a stream for each share of the processors.
    """
    from engines.images import (
        usable_processors,  # here, because it imports OpenCV, which a build does without
    )

    streams = options.slots or max(1, usable_processors() // options.threads)
    return {
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": str(streams * options.threads),
        "INFERENCE_PRECISION_HINT": _FLOAT_TYPES.get(precision, "f32"),
        "ENABLE_CPU_PINNING": False,  # the threads that decode call it: they go where the system puts them
    }


class _Slot(NamedTuple):
    """A request of one thread with the memory that it reads and writes."""

    infer: Callable[..., object]
    pixels: NDArray[Any]
    outputs: list[NDArray[np.float32]]  # probabilities, and class activation maps where the engine has them


class VinoRunner(DirectSubmission):
    """Models compiled for the sizes of batch at hand; any number of threads may call :meth:`run` at once.

    A call through OpenVINO's own Python interface with arrays takes 56 us beside the network, one with tensors that
    stay 16 us, as ONNX Runtime's (two cores of a shared x86-64 VM, a network that does nothing). So each thread has a
    request with tensors of its own, and a call copies 50 kB in and a few bytes out.

    Attributes:
        record: The engine's record.
        thread_safe: True.
    """

    thread_safe = True

    def __init__(
        self, compiler: _Compiler, model: bytes, record: EngineRecord, options: RunnerOptions
    ) -> None:
        """Load the model for the batches that come most.

        Args:
            compiler: Of this engine.
            model: The engine's content.
            record: Its record.
            options: How it runs.
        """
        self.record = record
        self._compiler, self._options = compiler, options
        self._model: bytes | None = model
        self._check = BatchCheck(record)
        batch = record.batch
        self._static = {size for size in (options.batch, batch.smallest, batch.best, batch.largest) if size}
        self._compiled: dict[int | None, Any] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self._opened = self._open(options.batch or batch.smallest)

    @property
    def description(self) -> Mapping[str, str]:
        """How it runs, by topic."""
        streams = int(self._opened.get_property("NUM_STREAMS"))
        how = "latency" if streams == 1 else "throughput"
        return {
            "execution": f"OpenVINO, {streams} stream{'s' if streams > 1 else ''} ({how})",
            "memory": "host",
            "runtime_cache": self._compiler.state,
        }

    def run(self, batch: InputPixels) -> NDArray[np.float32]:
        """Classify a batch.

        Args:
            batch: ``[N, *contract.input_shape]`` of the contract's type, with N within the engine's batch range.

        Returns:
            Probabilities, ``float32 [N, classes]``, owned by the caller.

        Raises:
            ArtefactError: OpenVINO cannot run the engine.
            BadInputError: Another type or shape.
            EnvironmentProblem: There is not enough memory for it.
            ValueError: The runner is closed.
        """
        answers: NDArray[np.float32] = self._run(batch)[0].copy()
        return answers

    def explain(self, batch: InputPixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Classify a batch and give its class activation maps; see :meth:`engines.runtimes.Runner.explain`."""
        require_cam(self.record)
        answers, maps = self._run(batch)
        return answers.copy(), maps.copy()

    def _run(self, batch: InputPixels) -> list[NDArray[np.float32]]:
        """Return the outputs, in memory that the thread's next call writes to."""
        self._check(batch)
        if self._model is None:
            raise ValueError(f"the runner of {self.record.engine} is closed")
        try:
            slot: _Slot = self._local.slots[len(batch)]
        except (AttributeError, KeyError):
            slot = self._make_slot(len(batch))
        np.copyto(slot.pixels, batch)
        try:
            slot.infer(share_outputs=True, decode_strings=False)
        except (RuntimeError, MemoryError) as error:
            raise _problem(f"run {self.record.engine}", error, self._compiler.remedy) from error
        return slot.outputs

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        self._model = None
        self._compiled.clear()
        self._local = threading.local()

    def __enter__(self) -> VinoRunner:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _open(self, size: int | None) -> Any:
        """Return the model for batches of a size; for a size that the build does not name, the one for any."""
        key = size if size in self._static else None
        with self._lock:
            if key not in self._compiled:
                assert self._model is not None, "a closed runner opens nothing"
                compiled = self._compiler.open(self._model, key, self._options, self._prove)
                _check_ends(compiled, self.record)
                self._compiled[key] = compiled
            return self._compiled[key]

    def _prove(self, compiled: Any) -> None:
        """Hold what was compiled on this processor against what the record says of the layers."""
        layers = _census_by_order(compiled)
        if layers != dict(self.record.layers):
            seen = ", ".join(f"{count} in {kind}" for kind, count in sorted(layers.items()))
            raise ArtefactError(
                f"{self.record.engine} would run {seen} on this processor ({self._compiler.processor}), not as it was "
                f"built on {self.record.platform.get('processor', 'another one')}",
                remedy=self._compiler.remedy,
            )
        if self.record.weight_bits == 8 and not _sums_exactly():
            raise ArtefactError(
                f"{self.record.engine} has INT8 weights of 8 bits, whose sums overflow on this processor "
                f"({self._compiler.processor}); it was built on {self.record.platform.get('processor', 'another one')}",
                remedy=self._compiler.remedy,
            )

    def _make_slot(self, size: int) -> _Slot:
        contract, tensor = self.record.contract, packages.load("openvino").Tensor
        pixels = np.zeros((size, *contract.input_shape), contract.dtype)
        outputs = [np.zeros((size, *shape), np.float32) for _, shape in contract.outputs]
        with _failures(f"run {self.record.engine}", self._compiler.remedy):
            request = self._open(size).create_infer_request()
            request.set_input_tensor(0, tensor(pixels, shared_memory=True))
            for place, output in enumerate(outputs):
                request.set_output_tensor(place, tensor(output, shared_memory=True))
        slot = _Slot(request.infer, pixels, outputs)
        vars(self._local).setdefault("slots", {})[size] = slot
        return slot


class _Node(NamedTuple):
    """A node of the execution graph."""

    name: str
    kind: str
    precision: str
    kernel: str
    layers: tuple[str, ...]  # nodes of the model that went into it

    @classmethod
    def of(cls, op: Any) -> _Node:
        facts = {name: value.astype(str) for name, value in op.get_rt_info().items() if name in _FACTS}
        kind = facts.get("runtimePrecision", "")
        return cls(
            op.get_friendly_name(),
            facts.get("layerType", ""),
            _PRECISIONS.get(kind, kind.upper()),
            facts.get("primitiveType", ""),
            tuple(filter(None, facts.get("originalLayersNames", "").split(","))),
        )


_FACTS = frozenset({"layerType", "runtimePrecision", "primitiveType", "originalLayersNames"})


def _weighted(compiled: Any) -> list[_Node]:
    nodes = (_Node.of(op) for op in compiled.get_runtime_model().get_ordered_ops())
    return [node for node in nodes if node.kind in _WEIGHTED_KINDS]


def _owners(compiled: Any, source: ModelProto) -> dict[str, str]:
    """Return the layer with weights that each node of the execution graph computes, where that can be told."""
    from engines.graph import layer_types, source_layers

    names, tensors = layer_types(source), {node.name: node.output[0] for node in source.graph.node}
    owners = {}
    for node in _weighted(compiled):
        # A part of a layer is named layer/part; a fused one after the node behind it, from which the graph leads back.
        parts = [part.partition("/")[0] if part not in tensors else part for part in node.layers]
        found = source_layers(
            [part if part in names else tensors.get(part, part) for part in parts], names, source
        )
        known = {owner for owner in found if owner is not None}
        if len(known) == 1:
            owners[node.name] = known.pop()
    return owners


def _census(compiled: Any, source: ModelProto) -> tuple[dict[str, str], dict[str, int]]:
    """Return the precision of each layer with weights by name, and their count by precision.

    The names are left out where they cannot all be told.
    """
    from engines.graph import layer_types

    owners = _owners(compiled, source)
    named = {owners[node.name]: node.precision for node in _weighted(compiled) if node.name in owners}
    names = layer_types(source)
    whole = {name: named[name] for name in names} if set(named) == set(names) else {}
    return whole, _census_by_order(compiled)


def _census_by_order(compiled: Any) -> dict[str, int]:
    return dict(Counter(node.precision for node in _weighted(compiled)))


def _check_ends(compiled: Any, record: EngineRecord) -> None:
    """Hold a model's inputs and outputs, without the batch, against the contract of its record."""
    contract = record.contract
    ends = (*compiled.inputs, *compiled.outputs)
    seen = [(end.any_name, [dim.get_length() for dim in list(end.partial_shape)[1:]]) for end in ends]
    expected = [
        (contract.input_name, list(contract.input_shape)),
        *((name, list(shape)) for name, shape in contract.outputs),
    ]
    if seen != expected:
        raise ArtefactError(
            f"{record.engine} has the inputs and outputs {seen}, its record says {expected}",
            remedy=f"rebuild it: {record.build_command}",
        )


@contextlib.contextmanager
def _failures(action: str, remedy: str) -> Iterator[None]:
    """Turn what OpenVINO raises in a block into our errors.

    Raises:
        ArtefactError: It cannot do it.
        EnvironmentProblem: Memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise _problem(action, error, remedy) from error


def _problem(action: str, error: Exception, remedy: str) -> EdgeDscError:
    what = f"openvino cannot {action}: {_reason(error)}"
    if isinstance(error, MemoryError) or "bad_alloc" in str(error) or "allocate" in str(error):
        return EnvironmentProblem(what, remedy=_REMEDY_MEMORY)
    return ArtefactError(what, remedy=remedy)


def _reason(error: Exception) -> str:
    """Return the line of OpenVINO's exception that says what is wrong: those before it say where in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    words = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return (words or lines or [type(error).__name__])[0][:300] or type(error).__name__
