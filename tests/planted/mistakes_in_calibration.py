"""Mistakes against ``calibration`` that mypy must find, each on the line that is marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.qdq import round_up_to_half
from calibration.table import CalibrationTable, load_table, save_table


def wrong_dtype(levels: NDArray[np.int8]) -> None:
    round_up_to_half(levels)  # mistake: arg-type


def none_where_none_may_be() -> None:
    load_table(None)  # mistake: arg-type


def swapped_arguments(path: Path, table: CalibrationTable) -> None:
    save_table(table, path)  # mistake: arg-type, arg-type
