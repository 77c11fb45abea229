"""The files of a run folder: training record, metrics, and the state of an unfinished run."""

from __future__ import annotations

import io
import json
import platform
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge_dsc.evaluate.metrics import Metrics
from edge_dsc.networks import INPUT_SIDE, NO_WEIGHTS, Network
from edge_dsc.networks.separable import Separation
from engines.contract import LARGEST_MODEL, Count, Labels, Name, PathName, Seconds, Seed, Sha256, Text
from engines.errors import ArtefactError
from engines.files import DocumentKind, read_regular, require_unpacked, sha256_file, write_bytes

RECORD_FILE = "training.json"
MODEL_FILE = "model.keras"
METRICS_FILE = "metrics.json"
STATE_FILE = "state.npz"
_LARGEST_STATE = 4 * LARGEST_MODEL  # the weights, the best ones, and the two moments of Adam
_TRAIN_AGAIN = "edge-dsc train DATA --out RUN --overwrite"
BEGIN_ANEW = "begin anew: edge-dsc train DATA --overwrite"
_PACKAGES = ("tensorflow", "keras", "numpy", "opencv-python-headless", "opencv-python")


class TrainedNetwork(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which network a run trained, beside its name.

    Attributes:
        size: Height and width of its input.
        config_sha256: :func:`edge_dsc.networks.identify` of ``model.keras``; None in records of before version 3.
        source: What ``--arch`` named: a network, a file's name, or a function.
        source_sha256: Hash of that file.
        weights: What it started from: ``none``, ``imagenet`` or a file's name.
        weights_sha256: Hash of that file.
        unfreeze: Layers of the features that were trained, as asked for; None where nothing was asked.
    """

    size: Count = INPUT_SIDE
    config_sha256: Sha256 | None = None
    source: Text
    source_sha256: Sha256 | None = None
    weights: Text = NO_WEIGHTS
    weights_sha256: Sha256 | None = None
    unfreeze: Count | None = None

    @classmethod
    def of(cls, network: Network) -> TrainedNetwork:
        """Describe a network before it is trained."""
        names = (name for name in cls.__struct_fields__ if name != "config_sha256")
        return cls(**{name: getattr(network, name) for name in names})


class Refit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of the recipe of a run that trained on all images, and so cannot be judged on any of them.

    Attributes:
        run: Name of the run whose recipe it is.
        model_sha256: Hash of that run's ``model.keras``.
        split_sha256: Of that run's split, which says what judged it.
        held_out: How right that run's network is on the images that were held back from it: the accuracy of the
            recipe, on fewer images, and not of the network beside this record.
    """

    run: Text
    model_sha256: Sha256
    split_sha256: Sha256
    held_out: Metrics


class Teacher(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run whose network's answers another one was trained to follow.

    Attributes:
        run: Its name.
        model_sha256: Hash of its ``model.keras``.
        split_sha256: Of its split: none of the images that it learnt from is held back from the one that it taught.
    """

    run: Text
    model_sha256: Sha256
    split_sha256: Sha256


class Mixed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The synthetic images that trained a run beside the real ones.

    Attributes:
        folder: Name of the folder that they came from.
        synthesis_sha256: Hash of its ``synthesis.json``, which names every image and the generator.
        generator_sha256: Hash of the generator that made them.
        label: Their class.
        images: How many there are.
        share: Of the images of that class in every epoch, as it was asked for.
        mixed: Synthetic images that every epoch drew.
    """

    folder: Text
    synthesis_sha256: Sha256
    generator_sha256: Sha256
    label: Name
    images: Count
    share: Annotated[float, Meta(gt=0, lt=1)]
    mixed: Count


class TrainingRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run did.

    Attributes:
        architecture: Name of the network: ``dsc``, ``resnet50v2``, or what a file or a function gave.
        network: Which network that is.
        labels: Class names, in the order of the outputs.
        recipe: The recipe's values; a mapping, because recipes of other versions have other fields.
        seed: The run's seed.
        split_sha256: :attr:`edge_dsc.data.Split.sha256`.
        model_sha256: Hash of ``model.keras``.
        parameters: ``feature_extractor`` (trainable), ``trainable`` and ``total``.
        history: Lists of figures by name, one figure per epoch.
        best_epoch: The epoch whose weights were kept, counted from 1.
        interrupted: Whether the user ended it early.
        skipped: Damaged images, (path, reason).
        seconds: Wall-clock time of training in the last call.
        versions: Package versions.
        created: UTC time, ISO 8601.
        edge_dsc: Version of edge-dsc.
        parent_sha256: Hash of the ``model.keras`` that this one was made of: fine-tuned for INT8, or separated.
        separation: For a separable twin, what became of every convolution.
        temperature: Fitted on the validation part, for the contract of the exported model; that of the recipe's run
            after a refit; 1 in records of before version 4, which knew none.
        refit: Where all images trained: what is known of the recipe.
        teachers: The runs whose mean answer it was trained to follow beside the labels.
        synthetic: The synthetic images that were mixed in; None in records of before version 5.
    """

    architecture: PathName
    network: TrainedNetwork
    labels: Labels
    recipe: Mapping[str, str | bool | int | float]
    seed: Seed
    split_sha256: Sha256
    model_sha256: Sha256
    parameters: Mapping[Text, Count]
    history: Mapping[Text, list[float]]
    best_epoch: Count
    interrupted: bool
    skipped: tuple[tuple[str, str], ...]
    seconds: Seconds
    versions: Mapping[Text, Text]
    created: Text
    edge_dsc: Text
    parent_sha256: Sha256 | None = None
    separation: Separation | None = None
    temperature: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    refit: Refit | None = None
    teachers: tuple[Teacher, ...] = ()
    synthetic: Mixed | None = None


def _from_version_1(body: dict[str, Any]) -> dict[str, Any]:
    """Fill in what version 1 gained under its own number; it had no seal."""
    return {"parent_sha256": None, **body}


def _from_version_2(body: dict[str, Any]) -> dict[str, Any]:
    """Version 2 knew the paper's two networks alone, which the name says all of, and no twin."""
    network = msgspec.to_builtins(TrainedNetwork(source=body["architecture"]))
    return {**body, "network": network, "separation": None}


def _from_version_3(body: dict[str, Any]) -> dict[str, Any]:
    """Version 3 knew neither a temperature nor a refit."""
    return {**body, "temperature": 1.0, "refit": None}


def _from_version_4(body: dict[str, Any]) -> dict[str, Any]:
    """Version 4 knew neither teachers nor synthetic images."""
    return {**body, "teachers": [], "synthetic": None}


TRAINING_RECORD = DocumentKind(
    name="edge-dsc/training-record",
    version=5,
    body=TrainingRecord,
    renew=_TRAIN_AGAIN,
    seal="record_sha256",
    sealed_from=2,
    older={1: _from_version_1, 2: _from_version_2, 3: _from_version_3, 4: _from_version_4},
)


def save_training_record(run: Path, record: TrainingRecord) -> None:
    """Write ``training.json``; it marks a run folder as complete."""
    TRAINING_RECORD.save(run / RECORD_FILE, record)


def load_training_record(run: Path) -> TrainingRecord:
    """Read a run's record and hold its model against it.

    Raises:
        ArtefactError: No run, an unreadable or edited record, no model, or a model that is not the record's.
    """
    record = TRAINING_RECORD.load(run / RECORD_FILE)
    model = run / MODEL_FILE
    if not model.is_file():
        raise ArtefactError(f"there is no {model}", remedy=f"make it again: {_TRAIN_AGAIN}")
    found = sha256_file(model)
    if found != record.model_sha256:
        raise ArtefactError(
            f"{model} is not the model of {RECORD_FILE} (SHA-256 {found[:12]}, recorded {record.model_sha256[:12]})",
            remedy=f"make it again: {_TRAIN_AGAIN}",
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


class RunMetrics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How well a trained network answers the images that were held back from training; ``metrics.json``.

    Attributes:
        model_sha256: Hash of ``model.keras``.
        evaluation: On the part of that name.
        test: On the part of that name.
        held_out: On both together.
    """

    model_sha256: str
    evaluation: Metrics
    test: Metrics
    held_out: Metrics


METRICS = DocumentKind(name="edge-dsc/metrics", version=1, body=RunMetrics, renew=_TRAIN_AGAIN)


@dataclass(kw_only=True)
class TrainState:
    """How far a run has come.

    Attributes:
        file: Where it is kept after every epoch; None for a run that cannot be resumed.
        settings: What decides the run: network, recipe, seed, split. A run goes on only with equal ones.
        epoch: Whole epochs done.
        history: Lists of figures by name, one figure per epoch.
        variables: The model's variables, with the state of its random generators.
        optimizer: The optimizer's variables.
        best_epoch: Epoch of the lowest validation loss, counted from 1; 0 before the first.
        best_weights: The model's weights after that epoch.
    """

    file: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    epoch: int = 0
    history: dict[str, list[float]] = field(default_factory=dict)
    variables: list[NDArray[Any]] = field(default_factory=list)
    optimizer: list[NDArray[Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_weights: list[NDArray[Any]] = field(default_factory=list)


class _StateHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a saved state holds beside its arrays, as JSON in an array of bytes."""

    schema_version: int
    settings: dict[str, Any]
    epoch: Count
    history: dict[str, list[float]]
    best_epoch: int
    counts: dict[str, int]  # how many arrays of each kind there are


_STATE_SCHEMA_VERSION = 1
_ARRAYS = ("variables", "optimizer", "best_weights")


def save_state(state: TrainState) -> None:
    """Write the state to its file, if it has one, atomically: a killed run leaves the last whole epoch."""
    if state.file is None:
        return
    header = _StateHeader(
        schema_version=_STATE_SCHEMA_VERSION,
        settings=dict(state.settings),
        epoch=state.epoch,
        history=state.history,
        best_epoch=state.best_epoch,
        counts={name: len(getattr(state, name)) for name in _ARRAYS},
    )
    encoded = json.dumps(
        msgspec.to_builtins(header)
    ).encode()  # keeps a loss that is no number; msgspec makes it null
    arrays = {f"{name}{index}": value for name in _ARRAYS for index, value in enumerate(getattr(state, name))}
    stream = io.BytesIO()
    np.savez(stream, header=np.frombuffer(encoded, np.uint8), **arrays)
    write_bytes(state.file, stream.getvalue())


def load_state(path: Path, *, remedy: str = BEGIN_ANEW) -> TrainState:
    """Read a saved state.

    Args:
        path: The file.
        remedy: What to do where it cannot be used.

    Raises:
        ArtefactError: Missing, damaged, or of another schema version.
    """
    try:
        require_unpacked(path, _LARGEST_STATE)
        with np.load(io.BytesIO(read_regular(path, _LARGEST_STATE)), allow_pickle=False) as stored:
            header = msgspec.convert(json.loads(stored["header"].tobytes()), _StateHeader, strict=True)
            if header.schema_version != _STATE_SCHEMA_VERSION:
                raise ValueError(f"schema version {header.schema_version}")
            variables, optimizer, best_weights = (
                [stored[f"{name}{index}"] for index in range(header.counts[name])] for name in _ARRAYS
            )
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        RuntimeError,
        MemoryError,
    ) as error:
        raise ArtefactError(f"{path} is no readable training state: {error}", remedy=remedy) from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ArtefactError(f"{path} is damaged: {error}", remedy=remedy) from error
    return TrainState(
        file=path,
        settings=header.settings,
        epoch=header.epoch,
        history=header.history,
        variables=variables,
        optimizer=optimizer,
        best_epoch=header.best_epoch,
        best_weights=best_weights,
    )
