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
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished run in the run folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in the run folder.")
    ] = False,
    out: Annotated[
        Optional[Path], typer.Option("--out", help="The run folder; default: runs/ARCH.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Train a network on a folder of X-rays and measure it on the images held back."""
    from edge_dsc.console import give, give_json, progress_bar, say
    from edge_dsc.evaluation_report import format_metrics
    from edge_dsc.training import TrainOptions
    from edge_dsc.training import train as run_training
    from edge_dsc.training_report import step_progress

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
