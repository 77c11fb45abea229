"""Mistakes against ``engines`` that mypy must find, each on the line that is marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.files import sha256_file, write_text
from engines.images import resize_to


def wrong_dtype(grey: NDArray[np.float32]) -> None:
    resize_to(grey, 224, 224)  # mistake: arg-type


def none_where_none_may_be() -> None:
    sha256_file(None)  # mistake: arg-type


def swapped_arguments(path: Path) -> None:
    write_text("text", path)  # mistake: arg-type, arg-type
