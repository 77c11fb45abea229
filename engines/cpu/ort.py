"""ONNX Runtime on a CPU: the runtime that works everywhere, and the reference that other engines are held against."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines import packages
from engines.errors import ArtefactError, EdgeDscError, EnvironmentProblem
from engines.files import write_bytes
from engines.record import EngineRecord, Precision, read_engine
from engines.runtimes import (
    DEFAULT_OPTIONS,
    LAYER_RUNS,
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

# The same import package comes in several distributions.
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
KERNEL_TIME = "_kernel_time"  # how its profiler names what a node took
_LAYERS_SOURCE = "graph as ONNX Runtime runs it on this machine"
# On an x86-64 CPU without VNNI the products of unsigned activations and signed weights are summed in 16 bits, which
# overflow: of 64 answers of an INT8 DenseNet121 14 were those of FP32, with unsigned weights 62. Elsewhere this changes
# nothing. Source: onnxruntime_session_options_config_keys.h, kOrtSessionOptionsAvx2PrecisionMode.
EXACT_SUMS = ("session.x64quantprecision", "1")
SILENT = 4  # log severity: what fails is raised, too, and told in one line
# It quantises the weights of a float layer that stands between two Q/DQ pairs, a tensor at a time, so a layer left in
# floating point on purpose would run in INT8; and it quantises biases that the graph keeps in float (1.23 to 1.32).
_DISABLED = ("WeightBiasQuantization",)
# As its profiler names types.
_PRECISIONS = {"float": "FP32", "float16": "FP16", "int8": "INT8", "uint8": "INT8"}
_INT8_NOTE = "INT8 may be slower than FP32 on a CPU: measure both with edge-dsc bench"
_DEPTHWISE_NOTE = (
    "INT8 depthwise convolutions are slower than FP32 ones on a CPU (1.5 to 3 times, measured on x86-64): "
    "measure both with edge-dsc bench"
)
# Only the text tells that memory ran out: most often of a plain Fail, of the arena or of the C++ library below it.
_OUT_OF_MEMORY = re.compile(
    r"allocate memory|smaller than requested bytes|bad_alloc|out of memory", re.IGNORECASE
)


class OnnxRuntime:
    """Builds an optimised ONNX file, FP32 or INT8 (Q/DQ), and runs it on any CPU.

    The engine is the graph after ONNX Runtime's extended optimisations: constants folded, Conv + ReLU fused,
    Q/DQ groups turned into integer operators. Nothing in it is tied to this CPU: the memory layout for the
    vector units at hand is chosen again each time the engine is opened.
    """

    name = "onnxruntime"
    signed_activations = False
    float_precision = Precision.FP32
    precisions = (Precision.FP32, Precision.INT8, Precision.MIXED)
    runs_on_cpu = True

    def availability(self) -> Availability:
        """Say what works here; never raises."""
        version = packages.installed_version("onnxruntime", *_DISTRIBUTIONS)
        reason = None if version else "onnxruntime is not installed"
        return Availability(version, reason, reason)

    def weight_bits(self) -> int:
        """Say 8: it is told to sum exactly (:data:`EXACT_SUMS`)."""
        return 8

    def rest_in_half(self) -> bool:
        """Say no: a CPU has no FP16 layers."""
        return False

    def require_calibrators(self, method: str) -> None:
        """Refuse: it has none.

        Raises:
            UsageError: Always.
        """
        raise without_calibrators(self.name, method)

    def build(self, model: bytes, out: Path, options: BuildOptions) -> BuildResult:
        """Optimise a model, prove the precision it will run in here, and write it.

        On an x86-64 CPU ONNX Runtime has no FP16 convolutions: it puts Casts around FP32 ones. Such a build
        fails, because it would be FP32 under an FP16 name.

        Raises:
            AccuracyGateError: The engine would not run in the precision asked for.
            ArtefactError: The model is none that ONNX Runtime can read.
            EnvironmentProblem: ``onnxruntime`` or memory is missing, or ``out`` cannot be written.
        """
        check_tuning(options.tuning, (), self.name)
        # Running an engine needs no onnx, whose import takes tens of milliseconds of each start.
        import onnx

        from engines.graph import executed_layer_types, executed_layers, layer_types, parse_model

        try:
            with (
                tempfile.TemporaryDirectory() as folder
            ):  # ONNX Runtime gives an optimised graph as a file only
                portable = _optimise(model, Path(folder) / "portable.onnx", "ORT_ENABLE_EXTENDED")
                running = _optimise(portable, Path(folder) / "running.onnx", "ORT_ENABLE_ALL")
        except OSError as error:
            raise EnvironmentProblem(
                f"cannot write temporary files: {error}",
                remedy="free some space, or set TMPDIR to another place",
            ) from error
        executed = onnx.load_model_from_string(running)
        source = onnx.load_model_from_string(model)
        named = executed_layer_types(executed, tuple(layer_types(source)), source)
        layers = dict(Counter(named.values())) if named else executed_layers(executed)
        check_precision(layers, options)
        engine = parse_model(portable, out)
        write_bytes(out, portable)
        notes: tuple[str, ...] = ()
        if options.precision is Precision.INT8:
            notes = (_DEPTHWISE_NOTE if _is_depthwise(engine.proto) else _INT8_NOTE,)
        return BuildResult(
            layers=layers,
            layers_source=_LAYERS_SOURCE,
            platform={"system": platform.system(), "machine": platform.machine()},
            notes=notes,
            layer_types=named,
        )

    def inspect_layers(
        self, engine: Path, record: EngineRecord, device: int = 0
    ) -> tuple[tuple[EngineLayer, ...], None]:
        """Return the nodes that run on this machine with ONNX Runtime's own times of them, on one thread.

        A node's precision is the type of what it gives. The layers with weights keep their names through all
        optimisations, or are named after what they give.

        Raises:
            ArtefactError: Not the engine of this record, built by another version of ONNX Runtime, or damaged.
            EnvironmentProblem: ``onnxruntime``, memory or a place for temporary files is missing.
        """
        from engines.graph import (
            WEIGHTED_OPERATORS,
            parse_model,
            source_layers,
        )  # here, because it imports onnx

        _check_origin(record, str(packages.load("onnxruntime").__version__))
        contract = record.contract
        batch = np.zeros((record.batch.smallest, *contract.input_shape), contract.dtype)
        rebuild = f"rebuild it: {record.build_command}"
        data = read_engine(engine, record)
        events = profile_nodes(
            data,
            {contract.input_name: batch},
            runs=LAYER_RUNS,
            source=str(engine),
            remedy=rebuild,
        )
        nodes = defaultdict[str, list[dict[str, Any]]](list)
        for event in events:
            nodes[event["args"]["node_index"]].append(event)
        weighted = [key for key, runs in nodes.items() if runs[0]["args"]["op_name"] in WEIGHTED_OPERATORS]
        called = [str(nodes[key][0]["name"]).removesuffix(KERNEL_TIME) for key in weighted]
        owners = source_layers(called, record.layer_types, parse_model(data, engine).proto)
        names = {key: owner for key, owner in zip(weighted, owners, strict=True) if owner is not None}
        return tuple(_layer(runs, names.get(key)) for key, runs in nodes.items()), None

    def open_runner(
        self, engine: Path, record: EngineRecord, options: RunnerOptions = DEFAULT_OPTIONS
    ) -> OrtRunner:
        """Load an engine, its content held against its record.

        Raises:
            ArtefactError: Not the engine of this record, built by another version of ONNX Runtime, damaged, or with
                other inputs and outputs than its record says.
            EnvironmentProblem: ``onnxruntime`` or memory is missing.
        """
        _check_origin(record, str(packages.load("onnxruntime").__version__))
        rebuild = f"rebuild it: {record.build_command}"
        data = read_engine(engine, record)
        session = open_session(data, str(engine), threads=options.threads, remedy=rebuild)
        _check_ends(session, record)
        return OrtRunner(session, record)


RUNTIME = OnnxRuntime()


class OrtRunner(DirectSubmission):
    """One session; any number of threads may call :meth:`run` at once.

    Attributes:
        record: The engine's record.
        thread_safe: True.
        description: How it runs.
    """

    thread_safe = True
    description: Mapping[str, str] = MappingProxyType({"execution": "ONNX Runtime session", "memory": "host"})

    def __init__(self, session: Any, record: EngineRecord) -> None:
        """Take over a session that was opened for this record.

        Args:
            session: The ``onnxruntime.InferenceSession``.
            record: The record of what it runs.
        """
        self.record = record
        self._session = session
        self._check = BatchCheck(record)
        self._outputs = [name for name, _ in record.contract.outputs]
        self._input = record.contract.input_name
        self._failures = _failure_types()

    def run(self, batch: InputPixels) -> NDArray[np.float32]:
        """Classify a batch.

        Args:
            batch: ``[N, *contract.input_shape]`` of the contract's type, with N within the engine's batch range.

        Returns:
            Probabilities, ``float32 [N, classes]``, owned by the caller.

        Raises:
            ArtefactError: ONNX Runtime cannot run the engine.
            BadInputError: Another type or shape.
            EnvironmentProblem: There is not enough memory for it.
            ValueError: The runner is closed.
        """
        return self._run(batch, self._outputs[:1])[0]

    def explain(self, batch: InputPixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Classify a batch and give its class activation maps; see :meth:`engines.runtimes.Runner.explain`."""
        require_cam(self.record)
        answers, maps = self._run(batch, self._outputs)
        return answers, maps

    def _run(self, batch: InputPixels, outputs: list[str]) -> list[NDArray[np.float32]]:
        self._check(batch)
        session = self._session
        if session is None:
            raise ValueError(f"the runner of {self.record.engine} is closed")
        try:
            found: list[NDArray[np.float32]] = session.run(outputs, {self._input: batch})
        except self._failures as error:
            rebuild = f"rebuild it: {self.record.build_command}"
            raise _problem(f"run {self.record.engine}", error, remedy=rebuild) from error
        return found

    def close(self) -> None:
        """Free the session; a second call does nothing."""
        self._session = None

    def __enter__(self) -> OrtRunner:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def _check_ends(session: Any, record: EngineRecord) -> None:
    """Hold a session's inputs and outputs, without the batch, against the contract of its record."""
    contract = record.contract
    seen = [(end.name, list(end.shape[1:])) for end in (*session.get_inputs(), *session.get_outputs())]
    expected = [(contract.input_name, list(contract.input_shape))]
    expected += [(name, list(shape)) for name, shape in contract.outputs]
    if seen != expected:
        raise ArtefactError(
            f"{record.engine} has the inputs and outputs {seen}, its record says {expected}",
            remedy=f"rebuild it: {record.build_command}",
        )


def open_reference(graph: ModelProto, record: EngineRecord, *, threads: int = 1) -> OrtRunner:
    """Run the graph that an engine was built from, whatever precision its layers get here.

    The answers are those of the graph's own roundings (FP16 casts, Q/DQ pairs), computed by ONNX Runtime: what
    they say of accuracy holds for the engine up to its runtime's arithmetic. Their time says nothing of it.

    Args:
        graph: The graph in the engine's precision.
        record: The engine's record; its name stands in errors.
        threads: CPU threads for one run.

    Raises:
        ArtefactError: ONNX Runtime cannot read the graph.
        EnvironmentProblem: ``onnxruntime`` or memory is missing.
    """
    rebuild = f"rebuild it: {record.build_command}"
    source = f"the graph of {record.engine}"
    return OrtRunner(open_session(graph.SerializeToString(), source, threads=threads, remedy=rebuild), record)


def profile_nodes(
    model: bytes, feed: Mapping[str, InputPixels], *, runs: int, source: str, remedy: str
) -> list[dict[str, Any]]:
    """Run a model on one thread, as :func:`open_session` opens it, with ONNX Runtime's profiler.

    Args:
        model: A serialised ``ModelProto``.
        feed: Its input by name.
        runs: How often, after a first run that is left out.
        source: Named in errors.
        remedy: What to do when the model cannot be loaded or run.

    Returns:
        An event for each node and run, in the order of execution: ``name``, ``dur`` in whole microseconds, and
        ``args`` with ``op_name``, ``node_index`` and the types of inputs and outputs.

    Raises:
        ArtefactError: ONNX Runtime cannot load or run the model.
        EnvironmentProblem: ``onnxruntime``, memory or a place for the profile is missing.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            profile = Path(folder) / "profile"
            session = open_session(model, source, threads=1, remedy=remedy, profile=profile)
            with failures_of(source, remedy=remedy):
                for _ in range(runs + 1):
                    session.run(None, feed)
            events = json.loads(Path(session.end_profiling()).read_text())
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot write a profile: {error}", remedy="set TMPDIR to a place with some space"
        ) from error
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(KERNEL_TIME)]
    nodes.sort(key=lambda event: int(event["ts"]))
    return nodes[len(nodes) // (runs + 1) :]


def _layer(runs: list[dict[str, Any]], source: str | None) -> EngineLayer:
    """Join the events of a node; ``source`` is the ONNX layer with weights in it."""
    first = runs[0]
    types = [name for value in first["args"].get("output_type_shape", ()) for name in value]
    return EngineLayer(
        name=str(first["name"]).removesuffix(KERNEL_TIME),
        onnx=() if source is None else (source,),
        kind=str(first["args"]["op_name"]),
        precision=_PRECISIONS.get(types[0], types[0].upper()) if types else "",
        microseconds=float(statistics.median(event["dur"] for event in runs)),
    )


def open_session(model: bytes, source: str, *, threads: int, remedy: str, profile: Path | None = None) -> Any:
    """Open a model for single requests on a CPU.

    Args:
        model: A serialised ``ModelProto``.
        source: Named in errors.
        threads: CPU threads for one run.
        remedy: What to do when the model cannot be loaded.
        profile: Where its profiler writes, a prefix of the file's name; None measures nothing.

    Returns:
        The ``onnxruntime.InferenceSession``.

    Raises:
        ArtefactError: ONNX Runtime cannot load the model.
        EnvironmentProblem: ``onnxruntime`` or memory is missing.
    """
    ort = packages.load("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # With more than one thread the workers would spin between and after runs, and take the cores from the
    # threads that decode the next image: twice the CPU time on two busy cores, for a run that gains a tenth.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(*EXACT_SUMS)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        return _make_session(ort, model, options)
    except _failure_types() as error:
        raise _problem(f"load {source}", error, remedy=remedy) from error


def simplify_graph(model: bytes) -> bytes:
    """Return a model after those of ONNX Runtime's optimisations that hold on any machine.

    Constants and shapes are folded, BatchNorm goes into the convolution before it, and what does nothing is left out.
    The result consists of ONNX's own operators as long as the model does.

    Raises:
        ArtefactError: ONNX Runtime cannot read the model.
        EnvironmentProblem: ``onnxruntime``, memory or a place for temporary files is missing.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _optimise(model, Path(folder) / "simplified.onnx", "ORT_ENABLE_BASIC")
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot write temporary files: {error}",
            remedy="free some space, or set TMPDIR to another place",
        ) from error


def _optimise(model: bytes, path: Path, level: str) -> bytes:
    """Return the graph as ONNX Runtime has it after its optimisations, kernels assigned."""
    ort = packages.load("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(path)
    options.intra_op_num_threads = 1
    try:
        _make_session(ort, model, options)
    except _failure_types() as error:
        if path.exists():  # the graph was read and optimised: what failed is writing it
            raise EnvironmentProblem(
                f"cannot write {path}: {_first_line(error)}",
                remedy=f"free some space in {path.parent.parent}",
            ) from error
        raise _problem("read the model", error, remedy="export it again: edge-dsc export RUN") from error
    return path.read_bytes()


def _make_session(ort: Any, model: bytes, options: Any) -> Any:
    options.log_severity_level = SILENT
    return ort.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=_DISABLED
    )


@contextlib.contextmanager
def failures_of(source: str, *, remedy: str) -> Iterator[None]:
    """Turn what ONNX Runtime raises in a block that runs ``source`` into our errors, as :class:`OrtRunner` does.

    Raises:
        ArtefactError: It cannot run.
        EnvironmentProblem: Memory ran out.
    """
    try:
        yield
    except _failure_types() as error:
        raise _problem(f"run {source}", error, remedy=remedy) from error


def _failure_types() -> tuple[type[Exception], ...]:
    """Return what ONNX Runtime raises when it fails.

    Its own types have no common base below Exception; its C++ allocator's failure arrives as Python's MemoryError.
    ValueError and RuntimeError are not among them: those say that it was called in a wrong way.
    """
    defined = vars(packages.load("onnxruntime").capi.onnxruntime_pybind11_state).values()
    own = (value for value in defined if isinstance(value, type) and issubclass(value, Exception))
    return (*own, MemoryError)


def _problem(action: str, error: Exception, *, remedy: str) -> EdgeDscError:
    """Return the error for what ONNX Runtime could not do, such as ``run dsc.engine``.

    Args:
        action: What it was to do.
        error: What it raised.
        remedy: What to do unless memory ran out, which has a remedy of its own.
    """
    what = f"onnxruntime cannot {action}: {_first_line(error)}"
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return EnvironmentProblem(what, remedy="free some memory, or use a smaller batch")
    return ArtefactError(what, remedy=remedy)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _check_origin(record: EngineRecord, version: str) -> None:
    """Refuse an engine of another minor version, whose own operators may mean something else."""
    remedy = f"rebuild it: {record.build_command}"
    if packages.parse_version(record.runtime_version)[:2] != packages.parse_version(version)[:2]:
        raise ArtefactError(
            f"{record.engine} was built by onnxruntime {record.runtime_version}, here is {version}",
            remedy=remedy,
        )
    machine = record.platform.get("machine")
    if record.precision is Precision.FP16 and machine != platform.machine():
        raise ArtefactError(
            f"{record.engine} runs in FP16 on {machine}, which is not proven for {platform.machine()}",
            remedy=remedy,
        )


def _is_depthwise(model: ModelProto) -> bool:
    groups = (entry.i for node in model.graph.node for entry in node.attribute if entry.name == "group")
    return any(group > 1 for group in groups)
