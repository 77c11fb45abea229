"""The picture of ``debug``: what each layer in INT8 does to the logits."""

from __future__ import annotations

from pathlib import Path

from calibration.sensitivity import Sensitivity
from edge_dsc.pictures import new_figure, save_figure

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
