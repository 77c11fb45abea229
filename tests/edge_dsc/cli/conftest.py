"""A folder with everything that a command may want, to be changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def run(built_run: Path, tmp_path: Path) -> Path:
    """A copy of the built run that a test may change."""
    return Path(shutil.copytree(built_run, tmp_path / "run"))


@pytest.fixture
def engine(run: Path) -> Path:
    return run / "dsc-fp32.onnxruntime.engine"
