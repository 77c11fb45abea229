"""``calibrate``: the ranges for INT8 over the images that may calibrate, with what speaks for or against that set."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from calibration.collect import calibrate
from calibration.coverage import Coverage, measure_coverage, save_coverage
from calibration.select import CalibrationSet, Candidate, read_set, select_images
from calibration.table import (
    DEFAULT_METHOD,
    TABLE,
    TENSORRT_METHODS,
    CalibrationOptions,
    CalibrationTable,
    save_table,
)
from calibration.tensorrt import (
    TENSORRT_BATCH,
    OwnCalibration,
    cache_of_table,
    check_cache_request,
    table_of_cache,
    write_cache,
)
from edge_dsc.data import Dataset, Split, discover
from edge_dsc.data.purposes import images_to_calibrate, split_beside
from engines.errors import UsageError
from engines.files import require_writable, write_text
from engines.graph import OnnxModel, load_model
from engines.packages import is_installed
from engines.record import BatchRange, Precision, Tuning
from engines.runtimes import BuildOptions, ImplicitInt8, Progress, Runtime, choose_runtime

CALIBRATION_NAME = "calibration.json"  # beside the model


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """What ``calibrate`` was asked for.

    Attributes:
        model: The FP32 ONNX model.
        data: A folder of labelled images.
        method: One of :data:`calibration.table.METHODS`, or of ``TENSORRT_METHODS``: TensorRT finds the ranges while
            it builds an engine that is thrown away.
        images: How many images to draw, stratified by class.
        seed: Seed of the draw.
        out: The table; None puts ``calibration.json`` beside the model.
        trt_release: Also write TensorRT's own text cache for this release, such as ``8.6.2``, beside the table.
        runtime: What will build; only a TensorRT has calibrators of its own.
        device: Which GPU TensorRT calibrates on.
        rounding: How the signed graph's weights are rounded; see :class:`calibration.table.CalibrationOptions`.
        bias_correction: Whether its biases are corrected; as there.
    """

    model: Path
    data: Path
    method: str = DEFAULT_METHOD
    images: int = 256
    seed: int = 0
    out: Path | None = None
    trt_release: str | None = None
    runtime: str = "tensorrt"
    device: int = 0
    rounding: str | None = None
    bias_correction: bool | None = None


@dataclass(frozen=True, kw_only=True)
class CalibrationRun:
    """A calibration that was made, and what a build in the same command can go on with.

    Attributes:
        path: The table's file.
        table: The table.
        model: The model that it was made for.
        dataset: The folder of images, listed and hashed.
        split: The model's split, if any.
        held_out: Images left out because that split keeps them for something else.
        coverage: What the set holds and whether its ranges have settled; written beside the table. None where TensorRT
            found the ranges: it says nothing of how.
        trt_cache: TensorRT's own cache, where it was asked for, or was written by TensorRT.
    """

    path: Path
    table: CalibrationTable
    model: OnnxModel
    dataset: Dataset
    split: Split | None
    held_out: int
    coverage: Coverage | None
    trt_cache: Path | None = None


def run_calibration(request: CalibrationRequest, progress: Progress | None = None) -> CalibrationRun:
    """Choose images, calibrate over them and write the table.

    Which images may be drawn, :func:`edge_dsc.data.purposes.images_to_calibrate` decides. All files of the folder are
    hashed, to know them; those that are drawn are read once more, hashed and decoded at once.

    Raises:
        BadInputError: Too few usable images.
        ArtefactError: The model is not ours.
        EnvironmentProblem: TensorRT is to calibrate, and cannot here.
        UsageError: A TensorRT cache that the method, or the release, cannot give; a runtime without calibrators;
            roundings or biases that are learnt, of a network or a method that has none.
    """
    if request.trt_release is not None:
        check_cache_request(request.method, request.trt_release)
    tensorrt = choose_runtime(request.runtime)[0] if request.method in TENSORRT_METHODS else None
    if tensorrt is not None:
        if request.bias_correction or request.rounding not in (None, "nearest"):
            raise UsageError(
                f"ranges by {request.method} go with TensorRT's own roundings",
                remedy="leave --rounding and --bias-correction out, or choose another --calib-method",
            )
        tensorrt.require_calibrators(request.method)
    path = request.out or request.model.parent / CALIBRATION_NAME
    model = load_model(request.model)
    dataset, split = discover(request.data, labels=model.contract.labels), split_beside(request.model)
    candidates = calibration_candidates(dataset, split)
    require_writable(path, TABLE.name)
    chosen = select_images(candidates, request.images, request.seed)
    images = read_set(chosen, model.contract, progress)
    if tensorrt is not None:
        table = _calibrate_in_tensorrt(tensorrt, request, model, images, progress)
    else:
        options = CalibrationOptions(
            method=request.method,
            seed=request.seed,
            rounding=request.rounding,
            bias_correction=request.bias_correction,
        )
        table = calibrate(model, images, options, progress)
    save_table(path, table)
    coverage, report = None, path.with_name(f"{path.stem}.coverage.json")
    if not table.implicit:
        patients = {sample.sha256: sample.patient for sample in dataset.samples}
        coverage = measure_coverage(model, table, images, patients)
        save_coverage(report, coverage)
        if is_installed("matplotlib"):  # a machine that only calibrates need not have it
            from edge_dsc.page.figures import draw_coverage

            draw_coverage(coverage, report.with_suffix(".png"))
    cache = path.with_name(f"{path.stem}.trt-cache.txt")
    if table.implicit:
        write_text(cache, cache_of_table(table))
    elif request.trt_release is not None:
        write_text(cache, write_cache(table, model.proto, request.trt_release))
    return CalibrationRun(
        path=path,
        table=table,
        model=model,
        dataset=dataset,
        split=split,
        held_out=len(dataset.samples) - len(candidates),
        coverage=coverage,
        trt_cache=cache if table.implicit or request.trt_release is not None else None,
    )


def _calibrate_in_tensorrt(
    runtime: Runtime,
    request: CalibrationRequest,
    model: OnnxModel,
    images: CalibrationSet,
    progress: Progress | None,
) -> CalibrationTable:
    """Let TensorRT find the ranges; an engine takes them from the table, as often as it is built."""
    own = OwnCalibration(request.method, model.contract, images)
    options = BuildOptions(
        precision=Precision.INT8,
        required_layers=0,  # what is built here is thrown away
        batch=BatchRange(TENSORRT_BATCH, TENSORRT_BATCH, TENSORRT_BATCH),
        tuning=Tuning(optimization_level=0),
        progress=progress,
        implicit=ImplicitInt8(calibrator=own.attach),
        device=request.device,
    )
    with tempfile.TemporaryDirectory() as folder:
        runtime.build(model.proto.SerializeToString(), Path(folder) / "calibration.engine", options)
    version = runtime.availability().version or ""
    return table_of_cache(own.cache, request.method, request.seed, model, images, version)


def calibration_candidates(dataset: Dataset, split: Split | None) -> list[Candidate]:
    """Return the images of a folder that may calibrate, as the draw takes them."""
    return [
        Candidate(dataset.root / sample.path, sample.label, sample.sha256)
        for sample in images_to_calibrate(dataset, split)
    ]
