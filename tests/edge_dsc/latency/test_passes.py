from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.measure import Subject, always_open, measure
from bench.plan import Plan
from bench.power import Rail
from bench.report import Report
from edge_dsc.latency.passes import add_pass, memory_pass, memory_problems, power_pass


@pytest.fixture
def report() -> Report:
    return measure(
        [Subject(name=name, open=always_open(lambda: None)) for name in "ab"],
        Plan(iterations=5, warmup_seconds=0),
    )


def test_power_is_measured_for_each_subject_and_rail() -> None:
    subjects = [Subject(name=name, open=always_open(lambda: None)) for name in "ab"]
    rails = [Rail(name="VDD", watts=lambda: 4.0), Rail(name="dead", watts=lambda: None)]
    found = power_pass(subjects, rails, seconds=0.01)
    assert list(found) == ["a", "b"]
    (entry,) = found["a"]
    assert (entry["rail"], entry["idle_w"], entry["busy_w"], entry["joules"]) == ("VDD", 4.0, 4.0, 0.0)
    assert entry["calls"] >= 1 and entry["seconds"] >= 0.01


def test_what_a_pass_found_goes_to_its_subject(report: Report) -> None:
    both = add_pass(add_pass(report, "memory", {"b": {"host_peak_bytes": 1}}), "power", {"b": [], "x": []})
    assert [dict(subject.passes) for subject in both.subjects] == [
        {},
        {"memory": {"host_peak_bytes": 1}, "power": []},
    ]
    assert [dict(subject.passes) for subject in report.subjects] == [{}, {}]


def test_why_an_engine_was_not_measured_is_said(
    tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Modules that the user's folder happens to hold must not stand in for Python's or for ours.
    for name in ("json", "bench", "engines", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text(
            f"raise SystemExit('{name}.py of the current folder was imported')"
        )
    monkeypatch.chdir(tmp_path)
    found = memory_pass(Path("none.engine"), batch=1, threads=1)
    (reason,) = found.values()
    assert list(found) == ["error"]
    assert reason.startswith(f"there is no engine {tmp_path / 'none.engine'} (build the engine again: ")
    assert memory_problems(add_pass(report, "memory", {"a": {"host_peak_bytes": 1}, "b": found})) == (
        f"b: {reason}",
    )


@pytest.mark.parametrize(
    ("returncode", "stderr", "reason"),
    [
        (-9, "", "the process was killed by signal 9"),
        (1, "Traceback (most recent call last):\n  ...\nMemoryError\n", "MemoryError"),
        (3, "", "the process ended with 3"),
    ],
)
def test_a_process_that_dies_is_a_reason_too(
    monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str, reason: str
) -> None:
    done = subprocess.CompletedProcess([sys.executable], returncode, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_arguments, **_options: done)
    assert memory_pass(Path("a.engine"), batch=1, threads=1) == {"error": reason}


def test_a_pile_has_no_memory_pass(report: Report) -> None:
    assert memory_problems(report) == ("single requests are measured, not piles",)
