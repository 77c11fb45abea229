from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from calibration.collect import calibrate
from calibration.select import read_set, select_images
from calibration.table import CalibrationOptions, save_table
from edge_dsc.build.calibrate import calibration_candidates
from edge_dsc.build.debug import DebugRequest, debug, format_debugged
from edge_dsc.cli.app import app
from edge_dsc.data import discover
from engines.errors import ArtefactError
from engines.graph import load_model


@pytest.fixture(scope="module")
def run_folder(
    tmp_path_factory: pytest.TempPathFactory, deployed_models: dict[str, Path], textures: Path
) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model = load_model(Path(shutil.copy(deployed_models["dsc"], folder / "model.onnx")))
    images = read_set(select_images(calibration_candidates(discover(textures), None), 128, 0), model.contract)
    table = calibrate(model, images, CalibrationOptions(method="minmax"))
    save_table(folder / "calibration.json", table)
    return folder


@pytest.mark.slow
def test_the_table_names_every_layer_and_the_worst(run_folder: Path, textures: Path, tmp_path: Path) -> None:
    picture = tmp_path / "s.png"
    request = DebugRequest(
        target=run_folder / "model.onnx", data=textures, runtime="onnxruntime", out=picture
    )
    found = debug(request)
    text = format_debugged(found)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for layer in found.sensitivity.layers:
        assert layer.name in text
        assert set(layer.time_ms) == {"FP32", "INT8"}
        assert all(time > 0 for time in layer.time_ms.values())
    assert text.count("(depthwise)") == 3
    assert f"leaving {found.sensitivity.worst.name} in float" in text
    assert found.method == "minmax"


@pytest.mark.slow
def test_the_command_gives_one_json_object(run_folder: Path, textures: Path, tmp_path: Path) -> None:
    arguments = ["debug", str(run_folder), "--calib-data", str(textures), "--json"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "s.png")])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["kind"] == "edge-dsc/debug-result"
    assert (document["runtime"], document["images"], len(document["layers"])) == ("tensorrt", 128, 8)
    assert document["layers"][0]["time_ms"] == {}


def test_a_table_of_another_model_is_refused(
    run_folder: Path, textures: Path, deployed_models: dict[str, Path]
) -> None:
    request = DebugRequest(
        target=deployed_models["cnn"], data=textures, calibration=run_folder / "calibration.json"
    )
    with pytest.raises(ArtefactError, match="is of another model"):
        debug(request)
