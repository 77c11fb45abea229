from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from calibration.table import load_table
from calibration.tensorrt import check_cache, read_cache
from edge_dsc.build.calibrate import CalibrationRequest, run_calibration
from engines.errors import BadInputError, UsageError
from engines.graph import load_model


@pytest.mark.slow
def test_a_table_comes_with_its_coverage_its_picture_and_tensorrts_cache(
    deployed_models: dict[str, Path], textures: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copy(deployed_models["cnn"], tmp_path / "model.onnx"))
    made = run_calibration(
        CalibrationRequest(model=model, data=textures, method="minmax", images=128, trt_release="8.6.2")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "calibration.coverage.json",
        "calibration.coverage.png",
        "calibration.json",
        "calibration.trt-cache.txt",
        "model.onnx",
    ]
    assert made.coverage.images == 128
    assert made.coverage.patients == 128  # without a table of patients each file is one
    document = json.loads((tmp_path / "calibration.coverage.json").read_text())
    assert document["classes"] == {"clear": 49, "diffuse": 49, "focal": 30}
    assert made.trt_cache == tmp_path / "calibration.trt-cache.txt"
    cache = read_cache(made.trt_cache.read_text(), source="cache")
    check_cache(cache, load_table(made.path), load_model(model).proto, "8.6.2")


@pytest.mark.parametrize(
    ("method", "release", "text"),
    [
        ("tensorrt-minmax", "8.6.2", "tensorrt-minmax keeps the cache of the release that calibrates"),
        ("mse", "8.6.2", "ranges by mse are of a network with scaled channels"),
        ("entropy", "11.4.0", r"TensorRT 11\.4\.0 reads no calibration cache"),
    ],
)
def test_a_cache_that_cannot_be_is_refused_before_the_work(
    tmp_path: Path, method: str, release: str, text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        run_calibration(
            CalibrationRequest(
                model=tmp_path / "none.onnx", data=tmp_path, method=method, trt_release=release
            )
        )


def test_one_class_alone_is_refused(deployed_models: dict[str, Path], textures: Path, tmp_path: Path) -> None:
    shutil.copytree(textures / "clear", tmp_path / "data" / "clear")
    with pytest.raises(BadInputError, match="holds a single class, 'clear'"):
        run_calibration(CalibrationRequest(model=deployed_models["cnn"], data=tmp_path / "data"))
