"""Calibration as an application step: which images may be used, and where the table goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from calibration.table import CalibrationOptions
from calibration.collect import calibrate
from calibration.coverage import Coverage
from calibration.coverage import measure_coverage
from calibration.coverage import save_coverage
from calibration.table import DEFAULT_METHOD
from calibration.select import Candidate, read_set, select_images
from calibration.table import CalibrationTable
from calibration.table import save_table
from calibration.tensorrt import check_cache_request
from calibration.tensorrt import write_cache
from edge_dsc.data import discover
from edge_dsc.data.split import load_split
from edge_dsc.data.split import SPLIT_FILE
from engines.files import require_writable
from engines.files import write_text
from engines.graph import contract_of
from engines.graph import load_model
from engines.packages import is_installed
from engines.runtimes import Progress



CALIBRATION_NAME = "calibration.json"


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


@dataclass(frozen=True)
class CalibrationRun:
    """A calibration that was made.

    Attributes:
        path: The table's file.
        table: The table.
        held_out: Images left out because the network's split holds them back for evaluation.
        trt_cache: TensorRT's own cache, where it was asked for.
        coverage: What the set holds and whether its ranges have settled; written beside the table.
    """

    path: Path
    table: CalibrationTable
    held_out: int
    coverage: Coverage
    trt_cache: Path | None = None


def run_calibration(request: CalibrationRequest, progress: Progress | None = None) -> CalibrationRun:
    """Choose images, calibrate over them and write the table.

    Images that the network's own split (``split.json`` beside the model) keeps for validation, evaluation
    or test are left out: ranges tuned on them would flatter the INT8 engine's accuracy.

    Raises:
        BadInputError: Too few usable images.
        ArtefactError: The model is not ours.
        UsageError: A TensorRT cache that the method, or the release, cannot give.
    """
    if request.trt_release is not None:
        check_cache_request(request.method, request.trt_release)
    path = request.out or request.model.parent / CALIBRATION_NAME
    items, held_out = calibration_images(request.data, request.model)
    require_writable(path)
    chosen = select_images(items, request.images, request.seed)
    options = CalibrationOptions(method=request.method, seed=request.seed)
    model = load_model(request.model)
    images = read_set(chosen, model.contract, progress)
    table = calibrate(model, images, options, progress)
    save_table(path, table)
    patients = {sample.sha256: sample.patient for sample in discover(request.data).samples}
    coverage = measure_coverage(model, table, images, patients)
    save_coverage(path.with_name(f"{path.stem}.coverage.json"), coverage)
    if is_installed("matplotlib"):  # a machine that only calibrates need not have it
        from edge_dsc.page.figures import draw_coverage

        draw_coverage(coverage, path.with_name(f"{path.stem}.coverage.png"))
    cache = None
    if request.trt_release is not None:
        cache = path.with_name(f"{path.stem}.trt-cache.txt")
        write_text(cache, write_cache(table, model.proto, request.trt_release))
    return CalibrationRun(path, table, held_out, coverage, cache)


def calibration_images(data: Path, model: Path) -> tuple[list[Candidate], int]:
    """Name the images of a folder that may calibrate a model.

    Returns:
        The images, and how many were left out as held back by the model's split.
    """
    samples = discover(data).samples
    split_file = model.parent / SPLIT_FILE
    held_back: set[str] = set()
    if split_file.is_file():
        split = load_split(split_file)
        held_back = {
            sample.sha256 for part in split.parts if part != "train" for sample in split.samples(part)
        }
    allowed = [
        Candidate(data / sample.path, sample.label, sample.sha256)
        for sample in samples
        if sample.sha256 not in held_back
    ]
    return allowed, len(samples) - len(allowed)
