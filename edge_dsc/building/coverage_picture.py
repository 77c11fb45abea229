"""The picture of a calibration set: whether its ranges have settled, and what they cut off."""

from __future__ import annotations

from pathlib import Path

from calibration.coverage import PARTS, Coverage
from edge_dsc.pictures import new_figure, save_figure


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
