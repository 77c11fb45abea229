"""Commands that look: what they say of every file and of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_dsc.build.engine import BuildRequest, build_engine
from edge_dsc.checks.doctor import Examination
from engines.trt import runtime


def test_inspect_knows_every_file(edge_dsc: Any, run: Path, tmp_path: Path) -> None:
    engine = run / "dsc-int8.onnxruntime.engine"
    expected = {
        engine: "engine",
        engine.with_name(engine.name + ".json"): "engine record",
        run / "model.onnx": "ONNX model",
        run / "calibration.json": "calibration table",
        run: "run folder",
    }
    for path, what in expected.items():
        done = edge_dsc("inspect", path, "--json")
        assert (done.code, done.json["what"]) == (0, what), done.err
        assert edge_dsc("inspect", path).out.startswith(f"what: {what}\n")
    assert edge_dsc("inspect", run / "model.onnx", "--json").json["multiply_adds"] == 36_453_056


def test_inspect_shows_the_layers_of_an_engine_with_their_times(edge_dsc: Any, run: Path) -> None:
    engine = run / "dsc-int8.onnxruntime.engine"
    found = edge_dsc("inspect", engine, "--layers", "--json").json
    assert (found["kind"], found["what"]) == ("edge-dsc/inspect-result", "layers of an engine")
    assert (found["runtime"], found["batch"], found["runs"], found["not_timed"]) == (
        "onnxruntime",
        1,
        100,
        None,
    )
    kinds = [layer["kind"] for layer in found["layers"]]
    assert (kinds.count("QLinearConv"), kinds.count("QGemm")) == (7, 1)
    assert sum(layer["share"] for layer in found["layers"]) == pytest.approx(1)
    title, _, header, _, *rows = edge_dsc("inspect", engine, "--layers").out.splitlines()
    assert title.startswith(
        f"{engine}, {len(rows)} layers on onnxruntime: medians of 100 runs with one image, "
    )
    assert header.split() == ["layer", "us", "share", "precision", "kind", "ONNX", "layers"]
    assert [row.split()[0] for row in rows] == [layer["name"] for layer in found["layers"]]


def test_inspect_refuses_layers_of_anything_else(edge_dsc: Any, run: Path, engine: Path) -> None:
    for path, what in ((run / "model.onnx", "ONNX model"), (run, "run folder")):
        done = edge_dsc("inspect", path, "--layers")
        assert (done.code, done.err) == (
            2,
            f"error: --layers wants an engine; {path} is: {what} (name an .engine file)\n",
        )
    assert edge_dsc("inspect", run / "gone.engine", "--layers").code == 9
    data = engine.read_bytes()
    engine.write_bytes(data[:-1])
    done = edge_dsc("inspect", engine, "--layers")
    assert (done.code, done.out) == (4, "")
    assert f"{engine} has {len(data) - 1} bytes, its record says {len(data)}" in done.err


def test_an_engine_that_cannot_run_here_has_the_layers_of_its_record(
    edge_dsc: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(runtime, "find_gpu", lambda *_: (None, "no CUDA driver"))
    built = build_engine(BuildRequest(model=run / "model.onnx", runtime="tensorrt-rtx"))
    found = edge_dsc("inspect", built.path, "--layers", "--json").json
    why = "they are those of its record, because tensorrt-rtx cannot run here: no CUDA driver"
    assert found["not_timed"] == why
    assert {layer["name"]: layer["precision"] for layer in found["layers"]} == dict(built.record.layer_types)
    assert len(found["layers"]) == 9
    assert {(layer["microseconds"], layer["share"]) for layer in found["layers"]} == {(None, None)}
    title, _, header, _, *rows = edge_dsc("inspect", built.path, "--layers").out.splitlines()
    assert title == f"{built.path}, 9 layers on tensorrt-rtx: without times: {why}"
    assert (header.split(), len(rows)) == (["layer", "precision"], 9)


@pytest.mark.slow  # imports everything, TensorFlow too
def test_doctor(edge_dsc: Any, examination: Examination, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_dsc.checks.doctor.examine", lambda: examination)
    found = edge_dsc("doctor", "--json").json
    assert found["packages"]["onnxruntime"]["version"]
    assert found["packages"]["onnxruntime"]["problem"] is None
    assert found["runtimes"]["onnxruntime"]["no_run"] is None
    assert set(found["runtimes"]) == {"onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"}
    assert "builds here" in edge_dsc("doctor").out
