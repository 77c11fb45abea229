"""Phantoms and trained runs, made once a session: starting TensorFlow takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_dsc.data.phantoms import write_phantoms
from edge_dsc.training import TrainOptions, TrainProgress, TrainResult, train

PER_CLASS = 24


@dataclass(frozen=True)
class TrainedRun:
    """A short run and what its callbacks told."""

    result: TrainResult
    options: TrainOptions
    reports: list[TrainProgress]


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 phantoms of each class and one damaged file. Read only."""
    root = tmp_path_factory.mktemp("trained") / "phantoms"
    write_phantoms(root, PER_CLASS, seed=0)
    (root / "clear" / "damaged.png").write_bytes(b"\x89PNG but no more")
    return root


def _run(architecture: str, data: Path, out: Path) -> TrainedRun:
    options = TrainOptions(data=data, out=out, architecture=architecture, epochs=2, seed=3)
    reports: list[TrainProgress] = []
    return TrainedRun(train(options, progress=reports.append), options, reports)


@pytest.fixture(scope="session")
def dsc_run(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Two epochs of ``dsc``. Read only; copy the folder before you change it."""
    return _run("dsc", phantom_folder, tmp_path_factory.mktemp("runs") / "dsc")


@pytest.fixture(scope="session")
def cnn_run(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Two epochs of ``cnn``. Read only; copy the folder before you change it."""
    return _run("cnn", phantom_folder, tmp_path_factory.mktemp("runs") / "cnn")
