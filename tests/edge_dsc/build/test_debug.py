from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from calibration.sensitivity import LayerSensitivity, Sensitivity
from calibration.table import load_table
from edge_dsc.build.debug import Debugged, DebugRequest, debug, format_debugged
from edge_dsc.build.engine import BuildRequest, build_engine
from edge_dsc.cli.app import app
from engines.errors import ArtefactError


@pytest.mark.slow
def test_the_command_measures_every_layer_and_draws(
    calibrated_run: Path, textures: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "s.png"
    arguments = ["debug", str(calibrated_run), "--calib-data", str(textures), "--backend", "onnxruntime"]
    done = CliRunner().invoke(app, [*arguments, "--json", "--out", str(picture)])
    assert done.exit_code == 0, done.output
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    document = json.loads(done.stdout)
    assert document["kind"] == "edge-dsc/debug-result"
    assert (document["runtime"], document["method"], document["images"]) == ("onnxruntime", "minmax", 128)
    assert (len(document["layers"]), sum(layer["depthwise"] for layer in document["layers"])) == (8, 3)
    for layer in document["layers"]:
        assert set(layer["time_ms"]) == {"FP32", "INT8"}
        assert all(time > 0 for time in layer["time_ms"].values())


def test_a_table_of_another_model_is_refused(
    calibrated_run: Path, textures: Path, deployed_models: dict[str, Path]
) -> None:
    request = DebugRequest(
        target=deployed_models["cnn"], data=textures, calibration=calibrated_run / "calibration.json"
    )
    with pytest.raises(ArtefactError, match="is of another model"):
        debug(request)


def test_without_a_table_each_image_is_read_once_for_ranges_and_errors(
    calibrated_run: Path,
    textures: Path,
    tmp_path: Path,
    reads: Counter[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Measured(Exception):
        """The pixels are there; what is measured on them takes seconds."""

    def measure(model: Any, table: Any, pixels: np.ndarray, **more: Any) -> None:
        assert (more["signed"], more["times"]) == (True, {})  # no times of a GPU's layers
        raise Measured(pixels.shape)

    table = load_table(calibrated_run / "calibration.json")
    monkeypatch.setattr("edge_dsc.build.debug.calibrate", lambda *arguments: table)
    monkeypatch.setattr("edge_dsc.build.debug.measure_sensitivity", measure)
    model = Path(shutil.copy(calibrated_run / "model.onnx", tmp_path / "model.onnx"))
    with pytest.raises(Measured, match=r"\(128, 224, 224, 1\)"):
        debug(DebugRequest(target=model, data=textures))
    assert Counter(reads[path] for path in textures.rglob("*.png")) == {2: 150}  # one of them for the hash
    assert reads[model] == 1


def test_the_table_is_aligned_and_says_what_follows() -> None:
    layer = LayerSensitivity(
        name="stem",
        op="Conv",
        depthwise=False,
        output_error=0.0123,
        logit_error=1e-3,
        flips=2,
        logit_error_without=5e-4,
        flips_without=1,
        time_ms={"FP32": 0.05, "INT8": 0.125},
    )
    other = msgspec.structs.replace(
        layer, name="block1", depthwise=True, logit_error_without=9e-4, time_ms={}
    )
    sensitivity = Sensitivity(layers=(layer, other), logit_error=1e-3, flips=3, images=128, signed=False)
    found = Debugged(Path("m.onnx"), "onnxruntime", "mse", sensitivity, Path("s.png"))
    assert format_debugged(found).splitlines()[2:] == [
        "layer               output    logits  flips  logits without  flips without  ms FP32  ms INT8",
        "------------------  ------  --------  -----  --------------  -------------  -------  -------",
        "stem                 1.23%  1.00e-03      2        5.00e-04              1    0.050    0.125",
        "block1 (depthwise)   1.23%  1.00e-03      2        9.00e-04              1        -        -",
        "all in INT8: logits 1.00e-03, 3 of 128 answers change",
        "leaving stem in float would take away 50% of that error and give 2 answers back",
        "picture: s.png",
    ]


def test_without_matplotlib_the_table_stands_and_a_note_says_why_there_is_no_picture(
    calibrated_run: Path, textures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = LayerSensitivity(
        name="stem", op="Conv", depthwise=False, output_error=0.0, logit_error=0.0, flips=0,
        logit_error_without=0.0, flips_without=0, time_ms={},
    )  # fmt: skip
    measured = Sensitivity(layers=(layer,), logit_error=0.0, flips=0, images=128, signed=True)
    monkeypatch.setattr("edge_dsc.build.debug.measure_sensitivity", lambda *_, **more: measured)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    picture = tmp_path / "s.png"
    found = debug(DebugRequest(target=calibrated_run / "model.onnx", data=textures, out=picture))
    assert (found.sensitivity, found.picture, picture.exists()) == (measured, None, False)
    assert found.to_dict()["picture"] is None
    last = format_debugged(found).splitlines()[-1]
    assert last.startswith("note: no picture: cannot import matplotlib.style: ")


def test_an_engine_whose_model_is_gone_is_refused(
    calibrated_run: Path, textures: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(calibrated_run, tmp_path / "run"))
    built = build_engine(BuildRequest(model=run / "model.onnx", runtime="onnxruntime"))
    (run / "model.onnx").unlink()
    with pytest.raises(ArtefactError, match=r"model\.onnx, from which .* was built, is gone or was changed"):
        debug(DebugRequest(target=built.path, data=textures))
