from __future__ import annotations

from pathlib import Path

import pytest

from bench.measure import Subject, measure
from bench.plan import Plan
from bench.tables import Roof, pass_tables
from edge_dsc.latency.limits import count_work, measure_ceilings
from edge_dsc.latency.passes import add_pass
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


@pytest.mark.parametrize(
    ("adds", "moved", "bound", "nanoseconds"), [(1000, 10, "compute", 500), (10, 1000, "memory", 250)]
)
def test_the_roof_is_the_longer_of_computing_and_moving(
    adds: int, moved: int, bound: str, nanoseconds: float
) -> None:
    roof = Roof.of({"multiply_adds": adds, "bytes": moved, "multiply_adds_per_s": 2e9, "bytes_per_s": 4e9})
    assert (roof.bound, roof.nanoseconds, roof.intensity) == (bound, nanoseconds, adds / moved)


def test_limits_are_a_table() -> None:
    report = measure([Subject(name="a", call=lambda: None)], Plan(iterations=9, warmup_seconds=0))
    limits = {"multiply_adds": 36_000_000, "bytes": 18_000_000}
    ceilings = {"multiply_adds_per_s": 36e9, "bytes_per_s": 9e9}
    (table,) = pass_tables(add_pass(report, "limits", {"a": {**limits, **ceilings}}))
    assert table.rows[0][:6] == ("a", "36.0", "18.00", "2.0", "memory", "2.000")
    assert "36.0 G multiply-adds/s" in table.notes[0] and "9.0 GB/s" in table.notes[0]
