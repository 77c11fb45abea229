"""Damaged reports, and measurements that go wrong: a clear line, the right code, and what was measured kept."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from bench.measure import measure
from bench.plan import Plan
from bench.report import REPORT, BlockSamples, Report, SubjectReport, as_samples, load_report, save_report
from bench.statistics import Verdict
from engines.files import canonical_json, sha256_bytes


@pytest.fixture
def report(tmp_path: Path) -> Path:
    subjects = tuple(
        SubjectReport(
            name=name,
            description={"batch": 1},
            blocks=tuple(
                BlockSamples(
                    opening=index % 5,
                    round=index,
                    start_ns=index,
                    samples_ns=as_samples([median, median + 2]),
                )
                for index in range(8)
            ),
        )
        for name, median in (("cnn", 3_000_000), ("dsc", 1_000_000))
    )
    made = Report(subjects=subjects, plan=Plan(), environment={"cpu": "x"}, environment_end={}, created="t")
    save_report(tmp_path / "good.json", made)
    return tmp_path / "good.json"


def sealed(path: Path, change: Callable[[Any], object]) -> None:
    body = json.loads(path.read_text())
    for key in ("kind", "schema_version", "report_sha256"):
        del body[key]
    change(body)
    seal = sha256_bytes(canonical_json(body))
    document = {"kind": REPORT.name, "schema_version": REPORT.version, **body, "report_sha256": seal}
    path.write_text(json.dumps(document))


def text(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


def samples(value: object) -> Callable[[Any], object]:
    return lambda body: body["subjects"][0]["blocks"][0].update(samples_ns=value)


DAMAGE = {
    "truncated": (lambda path: path.write_text(path.read_text()[:-30]), "is not valid JSON"),
    "empty": (lambda path: path.write_text(""), "is not valid JSON"),
    "edited": (lambda path: text(path, '"batch": 1', '"batch": 2'), "was edited after it was made"),
    "foreign": (
        lambda path: text(path, REPORT.name, "edge-dsc/calibration"),
        "is not an edge-dsc/latency-report",
    ),
    "of the future": (
        lambda path: text(path, f'"schema_version": {REPORT.version}', '"schema_version": 99'),
        "has schema version 99",
    ),
    "with NaN": (lambda path: text(path, '"start_ns": 0', '"start_ns": NaN'), "NaN is not a JSON number"),
    "with a negative sample": (lambda path: sealed(path, samples([5, -4])), "sample -4 is negative"),
    "with a fraction": (lambda path: sealed(path, samples([5.5])), "sample 5.5 is not a whole number"),
    "with no samples": (lambda path: sealed(path, samples([])), "there are no samples"),
    "with a word for a number": (
        lambda path: sealed(path, lambda body: body["subjects"][0].update(refused="none")),
        "Expected `int`, got `str` - at `$.subjects[0].refused`",
    ),
    "with an impossible plan": (
        lambda path: sealed(path, lambda body: body["plan"].update(rounds=0)),
        "the number of rounds is 0",
    ),
    "with no subject": (lambda path: sealed(path, lambda body: body["subjects"].clear()), "no measured"),
    "gone": (lambda path: path.unlink(), "cannot read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_report_is_named_with_what_to_do(
    edge_dsc: Any, report: Path, tmp_path: Path, kind: str
) -> None:
    bad, third = tmp_path / "bad.json", tmp_path / "third.json"
    for copy in (bad, third):
        shutil.copy(report, copy)
    damage, words = DAMAGE[kind]
    damage(bad)
    for reports in ([bad], [report, bad], [report, third, bad]):
        done = edge_dsc("compare", *reports)
        assert (done.code, done.out) == (4, ""), done.err
        (line,) = done.err.splitlines()
        assert str(bad) in line and words in line and "edge-dsc bench ENGINE" in line


def test_a_regression_ends_with_6_and_its_own_line(edge_dsc: Any, report: Path, tmp_path: Path) -> None:
    slower = tmp_path / "slower.json"
    made = load_report(report)
    first, second = made.subjects
    save_report(slower, replace(made, subjects=(first, replace(second, blocks=first.blocks))))
    done = edge_dsc("compare", report, slower, "--fail-if-slower", 5)
    assert done.code == 6
    assert "error: slower than the allowed 5 %: dsc by 200.0 %" in done.err
    assert "3.00 times slower" in done.out


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.compare.UNSTABLE_SPREAD", float("inf"))
    monkeypatch.setattr("bench.machine.MOST_WAITING", 1.0)
    monkeypatch.setattr("bench.compare.judge", lambda *_: Verdict.NO_DIFFERENCE)


@pytest.mark.slow
@pytest.mark.usefixtures("calm")
def test_an_engine_that_fails_halfway_costs_only_itself(
    edge_dsc: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engines.cpu.ort import OrtRunner

    whole, left = OrtRunner.run, {"calls": 30}

    def fails(self: Any, batch: Any) -> Any:
        if self.record.precision.value == "int8":
            left["calls"] -= 1
            if left["calls"] < 0:
                raise RuntimeError("CUDA error 719")
        return whole(self, batch)

    monkeypatch.setattr(OrtRunner, "run", fails)
    engines = [run / f"dsc-{precision}.onnxruntime.engine" for precision in ("fp32", "int8")]
    out = tmp_path / "r.json"
    done = edge_dsc("bench", *engines, "--iterations", 40, "--warmup", 0, "--out", out)
    assert done.code == 1
    assert "* dsc-int8.onnxruntime failed: RuntimeError: CUDA error 719" in done.out
    assert "error: 1 of 2 engines failed; the report has the others" in done.err
    kept = load_report(out)
    assert len(kept.subjects[0].samples_ns) == 40
    assert 0 < len(kept.subjects[1].samples_ns) < 40


@pytest.mark.slow
@pytest.mark.usefixtures("calm")
def test_a_clock_that_jumps_is_said(
    edge_dsc: Any, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"now": 0, "calls": 0}

    def clock() -> int:
        state["calls"] += 1
        state["now"] += -5_000_000 if state["calls"] % 50 == 0 else 1_000_000
        return state["now"]

    monkeypatch.setattr("edge_dsc.latency.subjects.measure", functools.partial(measure, clock=clock))
    out = tmp_path / "r.json"
    done = edge_dsc("bench", engine, "--iterations", 100, "--warmup", 0, "--out", out)
    assert done.code == 0, done.err
    assert "samples refused, the clock jumped backwards" in done.out
    found = load_report(out).subjects[0]
    assert found.refused > 0 and len(found.samples_ns) == 100 and min(found.samples_ns) > 0
