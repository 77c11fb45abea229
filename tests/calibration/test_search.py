from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec import structs

from calibration.chain import quantized_chain
from calibration.chain.search import search_ranges
from calibration.table import CalibrationTable


def smooth_pixels(count: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    coarse = rng.integers(0, 256, (count, 7, 7, 1)).repeat(32, axis=1).repeat(32, axis=2)
    return coarse.astype(np.uint8)


def logit_error(model: onnx.ModelProto, table: CalibrationTable, pixels: np.ndarray) -> float:
    chain, grids = quantized_chain(model, table, signed=True)
    difference = chain.run(pixels, grids) - chain.finish(0, chain.start(pixels))
    difference = difference - difference.mean(axis=1, keepdims=True)
    return float((difference**2).mean())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_the_search_lessens_the_error_on_images_it_did_not_see(
    deployed_models: dict[str, Path], network_tables: dict[str, CalibrationTable], architecture: str
) -> None:
    model = onnx.load(deployed_models[architecture])
    minmax = network_tables[architecture]
    pixels = smooth_pixels(24)
    calls: list[tuple[str, int, int]] = []
    found = search_ranges(model, pixels[:8], lambda *call: calls.append(call))
    table = structs.replace(
        minmax,
        method="mse",
        ranges={**minmax.ranges, **found.ranges},
        channel_factors=found.channel_factors,
    )
    assert logit_error(model, table, pixels[8:]) < 0.7 * logit_error(model, minmax, pixels[8:])
    layers = {"dsc": 8, "cnn": 5}[architecture]
    assert len(found.ranges) == layers - 1  # not the pixels
    assert calls == [("searching ranges", done, layers) for done in range(1, layers + 1)]
    assert all(min(factors) == 1.0 for factors in found.channel_factors.values())
    if architecture == "cnn":
        assert search_ranges(model, pixels[:8]) == found
