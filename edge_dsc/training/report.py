"""How training's progress reads on a terminal."""

from __future__ import annotations

from collections.abc import Callable

from edge_dsc.training.options import TrainProgress
from engines.runtimes import Progress


def step_progress(architecture: str, progress: Progress) -> Callable[[TrainProgress], None]:
    """Return training's callback that feeds a progress bar: epoch, loss, accuracy, time left."""

    def report(state: TrainProgress) -> None:
        validation = ""
        if state.validation_accuracy is not None:
            validation = f", validation {state.validation_accuracy:.1%}"
        minutes, seconds = divmod(round(state.seconds_left), 60)
        detail = (
            f"epoch {state.epoch}/{state.epochs}, loss {state.loss:.3f}, accuracy {state.accuracy:.1%}"
            f"{validation}, {minutes}:{seconds:02} left"
        )
        done = (state.epoch - 1) * state.steps + state.step
        progress(f"training {architecture}\t{detail}", done, state.epochs * state.steps)

    return report
