"""The training record, ``training.json``: what a run did, and the hash that ties ``model.keras`` to it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from edge_dsc import __version__
from engines.errors import ArtefactError
from engines.files import read_document, sha256_file, write_document

KIND = "edge-dsc/training-record"
SCHEMA_VERSION = 1
FILE = "training.json"
MODEL_FILE = "model.keras"
SPLIT_FILE = "split.json"
METRICS_FILE = "metrics.json"
METRICS_KIND = "edge-dsc/metrics"
METRICS_SCHEMA_VERSION = 1
_PACKAGES = ("tensorflow", "keras", "numpy", "opencv-python-headless", "opencv-python")
_ANEW = "edge-dsc train DATA --out RUN --overwrite"


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
    write_document(run / FILE, KIND, SCHEMA_VERSION, asdict(record))


def load_training_record(run: Path) -> TrainingRecord:
    """Read a run's record and hold its model against it.

    Raises:
        ArtefactError: No run, an unreadable record, no model, or a model that is not the record's.
    """
    body = read_document(run / FILE, KIND, SCHEMA_VERSION, renew=_ANEW)
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
            f"{run / FILE} is no readable record: {error!r}", remedy=f"make it anew: {_ANEW}"
        ) from error
    model = run / MODEL_FILE
    if not model.is_file():
        raise ArtefactError(f"there is no {model}", remedy=f"make it anew: {_ANEW}")
    found = sha256_file(model)
    if found != record.model_sha256:
        raise ArtefactError(
            f"{model} is not the model of {FILE} (SHA-256 {found[:12]}, recorded {record.model_sha256[:12]})",
            remedy=f"make it anew: {_ANEW}",
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
