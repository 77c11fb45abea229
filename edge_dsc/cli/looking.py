"""Commands that look or show: inspect, doctor, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_dsc.cli.console import give, give_json, progress_bar, say
from edge_dsc.cli.options import Json, Seed


def inspect(
    path: Annotated[
        Path, typer.Argument(help="Any file that edge-dsc wrote, or a run folder.", show_default=False)
    ],
    json: Json = False,
) -> None:
    """A damaged or renamed file is refused; of a sound one everything that it records is shown."""
    from edge_dsc.inspection import format_inspection, inspect_path

    found = inspect_path(path)
    if json:
        give_json("edge-dsc/inspect-result", found)
    else:
        give(format_inspection(found))


def doctor(json: Json = False) -> None:
    """Where a runtime does not work, the reason is given."""
    from edge_dsc.doctor import examine, format_examination

    found = examine()
    if json:
        give_json("edge-dsc/doctor-result", found, schema_version=2)
    else:
        give(format_examination(found))


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
