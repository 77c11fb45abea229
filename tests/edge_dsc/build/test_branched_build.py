"""A network that is no chain goes the way of every other: calibrated, built, mixed, judged, looked at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from branched_networks import BRANCHED

from edge_dsc.build.calibrate import CalibrationRequest, run_calibration
from edge_dsc.build.debug import DebugRequest, debug, format_debugged
from edge_dsc.build.engine import BuildRequest, build_engine
from edge_dsc.build.gate import GateOptions
from engines.graph import seal_model
from engines.record import Precision
from engines.runtimes import get_runtime

LAYERS = {
    "stem": "INT8", "one_expand": "INT8", "one_depthwise": "INT8", "one_project": "INT8", "two_expand": "INT8",
    "two_depthwise": "INT8", "two_project": "INT8", "grouped": "INT8", "logits": "FP32",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, textures: Path) -> Path:
    """A folder with a model and its calibration."""
    folder = tmp_path_factory.mktemp("mobile")
    (folder / "model.onnx").write_bytes(seal_model(BRANCHED["mobile"]()))
    done = run_calibration(CalibrationRequest(model=folder / "model.onnx", data=textures, images=128))
    assert (done.table.method, len(done.table.ranges), len(done.coverage.tensors)) == ("mse", 10, 10)
    assert (folder / "calibration.coverage.png").is_file()
    return folder


def test_it_is_built_and_every_layer_is_proven(run: Path, tmp_path: Path) -> None:
    model = Path(shutil.copy(run / "model.onnx", tmp_path))
    request = BuildRequest(
        model=model, precision=Precision.INT8, runtime="onnxruntime", calibration=run / "calibration.json"
    )
    built = build_engine(request)
    assert built.record.layer_types == LAYERS
    assert built.record.layers == {"INT8": 8, "FP32": 1}
    layers, _ = get_runtime("onnxruntime").inspect_layers(built.path, built.record)
    assert [name for layer in layers for name in layer.onnx] == list(LAYERS)


@pytest.mark.slow
def test_a_mixed_engine_says_how_many_mixes_were_tried(run: Path, textures: Path, tmp_path: Path) -> None:
    built = build_engine(
        BuildRequest(
            model=run / "model.onnx",
            precision=Precision.MIXED,
            runtime="onnxruntime",
            calibration=run / "calibration.json",
            out=tmp_path / "mixed.engine",
            gate=GateOptions(data=textures, max_drop=20.0),
        )
    )
    assert built.record.float_layers == ()
    assert any("2 of 256 mixes tried" in note for note in built.record.notes)
    assert built.record.validation is not None


@pytest.mark.slow
def test_its_layers_are_looked_at_one_by_one(run: Path, textures: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.png"
    found = debug(DebugRequest(target=run / "model.onnx", data=textures, runtime="onnxruntime", out=out))
    assert [layer.name for layer in found.sensitivity.layers] == list(LAYERS)[:-1]
    assert all(set(layer.time_ms) == {"FP32", "INT8"} for layer in found.sensitivity.layers)
    assert format_debugged(found).splitlines()[4].startswith("stem ")
