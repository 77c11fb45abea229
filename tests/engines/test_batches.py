from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engines.errors import BadInputError
from engines.record import BatchRange
from engines.runtimes import BatchCheck, BuildResult


@pytest.fixture
def check(deployed_models: dict[str, Path], record_of: Callable) -> BatchCheck:
    result = BuildResult(layers={}, layers_source="", platform={})
    return BatchCheck(record_of(deployed_models["dsc"], "dsc", "fp32", result, BatchRange(2, 4, 8)))


@pytest.mark.parametrize("count", [2, 8])
def test_the_range_is_inclusive(check: BatchCheck, count: int) -> None:
    check(np.zeros((count, 224, 224, 1), np.uint8))


@pytest.mark.parametrize(
    ("batch", "seen"),
    [
        (np.zeros((1, 224, 224, 1), np.uint8), "uint8 [1, 224, 224, 1]"),
        (np.zeros((9, 224, 224, 1), np.uint8), "uint8 [9, 224, 224, 1]"),
        (np.zeros((2, 224, 224, 1), np.float32), "float32 [2, 224, 224, 1]"),
        (np.zeros((2, 224, 224), np.uint8), "uint8 [2, 224, 224]"),
        (np.zeros((2, 1, 224, 224), np.uint8), "uint8 [2, 1, 224, 224]"),
        ([0, 1], "list []"),
    ],
)
def test_anything_else_is_named(check: BatchCheck, batch: object, seen: str) -> None:
    with pytest.raises(BadInputError) as caught:
        check(batch)
    assert caught.value.what == f"dsc.onnx takes uint8 [N, 224, 224, 1], N from 2 to 8, not {seen}"
    assert caught.value.remedy.endswith("build with another --batch: edge-dsc build-engine model.onnx")
