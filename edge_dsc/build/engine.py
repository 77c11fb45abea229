"""From an ONNX model to an engine file and its record: the graph in the wanted precision, built, proven, sealed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec
from calibration.layers import find_layers
from calibration.layers import quantizable_layers
from calibration.table import CalibrationTable
from engines.graph import OnnxModel, cast_to_fp16, load_model
from engines.record import Precision
from engines.runtimes import FLOAT
from engines.runtimes import Runtime
import os
import shlex
import time
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from datetime import datetime
from datetime import timezone
from pathlib import Path
from calibration.table import check_table
from calibration.table import load_table
from edge_dsc import __version__
from edge_dsc.build.assign import Assignment
from edge_dsc.build.assign import MixedQuestion
from edge_dsc.build.assign import assign_layers
from edge_dsc.build.gate import Candidate
from edge_dsc.build.gate import GateOptions
from edge_dsc.build.gate import run_gate
from engines.errors import UsageError
from engines.files import atomic_path
from engines.files import sha256_file
from engines.record import BatchRange
from engines.record import EngineRecord
from engines.record import save_record
from engines.runtimes import BuildOptions
from engines.runtimes import BuildResult
from engines.runtimes import Progress
from engines.runtimes import check_layers
from engines.runtimes import choose_runtime



Model = Any  # onnx.ModelProto


def graph_in_precision(
    model: Model,
    precision: Precision,
    table: CalibrationTable | None,
    runtime: Runtime,
    *,
    float_layers: Collection[str] = (),
) -> Model:
    """Return the ONNX graph that holds the precision: as it is, cast to FP16, or with Q/DQ pairs.

    Args:
        model: The FP32 model; it is not changed.
        precision: What the graph shall hold.
        table: The calibration table, for INT8 and mixed.
        runtime: Decides between signed and unsigned activations, and whether FP16 surrounds INT8.
        float_layers: For INT8 and mixed: layers that stay in floating point, beside the last one.

    Raises:
        UsageError: There is no such layer.
    """
    if precision is Precision.FP32:
        return model
    if precision is Precision.FP16:
        return cast_to_fp16(model)
    from calibration.qdq import put_rest_in_half
    from calibration.qdq import quantize

    half = runtime.rest_in_half()
    if not _integer_layers(model, float_layers):
        return cast_to_fp16(model) if runtime.float_precision is Precision.FP16 else model
    assert table is not None, "an INT8 build has a table: the builder saw to it"
    graph = quantize(
        model, table, signed_activations=runtime.signed_activations, float_layers=tuple(float_layers)
    )
    return put_rest_in_half(graph) if half else graph


def wanted_layers(model: Model, precision: Precision, float_layers: Collection[str] = ()) -> dict[str, str]:
    """Tell what every layer with weights must run in; ``float`` is either of FP32 and FP16.

    Returns:
        Such as ``{"stem": "INT8", "logits": "float"}``. In INT8 every layer but the last and ``float_layers``.
    """
    names = [layer.name for layer in find_layers(model)]
    if precision in (Precision.FP32, Precision.FP16):
        return dict.fromkeys(names, precision.name)
    integer = _integer_layers(model, float_layers)
    return {name: "INT8" if name in integer else FLOAT for name in names}


def graph_precision(precision: Precision, wanted: dict[str, str], runtime: Runtime) -> Precision:
    """Return the precision that a builder must be told: that of the graph, which for mixed is INT8 or none."""
    if precision is not Precision.MIXED:
        return precision
    if "INT8" in wanted.values():
        return Precision.INT8
    return runtime.float_precision


def _integer_layers(model: Model, float_layers: Collection[str]) -> list[str]:
    return [layer.name for layer in quantizable_layers(model) if layer.name not in float_layers]



_CALIBRATED = {Precision.INT8: "INT8", Precision.MIXED: "mixed precision"}


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What ``build-engine`` was asked for.

    Attributes:
        model: The FP32 ONNX model.
        precision: Wanted precision.
        runtime: Name in the runtimes' table, or ``auto``.
        batch: The optimisation profile.
        calibration: The calibration table, for INT8.
        out: The engine file; None puts it beside the model as ``ARCHITECTURE-PRECISION.RUNTIME.engine``.
        workspace_mib: Scratch memory for the builder, MiB.
        gate: The accuracy gate that the engine must pass; None ships it unmeasured. Mixed needs one.
        layers: For mixed: an engine whose assignment of layers to take instead of searching one.
    """

    model: Path
    precision: Precision = Precision.FP32
    runtime: str = "auto"
    batch: BatchRange = field(default_factory=BatchRange)
    calibration: Path | None = None
    out: Path | None = None
    workspace_mib: int = 1024
    gate: GateOptions | None = None
    layers: Path | None = None


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


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """All that a build needs, checked."""

    request: BuildRequest
    runtime: Runtime
    chosen: str
    model: Any
    model_sha256: str
    contract: Any
    table: CalibrationTable | None
    graph: Any
    wanted: dict[str, str]
    out: Path
    assignment: Assignment | None


def build_engine(request: BuildRequest, progress: Progress | None = None) -> BuiltEngine:
    """Build an engine and write it with its record.

    Raises:
        UsageError: INT8 without a calibration table.
        ArtefactError: A model that is not ours, or a table of another model.
        AccuracyGateError: The engine would not run in the precision asked for, or it loses more accuracy than its
            gate allows; nothing is written, and an older engine stays as it is.
        EnvironmentProblem: The runtime cannot build here.
    """
    plan = _plan(request, progress)
    options = BuildOptions(
        precision=graph_precision(request.precision, plan.wanted, plan.runtime),
        required_layers=min(1, len(plan.wanted)),  # check_layers holds each by its name
        batch=request.batch,
        workspace_mib=request.workspace_mib,
        progress=progress,
    )
    with atomic_path(plan.out) as temporary:
        started = time.perf_counter()
        result = plan.runtime.build(plan.graph.SerializeToString(), temporary, options)
        seconds = time.perf_counter() - started
        check_layers(result, plan.wanted)
        record = _record(plan, result, temporary, seconds)
        if request.gate is not None:
            candidate = Candidate(
                path=temporary,
                record=record,
                runtime=plan.runtime,
                model=plan.model,
                model_path=request.model,
                graph=plan.graph,
                table=plan.table,
                searched=plan.assignment.searched if plan.assignment else frozenset(),
            )
            record = msgspec.structs.replace(record, validation=run_gate(candidate, request.gate, progress))
    save_record(plan.out, record)
    return BuiltEngine(plan.out, record, plan.chosen)


def _plan(request: BuildRequest, progress: Progress | None) -> _Plan:
    loaded = load_model(request.model)
    model, contract, model_sha256 = loaded.proto, loaded.contract, loaded.sha256
    runtime, chosen = choose_runtime(request.runtime)
    table = _checked_table(request, loaded)
    out = request.out or default_engine_path(request.model, contract.architecture, request.precision, runtime)
    assignment = None
    if request.precision is Precision.MIXED:
        assert table is not None and request.calibration is not None
        gate = _mixed_gate(request)
        question = MixedQuestion(
            model=model,
            model_path=request.model,
            onnx_sha256=model_sha256,
            contract=contract,
            table=table,
            calibration_sha256=sha256_file(request.calibration),
            data=gate.data,
            max_drop=gate.max_drop,
            runtime=runtime.name,
            signed=runtime.signed_activations,
        )
        assignment = assign_layers(question, out, request.layers, progress)
    float_layers = assignment.float_layers if assignment else ()
    return _Plan(
        request=request,
        runtime=runtime,
        chosen=chosen,
        model=model,
        model_sha256=model_sha256,
        contract=contract,
        table=table,
        graph=graph_in_precision(model, request.precision, table, runtime, float_layers=float_layers),
        wanted=wanted_layers(model, request.precision, float_layers),
        out=out,
        assignment=assignment,
    )


def _mixed_gate(request: BuildRequest) -> GateOptions:
    if request.gate is None:
        raise UsageError(
            "mixed precision is searched and judged on labelled images", remedy="add --validate DIR"
        )
    return request.gate


def default_engine_path(model: Path, architecture: str, precision: Precision, runtime: Runtime) -> Path:
    """Return where an engine goes by default: beside its model, its name telling what it is."""
    return model.parent / f"{architecture}-{precision.value}.{runtime.name}.engine"


def build_command(request: BuildRequest, runtime: Runtime, out: Path) -> str:
    """Return the command line that builds this engine again."""
    words = ["edge-dsc", "build-engine", str(request.model), "--precision", request.precision.value]
    words += ["--backend", runtime.name, "--batch", str(request.batch)]
    if request.precision in _CALIBRATED:
        words += ["--calibration", str(request.calibration)]
    if request.layers is not None:
        words += ["--layers", str(request.layers)]
    if request.gate is not None:
        words += ["--validate", str(request.gate.data), "--max-drop", f"{request.gate.max_drop:g}"]
    return shlex.join([*words, "--out", str(out)])


def _checked_table(request: BuildRequest, model: OnnxModel) -> CalibrationTable | None:
    if request.precision not in _CALIBRATED:
        return None
    if request.calibration is None:
        raise UsageError(
            f"{_CALIBRATED[request.precision]} needs calibration over real images",
            remedy=f"add --calib-data DIR, or first run edge-dsc calibrate {request.model} --calib-data DIR",
        )
    table = load_table(request.calibration)
    check_table(table, model, path=request.calibration)
    return table


def _record(plan: _Plan, result: BuildResult, engine: Path, seconds: float) -> EngineRecord:
    request = plan.request
    return EngineRecord(
        engine=plan.out.name,
        engine_sha256=sha256_file(engine),
        engine_bytes=engine.stat().st_size,
        runtime=plan.runtime.name,
        runtime_version=plan.runtime.availability().version or "",
        platform=dict(result.platform),
        precision=request.precision,
        batch=request.batch,
        contract=plan.contract,
        onnx=os.path.relpath(request.model, plan.out.parent),
        onnx_sha256=plan.model_sha256,
        calibration_sha256=sha256_file(request.calibration) if plan.table and request.calibration else None,
        layers=dict(result.layers),
        layers_source=result.layers_source,
        layer_types=dict(result.layer_types),
        build_seconds=round(seconds, 3),
        build_command=build_command(request, plan.runtime, plan.out),
        edge_dsc=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        float_layers=plan.assignment.float_layers if plan.assignment else (),
        notes=(*result.notes, *((plan.assignment.origin,) if plan.assignment else ())),
    )
