"""``debug``: which layer of an INT8 network spoils its answers, as a table and a picture."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from calibration.collect import calibrate
from calibration.layers import find_layers
from calibration.qdq import quantize
from calibration.select import Candidate, read_set, select_images
from calibration.sensitivity import Sensitivity, measure_sensitivity, time_layers
from calibration.table import CalibrationOptions, CalibrationTable, check_table, load_table, save_table
from edge_dsc.build.calibrate import (
    CALIBRATION_NAME,
    CalibrationRequest,
    CalibrationRun,
    calibration_candidates,
)
from edge_dsc.build.engine import BuildRequest, build_engine
from edge_dsc.data import discover
from edge_dsc.data.purposes import split_beside
from engines.contract import ModelContract
from engines.cpu.ort import failures_of
from engines.errors import AccuracyGateError, ArtefactError, BadInputError, EnvironmentProblem, ImageError
from engines.files import CHART, require_writable
from engines.graph import EXPORT_AGAIN, OnnxModel, load_model
from engines.images import read_inputs
from engines.record import Precision, load_record, record_path
from engines.runtimes import Progress, Runtime, get_runtime, layer_times, refuse_on_processor
from engines.text_table import align_rows

PICTURE_NAME = "sensitivity.png"
MOST_ROWS = 24  # layers in the table; of more, those with the largest error
_Known = Mapping[str, NDArray[np.uint8]]  # one input by the hash of its image file


@dataclass(frozen=True, kw_only=True)
class DebugRequest:
    """What ``debug`` was asked for.

    Attributes:
        target: An engine that build-engine wrote, or the FP32 ONNX model.
        data: A folder of labelled images.
        calibration: The calibration table; None takes the one beside the model, or calibrates on ``data``.
        runtime: For an ONNX model: the runtime whose INT8 graph is looked at.
        images: How many images to look at.
        seed: Seed of their draw, another than calibration's where its default was left.
        out: The picture; None puts ``sensitivity.png`` beside the model.
        device: Which GPU times the layers, where the runtime has one; None takes the first.
    """

    target: Path
    data: Path
    calibration: Path | None = None
    runtime: str = "tensorrt"
    images: int = 128
    seed: int = 1
    out: Path | None = None
    device: int | None = None


@dataclass(frozen=True)
class Debugged:
    """What ``debug`` found.

    Attributes:
        model: The FP32 model.
        runtime: The runtime whose INT8 graph was looked at.
        method: The calibration method of the ranges.
        sensitivity: What was measured.
        picture: The picture's path, or None where it could not be drawn.
        note: Why there is no picture.
        not_timed: Why the layers, or some of them, have no times.
    """

    model: Path
    runtime: str
    method: str
    sensitivity: Sensitivity
    picture: Path | None
    note: str | None = None
    not_timed: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "model": str(self.model),
            "runtime": self.runtime,
            "method": self.method,
            "picture": str(self.picture) if self.picture else None,
            "note": self.note,
            "not_timed": self.not_timed,
            **msgspec.to_builtins(self.sensitivity),
        }


def debug(request: DebugRequest, progress: Progress | None = None) -> Debugged:
    """Measure what INT8 does in each layer alone, and draw it. Without matplotlib there is no picture.

    Raises:
        ArtefactError: The engine's model is gone or was changed, or the table is of another model.
        BadInputError: Too few usable images.
        EnvironmentProblem: A GPU is named that is not there.
        UsageError: A GPU is named for a runtime on the processor.
    """
    from edge_dsc.page.figures import draw_sensitivity

    model, runtime = _find_model(request)
    refuse_on_processor(runtime, ["--device"] if request.device is not None else [])
    picture = request.out or model.path.parent / PICTURE_NAME
    require_writable(picture, CHART)
    dataset, split = discover(request.data), split_beside(model.path)
    candidates = calibration_candidates(dataset, split)
    table, known = _find_table(request, model, candidates, progress)
    chosen = select_images(candidates, request.images, request.seed)
    pixels = _read_pixels(chosen, model.contract, known)
    signed = runtime.signed_activations
    times: Mapping[str, Mapping[str, float]] = {}
    not_timed = None
    with failures_of(str(model.path), remedy=EXPORT_AGAIN):
        if runtime.runs_on_cpu:
            times = _time_on_processor(model, table, pixels)
        elif not table.implicit:  # which no sensitivity can be measured of
            calibrated = CalibrationRun(
                path=model.path,
                table=table,
                model=model,
                dataset=dataset,
                split=split,
                held_out=0,
                coverage=None,
            )
            times, not_timed = _time_on_device(calibrated, runtime, request.device, progress)
        found = measure_sensitivity(model.proto, table, pixels, signed=signed, times=times, progress=progress)
    title = f"{model.contract.architecture}, {runtime.name}, {table.method}"
    done = Debugged(model.path, runtime.name, table.method, found, picture, not_timed=not_timed)
    try:
        draw_sensitivity(found, picture, title=title)
    except EnvironmentProblem as error:
        if not isinstance(error.__cause__, ImportError):
            raise  # such as a full disk; without matplotlib the table is still worth its minutes
        return replace(done, picture=None, note=f"no picture: {error}")
    return done


def format_debugged(found: Debugged) -> str:
    """Return the table and what follows from it."""
    result = found.sensitivity
    timed = list(dict.fromkeys(key for layer in result.layers for key in layer.time_ms)) or ["FP32", "INT8"]
    header = (
        *("layer", "output", "logits", "flips", "logits without", "flips without"),
        *(f"ms {kind}" for kind in timed),
    )
    rows = [
        (
            layer.name + (" (depthwise)" if layer.depthwise else ""),
            f"{layer.output_error:.2%}",
            f"{layer.logit_error:.2e}",
            str(layer.flips),
            f"{layer.logit_error_without:.2e}",
            str(layer.flips_without),
            *(f"{layer.time_ms[key]:.3f}" if key in layer.time_ms else "-" for key in timed),
        )
        for layer in result.harmful(MOST_ROWS)
    ]
    rest = len(result.layers) - len(rows)
    if rest:
        shown = {layer.name for layer in result.harmful(MOST_ROWS)}
        errors = sum(layer.logit_error for layer in result.layers if layer.name not in shown)
        rows.append((f"{rest} more layers, summed", "-", f"{errors:.2e}", *["-"] * 5))
    worst = result.worst
    gain = 1 - worst.logit_error_without / result.logit_error if result.logit_error else 0.0
    return "\n".join(
        [
            f"{found.model} in INT8 for {found.runtime}, ranges by {found.method}, {result.images} images",
            "output, logits, flips: this layer alone in INT8; without: all others in INT8, this one in float",
            align_rows(header, rows),
            *([f"no times: {found.not_timed}"] if found.not_timed else []),
            f"all in INT8: logits {result.logit_error:.2e}, {result.flips} of {result.images} answers change",
            f"leaving {worst.name} in float would take away {gain:.0%} of that error"
            + (f" and give {result.flips - worst.flips_without} answers back" if result.flips else ""),
            f"picture: {found.picture}" if found.picture else f"note: {found.note}",
        ]
    )


def _find_model(request: DebugRequest) -> tuple[OnnxModel, Runtime]:
    """Return the FP32 model and the runtime whose INT8 graph is looked at: those of an engine, or as asked."""
    if not record_path(request.target).is_file():
        return load_model(request.target), get_runtime(request.runtime)
    record = load_record(request.target)
    path = request.target.parent / record.onnx
    model = load_model(path) if path.is_file() else None
    if model is None or model.sha256 != record.onnx_sha256:
        raise ArtefactError(
            f"{path}, from which {record.engine} was built, is gone or was changed",
            remedy=f"rebuild it: {record.build_command}",
        )
    return model, get_runtime(record.runtime)


def _find_table(
    request: DebugRequest, model: OnnxModel, candidates: Sequence[Candidate], progress: Progress | None
) -> tuple[CalibrationTable, _Known]:
    """Load the table, or make one as ``calibrate`` does by default; return the pixels read for it too, by hash."""
    beside = model.path.parent / CALIBRATION_NAME
    path = request.calibration or (beside if beside.is_file() else None)
    if path is not None:
        table = load_table(path)
        check_table(table, model, path=path)
        return table, {}
    usual = CalibrationRequest(model=model.path, data=request.data)
    drawn = select_images(candidates, usual.images, usual.seed)
    images = read_set(drawn, model.contract, progress)
    known = {image.sha256: pixels for image, pixels in zip(images.images, images.pixels, strict=True)}
    return calibrate(model, images, CalibrationOptions(), progress), known


def _read_pixels(chosen: Sequence[Candidate], contract: ModelContract, known: _Known) -> NDArray[np.uint8]:
    """Return ``uint8 [N, height, width, 1]`` of the readable images, in their order; known ones are not read again."""
    unread = [image for image in chosen if image.sha256 not in known]
    read = read_inputs([image.path for image in unread], contract)
    found = dict(known)
    for candidate, image in zip(unread, read, strict=True):
        # Calibration names those that cannot be read; here they only make the sample smaller.
        if not isinstance(image.pixels, ImageError):
            found[candidate.sha256] = np.asarray(image.pixels, np.uint8)  # as every model takes them
    pixels = [found[image.sha256] for image in chosen if image.sha256 in found]
    if not pixels:
        raise BadInputError(
            f"none of {len(chosen)} images can be read", remedy="give a folder of real X-rays"
        )
    return np.stack(pixels)


def _time_on_processor(
    model: OnnxModel, table: CalibrationTable, pixels: NDArray[np.uint8]
) -> dict[str, dict[str, float]]:
    """Return the time of each layer in FP32 and in INT8, ms."""
    names = [layer.name for layer in find_layers(model.proto)]
    graphs = {"FP32": model.proto, "INT8": quantize(model.proto, table, signed_activations=False)}
    seen = {kind: time_layers(graph, names, pixels) for kind, graph in graphs.items()}
    return {name: {kind: times[name] for kind, times in seen.items() if name in times} for name in names}


def _time_on_device(
    calibrated: CalibrationRun, runtime: Runtime, device: int | None, progress: Progress | None
) -> tuple[dict[str, dict[str, float]], str | None]:
    """Build engines for one image, in INT8 and in what mixed precision leaves a layer in, and time their layers.

    Returns:
        The time of each layer by precision, ms, and why some have none.

    Raises:
        EnvironmentProblem: A GPU is named, and cannot be used.
    """
    available = runtime.availability()
    reason = available.no_build or available.no_run
    if reason is not None:
        why = f"{runtime.name} does not work here: {reason}"
        if device is not None:
            raise EnvironmentProblem(why, remedy="leave --device out: the table needs no GPU, its times do")
        return {}, why
    names = [layer.name for layer in find_layers(calibrated.model.proto)]
    times: dict[str, dict[str, float]] = {name: {} for name in names}
    notes = []
    with tempfile.TemporaryDirectory(prefix="edge-dsc-debug-") as folder:
        table = Path(folder) / CALIBRATION_NAME
        save_table(table, calibrated.table)
        for precision in (runtime.float_precision, Precision.INT8):
            request = BuildRequest(
                model=calibrated.model.path,
                precision=precision,
                runtime=runtime.name,
                out=Path(folder) / f"{precision.value}.engine",
                timing_cache=False,
                device=device,
            )
            try:
                built = build_engine(request, progress, calibrated=replace(calibrated, path=table))
                layers, _ = runtime.inspect_layers(built.path, built.record, device or 0)
            except (AccuracyGateError, ArtefactError, EnvironmentProblem) as error:
                if device is not None and isinstance(error, EnvironmentProblem):
                    raise
                notes.append(f"in {precision.name}, {error.what}")  # the table is worth its minutes without
                continue
            seen = layer_times(layers, names)
            for name, taken in seen.items():
                times[name][precision.name] = taken
            if others := [name for name in names if name not in seen]:
                notes.append(
                    f"in {precision.name}, {', '.join(others)}: fused with one another, or not reported"
                )
    return times, "; ".join(notes) or None
