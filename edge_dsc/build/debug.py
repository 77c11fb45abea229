"""``debug``: which layer of an INT8 network spoils its answers, as a table and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from calibration.table import CalibrationOptions
from calibration.collect import calibrate
from calibration.sensitivity import time_layers
from calibration.layers import find_layers
from calibration.qdq import quantize
from calibration.select import Candidate, read_set, select_images
from calibration.sensitivity import Sensitivity
from calibration.sensitivity import measure_sensitivity
from calibration.table import CalibrationTable
from calibration.table import check_table
from calibration.table import load_table
from edge_dsc.build.calibrate import CALIBRATION_NAME
from edge_dsc.build.calibrate import calibration_images
from engines.errors import ArtefactError
from engines.errors import ImageError
from engines.files import sha256_file
from engines.graph import OnnxModel, load_model
from engines.graph import OnnxModel, load_model
from engines.images import read_inputs
from engines.packages import load
from engines.record import load_record
from engines.record import record_path
from engines.runtimes import Progress
from engines.runtimes import get_runtime
import numpy as np



PICTURE_NAME = "sensitivity.png"


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
        picture: The picture's path.
    """

    model: Path
    runtime: str
    method: str
    sensitivity: Sensitivity
    picture: Path

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "model": str(self.model),
            "runtime": self.runtime,
            "method": self.method,
            "picture": str(self.picture),
            **msgspec.to_builtins(self.sensitivity),
        }


def debug(request: DebugRequest, progress: Progress | None = None) -> Debugged:
    """Measure what INT8 does in each layer alone, and draw it.

    Raises:
        ArtefactError: The engine's model is gone or was changed, or the table is of another model.
        BadInputError: Too few usable images.
    """
    from edge_dsc.page.figures import draw_sensitivity

    path, runtime = _resolve(request)
    items, _ = calibration_images(request.data, path)
    loaded = load_model(path)
    model, contract = loaded.proto, loaded.contract
    table = _table(request, loaded, items, progress)
    chosen = select_images(items, request.images, request.seed)
    pixels = _read(chosen, contract)
    signed = get_runtime(runtime).signed_activations
    times = {} if signed else _times(model, table, pixels)
    found = measure_sensitivity(model, table, pixels, signed=signed, times=times, progress=progress)
    picture = request.out or path.parent / PICTURE_NAME
    draw_sensitivity(found, picture, title=f"{contract.architecture}, {runtime}, {table.method}")
    return Debugged(path, runtime, table.method, found, picture)


def format_debugged(found: Debugged) -> str:
    """Return the table and what follows from it."""
    result = found.sensitivity
    rows: list[tuple[str, ...]] = [
        ("layer", "output", "logits", "flips", "logits without", "flips without", "ms FP32", "ms INT8")
    ]
    for layer in result.layers:
        times = [f"{layer.time_ms[key]:.3f}" if key in layer.time_ms else "-" for key in ("FP32", "INT8")]
        rows.append(
            (
                layer.name + (" (depthwise)" if layer.depthwise else ""),
                f"{layer.output_error:.2%}",
                f"{layer.logit_error:.2e}",
                str(layer.flips),
                f"{layer.logit_error_without:.2e}",
                str(layer.flips_without),
                *times,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    worst = result.worst
    gain = 1 - worst.logit_error_without / result.logit_error if result.logit_error else 0.0
    return "\n".join(
        [
            f"{found.model} in INT8 for {found.runtime}, ranges by {found.method}, {result.images} images",
            "output, logits, flips: this layer alone in INT8; without: all others in INT8, this one in float",
            *lines,
            f"all in INT8: logits {result.logit_error:.2e}, {result.flips} of {result.images} answers change",
            f"leaving {worst.name} in float would take away {gain:.0%} of that error"
            + (f" and give {result.flips - worst.flips_without} answers back" if result.flips else ""),
            f"picture: {found.picture}",
        ]
    )


def _resolve(request: DebugRequest) -> tuple[Path, str]:
    """Name the FP32 model and the runtime."""
    if not record_path(request.target).is_file():
        return request.target, request.runtime
    record = load_record(request.target)
    model = request.target.parent / record.onnx
    if not model.is_file() or sha256_file(model) != record.onnx_sha256:
        raise ArtefactError(
            f"{model}, from which {record.engine} was built, is gone or was changed",
            remedy=f"rebuild it: {record.build_command}",
        )
    return model, record.runtime


def _table(
    request: DebugRequest, model: OnnxModel, items: list[Candidate], progress: Progress | None
) -> CalibrationTable:
    beside = model.path.parent / CALIBRATION_NAME
    path = request.calibration or (beside if beside.is_file() else None)
    if path is not None:
        table = load_table(path)
        check_table(table, model, path=path)
        return table
    images = read_set(select_images(items, 256, 0), model.contract, progress)
    return calibrate(model, images, CalibrationOptions(), progress)


def _read(chosen: list[Candidate], contract: Any) -> Any:
    found = read_inputs([candidate.path for candidate in chosen], contract)
    # Calibration names those that cannot be read; here they only make the sample smaller.
    return np.stack([image.pixels for image in found if not isinstance(image.pixels, ImageError)])


def _times(model: Any, table: CalibrationTable, pixels: Any) -> dict[str, dict[str, float]]:
    names = [layer.name for layer in find_layers(model)]
    graphs = {"FP32": model, "INT8": quantize(model, table, signed_activations=False)}
    seen = {kind: time_layers(graph, names, pixels) for kind, graph in graphs.items()}
    return {name: {kind: times[name] for kind, times in seen.items() if name in times} for name in names}
