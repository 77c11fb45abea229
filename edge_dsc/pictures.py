"""Pictures of a training run: learning curves and the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_dsc.evaluation.metrics import Metrics
from engines.files import atomic_path
from engines.packages import load

_TRAIN_COLOUR = "#4c72b0"
_VALIDATION_COLOUR = "#dd8452"


def draw_curves(history: Mapping[str, Sequence[float]], path: Path, *, best_epoch: int) -> None:
    """Draw loss and accuracy over the epochs to a PNG file.

    Args:
        history: ``loss``, ``accuracy``, ``validation_loss`` and ``validation_accuracy``, one figure an epoch.
        path: The PNG file.
        best_epoch: Marked by a line; counted from 1.
    """
    figure = new_figure(9, 3.6)
    for place, (name, title) in enumerate((("loss", "Loss"), ("accuracy", "Accuracy")), start=1):
        axes = figure.add_subplot(1, 2, place)
        epochs = range(1, len(history[name]) + 1)
        marker = "o" if len(history[name]) < 3 else None
        axes.plot(epochs, history[name], color=_TRAIN_COLOUR, marker=marker, label="training (augmented)")
        validation = history[f"validation_{name}"]
        axes.plot(epochs, validation, color=_VALIDATION_COLOUR, marker=marker, label="validation")
        axes.axvline(best_epoch, color="#888888", linestyle=":", label=f"kept: epoch {best_epoch}")
        axes.set_xlabel("epoch")
        axes.set_title(title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path)


def draw_confusion(metrics: Metrics, path: Path, *, title: str) -> None:
    """Draw a confusion matrix to a PNG file: counts, shaded by the share of the true class."""
    size = max(3.6, 1.5 + 0.8 * len(metrics.labels))
    figure = new_figure(size + 0.8, size)
    axes = figure.add_subplot()
    shares = [[value / max(sum(row), 1) for value in row] for row in metrics.confusion]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, values in enumerate(metrics.confusion):
        for column, value in enumerate(values):
            share = shares[row][column]
            axes.text(
                column,
                row,
                f"{value}\n{share:.0%}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if share > 0.5 else "black",
            )
    axes.set_xticks(range(len(metrics.labels)), metrics.labels, rotation=30, ha="right")
    axes.set_yticks(range(len(metrics.labels)), metrics.labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{title}\naccuracy {metrics.accuracy:.1%} of {metrics.count} images", fontsize=10)
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """Return a figure that no window system knows of: nothing global, nothing to close."""
    load("matplotlib.backends.backend_agg")
    return load("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure to a PNG file."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
