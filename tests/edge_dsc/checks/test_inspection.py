"""``inspect`` shows a document of ours as it is, and refuses one that was edited or has a wrong field."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calibration.table import CalibrationImage, CalibrationTable, save_table
from edge_dsc.checks.inspection import inspect_path
from edge_dsc.data import PARTS, Sample, Split, save_split
from edge_dsc.evaluate.evaluation import EVALUATION, Evaluation
from edge_dsc.evaluate.metrics import classification_metrics
from edge_dsc.training.run_folder import METRICS, TRAINING_RECORD, RunMetrics, TrainedNetwork, TrainingRecord
from engines.errors import ArtefactError, BadInputError
from engines.trt.cache import MEMORY, MemoryChoice, MemoryChoices


def write_table(path: Path) -> None:
    images = tuple(CalibrationImage(f"{index}.png", "clear", f"{index:064}") for index in range(128))
    table = CalibrationTable(
        method="minmax",
        parameters={},
        seed=0,
        ranges={"x": (0.0, 1.0)},
        onnx_sha256="0" * 64,
        preprocess_sha256="1" * 64,
        images=images,
        versions={},
    )
    save_table(path, table)


def write_split(path: Path) -> None:
    parts = {part: (Sample(path=part, label="a", patient=part, sha256=part),) for part in PARTS}
    save_split(Split(root=path.parent, labels=("a", "b"), seed=0, parts=parts), path)


def write_record(path: Path) -> None:
    record = TrainingRecord(
        architecture="dsc",
        network=TrainedNetwork(source="dsc"),
        labels=("a", "b"),
        recipe={"name": "quick"},
        seed=0,
        split_sha256="0" * 64,
        model_sha256="1" * 64,
        parameters={"total": 1},
        history={"loss": [1.0]},
        best_epoch=1,
        interrupted=False,
        skipped=(),
        seconds=1.0,
        versions={},
        created="2026-01-01T00:00:00+00:00",
        edge_dsc="0.1.0",
    )
    TRAINING_RECORD.save(path, record)


def metrics() -> Any:
    import numpy as np

    answers = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    return classification_metrics(np.array([0, 1]), answers, ("a", "b"))


def write_evaluation(path: Path) -> None:
    found = Evaluation(engine="x.engine", images=2, skipped=(), metrics=metrics(), agreement=None)
    EVALUATION.save(path, found)


def write_metrics(path: Path) -> None:
    METRICS.save(
        path, RunMetrics(model_sha256="0" * 64, evaluation=metrics(), test=metrics(), held_out=metrics())
    )


def write_memory(path: Path) -> None:
    choice = MemoryChoice(
        gpu={"gpu": "Orin"},
        runtime_version="10.3.0",
        batch=1,
        kind="mapped",
        medians_us={"device": 80.0, "mapped": 50.0},
        created="2026-01-01T00:00:00+00:00",
    )
    MEMORY.save(path, MemoryChoices(engine_sha256="0" * 64, choices=(choice,)))


# How it is written, its kind, a field to change, the value it gets, and why that is refused.
DOCUMENTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...], Any, str]] = {
    "calibration table": (write_table, ("ranges", "x"), [0.0, 2.0], "was edited after it was made"),
    "split": (write_split, ("seed",), 7, "was edited after it was made"),
    "training record": (write_record, ("best_epoch",), 2, "was edited after it was made"),
    "memory choices": (write_memory, ("engine_sha256",), "1" * 64, "was edited after it was made"),
    "evaluation": (
        write_evaluation,
        ("metrics", "accuracy"),
        "good",
        r"Expected `float`, got `str`.*accuracy",
    ),
    "metrics": (write_metrics, ("test", "accuracy"), "good", r"Expected `float`, got `str`.*accuracy"),
}


@pytest.mark.parametrize("what", DOCUMENTS)
def test_a_sound_document_is_shown_and_a_changed_one_refused(what: str, tmp_path: Path) -> None:
    write, (*folders, field), value, words = DOCUMENTS[what]
    path = tmp_path / "document.json"
    write(path)
    document = json.loads(path.read_text())
    assert inspect_path(path) == {"what": what, "path": str(path), "document": document}
    place = document
    for name in folders:
        place = place[name]
    place[field] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match=words):
        inspect_path(path)


def test_a_run_folder_says_which_file_it_refuses(tmp_path: Path) -> None:
    write_table(tmp_path / "calibration.json")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "split.json").write_text('{"kind": "edge-dsc/split", "schema_version": 99}')
    files = {entry["file"]: entry["what"] for entry in inspect_path(tmp_path)["files"]}
    assert files["calibration.json"] == "calibration table"
    assert files["notes.txt"] == "other"
    assert "has schema version 99" in files["split.json"]


def test_a_keras_model_is_held_against_its_run_or_is_at_least_whole(tmp_path: Path) -> None:
    model = tmp_path / "other.keras"
    with zipfile.ZipFile(model, "w") as archive:
        archive.writestr("config.json", "{}" * 1000)
    whole = model.read_bytes()
    assert inspect_path(model)["sha256"] == hashlib.sha256(whole).hexdigest()
    model.write_bytes(whole[:-10])
    with pytest.raises(ArtefactError, match=r"other\.keras is no whole Keras model"):
        inspect_path(model)
    model.rename(tmp_path / "model.keras").write_bytes(whole)
    assert inspect_path(tmp_path / "model.keras")["what"] == "Keras model"
    write_record(tmp_path / "training.json")
    files = {entry["file"]: entry["what"] for entry in inspect_path(tmp_path)["files"]}
    assert (
        files["model.keras"].startswith("refused:")
        and "is not the model of training.json" in files["model.keras"]
    )


@pytest.mark.parametrize("kind", ["edge-dsc/\x1b[2Jx", "edge-dsc/", "edge-dsc/a b", "x" * 10**6])
def test_a_kind_that_none_of_ours_has_is_refused_in_a_short_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({"kind": kind}))
    with pytest.raises(BadInputError, match="is no document of edge-dsc") as refused:
        inspect_path(path)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 2100


def test_what_a_command_printed_is_shown_as_it_is(tmp_path: Path) -> None:
    printed = {"kind": "edge-dsc/debug-result", "schema_version": 1, "anything": True}
    path = tmp_path / "printed.json"
    path.write_text(json.dumps(printed))
    assert inspect_path(path) == {"what": "debug result", "path": str(path), "document": printed}
