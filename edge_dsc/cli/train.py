"""The command that trains a network."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from edge_dsc.cli.options import Json, Seed
from edge_dsc.cli.run import INTERRUPTED


class Arch(str, enum.Enum):
    """The names of edge_dsc.networks.ARCHITECTURES."""

    DSC = "dsc"
    CNN = "cnn"


class RecipeName(str, enum.Enum):
    """The names of edge_dsc.training.RECIPES."""

    DEFAULT = "default"
    QUICK = "quick"
    PAPER = "paper"


def train(
    data: Annotated[Path, typer.Argument(help="Folder of X-rays: DIR/class/file, or the Kaggle layout.")],
    arch: Annotated[Arch, typer.Option("--arch", help="Which network.")] = Arch.DSC,
    recipe: Annotated[RecipeName, typer.Option("--recipe", help="How to train.")] = RecipeName.DEFAULT,
    epochs: Annotated[
        Optional[int], typer.Option("--epochs", min=1, help="Instead of the recipe's.", show_default=False)
    ] = None,
    seed: Seed = 0,
    qat: Annotated[
        Optional[Path],
        typer.Option(
            "--qat",
            help="Fine-tune this finished run of the same images for INT8, 5 epochs; needs no calibration after.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished run in the run folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in the run folder.")
    ] = False,
    out: Annotated[
        Optional[Path],
        typer.Option(
            "--out", help="The run folder; default: runs/ARCH, with --qat RUN-qat.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Train a network on a folder of X-rays and measure it on the images held back."""
    if qat is not None:
        _fine_tune(
            data, qat, epochs=epochs, seed=seed, resume=resume, overwrite=overwrite, out=out, json=json
        )
        return
    from edge_dsc.console import give, give_json, progress_bar, say
    from edge_dsc.evaluation.report import format_metrics
    from edge_dsc.training import TrainOptions
    from edge_dsc.training import train as run_training
    from edge_dsc.training.report import step_progress

    options = TrainOptions(
        data=data,
        out=out or Path("runs") / arch.value,
        architecture=arch.value,
        recipe=recipe.value,
        epochs=epochs,
        seed=seed,
        resume=resume,
        overwrite=overwrite,
    )
    with progress_bar() as progress:
        result = run_training(options, progress=step_progress(arch.value, progress), reading=progress)
    for path, reason in result.record.skipped:
        say(f"skipped {path}: {reason}")
    if result.record.skipped:
        say(f"{len(result.record.skipped)} images could not be read and were left out")
    if json:
        metrics = {part: figures.to_dict() for part, figures in result.metrics.items()}
        give_json("edge-dsc/train-result", {"run": str(result.run), "metrics": metrics})
    else:
        give(f"{result.run}: evaluation and test images together, none seen in training")
        give(format_metrics(result.metrics["held_out"]))
    if result.record.interrupted:
        say(
            f"interrupted: kept the best weights so far, of epoch {result.record.best_epoch} (--resume goes on)"
        )
        raise typer.Exit(INTERRUPTED)


def _fine_tune(
    data: Path,
    run: Path,
    *,
    epochs: Optional[int],
    seed: int,
    resume: bool,
    overwrite: bool,
    out: Optional[Path],
    json: bool,
) -> None:
    from edge_dsc.console import give, give_json, progress_bar, say
    from edge_dsc.evaluation.report import format_metrics
    from edge_dsc.qat import QatOptions, fine_tune
    from edge_dsc.qat.run import EPOCHS
    from edge_dsc.training.report import step_progress
    from engines.errors import UsageError

    if resume:
        raise UsageError(
            "--resume has no use with --qat", remedy="a fine-tuning run takes minutes: begin anew"
        )
    options = QatOptions(
        data=data,
        run=run,
        out=out or run.with_name(f"{run.name}-qat"),
        epochs=epochs or EPOCHS,
        seed=seed,
        overwrite=overwrite,
    )
    with progress_bar() as progress:
        result = fine_tune(options, progress=step_progress(run.name, progress), reading=progress)
    trained = result.trained
    if json:
        metrics = {part: figures.to_dict() for part, figures in trained.metrics.items()}
        body = {"run": str(trained.run), "onnx": str(result.onnx), "calibration": str(result.table)}
        give_json("edge-dsc/train-result", {**body, "metrics": metrics})
    else:
        give(f"{trained.run}: evaluation and test images together, in INT8 as it was trained")
        give(format_metrics(trained.metrics["held_out"]))
        say(f"next: edge-dsc build-engine {trained.run} --int8 --validate {data}")
    if trained.record.interrupted:
        say(f"interrupted: kept the best weights so far, of epoch {trained.record.best_epoch}")
        raise typer.Exit(INTERRUPTED)
