"""What the tests of building share."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from calibration.collect import calibrate
from calibration.select import read_set, select_images
from calibration.table import CalibrationOptions, save_table
from edge_dsc.build.calibrate import calibration_candidates
from edge_dsc.data import discover
from engines.graph import load_model


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
