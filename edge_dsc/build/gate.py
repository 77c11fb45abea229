"""The accuracy gate: an engine is held against its FP32 model on images that neither training nor calibration saw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from calibration.table import DEFAULT_METHOD
from edge_dsc.data.purposes import images_to_judge
from edge_dsc.evaluate.evaluation import evaluate_runner, format_validation
from engines.cpu.ort import open_reference
from engines.errors import AccuracyGateError, EnvironmentProblem, UsageError
from engines.files import canonical_json, sha256_bytes
from engines.images import usable_processors
from engines.record import EngineRecord, Precision, Validation
from engines.runtimes import Progress, Runner, RunnerOptions

if TYPE_CHECKING:
    from edge_dsc.build.engine import Build

DEFAULT_MAX_DROP = 0.5  # percentage points


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """What an accuracy gate is asked for.

    Attributes:
        data: A folder of labelled images.
        max_drop: Most that accuracy may fall against FP32, percentage points.

    Raises:
        UsageError: A budget outside 0..100.
    """

    data: Path
    max_drop: float = DEFAULT_MAX_DROP

    def __post_init__(self) -> None:
        """Check the budget."""
        if not 0 <= self.max_drop <= 100:
            raise UsageError(
                f"a budget of {self.max_drop:g} points", remedy="give --max-drop 0 to 100, such as 0.5"
            )


def run_gate(
    build: Build, engine: Path, record: EngineRecord, progress: Progress | None = None
) -> Validation:
    """Hold an engine that is not shipped yet against its FP32 model.

    The FP32 answers are ONNX Runtime's. The engine's are its own where it can run here; elsewhere its graph
    answers on ONNX Runtime, and the result says so.

    Args:
        build: The build, with the images of its gate.
        engine: The engine's temporary file.
        record: What would become its record.
        progress: Called with (phase, done, total).

    Raises:
        AccuracyGateError: Accuracy falls beyond the budget; its details hold the table.
        EnvironmentProblem: TensorRT quantised by itself, and the engine cannot run here.
        BadInputError: No image is left to validate on, or the folder knows other classes.
    """
    gate, dataset = build.request.gate, build.dataset
    assert gate is not None and dataset is not None, "a build with a gate has its images"
    calibrated = {image.sha256 for image in build.table.images} if build.table is not None else set()
    judging = images_to_judge(dataset, build.split, calibrated | build.searched)
    # FP32 answers what the model's own contract makes of the files, whatever input the engine takes.
    plain = msgspec.structs.replace(record, engine="FP32", contract=build.model.contract)
    with open_reference(build.model.proto, plain) as reference:
        runner, answered_by = _open_runner(build, engine, record)
        with runner:
            result = evaluate_runner(
                runner,
                dataset.root,
                judging.samples,
                reference=reference,
                threads=usable_processors(),
                progress=progress,
            )
    assert result.agreement is not None, "there was a reference, and at least one image was answered"
    found = Validation(
        images=judging.origin,
        images_sha256=sha256_bytes(canonical_json(sorted(sample.sha256 for sample in judging.samples))),
        answered_by=answered_by,
        max_drop=gate.max_drop,
        skipped=len(result.skipped),
        agreement=result.agreement,
    )
    if not found.passed:
        precision = record.precision.value
        raise AccuracyGateError(
            f"{precision.upper()} loses {found.drop:.2f} points of accuracy on {found.agreement.images} images,"
            f" {gate.max_drop:g} are allowed; nothing was written",
            remedy=_remedy(build),
            details=format_validation(found, precision=precision),
        )
    return found


def _open_runner(build: Build, engine: Path, record: EngineRecord) -> tuple[Runner, str]:
    """Open what answers for the engine, and say in one line what that is."""
    reason = build.runtime.availability().no_run
    if reason is None:
        options = RunnerOptions(device=build.request.device or 0)
        runner = build.runtime.open_runner(engine, record, options)
        return runner, f"the engine on {record.runtime} {record.runtime_version}"
    if build.table is not None and build.table.implicit:
        raise EnvironmentProblem(
            f"the engine cannot run here to be judged, and no graph holds its INT8: {reason}",
            remedy="build without --validate, or calibrate with another --calib-method",
        )
    graph = open_reference(build.graph, record)
    return graph, f"its graph on ONNX Runtime, because the engine cannot run here: {reason}"


def _remedy(build: Build) -> str:
    if build.table is None:
        return "build with --fp32, or allow more with --max-drop"
    method = DEFAULT_METHOD if build.table.method != DEFAULT_METHOD else "entropy"
    mixed = "" if build.request.precision is Precision.MIXED else ", --precision mixed"
    return f"try --calib-method {method}{mixed} or train --qat RUN, or allow more with --max-drop"
