"""Mixed precision: which layers stay in floating point, searched for, or as an earlier engine has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from calibration.mixed import search
from calibration.table import CalibrationTable
from edge_dsc.data import Sample
from edge_dsc.data import discover
from edge_dsc.data.loading import load_images
from edge_dsc.data.split import load_split
from edge_dsc.data.split import SPLIT_FILE
from engines.contract import ModelContract
from engines.errors import ArtefactError
from engines.errors import BadInputError
from engines.errors import UsageError
from engines.packages import load
from engines.record import EngineRecord
from engines.record import Precision
from engines.record import load_record
from engines.record import record_path
from engines.runtimes import Progress
import numpy as np



Model = Any  # onnx.ModelProto


@dataclass(frozen=True, kw_only=True)
class MixedQuestion:
    """What a mixed build has to find out.

    Attributes:
        model: The FP32 model.
        model_path: Its file; a split may stand beside it.
        onnx_sha256: Hash of that file.
        contract: The model's contract.
        table: The calibration table.
        calibration_sha256: Hash of the table's file.
        data: Labelled images.
        max_drop: The budget, percentage points.
        runtime: Name of the runtime.
        signed: Whether it wants signed activations.
    """

    model: Model
    model_path: Path
    onnx_sha256: str
    contract: ModelContract
    table: CalibrationTable
    calibration_sha256: str
    data: Path
    max_drop: float
    runtime: str
    signed: bool


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Which layers stay in floating point.

    Attributes:
        float_layers: Their names.
        origin: Where that comes from: one line for the record.
        searched: Hashes of the images that the search has seen; they cannot judge its result.
    """

    float_layers: tuple[str, ...]
    origin: str
    searched: frozenset[str] = frozenset()


def assign_layers(
    question: MixedQuestion, out: Path, layers: Path | None, progress: Progress | None = None
) -> Assignment:
    """Take the assignment of a named engine, else that of the engine which is to be replaced, else search.

    The engine that is to be replaced is followed where it is mixed and of the same model, calibration, runtime and
    budget: a build that is repeated gives the same engine.

    Args:
        question: The build.
        out: The engine that will be written.
        layers: A mixed engine whose assignment to take.
        progress: Told how far the search is.

    Raises:
        ArtefactError: ``layers`` is no sound engine of ours.
        UsageError: ``layers`` is not mixed.
        BadInputError: There are no images to search on.
    """
    if layers is not None:
        record = load_record(layers)
        if record.precision is not Precision.MIXED:
            raise UsageError(
                f"{layers} is in {record.precision.value}: it has no assignment of layers",
                remedy="give an engine that --precision mixed built",
            )
        return Assignment(
            float_layers=record.float_layers, origin=f"{_words(record.float_layers)}, as in {layers.name}"
        )
    earlier = _earlier(question, out)
    if earlier is not None:
        origin = f"{_words(earlier.float_layers)}, as in the engine before (remove it to search again)"
        return Assignment(float_layers=earlier.float_layers, origin=origin)
    return _search(question, progress)


def search_samples(data: Path, model: Path, table: CalibrationTable) -> tuple[list[Sample], bool]:
    """Choose the labelled images to search on: others than those that will judge the result.

    These are the validation part of the model's split where the folder holds it, else the images that calibration
    saw, else every second one of the rest.

    Returns:
        The samples, and whether the gate must leave them out.
    """
    samples = discover(data).samples
    split_file = model.parent / SPLIT_FILE
    if split_file.is_file():
        part = {sample.sha256 for sample in load_split(split_file).samples("validation")}
        chosen = [sample for sample in samples if sample.sha256 in part]
        if chosen:
            return chosen, False
    seen = {image.sha256 for image in table.images}
    chosen = [sample for sample in samples if sample.sha256 in seen]
    if chosen:
        return chosen, False
    by_content = sorted(samples, key=lambda sample: sample.sha256)
    return by_content[::2], True


def _earlier(question: MixedQuestion, out: Path) -> EngineRecord | None:
    if not record_path(out).is_file():
        return None
    try:
        record = load_record(out)
    except ArtefactError:
        return None  # it is being replaced
    same = (
        record.precision is Precision.MIXED
        and record.onnx_sha256 == question.onnx_sha256
        and record.calibration_sha256 == question.calibration_sha256
        and record.runtime == question.runtime
        and record.validation is not None
        and record.validation.max_drop == question.max_drop
    )
    return record if same else None


def _search(question: MixedQuestion, progress: Progress | None) -> Assignment:
    samples, leave_out = search_samples(question.data, question.model_path, question.table)
    loaded = load_images(question.data, samples, question.contract, progress=progress)
    labels = question.contract.labels
    unknown = sorted({sample.label for sample in loaded.samples} - set(labels))
    if unknown:
        raise BadInputError(
            f"the model does not know the class {', '.join(unknown)}",
            remedy=f"name the folders after its classes: {', '.join(labels)}",
        )
    found = search(
        question.model,
        question.table,
        loaded.pixels,
        [labels.index(sample.label) for sample in loaded.samples],
        signed=question.signed,
        max_drop=question.max_drop,
        progress=progress,
    )
    return Assignment(
        float_layers=tuple(found.float_layers),
        origin=found.text,
        searched=frozenset(sample.sha256 for sample in samples) if leave_out else frozenset(),
    )


def _words(float_layers: tuple[str, ...]) -> str:
    return f"mixed: {', '.join(float_layers) or 'no layer'} in floating point"
