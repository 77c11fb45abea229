"""Commands that look or show: inspect, networks, doctor, selftest, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edge_dsc.cli.console import give, give_json, progress_bar, say
from edge_dsc.cli.options import Device, Json, Seed
from engines.errors import UsageError


def inspect(
    path: Annotated[
        Path, typer.Argument(help="Any file that edge-dsc wrote, or a run folder.", show_default=False)
    ],
    layers: Annotated[
        bool, typer.Option("--layers", help="Run an engine and show its layers: kernel, precision, time.")
    ] = False,
    device: Device = None,
    json: Json = False,
) -> None:
    """A damaged or renamed file is refused; of a sound one everything that it records is shown.

    Layers are timed one by one, which costs the engine its overlap and its CUDA graph: their sum is not its latency.
    Where the engine cannot run, its record names them.
    """
    from edge_dsc.inspection import format_inspection, format_layers, inspect_layers, inspect_path

    if device is not None and not layers:
        raise UsageError("--device has no use where nothing runs", remedy="add --layers, or leave it out")
    found = inspect_layers(path, device) if layers else inspect_path(path)
    if json:
        give_json("edge-dsc/inspect-result", found)
    else:
        give(format_layers(found) if layers else format_inspection(found))


def networks(json: Json = False) -> None:
    """Each is built once to be counted, which takes TensorFlow and some seconds. Your own need no entry: train --arch.

    Weights of ImageNet are loaded by train --weights imagenet alone.
    """
    from edge_dsc.inspection import format_networks, list_networks

    with progress_bar() as progress:
        found = list_networks(progress=progress)
    if json:
        give_json("edge-dsc/networks-result", found)
    else:
        give(format_networks(found))


def doctor(json: Json = False) -> None:
    """Where a runtime does not work, the reason is given."""
    from edge_dsc.checks.doctor import examine, format_examination

    found = examine()
    if json:
        give_json("edge-dsc/doctor-result", found, schema_version=2)
    else:
        give(format_examination(found))


def selftest(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything that is seen.")] = Path(
        "runs/selftest"
    ),
    camera: Annotated[
        Optional[str],
        typer.Option(
            "--camera", help="Also answer frames of this camera, such as csi://0.", show_default=False
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Both networks, every precision and every switch on each runtime that works here, in some minutes.

    Each line ends in pass, fail or not here. The folder holds it all as JSON and as a page: send it with a report of
    a defect. Exit code 1 where a line failed.
    """
    from edge_dsc.checks.selftest import SELFTEST, SelfTestPlan, format_selftest, run_selftest

    plan = SelfTestPlan(out=out, camera=camera, seed=seed, device=device or 0)
    with progress_bar() as progress:
        found = run_selftest(plan, progress=progress, say=say)
    if json:
        give_json(SELFTEST.name, found)
    else:
        give(format_selftest(found))
    say(f"page: {out / 'selftest.html'}")
    if found.failed:
        say(f"error: {len(found.failed)} lines failed; send the folder {out} with a report of the defect")
        raise typer.Exit(1)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything the demo makes.")] = Path(
        "runs/demo"
    ),
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train, export, calibrate, build, classify and measure, for both networks, without any real X-ray."""
    from edge_dsc.demo import DemoPlan, run_demo

    with progress_bar() as progress:
        result = run_demo(DemoPlan(out=out, seed=seed), progress=progress, say=say)
    if json:
        give_json("edge-dsc/demo-result", result)
    else:
        give(result.text())
