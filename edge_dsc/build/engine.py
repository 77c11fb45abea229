"""From an ONNX model to an engine file and its record.

One value, :class:`Build`, goes through the steps in this order and gains what each finds out:

    model -> table -> images -> layers -> graph -> engine -> gate -> record
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from calibration.layers import find_layers, quantizable_layers
from calibration.qdq import put_rest_in_half, quantize
from calibration.rewrites import pixel_border, take_int8_pixels
from calibration.table import CalibrationTable, check_table, load_table
from calibration.tensorrt import OwnCalibration, cache_of_table, check_release
from edge_dsc import IMPORTED_FROM, __version__
from edge_dsc.build.assign import as_before, assign_layers
from edge_dsc.build.calibrate import CALIBRATION_NAME, CalibrationRun
from edge_dsc.build.cam import add_cam
from edge_dsc.build.gate import GateOptions, run_gate
from edge_dsc.data import Dataset, Split, discover
from edge_dsc.data.purposes import split_beside
from engines.contract import DECODE_RULE, DECODERS, NVJPEG_RULE, ModelContract
from engines.cpu.ort import open_reference
from engines.errors import AccuracyGateError, ArtefactError, EdgeDscError, EnvironmentProblem, UsageError
from engines.files import ENGINE, atomic_path, require_writable, sha256_file
from engines.graph import OnnxModel, cast_to_fp16, load_model, replace_contract, take_half_pixels
from engines.images import require_decoder
from engines.record import (
    DEFAULT_WORKSPACE_MIB,
    RECORD,
    BatchRange,
    EngineRecord,
    Precision,
    Tuning,
    load_record,
    record_path,
    save_record,
)
from engines.runtimes import (
    FLOAT,
    RUNTIME_NAMES,
    BuildOptions,
    BuildResult,
    ImplicitInt8,
    Progress,
    Runner,
    Runtime,
    check_layers,
    choose_runtime,
    get_runtime,
    open_engine,
    refuse_on_processor,
)

if TYPE_CHECKING:
    from onnx import ModelProto

DLA_METHOD = "tensorrt-entropy"
_CALIBRATED = {Precision.INT8: "INT8", Precision.MIXED: "mixed precision"}


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What ``build-engine`` was asked for.

    Attributes:
        model: The FP32 ONNX model.
        precision: Wanted precision.
        runtime: Name in the runtimes' table, or ``auto``.
        batch: The optimisation profile.
        calibration: The calibration table, for INT8 and mixed.
        out: The engine file; None puts it beside the model as ``ARCHITECTURE-PRECISION.RUNTIME.engine``.
        workspace_mib: Scratch memory for the builder, MiB.
        gate: The accuracy gate that the engine must pass; None ships it unmeasured. A search for layers needs one.
        layers: For mixed: an engine whose assignment of layers to take instead of searching one.
        tuning: What else the builder is told.
        timing_cache: Whether the builder keeps its timings beside the engine and takes those of earlier builds.
        input: Element type of the engine's input: ``uint8``, grey as the model takes it; ``int8``, for INT8 and mixed:
            grey minus 128 and with the border of the first convolution, both made by the host; or ``float16``, for
            FP16: grey. None takes ``float16`` for FP16 on the Deep Learning Accelerator, else ``uint8``.
        decode: The rule by which the engine's pictures are decoded; None takes the model's.
        device: Which GPU builds, and runs the engine for its gate; None takes the first where one is needed.
        cam: Whether the engine gives class activation maps as a second output.
    """

    model: Path
    precision: Precision = Precision.FP32
    runtime: str = "auto"
    batch: BatchRange = field(default_factory=BatchRange)
    calibration: Path | None = None
    out: Path | None = None
    workspace_mib: int = DEFAULT_WORKSPACE_MIB
    gate: GateOptions | None = None
    layers: Path | None = None
    tuning: Tuning = field(default_factory=Tuning)
    timing_cache: bool = True
    input: str | None = None
    decode: str | None = None
    device: int | None = None
    cam: bool = False


@dataclass(frozen=True, kw_only=True)
class Build:
    """An engine on its way: what was asked for, and what is known so far.

    Attributes:
        request: What was asked for.
        model: The FP32 model.
        runtime: What builds.
        chosen: Why this runtime: one line.
        path: The engine file that will be written.
        contract: What the engine takes and gives: the model's contract, with the input that was asked for.
        table: The calibration table; None where none is needed.
        table_sha256: Hash of its file.
        dataset: The images of the gate's folder; None without a gate.
        split: The model's split, where there is one and the gate may need it.
        float_layers: For mixed: the layers that stay in floating point.
        layers_origin: For mixed: who said so, one line for the record.
        searched: Hashes of images that chose these layers, and so cannot judge the engine.
        graph: The graph in the wanted precision; the FP32 graph until that is made.
        wanted: What each layer with weights must run in.
    """

    request: BuildRequest
    model: OnnxModel
    runtime: Runtime
    chosen: str
    path: Path
    contract: ModelContract
    table: CalibrationTable | None = None
    table_sha256: str | None = None
    dataset: Dataset | None = None
    split: Split | None = None
    float_layers: tuple[str, ...] = ()
    layers_origin: str | None = None
    searched: frozenset[str] = frozenset()
    graph: ModelProto
    wanted: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BuiltEngine:
    """An engine that was built.

    Attributes:
        path: The engine file.
        record: Its record.
        chosen: Why this runtime: one line.
    """

    path: Path
    record: EngineRecord
    chosen: str

    @property
    def runs_here(self) -> bool:
        """Whether its runtime runs engines on this machine."""
        return get_runtime(self.record.runtime).availability().no_run is None


def build_engine(
    request: BuildRequest,
    progress: Progress | None = None,
    *,
    calibrated: CalibrationRun | None = None,
    log: Callable[[str], None] | None = None,
) -> BuiltEngine:
    """Build an engine and write it with its record.

    Args:
        request: What is asked for.
        progress: Called with (phase, done, total).
        calibrated: The calibration that this command has just made of the same model: its model, table and images
            are taken as they are, and ``request.calibration`` is left alone.
        log: Called with each line of the builder's log.

    Raises:
        UsageError: INT8 without a calibration table, a search for layers without a gate, or a GPU that is named for a
            runtime on the processor.
        ArtefactError: A model that is not ours, or a table of another model.
        AccuracyGateError: The engine would not run in the precision asked for, or it loses more accuracy than its
            gate allows; nothing is written, and an older engine stays as it is.
        EnvironmentProblem: The runtime cannot build here.
    """
    build = _begin(request, calibrated)
    build = _find_images(build, calibrated)
    if request.precision is Precision.MIXED:
        build = assign_layers(build, progress)
    return _finish(build, progress, log)


def build_everywhere(
    model: Path, table: Path | None, batch: BatchRange, progress: Progress | None = None
) -> tuple[list[BuiltEngine], list[str]]:
    """Build a model in FP32, FP16 and INT8 on every runtime that builds here, beside the model.

    Args:
        model: The FP32 ONNX model.
        table: Its calibration table; None leaves INT8 out.
        batch: The optimisation profile.
        progress: Called with (phase, done, total).

    Returns:
        The engines, and a note for each runtime or precision that was left out, with its reason.
    """
    engines: list[BuiltEngine] = []
    notes: list[str] = []
    for runtime in RUNTIME_NAMES:
        reason = get_runtime(runtime).availability().no_build
        if reason is not None:
            notes.append(f"{runtime} left out: {reason}")
            continue
        for precision in precisions_to_try(runtime):
            calibration = table if precision is Precision.INT8 else None
            if precision is Precision.INT8 and table is None:
                continue
            request = BuildRequest(
                model=model, precision=precision, runtime=runtime, batch=batch, calibration=calibration
            )
            try:
                built = build_engine(request, progress)
            except AccuracyGateError as error:
                notes.append(f"{runtime} in {precision.value} left out of {model.parent.name}: {error.what}")
                continue
            notes += [f"{built.path.stem}: {note}" for note in built.record.notes]
            engines.append(built)
    return engines, notes


def precisions_to_try(name: str) -> tuple[Precision, ...]:
    """Return what a runtime may build without a search: its own precisions and, on some processors, FP16."""
    known = {*get_runtime(name).precisions, Precision.FP16} - {Precision.MIXED}
    return tuple(precision for precision in Precision if precision in known)


def open_to_answer(built: BuiltEngine, model: OnnxModel, table: CalibrationTable | None) -> Runner:
    """Open an engine that was just built, or its graph on ONNX Runtime where it cannot run here.

    Args:
        built: The engine.
        model: The FP32 model that it was built from.
        table: The calibration table that it was built with, if any.
    """
    if built.runs_here:
        return open_engine(built.path)
    record = built.record
    used = table if record.precision is Precision.INT8 else None
    graph = graph_in_precision(model.proto, record.precision, used, get_runtime(record.runtime))
    return open_reference(graph, record)


def rebuild_engine(engine: Path, folder: Path, device: int = 0) -> Path:
    """Build an engine again, as its record says and without its gate, into another folder.

    The build runs in a process of its own, because that is how the first one came about: with no engine open, no
    memory taken and no library warmed up by an earlier build, so that the differences between builds are those that
    a user gets. It starts in the folder that holds our packages, not in the caller's: ``python -m`` puts the current
    folder first on the search path, and no stray module of the caller's may stand in for one of ours.

    Args:
        engine: The engine; its record names model, calibration table, layers, runtime, batch and workspace.
        folder: Where the new engine goes, under the same name.
        device: Which GPU builds, where one does.

    Returns:
        The new engine file.

    Raises:
        ArtefactError: The engine or its record is not sound.
        EnvironmentProblem: The build fails, such as for a model that is gone.
    """
    out = folder.absolute() / engine.name
    command = [sys.executable, "-m", "edge_dsc.build.engine", str(engine.absolute()), str(out), str(device)]
    done = subprocess.run(command, cwd=IMPORTED_FROM, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        record = RECORD.load(record_path(engine))
        raise EnvironmentProblem(
            f"cannot build {engine.name} again: {last}",
            remedy=f"run it where it was first built: {record.build_command}",
        )
    return out


def build_again(engine: Path, out: Path, device: int = 0) -> BuiltEngine:
    """Do what :func:`rebuild_engine` does, in this process.

    Raises:
        ArtefactError: The engine is not sound, or its model or table is gone or was changed.
        EnvironmentProblem: The runtime cannot build here.
    """
    record = load_record(engine)
    model = engine.parent / record.onnx
    # Records of version 1 do not say where their table lies; by default it is beside the model.
    table = engine.parent / record.calibration if record.calibration else model.parent / CALIBRATION_NAME
    request = BuildRequest(
        model=model,
        precision=record.precision,
        runtime=record.runtime,
        batch=record.batch,
        calibration=table if record.precision in _CALIBRATED else None,
        out=out,
        workspace_mib=record.workspace_mib,
        layers=engine if record.precision is Precision.MIXED else None,
        tuning=record.tuning,
        input=record.contract.dtype,
        decode=NVJPEG_RULE if record.contract.decode == NVJPEG_RULE else None,
        timing_cache=False,  # builds differ by what their builder measured: each measures for itself
        device=device or None,
        cam=record.contract.cam is not None,
    )
    build = _begin(request)
    if build.table_sha256 != record.calibration_sha256:
        raise ArtefactError(
            f"{table} is not the calibration table that {engine} was built with",
            remedy=f"put that table there, or build a new engine: {record.build_command}",
        )
    if record.precision is Precision.MIXED:
        build = as_before(build, record.float_layers, f"as in {engine.name}")
    return _finish(build)


def _begin(request: BuildRequest, calibrated: CalibrationRun | None = None) -> Build:
    """Take the first two steps: the model with its runtime, and the calibration table where one is needed."""
    if calibrated is not None:
        request = replace(request, calibration=calibrated.path)
    model = calibrated.model if calibrated is not None else load_model(request.model)
    runtime, chosen = choose_runtime(request.runtime)
    refuse_on_processor(runtime, ["--device"] if request.device is not None else [])
    if request.precision is Precision.BF16 and request.precision not in runtime.precisions:
        raise UsageError(
            f"{runtime.name} builds no engines in BF16",
            remedy="choose another precision, or --backend openvino",
        )
    path = request.out or default_engine_path(
        request.model, model.contract.architecture, request.precision, runtime
    )
    require_writable(path, ENGINE)
    require_writable(record_path(path), RECORD.name)
    build = Build(
        request=request,
        model=model,
        runtime=runtime,
        chosen=chosen,
        path=path,
        contract=_engine_contract(request, model),
        graph=model.proto,
    )
    if request.precision not in _CALIBRATED:
        _check_dla(request, None)
        return build
    if request.calibration is None:
        raise UsageError(
            f"{_CALIBRATED[request.precision]} needs calibration over real images",
            remedy=f"add --calib-data DIR, or first run edge-dsc calibrate {request.model} --calib-data DIR",
        )
    table = calibrated.table if calibrated is not None else load_table(request.calibration)
    check_table(table, model, path=request.calibration)
    _check_dla(request, table)
    if table.implicit:
        if build.contract.dtype != "uint8":
            raise UsageError(
                f"ranges by {table.method} are for a graph without Q/DQ pairs, which takes uint8 pixels",
                remedy="leave --input out, or calibrate with another --calib-method",
            )
        runtime.require_calibrators(table.method)
        check_release(table, runtime.availability().version or "")
    return replace(build, table=table, table_sha256=sha256_file(request.calibration))


def _engine_contract(request: BuildRequest, model: OnnxModel) -> ModelContract:
    """Return the model's contract with the decoder and the input that were asked for.

    Raises:
        UsageError: They do not go with this model or this precision.
    """
    contract, precision = model.contract, request.precision
    if request.decode is not None:
        if contract.decode != DECODE_RULE:
            raise UsageError(
                f"{request.model} is decoded by {contract.decode}, which has one decoder",
                remedy="leave --decode out",
            )
        contract = msgspec.structs.replace(contract, decode=request.decode)
    accelerated = request.tuning.dla is not None and precision is Precision.FP16
    wanted = request.input or ("float16" if accelerated else "uint8")
    if wanted == "uint8":
        return contract
    fitting = (Precision.FP16,) if wanted == "float16" else tuple(_CALIBRATED)
    if precision not in fitting:
        raise UsageError(
            f"--input {wanted} is for {' and '.join(kind.value for kind in fitting)}, not {precision.value}",
            remedy="leave --input out, or choose another --precision",
        )
    if wanted == "float16":
        return contract.with_input(wanted)
    border = pixel_border(model.proto)
    if border is None:
        raise UsageError(
            f"the first layer of {request.model} is no convolution of raw pixels with a padding of 0 or 1 all round",
            remedy="leave --input out",
        )
    return contract.with_input(wanted, border)


def _check_dla(request: BuildRequest, table: CalibrationTable | None) -> None:
    """Refuse what the Deep Learning Accelerator cannot do.

    It takes no Q/DQ pairs, and of TensorRT's calibrators the entropy one alone. Source: TensorRT documentation,
    "Working with DLA", and NVIDIA/TensorRT#2222.

    Raises:
        UsageError: FP32 or mixed precision, several batch sizes, or INT8 by other ranges.
    """
    if request.tuning.dla is None:
        return
    if request.precision not in (Precision.FP16, Precision.INT8):
        raise UsageError(
            f"DLA computes in FP16 and INT8, not {request.precision.value}",
            remedy="add --fp16, or leave --dla out",
        )
    if request.batch.smallest != request.batch.largest:
        raise UsageError(
            f"DLA runs one batch size, {request.batch} was asked for", remedy="give one, such as --batch 1"
        )
    if table is not None and table.method != DLA_METHOD:
        raise UsageError(
            f"DLA takes no Q/DQ pairs: its INT8 needs ranges by {DLA_METHOD}, these are by {table.method}",
            remedy=f"add --calib-data DIR --calib-method {DLA_METHOD} (TensorRT 8.6 to 10.7), or build with --fp16",
        )


def _find_images(build: Build, calibrated: CalibrationRun | None) -> Build:
    """List and hash the images of the gate's folder, unless calibration has just done that."""
    gate = build.request.gate
    if gate is None:
        return build
    require_decoder(build.contract)
    if calibrated is not None and calibrated.dataset.root == gate.data:
        return replace(build, dataset=calibrated.dataset, split=calibrated.split)
    dataset = discover(gate.data, labels=build.model.contract.labels)
    return replace(build, dataset=dataset, split=split_beside(build.model.path))


def _finish(
    build: Build, progress: Progress | None = None, log: Callable[[str], None] | None = None
) -> BuiltEngine:
    """Take the steps from the graph to the record."""
    model, precision = build.model.proto, build.request.precision
    if build.contract != build.model.contract:
        model = replace_contract(model, build.contract)
    build = replace(
        build,
        graph=graph_in_precision(
            model,
            precision,
            build.table,
            build.runtime,
            float_layers=build.float_layers,
            contract=build.contract,
        ),
        wanted=wanted_layers(model, precision, build.float_layers),
    )
    if build.request.cam:
        graph, contract = add_cam(build.graph, build.contract)
        build = replace(build, graph=graph, contract=contract)
    options = BuildOptions(
        precision=graph_precision(precision, build.wanted, build.runtime),
        required_layers=min(1, len(build.wanted)),  # check_layers holds each by its name
        batch=build.request.batch,
        workspace_mib=build.request.workspace_mib,
        tuning=build.request.tuning,
        timing_cache=build.path.parent if build.request.timing_cache else None,
        progress=progress,
        log=log,
        implicit=_implicit(build),
        device=build.request.device or 0,
    )
    with atomic_path(build.path, ENGINE) as temporary:
        started = time.perf_counter()
        result = build.runtime.build(build.graph.SerializeToString(), temporary, options)
        seconds = time.perf_counter() - started
        check_layers(result, build.wanted)
        record = _record(build, result, temporary, seconds)
        if build.request.gate is not None:
            validation = run_gate(build, temporary, record, progress)
            record = msgspec.structs.replace(record, validation=validation)
    save_record(build.path, record)
    return BuiltEngine(build.path, record, build.chosen)


def _implicit(build: Build) -> ImplicitInt8 | None:
    """Return how TensorRT is to quantise by the ranges that it found itself, where the table holds such."""
    if build.table is None or not build.table.implicit:
        return None
    own = OwnCalibration(build.table.method, build.model.contract, cache=cache_of_table(build.table).encode())
    integer = frozenset(name for name, kind in build.wanted.items() if kind == "INT8")
    return ImplicitInt8(calibrator=own.attach, layers=integer)


def graph_in_precision(
    model: ModelProto,
    precision: Precision,
    table: CalibrationTable | None,
    runtime: Runtime,
    *,
    float_layers: Collection[str] = (),
    contract: ModelContract | None = None,
) -> ModelProto:
    """Return the ONNX graph that holds the precision: as it is, cast to FP16, or with Q/DQ pairs.

    INT8 by ranges of TensorRT's own is not in the graph: that stays as it is.

    Args:
        model: The FP32 model; it is not changed.
        precision: What the graph shall hold.
        table: The calibration table, for INT8 and mixed.
        runtime: Decides between signed and unsigned activations, on the bits of the weights, and whether FP16
            surrounds INT8.
        float_layers: For INT8 and mixed: layers that stay in floating point, beside the last one.
        contract: The contract of the engine, where its input is not the model's.

    Raises:
        UsageError: There is no such layer, or INT8 pixels are asked for and no layer is in INT8.
    """
    if precision in (
        Precision.FP32,
        Precision.BF16,
    ):  # which has the range of FP32: the runtime rounds by itself
        return model
    dtype = contract.dtype if contract is not None else "uint8"
    if precision is Precision.FP16:
        half_model = cast_to_fp16(model)
        return take_half_pixels(half_model, contract) if contract and dtype == "float16" else half_model
    half = runtime.rest_in_half()
    if not _integer_layers(model, float_layers):
        if dtype == "int8":
            raise UsageError(
                "no layer of this mixed engine runs in INT8: it takes uint8 pixels",
                remedy="leave --input out",
            )
        return cast_to_fp16(model) if runtime.float_precision is Precision.FP16 else model
    assert table is not None, "an INT8 build has a table: its second step saw to it"
    if table.implicit and precision is Precision.INT8:
        return model
    graph: ModelProto = quantize(
        model,
        table,
        signed_activations=runtime.signed_activations,
        float_layers=tuple(float_layers),
        weight_bits=runtime.weight_bits(),
    )
    if contract and dtype == "int8":
        graph = take_int8_pixels(graph, contract)
    return put_rest_in_half(graph) if half else graph


def wanted_layers(
    model: ModelProto, precision: Precision, float_layers: Collection[str] = ()
) -> dict[str, str]:
    """Return what every layer with weights must run in; ``float`` is either of FP32 and FP16.

    Returns:
        Such as ``{"stem": "INT8", "logits": "float"}``. In INT8 every layer but the last and ``float_layers``.
    """
    names = [layer.name for layer in find_layers(model)]
    if precision in (Precision.FP32, Precision.FP16, Precision.BF16):
        return dict.fromkeys(names, precision.name)
    integer = _integer_layers(model, float_layers)
    return {name: "INT8" if name in integer else FLOAT for name in names}


def graph_precision(precision: Precision, wanted: Mapping[str, str], runtime: Runtime) -> Precision:
    """Return the precision that a builder must be told: that of the graph, which for mixed is INT8 or none."""
    if precision is not Precision.MIXED:
        return precision
    if "INT8" in wanted.values():
        return Precision.INT8
    return runtime.float_precision


def _integer_layers(model: ModelProto, float_layers: Collection[str]) -> list[str]:
    return [layer.name for layer in quantizable_layers(model) if layer.name not in float_layers]


def default_engine_path(model: Path, architecture: str, precision: Precision, runtime: Runtime) -> Path:
    """Return where an engine goes by default: beside its model, named after what it is."""
    return model.parent / f"{architecture}-{precision.value}.{runtime.name}.engine"


def build_command(build: Build) -> str:
    """Return the command line that builds this engine again, for a person in the same folder."""
    request = build.request
    words = ["edge-dsc", "build-engine", str(request.model), "--precision", request.precision.value]
    words += ["--backend", build.runtime.name, "--batch", str(request.batch)]
    if request.precision in _CALIBRATED:
        words += ["--calibration", str(request.calibration)]
    if request.layers is not None:
        words += ["--layers", str(request.layers)]
    if request.gate is not None:
        words += ["--validate", str(request.gate.data), "--max-drop", f"{request.gate.max_drop:g}"]
    elif request.precision is Precision.MIXED:
        words += ["--validate", "DIR"]  # the command line builds no mixed engine unjudged
    words += ["--workspace", str(request.workspace_mib), *_tuning_words(request.tuning)]
    words += ["--input", build.contract.dtype] if build.contract.dtype != "uint8" else []
    words += [
        word for name, rule in DECODERS.items() if rule == request.decode for word in ("--decode", name)
    ]
    words += ["--device", str(request.device)] if request.device else []
    words += ["--cam"] if request.cam else []
    return shlex.join([*words, "--out", str(build.path)])


def device_arguments(record: EngineRecord) -> list[str]:
    """Return the options of ``build-engine`` that build an engine like this one elsewhere, by what runs there.

    Without files: model, calibration table and output are named by whoever builds.
    """
    words = ["--precision", record.precision.value, "--batch", str(record.batch)]
    words += ["--workspace", str(record.workspace_mib), *_tuning_words(record.tuning)]
    words += ["--input", record.contract.dtype] if record.contract.dtype != "uint8" else []
    words += ["--decode", "nvjpeg"] if record.contract.decode == NVJPEG_RULE else []
    return [*words, *(["--cam"] if record.contract.cam is not None else [])]


def _tuning_words(tuning: Tuning) -> list[str]:
    words: list[str] = []
    for name in tuning.__struct_fields__:
        value, option = getattr(tuning, name), f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            words += [option, str(value)]
    return words


def _record(build: Build, result: BuildResult, engine: Path, seconds: float) -> EngineRecord:
    request, folder = build.request, build.path.parent
    table = request.calibration if build.table is not None else None
    return EngineRecord(
        engine=build.path.name,
        engine_sha256=sha256_file(engine),
        engine_bytes=engine.stat().st_size,
        runtime=build.runtime.name,
        runtime_version=build.runtime.availability().version or "",
        platform=dict(result.platform),
        precision=request.precision,
        batch=request.batch,
        contract=build.contract,
        onnx=os.path.relpath(request.model, folder),
        onnx_sha256=build.model.sha256,
        calibration=None if table is None else os.path.relpath(table, folder),
        calibration_sha256=build.table_sha256,
        workspace_mib=request.workspace_mib,
        tuning=request.tuning,
        layers=dict(result.layers),
        layers_source=result.layers_source,
        layer_types=dict(result.layer_types),
        gpu_layers=result.gpu_layers,
        build_seconds=round(seconds, 3),
        build_command=build_command(build),
        edge_dsc=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        weight_bits=build.runtime.weight_bits() if "INT8" in result.layers else None,
        float_layers=build.float_layers,
        notes=(*result.notes, *_origins(build)),
    )


def _origins(build: Build) -> list[str]:
    """Say how the engine's INT8 came to be, beyond its ranges."""
    notes = [build.layers_origin] if build.layers_origin is not None else []
    if build.table is not None and build.table.implicit:
        notes.append(
            f"implicit quantisation: TensorRT rounds an FP32 graph, by its own ranges ({build.table.method})"
        )
    if build.table is not None and build.runtime.signed_activations:
        corrected = build.table.describe_corrections()
        notes += [corrected] if corrected else []
    return notes


if __name__ == "__main__":  # the process that rebuild_engine starts
    try:
        build_again(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    except EdgeDscError as error:
        sys.exit(str(error))
