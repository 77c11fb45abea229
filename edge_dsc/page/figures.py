"""Pictures of training, calibration and sensitivity, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.files import CHART, atomic_path
from engines.packages import load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from calibration.coverage import Coverage
    from calibration.sensitivity import LayerSensitivity, Sensitivity
    from edge_dsc.evaluate.metrics import Metrics

MOST_BARS = 32  # of layers in one picture
SHEET = 6  # images in each row and column of a contact sheet's halves
_BLUE, _ORANGE, _GREY = "#4c72b0", "#dd8452", "#444444"


@contextmanager
def drawing_style(settings: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Draw in matplotlib's default style with some settings changed, whatever the user's own configuration says.

    Names of engines and classes are drawn as they are: a ``$`` in them does not begin a formula.

    Raises:
        EnvironmentProblem: matplotlib is missing.
    """
    with load("matplotlib.style").context(["default", {"text.parse_math": False, **(settings or {})}]):
        yield


@drawing_style()
def draw_curves(history: Mapping[str, Sequence[float]], path: Path, *, best_epoch: int) -> None:
    """Draw loss and accuracy over the epochs to a PNG file.

    Args:
        history: ``loss`` and ``accuracy``, and where images validated ``validation_loss`` and
            ``validation_accuracy``, one number per epoch.
        path: The PNG file.
        best_epoch: Marked by a line; counted from 1.
    """
    figure = _new_figure(9, 3.6)
    for place, (name, title) in enumerate((("loss", "Loss"), ("accuracy", "Accuracy")), start=1):
        axes = figure.add_subplot(1, 2, place)
        epochs = range(1, len(history[name]) + 1)
        marker = "o" if len(history[name]) < 3 else None
        axes.plot(epochs, history[name], color=_BLUE, marker=marker, label="training (augmented)")
        if f"validation_{name}" in history:
            axes.plot(epochs, history[f"validation_{name}"], color=_ORANGE, marker=marker, label="validation")
        axes.axvline(best_epoch, color="#888888", linestyle=":", label=f"kept: epoch {best_epoch}")
        axes.set_xlabel("epoch")
        axes.set_title(title)
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _save(figure, path)


@drawing_style()
def draw_confusion(metrics: Metrics, path: Path, *, title: str) -> None:
    """Draw a confusion matrix to a PNG file: counts, shaded by the share of the true class."""
    labels = metrics.labels
    size = max(3.6, 1.5 + 0.8 * len(labels))
    figure = _new_figure(size + 0.8, size)
    axes = figure.add_subplot()
    _draw_matrix(axes, metrics.confusion, labels)
    axes.set_title(f"{title}\naccuracy {metrics.accuracy:.1%} of {metrics.count} images", fontsize=10)
    _save(figure, path)


@drawing_style()
def draw_confusions(
    matrices: Mapping[str, Sequence[Sequence[int]]], labels: Sequence[str], path: Path, *, title: str
) -> None:
    """Draw several confusion matrices of one network side by side to a PNG file.

    Args:
        matrices: ``[true][predicted]`` counts by name, such as ``training``.
        labels: Class names.
        path: The PNG file.
        title: Above all of them.
    """
    size = max(3.0, 1.4 + 0.7 * len(labels))
    figure = _new_figure((size + 0.3) * len(matrices), size + 0.5)
    for place, (name, matrix) in enumerate(matrices.items(), start=1):
        axes = figure.add_subplot(1, len(matrices), place)
        _draw_matrix(axes, matrix, labels)
        count = sum(map(sum, matrix))
        right = sum(row[index] for index, row in enumerate(matrix))
        found = f"{right / count:.1%} of {count:,}" if count else "no images"
        axes.set_title(f"{name}: {found}", fontsize=10)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


@drawing_style()
def draw_trainings(histories: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], path: Path) -> None:
    """Draw the accuracy of training and validation over the epochs to a PNG file, one panel per network.

    Args:
        histories: By network, the history of each of its trainings: ``accuracy``, and where images validated
            ``validation_accuracy``, one number per epoch.
        path: The PNG file.
    """
    columns = min(2, len(histories))
    rows = math.ceil(len(histories) / columns)
    figure = _new_figure(4.6 * columns, 3.1 * rows)
    axes_of: list[Axes] = []
    for place, (name, runs) in enumerate(histories.items(), start=1):
        axes = figure.add_subplot(rows, columns, place, sharey=axes_of[0] if axes_of else None)
        axes_of.append(axes)
        for number, run in enumerate(runs):
            epochs = range(1, len(run["accuracy"]) + 1)
            for key, colour, style, words in (
                ("accuracy", _BLUE, "-", "training"),
                ("validation_accuracy", _ORANGE, "--", "validation"),
            ):
                if key not in run:
                    continue
                axes.plot(
                    epochs,
                    [100 * value for value in run[key]],
                    style,
                    color=colour,
                    marker="o" if len(epochs) < 3 else None,
                    linewidth=1.2,
                    alpha=0.8,
                    label=words if number == 0 else None,
                )
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("epoch")
        axes.set_ylabel("accuracy, %")
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _save(figure, path)


@drawing_style()
def draw_coverage(found: Coverage, path: Path) -> None:
    """Draw to a PNG file how each tensor's largest value grows with the images, and how much is saturated."""
    tensors = found.shown
    figure = _new_figure(10, max(3.8, 0.2 * len(tensors)))
    growth, share = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for tensor in tensors:
        parts = len(tensor.growth)
        counts = [found.images * part // parts for part in range(1, parts + 1)]
        growth.plot(counts, tensor.growth, marker="o", markersize=3, label=tensor.name)
    growth.set_xlabel("images")
    growth.set_ylabel("largest magnitude, of that after all")
    growth.set_title("does the range still grow?", fontsize=10)
    growth.grid(alpha=0.3)
    growth.legend(fontsize=6)
    places = range(len(tensors))[::-1]
    share.barh(places, [100 * tensor.saturated for tensor in tensors], color=_BLUE)
    share.set_yticks(places, [tensor.name for tensor in tensors], fontsize=7)
    share.set_xlabel("values beyond the range, %")
    share.set_title(f"what {found.method} cuts off", fontsize=10)
    share.grid(axis="x", alpha=0.3)
    held = ", ".join(f"{name} {count}" for name, count in sorted(found.classes.items()))
    figure.suptitle(f"calibration set: {found.images} images ({held})", fontsize=10)
    _save(figure, path)


@drawing_style()
def draw_sensitivity(found: Sensitivity, path: Path, *, title: str) -> None:
    """Draw one bar per layer to a PNG file: its error alone in INT8, and the error left when it alone is float.

    Of a large network the :data:`MOST_BARS` layers with the largest error are drawn.

    Args:
        found: The measurement.
        path: The PNG file.
        title: Above the picture.
    """
    layers = found.harmful(MOST_BARS)
    if len(layers) < len(found.layers):
        title += f", {len(layers)} of {len(found.layers)} layers"
    figure = _new_figure(9.5, 1.6 + 0.42 * len(layers))
    alone, without = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    _draw_errors(alone, layers, [(layer.logit_error, layer.flips) for layer in layers])
    alone.set_title("alone in INT8", fontsize=10)
    names = [layer.name + ("\n(depthwise)" if layer.depthwise else "") for layer in layers]
    alone.set_yticks(range(len(layers))[::-1], names, fontsize=8)
    _draw_errors(without, layers, [(layer.logit_error_without, layer.flips_without) for layer in layers])
    without.set_title("all in INT8 but this one", fontsize=10)
    without.set_yticks(range(len(layers))[::-1], [""] * len(layers))
    without.axvline(found.logit_error, color=_GREY, linestyle=":")
    without.set_xlabel(without.get_xlabel() + "; dotted: all in INT8", fontsize=8)
    figure.suptitle(f"{title}: {found.images} images, {found.flips} answers changed by INT8", fontsize=10)
    _save(figure, path)


@drawing_style()
def draw_contact_sheet(
    real: NDArray[np.uint8], synthetic: NDArray[np.uint8], path: Path, *, title: str
) -> None:
    """Draw real images, left, beside synthetic ones, right, to a PNG file: at most :data:`SHEET` squared of each.

    Args:
        real: ``[N, H, W]``.
        synthetic: ``[M, H, W]``.
        path: The PNG file.
        title: Above both.
    """
    figure = _new_figure(10, 5.4)
    for place, (name, images) in enumerate((("real", real), ("synthetic", synthetic)), start=1):
        axes = figure.add_subplot(1, 2, place)
        axes.imshow(_tile(images), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(f"{name}: {min(len(images), SHEET**2)} of {len(images):,}", fontsize=10)
        axes.set_axis_off()
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _tile(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the first images ``[N, H, W]`` side by side in rows of :data:`SHEET`, black where there are none."""
    height, width = images.shape[1:]
    tiled = np.zeros((SHEET, height, SHEET, width), np.uint8)
    for place, image in enumerate(images[: SHEET**2]):
        tiled[place // SHEET, :, place % SHEET] = image
    return tiled.reshape(SHEET * height, SHEET * width)


def _draw_errors(axes: Axes, layers: Sequence[LayerSensitivity], errors: Sequence[tuple[float, int]]) -> None:
    """Draw (squared error of the logits, changed answers) of each layer, from top to bottom."""
    places = range(len(layers))[::-1]
    colours = [_ORANGE if layer.depthwise else _BLUE for layer in layers]
    axes.barh(places, [error for error, _ in errors], color=colours, height=0.7)
    for place, (error, flips) in zip(places, errors, strict=True):
        axes.text(error, place, f" {flips}", va="center", fontsize=8)
    axes.set_xlabel("squared error of the logits (number: changed answers)", fontsize=8)
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)


def _draw_matrix(axes: Axes, confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> None:
    """Draw ``[true][predicted]`` counts, shaded by the share of the true class."""
    shares = [[value / max(sum(row), 1) for value in row] for row in confusion]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, values in enumerate(confusion):
        for column, value in enumerate(values):
            share = shares[row][column]
            colour = "white" if share > 0.5 else "black"
            axes.text(
                column, row, f"{value}\n{share:.0%}", ha="center", va="center", fontsize=9, color=colour
            )
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")


def _new_figure(width: float, height: float) -> Figure:
    """Return a figure that no window system knows of: nothing global, nothing to close."""
    figure: Figure = load("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path, CHART) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
