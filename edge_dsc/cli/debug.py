"""The command that looks for the layer that INT8 spoils: debug."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from edge_dsc.cli.options import Json, Out, model_of


class Int8Backend(str, enum.Enum):
    """The runtimes that run INT8 graphs."""

    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


def debug(
    target: Annotated[
        Path, typer.Argument(help="An engine, an ONNX model or a run folder.", show_default=False)
    ],
    calib_data: Annotated[
        Path, typer.Option("--calib-data", help="Folder of real X-rays, DIR/class/file.", show_default=False)
    ],
    calibration: Annotated[
        Optional[Path],
        typer.Option(
            "--calibration", help="A calibration table; default: the one beside MODEL.", show_default=False
        ),
    ] = None,
    backend: Annotated[
        Int8Backend, typer.Option("--backend", help="For an ONNX model: whose INT8 graph to look at.")
    ] = Int8Backend.TENSORRT,
    images: Annotated[int, typer.Option("--images", min=1, help="Images to look at, equal by class.")] = 128,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the images' draw.")] = 1,
    out: Out = None,
    json: Json = False,
) -> None:
    """Measure what INT8 does in each layer alone: at its output, at the logits, in decisions, in time."""
    from edge_dsc.building.debugging import DebugRequest, format_debugged
    from edge_dsc.building.debugging import debug as examine
    from edge_dsc.console import give, give_json, progress_bar

    request = DebugRequest(
        target=model_of(target),
        data=calib_data,
        calibration=calibration,
        runtime=backend.value,
        images=images,
        seed=seed,
        out=out,
    )
    with progress_bar() as progress:
        found = examine(request, progress)
    if json:
        give_json("edge-dsc/debug-result", found.to_dict())
    else:
        give(format_debugged(found))
