"""Commands that measure: the report that is kept, the exit code, and ``--json``, one object on standard output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.statistics import Verdict
from engines.errors import UsageError


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no noise of this machine end a measurement with exit code 7."""
    monkeypatch.setattr("bench.compare.judge", lambda *_: Verdict.NO_DIFFERENCE)
    monkeypatch.setattr("bench.compare.UNSTABLE_SPREAD", float("inf"))
    monkeypatch.setattr("bench.machine.MOST_WAITING", 1.0)


def test_an_unstable_measurement_is_kept_and_said(
    edge_dsc: Any, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.compare.UNSTABLE_SPREAD", -1.0)
    done = edge_dsc("bench", engine, "--iterations", 40, "--warmup", 0, "--out", tmp_path / "report.json")
    assert done.code == 7
    assert "error: dsc-fp32.onnxruntime's block medians scatter" in done.err
    assert "Latency, ms" in done.out
    assert (tmp_path / "report.json").is_file()


def test_a_control_that_differs_ends_bench_and_compare_with_7(
    edge_dsc: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.compare.judge", lambda *_: Verdict.SLOWER)
    engines = [run / f"dsc-{precision}.onnxruntime.engine" for precision in ("fp32", "int8")]
    short = ("--iterations", 20, "--warmup", 0)
    report = tmp_path / "report.json"
    done = edge_dsc("bench", *engines, *short, "--out", report)
    assert done.code == 7 and "differs from itself" in done.err
    for reports in ([report], [report, report]):
        done = edge_dsc("compare", *reports, "--fail-if-slower", 0)
        assert done.code == 7 and "measured twice, ratio" in done.err
    monkeypatch.setattr("bench.compare.UNSTABLE_SPREAD", float("inf"))
    monkeypatch.setattr("bench.machine.MOST_WAITING", 1.0)
    done = edge_dsc("bench", *engines, *short, "--no-control", "--out", report, "--json")
    assert done.code == 0 and len(done.json["subjects"]) == 2
    assert edge_dsc("compare", report, "--json").json["controls"] == []


@pytest.mark.usefixtures("calm")
def test_bench_and_compare(edge_dsc: Any, run: Path, tmp_path: Path) -> None:
    engines = [run / f"dsc-{precision}.onnxruntime.engine" for precision in ("fp32", "int8")]
    report = tmp_path / "report.json"
    done = edge_dsc("bench", *engines, "--iterations", 40, "--warmup", 0, "--out", report, "--json")
    assert done.code == 0, done.err
    written = json.loads(report.read_text())
    del written["report_sha256"]
    assert done.json == written
    names = [subject["name"] for subject in done.json["subjects"]]
    assert names == [*(e.stem for e in engines), f"{engines[0].stem} (control)"]
    within = edge_dsc("compare", report, "--json")
    assert [row["candidate"] for row in within.json["rows"]] == ["dsc-int8.onnxruntime"]
    page = tmp_path / "c.html"
    between = edge_dsc("compare", report, report, "--markdown", "--out", tmp_path / "c.md", "--html", page)
    assert page.read_text().startswith("<!doctype html>")
    assert between.code == 0
    assert between.out.strip() == (tmp_path / "c.md").read_text().strip()
    assert between.out.count("1.000") >= 2
    assert edge_dsc("compare", report, report, "--fail-if-slower", 5).code == 0
    copies = [report, tmp_path / "two.json", tmp_path / "three.json"]
    for copy in copies[1:]:
        shutil.copy(report, copy)
    fleet = edge_dsc("compare", *copies, "--json", "--html", page)
    assert (fleet.code, fleet.json["kind"]) == (0, "edge-dsc/fleet")
    assert fleet.json["engines"] == [e.stem for e in engines]
    assert [device["source"] for device in fleet.json["devices"]] == ["report", "two", "three"]
    assert "Ratio to dsc-fp32.onnxruntime on the same device" in page.read_text()


def test_import_times(edge_dsc: Any, tmp_path: Path) -> None:
    times = tmp_path / "a.json"
    entry = {"startEnqMs": 1, "h2dMs": 0.1, "computeMs": 0.8, "d2hMs": 0.1, "latencyMs": 1}
    times.write_text(json.dumps([entry] * 100))
    done = edge_dsc("import-times", times, "--name", "mine", "--json")
    assert done.code == 0, done.err
    assert done.json["subjects"][0]["name"] == "mine"
    report = tmp_path / "a.report.json"
    assert edge_dsc("compare", report, report, "--json").json["rows"][0]["ratio"]["value"] == 1
    assert "execute" in edge_dsc("import-times", times, "--out", tmp_path / "b.json").out
    times.write_text("[]")
    done = edge_dsc("import-times", times)
    assert done.code == 9 and "holds no times of trtexec" in done.err


@pytest.mark.usefixtures("calm")
def test_bench_measures_memory_and_power_in_passes_of_their_own(
    edge_dsc: Any, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.power import Rail

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    monkeypatch.setattr(
        "edge_dsc.latency.subjects.find_rails", lambda **_: (Rail(name="VDD_IN", watts=lambda: 5.0),)
    )
    short = ("--iterations", 20, "--warmup", 0, "--out", tmp_path / "r.json", "--json")
    done = edge_dsc("bench", engine, *short, "--memory", "--power", 0.05, "--limits")
    assert done.code == 0, done.err
    (subject,) = done.json["subjects"]
    memory = subject["passes"]["memory"]
    assert memory["host_peak_bytes"] > memory["host_before_bytes"] > 10 << 20
    limits = subject["passes"]["limits"]
    assert limits["multiply_adds"] == 36_453_056
    assert limits["bytes_per_s"] > 1e6 and limits["multiply_adds_per_s"] > 1e6
    assert [power["rail"] for power in subject["passes"]["power"]] == ["VDD_IN"]
    monkeypatch.setattr("edge_dsc.latency.subjects.find_rails", lambda **_: ())
    (engine.parent / "model.onnx").rename(tmp_path / "away.onnx")
    done = edge_dsc("bench", engine, *short, "--power", 0.05, "--limits")
    assert done.code == 0 and "no rail can be read here" in done.err
    assert "limits: told of engines on the processor that have their ONNX model beside them" in done.err


@pytest.mark.slow
@pytest.mark.usefixtures("calm")
def test_bench_in_every_scenario(edge_dsc: Any, engine: Path, textures: Path, tmp_path: Path) -> None:
    short = ("--iterations", 20, "--warmup", 0, "--out", tmp_path / "r.json", "--json")
    camera = edge_dsc("bench", engine, *short, "--fps", 2000)
    assert camera.json["plan"]["scenario"] == "camera of 2000 fps"
    assert "Frames at 2000 fps" in edge_dsc("bench", engine, *short[:-1], "--fps", 2000).out
    folder = edge_dsc("bench", engine, *short, "--folder", textures / "focal")
    (subject,) = folder.json["subjects"]
    assert (folder.json["plan"]["scenario"], subject["description"]["images"]) == ("folder", 30)
    assert set(subject["blocks"][0]["stages_ns"]) == {"decode", "execute"}
    pile = edge_dsc("bench", engine, *short, "--offline", 8)
    names = [subject["name"] for subject in pile.json["subjects"]]
    assert names[0] == f"{engine.stem} b1 c1" and f"{engine.stem} b4 c1" in names
    assert {subject["description"]["batch"] for subject in pile.json["subjects"]} == {8}


@pytest.mark.parametrize(
    ("flags", "name", "seconds"),
    [((), "standard", 60), (("--quick",), "quick", 10), (("--publish",), "publish", 600)],
)
def test_bench_measures_60_seconds_unless_told_otherwise(
    edge_dsc: Any, engine: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str], name: str, seconds: int
) -> None:
    plans: list[Any] = []

    def measured(_engines: Any, plan: Any, *_: Any, **__: Any) -> None:
        plans.append(plan)
        raise UsageError("enough", remedy="none")

    monkeypatch.setattr("edge_dsc.latency.subjects.measure_engines", measured)
    assert edge_dsc("bench", engine, *flags, "--out", engine.with_name("r.json")).code == 2
    assert [(plan.name, plan.seconds) for plan in plans] == [(name, seconds)]


def test_scenarios_that_cannot_be(edge_dsc: Any, engine: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no picture")
    for words, code, *arguments in (
        ("exclude each other", 2, "--fps", 30, "--offline", 8),
        ("--quick and --publish exclude each other", 2, "--quick", "--publish"),
        ("the rate is 0.0 fps", 2, "--fps", 0),
        ("none of 1 files is an image", 9, "--folder", tmp_path / "bad"),
        ("no file, folder or glob", 9, "--folder", tmp_path / "none"),
    ):
        done = edge_dsc("bench", engine, "--iterations", 5, "--out", tmp_path / "r.json", *arguments)
        assert (done.code, words in done.err) == (code, True), done.err


@pytest.mark.slow
@pytest.mark.usefixtures("calm")
def test_bench_tells_builds_apart(
    edge_dsc: Any, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    built = edge_dsc("build-engine", engine.parent, "--fp32", "--backend", "onnxruntime")
    assert built.code == 0, built.err
    short = ("--iterations", 20, "--warmup", 0, "--out", tmp_path / "r.json")
    done = edge_dsc("bench", engine, "--builds", 2, *short)
    assert done.code == 0, done.err
    assert "Spread within a build and between builds" in done.out
    subjects = json.loads((tmp_path / "r.json").read_text())["subjects"]
    names = [engine.stem, f"{engine.stem} (build 2)", f"{engine.stem} (control)"]
    assert [subject["name"] for subject in subjects] == names
    assert subjects[1]["description"]["build_of"] == engine.stem
    (engine.parent / "model.onnx").unlink()
    done = edge_dsc("bench", engine, "--builds", 2, *short)
    assert done.code == 3 and "again" in done.err and "where it was first built" in done.err
