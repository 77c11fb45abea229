"""The accuracy gate: an engine is held against its FP32 model on images that neither training nor calibration saw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from calibration.table import DEFAULT_METHOD
from calibration.table import CalibrationTable
from edge_dsc.data import Sample
from edge_dsc.data import discover
from edge_dsc.data.split import load_split
from edge_dsc.evaluate.evaluation import evaluate_runner
from edge_dsc.evaluate.evaluation import format_validation
from engines.images import usable_processors
from edge_dsc.data.split import SPLIT_FILE
from engines.errors import AccuracyGateError
from engines.errors import BadInputError
from engines.errors import UsageError
from engines.files import canonical_json
from engines.files import sha256_bytes
from engines.record import EngineRecord
from engines.record import Precision
from engines.ort import open_reference
from engines.runtimes import Progress
from engines.runtimes import Runner
from engines.runtimes import Runtime
from engines.record import Validation



DEFAULT_MAX_DROP = 0.5  # percentage points
HELD_OUT = ("evaluation", "test")

Model = Any  # onnx.ModelProto


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


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An engine that was built and is not shipped yet.

    Attributes:
        path: The engine's temporary file.
        record: What would become its record.
        runtime: Its runtime.
        model: The FP32 model.
        model_path: Where that lies; a split stands beside it.
        graph: The graph that the engine was built from.
        table: The calibration table, for INT8 and mixed.
        searched: Hashes of images that chose the layers of a mixed engine, and so cannot judge it.
    """

    path: Path
    record: EngineRecord
    runtime: Runtime
    model: Model
    model_path: Path
    graph: Model
    table: CalibrationTable | None
    searched: frozenset[str] = frozenset()


def run_gate(candidate: Candidate, options: GateOptions, progress: Progress | None = None) -> Validation:
    """Hold an engine against its FP32 model.

    The FP32 answers are ONNX Runtime's. The engine's are its own where it can run here; elsewhere its graph
    answers on ONNX Runtime, and the result says so.

    Raises:
        AccuracyGateError: Accuracy falls beyond the budget; its details hold the table.
        BadInputError: No image is left to validate on, or the folder knows other classes.
    """
    samples, which = validation_samples(
        options.data, candidate.model_path, candidate.table, searched=candidate.searched
    )
    named = candidate.record.renamed("FP32")
    with open_reference(candidate.model, named) as reference:
        # open_reference calls it a graph of its engine; here it is the model itself.
        reference.record = named
        runner, answered_by = _open(candidate)
        with runner:
            result = evaluate_runner(
                runner,
                options.data,
                samples,
                reference=reference,
                threads=usable_processors(),
                progress=progress,
            )
    assert result.agreement is not None, "there was a reference, and at least one image was answered"
    found = Validation(
        images=which,
        images_sha256=sha256_bytes(canonical_json(sorted(sample.sha256 for sample in samples))),
        answered_by=answered_by,
        max_drop=options.max_drop,
        skipped=len(result.skipped),
        agreement=result.agreement,
    )
    if not found.passed:
        precision = candidate.record.precision.value
        raise AccuracyGateError(
            f"{precision.upper()} loses {found.drop:.2f} points of accuracy on {found.agreement.images} images,"
            f" {options.max_drop:g} are allowed; nothing was written",
            remedy=_remedy(candidate),
            details=format_validation(found, precision=precision),
        )
    return found


def validation_samples(
    data: Path, model: Path, table: CalibrationTable | None, *, searched: frozenset[str] = frozenset()
) -> tuple[list[Sample], str]:
    """Choose the images of a folder that can judge an engine.

    Where the model's split stands beside it and the folder holds its images, these are the parts evaluation and
    test, which neither training, the choice of the best epoch nor calibration saw. Elsewhere it is every image
    that is neither in the split's other parts nor in the calibration table, by content.

    Returns:
        The samples, and one line that says which they are.

    Raises:
        BadInputError: None is left.
    """
    samples = discover(data).samples
    seen = ({image.sha256 for image in table.images} if table else set()) | searched
    split_file = model.parent / SPLIT_FILE
    if split_file.is_file():
        split = load_split(split_file)
        held = {sample.sha256 for part in HELD_OUT for sample in split.samples(part)} - seen
        chosen = [sample for sample in samples if sample.sha256 in held]
        if chosen:
            return chosen, f"{' and '.join(HELD_OUT)} of the model's split, in {data}"
        seen |= {sample.sha256 for part in split.parts for sample in split.samples(part)}
    chosen = [sample for sample in samples if sample.sha256 not in seen]
    if not chosen:
        raise BadInputError(
            f"training or calibration saw all {len(samples)} images of {data}",
            remedy="give images of your own that the model has not seen: --validate DIR",
        )
    left_out = len(samples) - len(chosen)
    return chosen, f"all of {data}" + (f" but {left_out} that the model has seen" if left_out else "")


def _open(candidate: Candidate) -> tuple[Runner, str]:
    reason = candidate.runtime.availability().no_run
    if reason is None:
        return candidate.runtime.open_runner(
            candidate.path, candidate.record
        ), f"the engine on {_name(candidate)}"
    runner = open_reference(candidate.graph, candidate.record)
    return runner, f"its graph on ONNX Runtime, because the engine cannot run here: {reason}"


def _name(candidate: Candidate) -> str:
    return f"{candidate.record.runtime} {candidate.record.runtime_version}"


def _remedy(candidate: Candidate) -> str:
    if candidate.table is None:
        return "build with --fp32, or allow more with --max-drop"
    method = DEFAULT_METHOD if candidate.table.method != DEFAULT_METHOD else "entropy"
    mixed = "" if candidate.record.precision is Precision.MIXED else ", --precision mixed"
    return f"try --calib-method {method}{mixed} or train --qat RUN, or allow more with --max-drop"
