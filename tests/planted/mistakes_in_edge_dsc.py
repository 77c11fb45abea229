"""Mistakes against ``edge_dsc`` that mypy must find, each on the line that is marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_dsc.data.phantoms import draw_phantom, write_phantoms
from edge_dsc.training.batches import class_weights


def wrong_dtype(targets: NDArray[np.float32]) -> None:
    class_weights(targets, 3)  # mistake: arg-type


def none_where_none_may_be() -> None:
    draw_phantom(None, 0)  # mistake: arg-type


def swapped_arguments(root: Path) -> None:
    write_phantoms(24, root, seed=0)  # mistake: arg-type, arg-type
