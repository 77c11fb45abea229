"""The files of a run folder: the training record, and the state of an unfinished run."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from edge_dsc import __version__
from engines.errors import ArtefactError
from engines.files import read_document, sha256_file, write_bytes, write_document

KIND = "edge-dsc/training-record"
SCHEMA_VERSION = 1
RECORD_FILE = "training.json"
MODEL_FILE = "model.keras"
METRICS_FILE = "metrics.json"
METRICS_KIND = "edge-dsc/metrics"
METRICS_SCHEMA_VERSION = 1
_PACKAGES = ("tensorflow", "keras", "numpy", "opencv-python-headless", "opencv-python")
_TRAIN_AGAIN = "edge-dsc train DATA --out RUN --overwrite"


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What a run did.

    Attributes:
        architecture: ``dsc`` or ``cnn``.
        labels: Class names, in the order of the outputs.
        recipe: The recipe's values.
        seed: The run's seed.
        split_sha256: :attr:`edge_dsc.data.Split.sha256`.
        model_sha256: Hash of ``model.keras``.
        parameters: ``feature_extractor`` (trainable), ``trainable`` and ``total``.
        history: Figures by name, one an epoch.
        best_epoch: The epoch whose weights were kept, counted from 1.
        interrupted: Whether the user ended it early.
        skipped: Damaged images, (path, reason).
        seconds: Wall-clock time of training in the last call.
        versions: Package versions.
        edge_dsc: Version of edge-dsc.
        parent_sha256: Hash of the ``model.keras`` that was trained further, for quantisation-aware fine-tuning.
        created: UTC time, ISO 8601.
    """

    architecture: str
    labels: tuple[str, ...]
    recipe: Mapping[str, Any]
    seed: int
    split_sha256: str
    model_sha256: str
    parameters: Mapping[str, int]
    history: Mapping[str, list[float]]
    best_epoch: int
    interrupted: bool
    skipped: tuple[tuple[str, str], ...]
    seconds: float
    versions: Mapping[str, str]
    created: str
    edge_dsc: str = __version__
    parent_sha256: str | None = None


def save_training_record(run: Path, record: TrainingRecord) -> None:
    """Write ``training.json``; it comes last and marks a run folder as complete."""
    write_document(run / RECORD_FILE, KIND, SCHEMA_VERSION, asdict(record))


def load_training_record(run: Path) -> TrainingRecord:
    """Read a run's record and hold its model against it.

    Raises:
        ArtefactError: No run, an unreadable record, no model, or a model that is not the record's.
    """
    body = read_document(run / RECORD_FILE, KIND, SCHEMA_VERSION, renew=_TRAIN_AGAIN)
    del body["kind"], body["schema_version"]
    try:
        record = TrainingRecord(
            **{
                **body,
                "labels": tuple(body["labels"]),
                "skipped": tuple(tuple(row) for row in body["skipped"]),
            }
        )
    except (KeyError, TypeError) as error:
        raise ArtefactError(
            f"{run / RECORD_FILE} is no readable record: {error!r}", remedy=f"make it anew: {_TRAIN_AGAIN}"
        ) from error
    model = run / MODEL_FILE
    if not model.is_file():
        raise ArtefactError(f"there is no {model}", remedy=f"make it anew: {_TRAIN_AGAIN}")
    found = sha256_file(model)
    if found != record.model_sha256:
        raise ArtefactError(
            f"{model} is not the model of {RECORD_FILE} (SHA-256 {found[:12]}, recorded {record.model_sha256[:12]})",
            remedy=f"make it anew: {_TRAIN_AGAIN}",
        )
    return record


def package_versions() -> dict[str, str]:
    """Return Python's version and those of the packages that decide a training run."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


STATE_SCHEMA_VERSION = 1
STATE_FILE = "state.npz"
_ANEW = "begin anew: edge-dsc train DATA --overwrite"

Array = Any


@dataclass(kw_only=True)
class TrainState:
    """How far a run has come.

    Attributes:
        settings: What decides the run: network, recipe, seed, split. A run goes on only with equal ones.
        epoch: Whole epochs done.
        history: One list of figures by name, a figure an epoch.
        variables: The model's variables, with the state of its random generators.
        optimizer: The optimizer's variables.
        best_epoch: Epoch of the lowest validation loss, counted from 1; 0 before the first.
        best_weights: The model's weights after that epoch.
    """

    settings: Mapping[str, Any]
    epoch: int = 0
    history: dict[str, list[float]] = field(default_factory=dict)
    variables: list[Array] = field(default_factory=list)
    optimizer: list[Array] = field(default_factory=list)
    best_epoch: int = 0
    best_weights: list[Array] = field(default_factory=list)


_ARRAYS = ("variables", "optimizer", "best_weights")


def save_state(path: Path, state: TrainState) -> None:
    """Write the state atomically: a killed run leaves the last whole epoch."""
    header = {
        "schema_version": STATE_SCHEMA_VERSION,
        "settings": dict(state.settings),
        "epoch": state.epoch,
        "history": state.history,
        "best_epoch": state.best_epoch,
        "counts": {name: len(getattr(state, name)) for name in _ARRAYS},
    }
    arrays = {f"{name}{index}": value for name in _ARRAYS for index, value in enumerate(getattr(state, name))}
    stream = io.BytesIO()
    np.savez(stream, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
    write_bytes(path, stream.getvalue())


def load_state(path: Path) -> TrainState:
    """Read a saved state.

    Raises:
        ArtefactError: Missing, damaged, or of another schema version.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            header = json.loads(stored["header"].tobytes())
            if header["schema_version"] != STATE_SCHEMA_VERSION:
                raise ValueError(f"schema version {header['schema_version']}")
            arrays = {
                name: [stored[f"{name}{index}"] for index in range(header["counts"][name])]
                for name in _ARRAYS
            }
            return TrainState(
                settings=header["settings"],
                epoch=header["epoch"],
                history=header["history"],
                best_epoch=header["best_epoch"],
                **arrays,
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise ArtefactError(f"{path} is no readable training state: {error}", remedy=_ANEW) from error
    except Exception as error:
        # zipfile.BadZipFile and zlib.error derive from Exception alone.
        if type(error).__module__ in ("zipfile", "zlib"):
            raise ArtefactError(f"{path} is damaged: {error}", remedy=_ANEW) from error
        raise
