"""No command replaces what it reads, or a file of another kind: exit code 2, and every file is as before."""

from __future__ import annotations

import re
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from edge_dsc.latency.subjects import default_report_path
from engines.files import sha256_file

TARGETS = (
    "dsc-fp32.onnxruntime.engine",
    "dsc-fp32.onnxruntime.engine.json",
    "model.onnx",
    "model.keras",
    "xray.png",
)
FAST = ("--iterations", 20, "--warmup", 0, "--no-control")


@pytest.fixture
def full_run(run: Path, textures: Path) -> Path:
    """A run with a stand-in for the Keras model, an X-ray and a report in it."""
    (run / "model.keras").write_bytes(b"PK\x03\x04" + bytes(26) + b"metadata.json")
    shutil.copy(next(textures.rglob("*.png")), run / "xray.png")
    (run / "report.json").write_text('{\n "kind": "edge-dsc/latency-report",\n "schema_version": 1\n}\n')
    return run


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("target", [*TARGETS, "calibration.json"])
@pytest.mark.parametrize("command", ["bench --out", "bench --html", "evaluate", "export", "debug", "compare"])
def test_another_kind_of_file_is_never_replaced(
    edge_dsc: Any, full_run: Path, textures: Path, tmp_path: Path, command: str, target: str
) -> None:
    if command == "export" and target == "model.onnx":
        pytest.skip("its own kind")
    engine, out = full_run / TARGETS[0], full_run / target
    arguments: dict[str, tuple[object, ...]] = {
        "bench --out": ("bench", engine, *FAST, "--out", out),
        "bench --html": ("bench", engine, *FAST, "--out", tmp_path / "new.json", "--html", out),
        "evaluate": ("evaluate", engine, textures, "--out", out),
        "export": ("export", full_run, "--out", out),
        "debug": ("debug", full_run, "--calib-data", textures, "--out", out),
        "compare": ("compare", full_run / "report.json", "--out", out),
    }
    before = contents(full_run)
    done = edge_dsc(*arguments[command])
    assert done.code == 2, done.err
    assert f"{out} is " in done.err and "would be replaced" in done.err
    assert contents(full_run) == before
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize("target", ["model.onnx", "calibration.json", "calibration", "xray.png"])
def test_neither_an_engine_nor_its_record_replaces_another_file(
    edge_dsc: Any, full_run: Path, target: str
) -> None:
    before = contents(full_run)
    done = edge_dsc("build-engine", full_run, "--backend", "onnxruntime", "--out", full_run / target)
    assert done.code == 2 and "would be replaced" in done.err
    assert contents(full_run) == before


@pytest.mark.parametrize("how", ["--out", "--html"])
def test_compare_does_not_replace_what_it_reads(edge_dsc: Any, full_run: Path, how: str) -> None:
    report, link = full_run / "report.json", full_run / "link.json"
    link.hardlink_to(report)
    before = contents(full_run)
    for place in (report, link):
        done = edge_dsc("compare", report, how, place)
        assert done.code == 2 and "is edge-dsc/latency-report" in done.err
    done = edge_dsc("compare", report, "--out", full_run / "x", "--html", full_run / "x")
    assert done.code == 2 and "both name" in done.err
    assert contents(full_run) == before


def test_an_engine_is_built_again_over_itself(edge_dsc: Any, run: Path, engine: Path) -> None:
    engine.chmod(0o600)
    done = edge_dsc("build-engine", run, "--backend", "onnxruntime", "--out", engine)
    assert done.code == 0, done.err
    assert stat.S_IMODE(engine.stat().st_mode) == 0o600


def test_two_runs_in_one_second_have_two_reports() -> None:
    first, second = default_report_path(), default_report_path()
    assert first != second and first.parent == Path("runs/bench")
    assert re.fullmatch(r"\d{8}T\d{6}\.\d{6}Z\.json", first.name)
