"""Commands that look: what they say of every file and of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


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


@pytest.mark.slow  # imports everything, TensorFlow too
def test_doctor(edge_dsc: Any) -> None:
    found = edge_dsc("doctor", "--json").json
    assert found["packages"]["onnxruntime"]["version"]
    assert found["packages"]["onnxruntime"]["problem"] is None
    assert found["runtimes"]["onnxruntime"]["no_run"] is None
    assert set(found["runtimes"]) == {"onnxruntime", "tensorrt", "tensorrt-rtx"}
    assert "builds here" in edge_dsc("doctor").out
