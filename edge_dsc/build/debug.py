"""``debug``: which layer of an INT8 network spoils its answers, as a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from calibration.table import CalibrationOptions, CalibrationTable, check_table, load_table
from edge_dsc.build.calibrate import CALIBRATION_NAME, CalibrationRequest, calibration_candidates
from edge_dsc.data import discover
from edge_dsc.data.purposes import split_beside
from engines.contract import ModelContract
from engines.errors import ArtefactError, BadInputError, EnvironmentProblem, ImageError
from engines.files import CHART, require_writable
from engines.graph import EXPORT_AGAIN, OnnxModel, load_model
from engines.images import read_inputs
from engines.ort import failures_of
from engines.record import load_record, record_path
from engines.runtimes import Progress, Runtime, get_runtime
from engines.text_table import align_rows

PICTURE_NAME = "sensitivity.png"
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
    """

    target: Path
    data: Path
    calibration: Path | None = None
    runtime: str = "tensorrt"
    images: int = 128
    seed: int = 1
    out: Path | None = None


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
    """

    model: Path
    runtime: str
    method: str
    sensitivity: Sensitivity
    picture: Path | None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "model": str(self.model),
            "runtime": self.runtime,
            "method": self.method,
            "picture": str(self.picture) if self.picture else None,
            "note": self.note,
            **msgspec.to_builtins(self.sensitivity),
        }


def debug(request: DebugRequest, progress: Progress | None = None) -> Debugged:
    """Measure what INT8 does in each layer alone, and draw it. Without matplotlib there is no picture.

    Raises:
        ArtefactError: The engine's model is gone or was changed, or the table is of another model.
        BadInputError: Too few usable images.
    """
    from edge_dsc.page.figures import draw_sensitivity

    model, runtime = _find_model(request)
    picture = request.out or model.path.parent / PICTURE_NAME
    require_writable(picture, CHART)
    candidates = calibration_candidates(discover(request.data), split_beside(model.path))
    table, known = _find_table(request, model, candidates, progress)
    chosen = select_images(candidates, request.images, request.seed)
    pixels = _read_pixels(chosen, model.contract, known)
    signed = runtime.signed_activations
    with failures_of(str(model.path), remedy=EXPORT_AGAIN):
        times = _time_layers(model, table, pixels) if runtime.runs_on_cpu else {}
        found = measure_sensitivity(model.proto, table, pixels, signed=signed, times=times, progress=progress)
    title = f"{model.contract.architecture}, {runtime.name}, {table.method}"
    try:
        draw_sensitivity(found, picture, title=title)
    except EnvironmentProblem as error:
        if not isinstance(error.__cause__, ImportError):
            raise  # such as a full disk; without matplotlib the table is still worth its minutes
        return Debugged(model.path, runtime.name, table.method, found, None, f"no picture: {error}")
    return Debugged(model.path, runtime.name, table.method, found, picture)


def format_debugged(found: Debugged) -> str:
    """Return the table and what follows from it."""
    result = found.sensitivity
    header = ("layer", "output", "logits", "flips", "logits without", "flips without", "ms FP32", "ms INT8")
    rows = [
        (
            layer.name + (" (depthwise)" if layer.depthwise else ""),
            f"{layer.output_error:.2%}",
            f"{layer.logit_error:.2e}",
            str(layer.flips),
            f"{layer.logit_error_without:.2e}",
            str(layer.flips_without),
            *(f"{layer.time_ms[key]:.3f}" if key in layer.time_ms else "-" for key in ("FP32", "INT8")),
        )
        for layer in result.layers
    ]
    worst = result.worst
    gain = 1 - worst.logit_error_without / result.logit_error if result.logit_error else 0.0
    return "\n".join(
        [
            f"{found.model} in INT8 for {found.runtime}, ranges by {found.method}, {result.images} images",
            "output, logits, flips: this layer alone in INT8; without: all others in INT8, this one in float",
            align_rows(header, rows),
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


def _time_layers(
    model: OnnxModel, table: CalibrationTable, pixels: NDArray[np.uint8]
) -> dict[str, dict[str, float]]:
    """Return the time of each layer in FP32 and in INT8, ms."""
    names = [layer.name for layer in find_layers(model.proto)]
    graphs = {"FP32": model.proto, "INT8": quantize(model.proto, table, signed_activations=False)}
    seen = {kind: time_layers(graph, names, pixels) for kind, graph in graphs.items()}
    return {name: {kind: times[name] for kind, times in seen.items() if name in times} for name in names}
