"""``calibrate``: the ranges for INT8 over the images that may calibrate, with what speaks for or against that set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calibration.collect import calibrate
from calibration.coverage import Coverage, measure_coverage, save_coverage
from calibration.select import Candidate, read_set, select_images
from calibration.table import DEFAULT_METHOD, TABLE, CalibrationOptions, CalibrationTable, save_table
from calibration.tensorrt import check_cache_request, write_cache
from edge_dsc.data import Dataset, Split, discover
from edge_dsc.data.purposes import images_to_calibrate, split_beside
from engines.files import require_writable, write_text
from engines.graph import OnnxModel, load_model
from engines.packages import is_installed
from engines.runtimes import Progress

CALIBRATION_NAME = "calibration.json"  # beside the model


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """What ``calibrate`` was asked for.

    Attributes:
        model: The FP32 ONNX model.
        data: A folder of labelled images.
        method: One of :data:`calibration.table.METHODS`.
        images: How many images to draw, stratified by class.
        seed: Seed of the draw.
        out: The table; None puts ``calibration.json`` beside the model.
        trt_release: Also write TensorRT's own text cache for this release, such as ``8.6.2``, beside the table.
    """

    model: Path
    data: Path
    method: str = DEFAULT_METHOD
    images: int = 256
    seed: int = 0
    out: Path | None = None
    trt_release: str | None = None


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
        coverage: What the set holds and whether its ranges have settled; written beside the table.
        trt_cache: TensorRT's own cache, where it was asked for.
    """

    path: Path
    table: CalibrationTable
    model: OnnxModel
    dataset: Dataset
    split: Split | None
    held_out: int
    coverage: Coverage
    trt_cache: Path | None = None


def run_calibration(request: CalibrationRequest, progress: Progress | None = None) -> CalibrationRun:
    """Choose images, calibrate over them and write the table.

    Which images may be drawn, :func:`edge_dsc.data.purposes.images_to_calibrate` decides. All files of the folder are
    hashed, to know them; those that are drawn are read once more, hashed and decoded at once.

    Raises:
        BadInputError: Too few usable images.
        ArtefactError: The model is not ours.
        UsageError: A TensorRT cache that the method, or the release, cannot give.
    """
    if request.trt_release is not None:
        check_cache_request(request.method, request.trt_release)
    path = request.out or request.model.parent / CALIBRATION_NAME
    dataset, split = discover(request.data), split_beside(request.model)
    candidates = calibration_candidates(dataset, split)
    require_writable(path, TABLE.name)
    chosen = select_images(candidates, request.images, request.seed)
    model = load_model(request.model)
    images = read_set(chosen, model.contract, progress)
    options = CalibrationOptions(method=request.method, seed=request.seed)
    table = calibrate(model, images, options, progress)
    save_table(path, table)
    patients = {sample.sha256: sample.patient for sample in dataset.samples}
    coverage = measure_coverage(model, table, images, patients)
    save_coverage(path.with_name(f"{path.stem}.coverage.json"), coverage)
    if is_installed("matplotlib"):  # a machine that only calibrates need not have it
        from edge_dsc.page.figures import draw_coverage

        draw_coverage(coverage, path.with_name(f"{path.stem}.coverage.png"))
    cache = None
    if request.trt_release is not None:
        cache = path.with_name(f"{path.stem}.trt-cache.txt")
        write_text(cache, write_cache(table, model.proto, request.trt_release))
    return CalibrationRun(
        path=path,
        table=table,
        model=model,
        dataset=dataset,
        split=split,
        held_out=len(dataset.samples) - len(candidates),
        coverage=coverage,
        trt_cache=cache,
    )


def calibration_candidates(dataset: Dataset, split: Split | None) -> list[Candidate]:
    """Return the images of a folder that may calibrate, as the draw takes them."""
    return [
        Candidate(dataset.root / sample.path, sample.label, sample.sha256)
        for sample in images_to_calibrate(dataset, split)
    ]
