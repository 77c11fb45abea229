"""Commands that look or show: inspect, networks, doctor, selftest, demo, study."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from edge_dsc.cli import INTERRUPTED
from edge_dsc.cli.console import give, give_json, progress_bar, say, study_board
from edge_dsc.cli.making import RecipeName
from edge_dsc.cli.options import Device, Json, Seed, finite
from engines.errors import UsageError


class Augmentation(str, enum.Enum):
    """The names of edge_dsc.study.trainings.AUGMENTATION."""

    BOTH = "both"
    ON = "on"
    OFF = "off"


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
    from edge_dsc.checks.inspection import format_inspection, format_layers, inspect_layers, inspect_path

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
    from edge_dsc.checks.inspection import format_networks, list_networks

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
    from edge_dsc.checks.demo import DemoPlan, run_demo

    with progress_bar() as progress:
        result = run_demo(DemoPlan(out=out, seed=seed), progress=progress, say=say)
    if json:
        give_json("edge-dsc/demo-result", result)
    else:
        give(result.text())


def study(
    data: Annotated[Path, typer.Argument(help="Folder of X-rays: DIR/class/file, or the Kaggle layout.")],
    arch: Annotated[
        str, typer.Option("--arch", metavar="NETWORKS", help="As train takes them, with commas.")
    ] = "cnn,dsc",
    augmentation: Annotated[
        Augmentation, typer.Option("--augmentation", help="Train each with augmentation, without, or both.")
    ] = Augmentation.BOTH,
    variants: Annotated[
        Optional[list[str]],
        typer.Option(
            "--with",
            metavar="WHAT",
            help="Also each with this added, as train takes it: mixup=0.2, last, synthetic=DIR. Repeatable.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        Optional[int],
        typer.Option("--seeds", min=1, max=1000, help="Trainings of each; default: 5.", show_default=False),
    ] = None,
    folds: Annotated[
        Optional[int],
        typer.Option(
            "--folds",
            min=3,
            max=100,
            help="Instead of seeds: parts of the data, so that each image judges once.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[RecipeName, typer.Option("--recipe", help="How to train.")] = RecipeName.PAPER,
    epochs: Annotated[
        Optional[int],
        typer.Option("--epochs", min=1, max=10_000, help="Instead of the recipe's.", show_default=False),
    ] = None,
    weights: Annotated[
        Optional[str],
        typer.Option(
            "--weights",
            metavar="none|imagenet",
            help="Where networks of Keras start; imagenet is Keras' own loader, which downloads. Default: none.",
            show_default=False,
        ),
    ] = None,
    keep_split: Annotated[
        bool, typer.Option("--keep-split", help="Keep the split that the folder comes in, in every seed.")
    ] = False,
    margin: Annotated[
        float,
        typer.Option("--margin", callback=finite, help="Points of accuracy that dsc may lose against cnn."),
    ] = 2.0,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, max=256, help="Trainings at a time, each on its processors.")
    ] = 1,
    out: Annotated[Path, typer.Option("--out", help="Folder for everything the study makes.")] = Path(
        "runs/study"
    ),
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Time one epoch of each network, show what is left to do, and stop."),
    ] = False,
    bench: Annotated[bool, typer.Option(help="Measure the latency of the engines.")] = True,
    json: Json = False,
) -> None:
    """Every network is trained, exported, calibrated, built, judged and measured, seed by seed or fold by fold.

    It ends in the paper's table with the published figures beside ours, intervals by patient, and a verdict: is dsc
    not inferior to cnn by more than the margin. Stopped or killed, the same command goes on. Exit code 7 where a
    training diverged; the report is of the others.
    """
    from bench.plan import PLANS
    from edge_dsc.study.findings import REPORT, conclude, render_study
    from edge_dsc.study.run_study import plan_study, plan_table, run_trainings
    from edge_dsc.study.trainings import AUGMENTATION, StudyOptions, open_study
    from engines.text_table import render_text

    options = StudyOptions(
        data=data,
        out=out,
        networks=tuple(name.strip() for name in arch.split(",") if name.strip()),
        augmentation=AUGMENTATION[augmentation.value],
        variants=tuple(variants or ()),
        seeds=5 if seeds is None and folds is None else seeds,
        folds=folds,
        recipe=recipe.value,
        epochs=epochs,
        weights=weights,
        keep_split=keep_split,
        margin=margin,
        jobs=jobs,
    )
    try:
        with open_study(options) as found:
            if plan:
                with study_board() as watch:
                    planned = plan_study(found, jobs=jobs, watch=watch)
                if json:
                    give_json("edge-dsc/study-plan", {"jobs": jobs, "trainings": planned})
                else:
                    give(render_text(plan_table(planned, jobs)))
                return
            with study_board() as watch:
                problems = run_trainings(found, jobs=jobs, watch=watch)
            with progress_bar() as progress:
                measured = PLANS["quick"] if bench else None
                result = conclude(found, problems, bench=measured, progress=progress)
    except KeyboardInterrupt:
        say("interrupted: whole epochs are kept, the same command goes on")
        raise typer.Exit(INTERRUPTED) from None
    if json:
        give_json(REPORT.name, REPORT.to_builtins(result.report), schema_version=REPORT.version)
    else:
        give(render_study(result.report))
    for kind, path in result.files.items():
        say(f"{kind}: {path}")
    if result.problem is not None:
        raise result.problem
