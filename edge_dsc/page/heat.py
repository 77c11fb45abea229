"""What a class activation map says of a picture: the share of evidence outside the central chest, and the map drawn.

The logits of an image mean nothing alone: softmax sees their differences. So the mean over the classes is taken from
the maps, and what is left of a class's map is what speaks for it rather than for the others (above 0) or against it.
"""

from __future__ import annotations

import functools
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

# The central chest is the picture without an eighth of it on each side. In a frontal X-ray taken as usual the lungs
# and the heart lie in it; letters, markers, borders, shoulders and what a collimator left lie outside.
CENTRAL_MARGIN = 1 / 8
OUTSIDE_AREA = (
    1 - (1 - 2 * CENTRAL_MARGIN) ** 2
)  # the share that evidence without any place of its own would have
_STRONGEST = 0.6  # of the colour over the picture, where the evidence is largest


def evidence_for(maps: NDArray[np.float32], index: int) -> NDArray[np.float32]:
    """Return what speaks for a class rather than for the others, by place.

    Args:
        maps: Class activation maps of an image, ``[classes, height, width]``.
        index: The class.

    Returns:
        ``[height, width]``; above 0 for the class, below 0 against it.
    """
    found: NDArray[np.float32] = maps[index] - maps.mean(axis=0)
    return found


def outside_share(evidence: NDArray[np.float32]) -> float | None:
    """Return the share of the evidence for a class that lies outside the central chest, 0..1.

    A place that the border of the central chest cuts counts by its area on either side.

    Args:
        evidence: Of :func:`evidence_for`; what is below 0 is left out.

    Returns:
        None where nothing speaks for the class.
    """
    positive = np.maximum(evidence.astype(np.float64), 0.0)
    total = positive.sum()
    if not total > 0:
        return None
    return float(1.0 - (positive * central_weights(evidence.shape[0], evidence.shape[1])).sum() / total)


@functools.cache
def central_weights(height: int, width: int) -> NDArray[np.float64]:
    """Return the share of each place's area that lies in the central chest, ``[height, width]``."""
    shares = []
    for places in (height, width):
        edges = np.clip(np.arange(places + 1) / places, CENTRAL_MARGIN, 1 - CENTRAL_MARGIN)
        shares.append(np.diff(edges) * places)
    return np.outer(*shares)


def draw_heat(picture: NDArray[np.uint8], evidence: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Lay the evidence for a class over a picture: red where it is largest, nothing where there is none.

    Args:
        picture: ``uint8 [H, W, 3]`` BGR; not changed.
        evidence: ``[height, width]`` of the whole picture, as :func:`evidence_for` gives it.

    Returns:
        ``uint8 [H, W, 3]`` BGR.
    """
    positive = np.maximum(evidence, 0.0).astype(np.float32)
    largest = float(positive.max())
    if not largest > 0:
        return picture
    sides = (picture.shape[1], picture.shape[0])
    heat = cv2.resize(positive / largest, sides, interpolation=cv2.INTER_LINEAR)
    colours = cv2.applyColorMap(np.round(heat * 255).astype(np.uint8), cv2.COLORMAP_JET)
    share = (_STRONGEST * heat)[:, :, None]
    drawn = picture * (1 - share) + colours * share
    return cast("NDArray[np.uint8]", np.round(drawn).astype(np.uint8))
