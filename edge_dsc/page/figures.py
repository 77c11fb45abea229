"""Pictures of training, calibration and sensitivity, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.coverage import PARTS, Coverage
from calibration.sensitivity import Sensitivity
from engines.files import atomic_path
from engines.packages import load

if TYPE_CHECKING:
    from edge_dsc.evaluate.metrics import Metrics

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


def draw_coverage(found: Coverage, path: Path) -> None:
    """Draw to a PNG file how each tensor's largest value grows with the images, and how much is saturated."""
    figure = new_figure(10, 3.8)
    growth, share = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    counts = [found.images * part // PARTS for part in range(1, PARTS + 1)]
    for tensor in found.tensors:
        growth.plot(counts, tensor.growth, marker="o", markersize=3, label=tensor.name)
    growth.set_xlabel("images")
    growth.set_ylabel("largest magnitude, of that after all")
    growth.set_title("does the range still grow?", fontsize=10)
    growth.grid(alpha=0.3)
    growth.legend(fontsize=6)
    places = list(range(len(found.tensors)))[::-1]
    share.barh(places, [100 * tensor.saturated for tensor in found.tensors], color="#4c72b0")
    share.set_yticks(places, [tensor.name for tensor in found.tensors], fontsize=7)
    share.set_xlabel("values beyond the range, %")
    share.set_title(f"what {found.method} cuts off", fontsize=10)
    share.grid(axis="x", alpha=0.3)
    held = ", ".join(f"{name} {count}" for name, count in sorted(found.classes.items()))
    figure.suptitle(f"calibration set: {found.images} images ({held})", fontsize=10)
    save_figure(figure, path)


_PLAIN, _DEPTHWISE, _LINE = "#4c72b0", "#dd8452", "#444444"


def draw_sensitivity(found: Sensitivity, path: Path, *, title: str) -> None:
    """Draw a bar a layer to a PNG file: its error alone in INT8, and the error left when it alone is float.

    Args:
        found: The measurement.
        path: The PNG file.
        title: Above the picture.
    """
    layers = found.layers
    figure = new_figure(9.5, 1.6 + 0.42 * len(layers))
    places = list(range(len(layers)))[::-1]
    colours = [_DEPTHWISE if layer.depthwise else _PLAIN for layer in layers]
    names = [layer.name + ("\n(depthwise)" if layer.depthwise else "") for layer in layers]
    panels = (
        ([layer.logit_error for layer in layers], "alone in INT8", [layer.flips for layer in layers]),
        (
            [layer.logit_error_without for layer in layers],
            "all in INT8 but this one",
            [layer.flips_without for layer in layers],
        ),
    )
    for number, (values, heading, flips) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, number)
        axes.barh(places, values, color=colours, height=0.7)
        for place, value, count in zip(places, values, flips, strict=True):
            axes.text(value, place, f" {count}", va="center", fontsize=8)
        axes.set_yticks(places, names if number == 1 else [""] * len(names), fontsize=8)
        axes.set_title(heading, fontsize=10)
        axes.set_xlabel("squared error of the logits (number: changed answers)", fontsize=8)
        axes.margins(x=0.12)
        axes.grid(axis="x", alpha=0.3)
        if number == 2:
            axes.axvline(found.logit_error, color=_LINE, linestyle=":", label="all in INT8")
            axes.legend(fontsize=8)
    figure.suptitle(f"{title}: {found.images} images, {found.flips} answers changed by INT8", fontsize=10)
    save_figure(figure, path)
