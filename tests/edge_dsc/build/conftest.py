"""What the tests of building share."""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from double_cuda import DoubleCuda, DoubleDriver
from double_tensorrt import DoubleTensorRt

from calibration.collect import calibrate
from calibration.select import read_set, select_images
from calibration.table import CalibrationOptions, save_table
from edge_dsc.build.calibrate import (
    CalibrationRequest,
    CalibrationRun,
    calibration_candidates,
    run_calibration,
)
from edge_dsc.data import discover
from engines import packages
from engines.graph import load_model
from engines.trt import cuda as cuda_driver

Machine = Callable[[str], DoubleTensorRt]


@pytest.fixture(scope="session")
def calibrated_run(
    tmp_path_factory: pytest.TempPathFactory, deployed_models: dict[str, Path], textures: Path
) -> Path:
    """A folder with model.onnx and calibration.json. Read only."""
    run = tmp_path_factory.mktemp("calibrated")
    model = load_model(Path(shutil.copy(deployed_models["dsc"], run / "model.onnx")))
    drawn = select_images(calibration_candidates(discover(textures), None), 128, 0)
    images = read_set(drawn, model.contract)
    save_table(run / "calibration.json", calibrate(model, images, CalibrationOptions(method="minmax")))
    return run


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """Counts how often each file is opened to be read."""
    seen: Counter[Path] = Counter()
    whole = Path.open

    def counting(self: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if mode in ("r", "rb"):
            seen[self] += 1
        return whole(self, mode, *arguments, **more)

    monkeypatch.setattr(Path, "open", counting)
    return seen


@pytest.fixture
def cuda() -> Iterator[DoubleCuda]:
    double = DoubleCuda()
    yield double
    assert double.idle


@pytest.fixture
def machine(cuda: DoubleCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], DoubleTensorRt]]:
    """``machine(release)``: this machine has two GPUs, pycuda and that release of TensorRT from now on."""
    real, driver = packages.load, DoubleDriver(cuda)
    monkeypatch.setattr(cuda_driver, "load_driver", lambda: driver)
    monkeypatch.setattr(packages, "is_installed", lambda name: True)

    def have(release: str) -> DoubleTensorRt:
        trt = DoubleTensorRt(release, cuda)
        doubles = {trt.__name__: trt, "pycuda.driver": cuda}
        monkeypatch.setattr(packages, "load", lambda name: doubles[name] if name in doubles else real(name))
        monkeypatch.setattr(packages, "installed_version", lambda *_: trt.__version__)
        return trt

    yield have
    gc.collect()  # what an error kept alive goes while the driver is there


@pytest.fixture(scope="session")
def calibrated(
    tmp_path_factory: pytest.TempPathFactory, deployed_models: dict[str, Path], textures: Path
) -> Callable[..., CalibrationRun]:
    """``calibrated(release, method)``: what that release found, made once."""
    made: dict[tuple[str, str], CalibrationRun] = {}

    def calibrate(release: str, method: str = "tensorrt-entropy") -> CalibrationRun:
        if (release, method) not in made:
            folder = tmp_path_factory.mktemp("calibrated")
            model = Path(shutil.copy(deployed_models["dsc"], folder / "model.onnx"))
            request = CalibrationRequest(model=model, data=textures, method=method, images=128)
            made[release, method] = run_calibration(request)
        return made[release, method]

    return calibrate
