"""A folder with everything that a command may want."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def built_run(
    deployed_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, textures: Path
) -> Path:
    """A folder with model.onnx, calibration.json and an FP32 and an INT8 engine of onnxruntime."""
    from edge_dsc.build.calibrate import CalibrationRequest, run_calibration
    from edge_dsc.build.engine import BuildRequest, build_engine
    from engines.record import BatchRange, Precision

    run = tmp_path_factory.mktemp("run")
    model = Path(shutil.copy(deployed_models["dsc"], run / "model.onnx"))
    table = run_calibration(CalibrationRequest(model=model, data=textures, method="minmax", images=128)).path
    for precision, calibration in ((Precision.FP32, None), (Precision.INT8, table)):
        request = BuildRequest(
            model=model,
            precision=precision,
            runtime="onnxruntime",
            batch=BatchRange(1, 1, 4),
            calibration=calibration,
        )
        build_engine(request)
    return run


@pytest.fixture
def run(built_run: Path, tmp_path: Path) -> Path:
    """A copy of the built run that a test may change."""
    return Path(shutil.copytree(built_run, tmp_path / "run"))


@pytest.fixture
def engine(run: Path) -> Path:
    return run / "dsc-fp32.onnxruntime.engine"
