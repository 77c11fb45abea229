"""Commands that turn a trained network into an engine: export, calibrate, build-engine."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from edge_dsc.cli.options import Json, Out, Seed, model_of

DEFAULT_RUN = Path("runs/dsc")


class CalibMethod(str, enum.Enum):
    """How ranges are chosen; the names of calibration.methods.METHODS."""

    MSE = "mse"
    ENTROPY = "entropy"
    MINMAX = "minmax"
    PERCENTILE = "percentile"


class PrecisionName(str, enum.Enum):
    """The values of engines.record.Precision."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    MIXED = "mixed"


class Backend(str, enum.Enum):
    """The runtimes' table and ``auto``."""

    AUTO = "auto"
    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


Model = Annotated[Path, typer.Argument(help="A run folder that train wrote, or an ONNX model of export.")]
CalibData = Annotated[
    Optional[Path],
    typer.Option("--calib-data", help="Folder of real X-rays, DIR/class/file.", show_default=False),
]
CalibImages = Annotated[
    int, typer.Option("--calib-images", min=1, help="Images to draw, stratified by class.")
]
Method = Annotated[CalibMethod, typer.Option("--calib-method", help="How the ranges are chosen.")]


def export(
    run: Annotated[Path, typer.Argument(help="A run folder that train wrote.")] = DEFAULT_RUN,
    data: Annotated[
        Optional[Path],
        typer.Option(
            "--data", help="Images for the parity check; default: those of training.", show_default=False
        ),
    ] = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Export a trained network as ONNX in its deployed form, and prove it equal to Keras."""
    from edge_dsc.console import give, give_json, progress_bar
    from edge_dsc.export import export_run

    with progress_bar() as progress:
        result = export_run(run, out=out, data=data, progress=progress)
    if json:
        body = {"path": str(result.path), "parity": result.parity, "images": result.images}
        give_json("edge-dsc/export-result", {**body, "contract": result.contract.to_dict()})
    else:
        give(f"{result.path}: equal to Keras within {result.parity:.1e} on {result.images} real images")


def calibrate(
    calib_data: CalibData,
    model: Model = DEFAULT_RUN,
    calib_method: Method = CalibMethod.MSE,
    calib_images: CalibImages = 256,
    seed: Seed = 0,
    trt_cache: Annotated[
        Optional[str],
        typer.Option(
            "--trt-cache",
            help="Also write TensorRT's own calibration cache, for this release: 8.6.2, 10.3.0.",
            show_default=False,
        ),
    ] = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Find the activation ranges for INT8 over real images."""
    from edge_dsc.building.calibration import CalibrationRequest, run_calibration
    from edge_dsc.console import give, give_json, progress_bar
    from edge_dsc.inspection import describe_table
    from engines.errors import UsageError

    if calib_data is None:
        raise UsageError("calibration needs real images", remedy="add --calib-data DIR")
    request = CalibrationRequest(
        model=model_of(model),
        data=calib_data,
        method=calib_method.value,
        images=calib_images,
        seed=seed,
        out=out,
        trt_release=trt_cache,
    )
    with progress_bar() as progress:
        made = run_calibration(request, progress)
    description = {"path": str(made.path), "held_out": made.held_out, **describe_table(made.table)}
    description["trt_cache"] = str(made.trt_cache) if made.trt_cache else None
    description["coverage"] = made.coverage.to_dict()
    if json:
        give_json("edge-dsc/calibrate-result", description)
    else:
        give(
            f"{made.path}: {len(made.table.ranges)} ranges by {made.table.method} over {len(made.table.images)} images"
            f" ({made.held_out} left out as held back by the split)\n{made.coverage.text()}"
            + (f"\nTensorRT's cache: {made.trt_cache}" if made.trt_cache else "")
        )


def build_engine(
    model: Model = DEFAULT_RUN,
    precision: Annotated[
        Optional[PrecisionName],
        typer.Option(
            "--precision",
            help="Precision; mixed leaves in floating point what spoils --max-drop, and no more.",
            show_default=False,
        ),
    ] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="Build in FP32 (the default).")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Build in FP16.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Build in INT8, from a calibration.")] = False,
    calib_data: CalibData = None,
    calibration: Annotated[
        Optional[Path],
        typer.Option(
            "--calibration", help="A calibration table; default: the one beside MODEL.", show_default=False
        ),
    ] = None,
    calib_method: Method = CalibMethod.MSE,
    calib_images: CalibImages = 256,
    layers: Annotated[
        Optional[Path],
        typer.Option(
            "--layers",
            help="For mixed: take the layers from this engine; default: from the one that is replaced, else search.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    backend: Annotated[Backend, typer.Option("--backend", help="Which runtime builds.")] = Backend.AUTO,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, N or MIN:OPT:MAX.")] = "1:8:32",
    workspace: Annotated[
        int, typer.Option("--workspace", min=1, help="Scratch memory for the builder, MiB.")
    ] = 1024,
    validate: Annotated[
        Optional[Path],
        typer.Option(
            "--validate",
            help="Labelled X-rays to hold the engine against FP32 on; beyond the budget nothing is shipped.",
            show_default=False,
        ),
    ] = None,
    max_drop: Annotated[
        Optional[float],
        typer.Option(
            "--max-drop",
            min=0,
            max=100,
            help="With --validate: accuracy that may be lost, percentage points; default 0.5.",
            show_default=False,
        ),
    ] = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Build an engine in FP32, FP16, INT8 or mixed and write the record that proves what it is."""
    from edge_dsc.building.calibration import CALIBRATION_NAME, CalibrationRequest, run_calibration
    from edge_dsc.building.engine import BuildRequest
    from edge_dsc.building.engine import build_engine as build
    from edge_dsc.cli.parse import parse_batch, parse_gate, parse_precision
    from edge_dsc.console import give, give_json, progress_bar, say
    from edge_dsc.inspection import format_record
    from engines.errors import UsageError
    from engines.record import Precision

    path = model_of(model)
    asked = parse_precision(precision=precision and precision.value, fp32=fp32, fp16=fp16, int8=int8)
    calibrated = asked in (Precision.INT8, Precision.MIXED)
    batch_range = parse_batch(batch)
    gate = parse_gate(validate, max_drop)
    if not calibrated and (calib_data or calibration):
        raise UsageError(f"calibration has no use in {asked.value}", remedy="add --int8")
    if asked is not Precision.MIXED and layers:
        raise UsageError(f"--layers has no use in {asked.value}", remedy="add --precision mixed")
    if asked is Precision.MIXED and gate is None:
        raise UsageError("mixed precision needs images to be judged on", remedy="add --validate DIR")
    if calib_data and calibration:
        raise UsageError("--calib-data and --calibration exclude each other", remedy="give one of them")
    with progress_bar() as progress:
        if calib_data:
            request = CalibrationRequest(
                model=path, data=calib_data, method=calib_method.value, images=calib_images, seed=seed
            )
            calibration = run_calibration(request, progress).path
        elif calibrated and calibration is None and (path.parent / CALIBRATION_NAME).is_file():
            calibration = path.parent / CALIBRATION_NAME
            say(f"using the calibration table {calibration}")
        built = build(
            BuildRequest(
                model=path,
                precision=asked,
                runtime=backend.value,
                batch=batch_range,
                calibration=calibration,
                out=out,
                workspace_mib=workspace,
                gate=gate,
                layers=layers,
            ),
            progress,
        )
    say(f"runtime: {built.chosen}")
    if json:
        give_json("edge-dsc/build-engine-result", {"path": str(built.path), "record": built.record.to_dict()})
    else:
        give(f"{built.path}\n{format_record(built.record)}")
