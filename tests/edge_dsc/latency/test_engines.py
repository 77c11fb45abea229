from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from bench.plan import Plan
from bench.statistics import stage_medians
from edge_dsc.latency.subjects import BenchOptions, measure_engines
from engines.contract import ModelContract
from engines.record import BatchRange, Precision
from engines.runtimes import DEFAULT_OPTIONS, RunnerOptions


class Fake:
    """A runner that tells stages where it is asked to."""

    opened: ClassVar[list[Fake]] = []

    def __init__(self, options: RunnerOptions) -> None:
        self.options = options
        self.calls = 0
        self.closed = False
        self.description = {"execution": "CUDA graph"}
        self.record = SimpleNamespace(
            batch=BatchRange(1, 1, 4),
            contract=ModelContract(labels=("a", "b"), architecture="dsc"),
            precision=Precision.FP16,
            runtime="tensorrt",
            runtime_version="10.3",
            engine_sha256="0",
            onnx_sha256="1",
            layers={"FP16": 9},
        )
        Fake.opened.append(self)

    def run(self, batch: Any) -> None:
        self.calls += 1

    def submit(self, batch: Any) -> Any:
        times = {"h2d": 10, "execute": 80, "d2h": 5} if self.options.time_stages else None
        return SimpleNamespace(stages_ns=times)

    def collect(self, ticket: Any) -> None:
        self.calls += 1

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def test_stages_come_from_a_runner_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_engine(engine: Path, *, threads: int, options: RunnerOptions = DEFAULT_OPTIONS) -> Fake:
        return Fake(options)

    Fake.opened.clear()
    monkeypatch.setattr("edge_dsc.latency.subjects.open_engine", open_engine)
    plan = Plan(iterations=10, rounds=5, warmup_seconds=0, lead_in=0)
    report = measure_engines([Path("a.engine")], plan, BenchOptions(batch=2))
    (subject,) = report.subjects
    assert stage_medians(subject) == {"h2d": 10.0, "execute": 80.0, "d2h": 5.0}
    assert subject.description["runs"] == {"execution": "CUDA graph"}
    measured, timed = Fake.opened
    assert (measured.calls, measured.options.time_stages) == (10, False)
    assert (timed.calls, timed.options.time_stages, timed.options.slots) == (1 + 5 * 5, True, 1)
    assert measured.closed and timed.closed
