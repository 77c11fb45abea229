from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
from double_cuda import DoubleCuda
from double_tensorrt import LAYER_MS
from typer.testing import CliRunner

import edge_dsc.build.debug as debug_module
from calibration.sensitivity import LayerSensitivity, Sensitivity
from calibration.table import load_table
from edge_dsc.build.debug import Debugged, DebugRequest, debug, format_debugged
from edge_dsc.build.engine import BuildRequest, build_engine
from edge_dsc.cli.app import app
from edge_dsc.page.figures import draw_sensitivity
from engines import packages
from engines.errors import AccuracyGateError, ArtefactError, EnvironmentProblem


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
    # For the mark, the hash, the pixels.
    assert Counter(reads[path] for path in textures.rglob("*.png")) == {3: 150}
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


def test_the_columns_are_those_of_what_was_timed_and_a_line_says_what_was_not() -> None:
    layer = LayerSensitivity(
        name="stem", op="Conv", depthwise=False, output_error=0.0, logit_error=1e-3, flips=0,
        logit_error_without=0.0, flips_without=0, time_ms={"FP16": 0.05},
    )  # fmt: skip
    sensitivity = Sensitivity(layers=(layer,), logit_error=1e-3, flips=0, images=128, signed=True)
    found = Debugged(Path("m.onnx"), "tensorrt", "mse", sensitivity, None, not_timed="in INT8, stem: fused")
    lines = format_debugged(found).splitlines()
    assert lines[2].split()[-2:] == ["ms", "FP16"]
    assert lines[4].split()[-1] == "0.050"
    assert lines[5] == "no times: in INT8, stem: fused"
    assert found.to_dict()["not_timed"] == "in INT8, stem: fused"


class Measured(Exception):
    """The times are there; what the errors are takes seconds."""


@pytest.fixture
def times(
    calibrated_run: Path, textures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, dict[str, float]]]:
    """``times(runtime, device)``: what ``debug`` hands on as the times of layers."""

    def measure(*_: object, **more: Any) -> None:
        raise Measured(more["times"])

    monkeypatch.setattr("edge_dsc.build.debug.measure_sensitivity", measure)

    def find(runtime: str, device: int | None = None) -> dict[str, dict[str, float]]:
        request = DebugRequest(
            target=calibrated_run / "model.onnx",
            data=textures,
            runtime=runtime,
            device=device,
            out=tmp_path / "s.png",
        )
        before = sorted(calibrated_run.iterdir())
        with pytest.raises(Measured) as caught:
            debug(request)
        assert sorted(calibrated_run.iterdir()) == before  # the engines were for this alone
        return caught.value.args[0]

    return find


@pytest.mark.slow
@pytest.mark.parametrize("release", ["8.6", "10.3", "11.4", "rtx"])
def test_layers_are_timed_on_the_device(
    machine: Callable[[str], Any], cuda: DoubleCuda, times: Callable[..., Any], release: str
) -> None:
    machine(release)
    found = times("tensorrt-rtx" if release == "rtx" else "tensorrt", 1)
    # The stand-in's n-th layer takes n times 0.25 ms, in every precision.
    assert list(found.values()) == [
        dict.fromkeys(("FP16", "INT8"), LAYER_MS * (index + 1)) for index in range(9)
    ]
    assert next(iter(found)) == "Conv_2"
    assert cuda.idle


@pytest.mark.slow
def test_a_precision_that_cannot_be_built_is_said_and_the_other_timed(
    machine: Callable[[str], Any], calibrated_run: Path, textures: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    machine("10.3")
    seen: list[Any] = []

    def measure(*_: object, **more: Any) -> Sensitivity:
        seen.append(more["times"])
        return Sensitivity(layers=(), logit_error=0.0, flips=0, images=1, signed=True)

    build = debug_module.build_engine

    def build_int8_alone(request: BuildRequest, *more: Any, **named: Any) -> Any:
        if request.precision.value == "fp16":
            raise AccuracyGateError("asked for 9 layers in FP16", remedy="")
        return build(request, *more, **named)

    monkeypatch.setattr(debug_module, "build_engine", build_int8_alone)
    monkeypatch.setattr(debug_module, "measure_sensitivity", measure)
    monkeypatch.setattr("edge_dsc.page.figures.draw_sensitivity", lambda *_, **__: None)
    found = debug(DebugRequest(target=calibrated_run / "model.onnx", data=textures, out=tmp_path / "s.png"))
    assert {tuple(kinds) for kinds in seen[0].values()} == {("INT8",)}
    assert found.not_timed == "in FP16, asked for 9 layers in FP16"


def test_a_gpu_that_is_not_there_ends_it(
    machine: Callable[[str], Any], calibrated_run: Path, textures: Path, tmp_path: Path
) -> None:
    machine("10.3")
    request = DebugRequest(
        target=calibrated_run / "model.onnx", data=textures, device=2, out=tmp_path / "s.png"
    )
    with pytest.raises(EnvironmentProblem, match="there is no GPU 2: the CUDA driver finds 2"):
        debug(request)


def test_without_a_gpu_a_line_says_why_there_are_no_times(
    calibrated_run: Path, textures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "installed_version", lambda *_: "10.3.0")
    monkeypatch.setattr("engines.trt.runtime.find_gpu", lambda *_: (None, "no CUDA driver"))
    measured = Sensitivity(layers=(), logit_error=0.0, flips=0, images=128, signed=True)
    monkeypatch.setattr(debug_module, "measure_sensitivity", lambda *_, **more: measured)
    monkeypatch.setattr("edge_dsc.page.figures.draw_sensitivity", lambda *_, **__: None)
    found = debug(DebugRequest(target=calibrated_run / "model.onnx", data=textures, out=tmp_path / "s.png"))
    assert found.not_timed == "tensorrt does not work here: no CUDA driver"
    with pytest.raises(EnvironmentProblem, match="tensorrt does not work here: no CUDA driver") as caught:
        debug(
            DebugRequest(
                target=calibrated_run / "model.onnx", data=textures, device=0, out=tmp_path / "s.png"
            )
        )
    assert "leave --device out" in caught.value.remedy


def test_of_many_layers_the_worst_are_shown_and_the_rest_is_summed(tmp_path: Path) -> None:
    layers = tuple(
        LayerSensitivity(
            name=f"layer{place}", op="Conv", depthwise=False, output_error=0.01,
            logit_error=2.0 ** -(place % 100), flips=0, logit_error_without=1.0, flips_without=0, time_ms={},
        )
        for place in range(1, 101)
    )  # fmt: skip
    sensitivity = Sensitivity(layers=layers, logit_error=2.0, flips=0, images=128, signed=True)
    found = Debugged(Path("m.onnx"), "tensorrt", "mse", sensitivity, None)
    lines = format_debugged(found).splitlines()
    names = [line.split()[0] for line in lines[4:28]]
    assert names == [*(f"layer{place}" for place in range(1, 24)), "layer100"]  # in the order of the graph
    assert lines[28].split()[:6] == ["76", "more", "layers,", "summed", "-", "1.19e-07"]
    draw_sensitivity(sensitivity, tmp_path / "s.png", title="many")
    assert cv2.imread(str(tmp_path / "s.png")).shape[0] < 2000


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
