"""Mistakes against ``bench`` that mypy must find, each on the line that is marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.report import Report, load_report, save_report
from bench.statistics import tail


def wrong_dtype(samples_ms: NDArray[np.float64]) -> None:
    tail(samples_ms, 99.0)  # mistake: arg-type


def none_where_none_may_be() -> None:
    load_report(None)  # mistake: arg-type


def swapped_arguments(path: Path, report: Report) -> None:
    save_report(report, path)  # mistake: arg-type, arg-type
