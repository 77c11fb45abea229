from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from edge_dsc.evaluate.metrics import classification_metrics
from edge_dsc.training import RECIPES
from edge_dsc.training.run_folder import (
    METRICS,
    Mixed,
    RunMetrics,
    Teacher,
    TrainedNetwork,
    TrainingRecord,
    TrainState,
    load_state,
    load_training_record,
    package_versions,
    save_state,
    save_training_record,
)
from engines.errors import ArtefactError
from engines.files import canonical_json, sha256_bytes

MODEL = b"a network"
RECORD = TrainingRecord(
    architecture="dsc",
    network=TrainedNetwork(source="dsc", config_sha256="3" * 64),
    labels=("clear", "focal"),
    recipe=asdict(RECIPES["quick"]["dsc"]),
    seed=3,
    split_sha256="1" * 64,
    model_sha256=sha256_bytes(MODEL),
    parameters={"feature_extractor": 4640, "trainable": 406_307, "total": 406_499},
    history={"loss": [1.5, 0.25], "accuracy": [0.5, 1.0]},
    best_epoch=2,
    interrupted=False,
    skipped=(("clear/x.png", "is empty"),),
    seconds=12.5,
    versions={"python": "3.11"},
    created="2026-01-01T00:00:00+00:00",
    edge_dsc="0.1.0",
    parent_sha256="2" * 64,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "model.keras").write_bytes(MODEL)
    save_training_record(tmp_path, RECORD)
    return tmp_path


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_record_is_saved_and_loaded(run: Path) -> None:
    assert load_training_record(run) == RECORD


def test_an_edited_record_is_refused(run: Path) -> None:
    edit(run / "training.json", lambda document: document["labels"].reverse())
    with pytest.raises(
        ArtefactError,
        match=r"training\.json was edited after it was made \(make it again: edge-dsc train .* --overwrite\)",
    ):
        load_training_record(run)


def as_version_1(document: dict[str, Any]) -> None:
    """Version 1 had no seal, and at first no parent."""
    document["schema_version"] = 1
    del document["record_sha256"], document["parent_sha256"], document["network"]


def test_a_record_of_version_1_is_read(run: Path) -> None:
    edit(run / "training.json", as_version_1)
    loaded = load_training_record(run)
    assert loaded.parent_sha256 is None
    assert (loaded.labels, loaded.recipe, loaded.history) == (RECORD.labels, RECORD.recipe, RECORD.history)
    edit(run / "training.json", lambda document: document.update(parent_sha256="2" * 64))
    assert load_training_record(run) == replace(RECORD, network=TrainedNetwork(source="dsc"))


def test_a_record_of_version_2_is_read(run: Path) -> None:
    """It had no network but a name, and a recipe of other fields, which is kept as it is."""
    recipe = {"name": "paper", "rotation": 10.0, "zoom": 0.1, "flip": True}

    def turn_back(document: dict[str, Any]) -> None:
        del document["network"], document["record_sha256"]
        body = {key: value for key, value in document.items() if key not in ("kind", "schema_version")}
        body["recipe"] = recipe
        document.clear()
        document.update(
            kind="edge-dsc/training-record",
            schema_version=2,
            **body,
            record_sha256=sha256_bytes(canonical_json(body)),
        )

    edit(run / "training.json", turn_back)
    found = load_training_record(run)
    assert found == replace(RECORD, network=TrainedNetwork(source="dsc"), recipe=recipe)
    assert (found.network.size, found.network.weights) == (224, "none")


def test_a_record_of_version_4_is_read(run: Path) -> None:
    """It knew no teachers."""

    def turn_back(document: dict[str, Any]) -> None:
        del document["record_sha256"]
        assert document.pop("teachers") == []
        body = {key: value for key, value in document.items() if key not in ("kind", "schema_version")}
        document.update(schema_version=4, record_sha256=sha256_bytes(canonical_json(body)))

    taught = Teacher(run="cnn", model_sha256="4" * 64, split_sha256="1" * 64)
    save_training_record(run, replace(RECORD, teachers=(taught,)))
    assert load_training_record(run).teachers == (taught,)
    save_training_record(run, RECORD)
    edit(run / "training.json", turn_back)
    assert load_training_record(run) == RECORD
    """It knew no synthetic images."""

    def turn_back(document: dict[str, Any]) -> None:
        del document["record_sha256"], document["synthetic"]
        body = {key: value for key, value in document.items() if key not in ("kind", "schema_version")}
        document.update(schema_version=4, record_sha256=sha256_bytes(canonical_json(body)))

    edit(run / "training.json", turn_back)
    assert load_training_record(run) == RECORD
    mixed = Mixed(
        folder="made", synthesis_sha256="4" * 64, generator_sha256="5" * 64, label="focal", images=9, share=0.3, mixed=5
    )  # fmt: skip
    save_training_record(run, replace(RECORD, synthetic=mixed))
    assert load_training_record(run).synthetic == mixed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("labels"), "missing required field `labels`"),
        (lambda d: d.update(seed="3"), r"Expected `int`, got `str` - at `\$\.seed`"),
        (lambda d: d.update(mood="good"), "unknown field `mood`"),
        (
            lambda d: d.update(schema_version=6),
            "schema version 6, this edge-dsc reads 1 and 2 and 3 and 4 and 5",
        ),
    ],
)
def test_a_damaged_record_is_refused(
    run: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(run / "training.json", as_version_1)
    edit(run / "training.json", change)
    with pytest.raises(ArtefactError, match=message):
        load_training_record(run)


def test_the_model_must_be_the_records(run: Path) -> None:
    (run / "model.keras").write_bytes(b"another")
    with pytest.raises(ArtefactError, match=r"model\.keras is not the model of training\.json \(SHA-256 "):
        load_training_record(run)
    (run / "model.keras").unlink()
    with pytest.raises(ArtefactError, match=r"there is no .*model\.keras \(make it again"):
        load_training_record(run)


def test_metrics_are_saved_and_loaded(tmp_path: Path) -> None:
    metrics = classification_metrics(np.array([0, 1]), np.eye(2), ("a", "b"))
    found = RunMetrics(model_sha256="0" * 64, evaluation=metrics, test=metrics, held_out=metrics)
    METRICS.save(tmp_path / "metrics.json", found)
    assert METRICS.load(tmp_path / "metrics.json") == found
    body = json.loads((tmp_path / "metrics.json").read_text())
    assert (body["schema_version"], body["test"]["confusion"]) == (1, [[1, 0], [0, 1]])
    assert body["held_out"]["per_class"]["b"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}


def test_versions_name_what_decides_a_run() -> None:
    assert {"python", "numpy"} <= set(package_versions())


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, other, strict=True)
    )


def make_state(path: Path) -> TrainState:
    return TrainState(
        file=path,
        settings={"seed": 1, "recipe": {"name": "quick"}},
        epoch=2,
        history={"loss": [0.5, 0.25], "validation_loss": [1.0, float("nan")]},
        variables=[np.arange(4.0), np.array([7], np.uint32)],
        optimizer=[np.array(3)],
        best_epoch=1,
        best_weights=[np.ones((2, 2))],
    )


def test_a_state_is_saved_and_loaded(tmp_path: Path) -> None:
    state = make_state(tmp_path / "state.npz")
    save_state(state)
    loaded = load_state(tmp_path / "state.npz")
    for name in ("file", "settings", "epoch", "best_epoch"):
        assert getattr(loaded, name) == getattr(state, name)
    assert loaded.history["loss"] == [0.5, 0.25]
    assert np.isnan(loaded.history["validation_loss"][1])
    for name in ("variables", "optimizer", "best_weights"):
        assert equal(getattr(loaded, name), getattr(state, name))


def test_a_state_without_a_file_stays_in_memory(tmp_path: Path) -> None:
    state = make_state(tmp_path / "state.npz")
    state.file = None
    save_state(state)
    assert not list(tmp_path.iterdir())


def put_header(path: Path, **changes: object) -> None:
    """Write a state with a changed header."""
    save_state(make_state(path))
    with np.load(path) as stored:
        arrays = dict(stored)
    header = {**json.loads(arrays.pop("header").tobytes()), **changes}
    np.savez(path, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema version 2"),
        ({"epoch": "2"}, r"Expected `int`, got `str` - at `\$\.epoch`"),
        ({"mood": 1}, "unknown field `mood`"),
        ({"counts": {"variables": 2}}, "optimizer"),
        ({"counts": {"variables": 3, "optimizer": 1, "best_weights": 1}}, "variables2"),
    ],
)
def test_a_state_with_another_header_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    put_header(tmp_path / "state.npz", **changes)
    with pytest.raises(ArtefactError, match=rf"state\.npz is no readable training state: .*{message}"):
        load_state(tmp_path / "state.npz")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04" + bytes(40), None])
def test_a_damaged_state_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "state.npz"
    save_state(make_state(path))
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(
        ArtefactError, match=r"state\.npz is .*\(begin anew: edge-dsc train DATA --overwrite\)"
    ):
        load_state(path)


def test_a_state_without_an_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pipe = tmp_path / "state.npz", tmp_path / "pipe"
    save_state(make_state(path))
    os.mkfifo(pipe)
    with pytest.raises(ArtefactError, match=r"no readable training state: .*not a regular file"):
        load_state(pipe)
    monkeypatch.setattr("edge_dsc.training.run_folder._LARGEST_STATE", 100)
    with pytest.raises(ArtefactError, match=r"training state: it unpacks to \d+ bytes, the limit is 100 "):
        load_state(path)


def test_a_state_without_arrays_of_ours_or_with_a_negative_epoch_is_refused(tmp_path: Path) -> None:
    state = TrainState(file=tmp_path / "state.npz", settings={}, epoch=-1)
    save_state(state)
    with pytest.raises(ArtefactError, match="no readable training state"):
        load_state(tmp_path / "state.npz")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("header", b"{}")
    with pytest.raises(ArtefactError, match="no readable training state"):
        load_state(tmp_path / "other.npz")
