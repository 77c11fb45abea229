from __future__ import annotations

from pathlib import Path

from edge_dsc.latency.passes import count_work, measure_ceilings
from engines.record import Precision


def test_the_work_of_a_network_is_counted_from_its_graph(deployed_models: dict[str, Path]) -> None:
    pixels = 224 * 224
    stem = pixels + 32 * pixels + 32 * 9 + 32  # input, output, kernel and bias
    blocks = sum(2 * 32 * size**2 + 32 * 32 * 9 + 32 for size in (112, 56, 28))
    dense = 32 * 14 * 14 + 32 * 14 * 14 * 64 + 64 + (64 + 64 * 3 + 3)
    found = count_work(deployed_models["cnn"], Precision.FP32, 1)
    assert found.bytes == 4 * (stem + blocks + dense)
    assert count_work(deployed_models["cnn"], Precision.INT8, 1).bytes == found.bytes // 4
    eight = count_work(deployed_models["cnn"], Precision.FP32, 8)
    assert eight.multiply_adds == 8 * found.multiply_adds
    assert found.bytes < eight.bytes < 8 * found.bytes  # the weights are read once


def test_ceilings_are_rates_of_this_machine() -> None:
    found = measure_ceilings(1)
    assert found.multiply_adds_per_s > 1e7
    assert found.bytes_per_s > 1e7
