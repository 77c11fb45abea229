from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from bench.plan import Plan
from bench.statistics import stage_medians
from edge_dsc.latency.subjects import BenchOptions, measure_engines, measured_board, subject_names
from engines.contract import ModelContract
from engines.errors import UsageError
from engines.record import BatchRange, Precision
from engines.runtimes import RunnerOptions
from engines.trt.cuda import Gpu

PLAN = Plan(iterations=10, rounds=5, warmup_seconds=0, lead_in=0)


class Fake:
    """A runner that reports stages where it is asked to, of a runtime that is not on the processor."""

    opened: ClassVar[list[Fake]] = []
    most: ClassVar[int] = 2  # slots; on the processor one

    def __init__(self, options: RunnerOptions) -> None:
        self.options = options
        self.calls = 0
        self.closed = False
        self.thread_safe = False
        self.slots = min(options.slots or 2, self.most)
        self.in_flight: set[int] = set()  # how many batches were, after each was submitted
        self.open = 0
        self.sizes: list[int] = []
        self.description = {"execution": "CUDA graph", "scratch": "1.0 MiB"}
        self.record = SimpleNamespace(
            engine="a.engine",
            batch=BatchRange(1, 2, 4),
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
        self.sizes.append(len(batch))

    def submit(self, batch: Any) -> Any:
        self.open += 1
        self.in_flight.add(self.open)
        self.sizes.append(len(batch))
        times = {"h2d": 10, "execute": 80, "d2h": 5} if self.options.time_stages else None
        return SimpleNamespace(stages_ns=times)

    def collect(self, ticket: Any) -> None:
        self.open -= 1
        self.calls += 1

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    """The runners that were opened, in order."""
    runtime = SimpleNamespace(runs_on_cpu=False, open_runner=lambda engine, record, options: Fake(options))
    Fake.opened.clear()
    subjects = "edge_dsc.latency.subjects"
    monkeypatch.setattr(
        f"{subjects}.open_model", lambda engine, threads, options: Fake(replace(options, threads=threads))
    )
    monkeypatch.setattr(f"{subjects}.get_runtime", lambda name: runtime)
    return Fake.opened


def test_stages_come_from_a_runner_of_their_own(fakes: list[Fake]) -> None:
    report = measure_engines([Path("a.engine")], PLAN, BenchOptions(batch=2, threads=3))
    (subject,) = report.subjects
    assert stage_medians(subject) == {"h2d": 10.0, "execute": 80.0, "d2h": 5.0}
    assert subject.description["runs"] == {"execution": "CUDA graph"}  # a condition of comparisons
    assert subject.description["found"] == {"scratch": "1.0 MiB"}  # none
    # The first two are opened to be looked at; then there are two for each opening.
    looked_at, looked_at_stages, *pairs = fakes
    assert (looked_at.calls, looked_at_stages.calls) == (0, 1)
    assert [(runner.options.time_stages, runner.calls) for runner in pairs] == [(False, 2), (True, 6)] * 5
    assert {(runner.options.slots, runner.options.threads, runner.options.batch) for runner in pairs} == {
        (1, 3, 2)
    }
    assert all(runner.closed for runner in fakes)


def test_the_first_of_several_engines_is_its_own_control() -> None:
    names = [Path("a.engine"), Path("b.engine")]
    control_of = {s.name: s.control_of for s in measure_engines(names, PLAN).subjects}
    assert control_of == {"a": None, "b": None, "a (control)": "a"}
    plain = measure_engines(names, PLAN, BenchOptions(control=False))
    assert [subject.name for subject in plain.subjects] == ["a", "b"]


def test_a_control_is_an_opening_of_its_own(fakes: list[Fake]) -> None:
    measure_engines([Path("a.engine"), Path("b.engine")], PLAN, BenchOptions(batch=2))
    assert len([runner for runner in fakes if runner.calls == 2]) == 3 * 5


def test_a_pile_is_measured_at_each_batch_and_has_no_other_pass(
    monkeypatch: pytest.MonkeyPatch, fakes: list[Fake]
) -> None:
    monkeypatch.setattr("edge_dsc.latency.subjects.memory_pass", pytest.fail)
    options = BenchOptions(offline=7, control=False, memory=True, limits=True)
    report = measure_engines([Path("a.engine")], PLAN, options)
    assert [subject.name for subject in report.subjects] == ["a b1 c1", "a b2 c1", "a b4 c1"]
    assert [subject.description["batch"] for subject in report.subjects] == [7, 7, 7]
    looked_at, *opened = fakes
    assert looked_at.calls == 0 and len(opened) == 3 * 5
    assert sum(runner.calls for runner in opened) == 10 * (7 + 4 + 2)
    # Each is warmed up, and its memory chosen, for the batches that it gets; two are in flight, in the end none.
    assert sorted((runner.options.batch, runner.slots) for runner in opened) == sorted(
        [(1, 2), (2, 2), (4, 2)] * 5
    )
    for runner in opened:
        assert runner.in_flight == {1, 2} and runner.open == 0
        assert (max(runner.sizes), sum(runner.sizes)) == (runner.options.batch, 2 * 7)


def test_a_pile_overlaps_only_where_there_is_more_than_one_slot(
    monkeypatch: pytest.MonkeyPatch, fakes: list[Fake]
) -> None:
    options = BenchOptions(offline=7, control=False, running=RunnerOptions(slots=1))
    measure_engines([Path("a.engine")], PLAN, options)
    assert all(runner.calls and not runner.in_flight for runner in fakes[1:])
    fakes.clear()
    monkeypatch.setattr(Fake, "most", 1)  # as on the processor, whatever is asked for
    measure_engines([Path("a.engine")], PLAN, BenchOptions(offline=7, control=False))
    assert all(runner.calls and not runner.in_flight for runner in fakes[1:])


def test_builds_and_passes_are_of_the_gpu_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    subjects, seen = "edge_dsc.latency.subjects", list[Any]()
    second, board = Gpu("Second", "8.7", bus_id="0000:41:00.0"), object()
    monkeypatch.setattr(f"{subjects}.find_gpu", lambda device: ({1: second}[device], ""))
    monkeypatch.setattr(f"{subjects}.gpu_at", lambda bus_id: seen.append(bus_id) or board)
    monkeypatch.setattr(f"{subjects}.environment", lambda gpu: {"gpu": "T4"} if gpu is board else {})
    monkeypatch.setattr(f"{subjects}.read_state", lambda gpu: {"gpu_mhz": 585} if gpu is board else {})
    monkeypatch.setattr(f"{subjects}.find_rails", lambda gpu: seen.append(gpu is board) or ())
    monkeypatch.setattr(f"{subjects}.memory_pass", lambda engine, **how: seen.append(how) or {"error": "no"})
    monkeypatch.setattr(
        "edge_dsc.build.engine.rebuild_engine", lambda engine, folder, device: seen.append(device) or engine
    )
    options = BenchOptions(
        running=RunnerOptions(device=1), builds=2, control=False, memory=True, power_seconds=0.1
    )
    report = measure_engines([Path("a.engine")], PLAN, options)
    assert report.environment == report.environment_end == {"gpu": "T4"}
    assert {state["gpu_mhz"] for state in report.states} == {585}
    assert seen == [1, "0000:41:00.0", True, {"batch": 1, "threads": 1, "device": 1}]


def test_engines_on_the_processor_ask_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_dsc.latency.subjects.find_gpu", pytest.fail)
    monkeypatch.setattr(
        "edge_dsc.latency.subjects.get_runtime", lambda name: SimpleNamespace(runs_on_cpu=True)
    )
    monkeypatch.setattr("edge_dsc.latency.subjects.first_gpu", lambda: "the first")
    assert measured_board(["onnxruntime"], 0) == "the first"


def test_limits_are_not_measured_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_dsc.latency.subjects.measure_ceilings", pytest.fail)
    (subject,) = measure_engines([Path("a.engine")], PLAN, BenchOptions(limits=True)).subjects
    assert subject.passes == {}


def test_a_batch_beyond_the_engine_is_refused() -> None:
    with pytest.raises(UsageError, match=r"a\.engine takes batches of 1 to 4, not 5"):
        measure_engines([Path("a.engine")], PLAN, BenchOptions(batch=5))


def test_engines_are_named_by_their_files_where_that_is_clear() -> None:
    assert subject_names([Path("x/a.engine"), Path("y/b.engine")]) == ["a", "b"]
    assert subject_names([Path("x/a.engine"), Path("y/a.engine")]) == ["x/a.engine", "y/a.engine"]
