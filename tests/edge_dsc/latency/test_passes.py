from __future__ import annotations

from pathlib import Path

import pytest

from bench.measure import Subject, measure
from bench.plan import Plan
from bench.power import Rail
from bench.tables import pass_tables, render_report
from edge_dsc.latency.passes import add_pass, memory_pass, power_pass


def test_power_and_memory_become_tables() -> None:
    subjects = [Subject(name=name, call=lambda: None) for name in "ab"]
    report = measure(subjects, Plan(iterations=5, warmup_seconds=0))
    assert pass_tables(report) == ()
    found = power_pass(subjects, [Rail(name="VDD", watts=lambda: 4.0)], seconds=0.01)
    assert [(entry["rail"], entry["idle_w"], entry["joules"]) for entry in found["a"]] == [("VDD", 4.0, 0.0)]
    entry = {"rail": "VDD", "idle_w": 3.0, "busy_w": 5.0, "joules": 0.0125, "calls": 320, "seconds": 2.0}
    report = add_pass(report, "power", {"a": [entry]})
    report = add_pass(report, "memory", {"a": {"host_peak_bytes": 80 << 20, "host_before_bytes": 70 << 20}})
    power, memory = pass_tables(report)
    assert power.rows == (("a", "VDD", "3.00", "5.00", "12.500", "160.0"),)
    assert memory.rows == (("a", "80.0", "10.0", "-"),)
    device = {"host_peak_bytes": 80 << 20, "host_before_bytes": 70 << 20, "device_bytes": 300 << 20}
    (_, memory) = pass_tables(add_pass(report, "memory", {"a": device}))
    assert memory.rows == (("a", "80.0", "10.0", "300.0"),)
    assert "mJ a request" in render_report(report)


def test_the_memory_of_an_engine_that_fails_is_not_told(tmp_path: Path) -> None:
    assert memory_pass(tmp_path / "none.engine", batch=1, threads=1) is None


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
