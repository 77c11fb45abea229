from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_dsc.data import Sample
from edge_dsc.evaluate.agreement import LabelledImages, compare_answers
from edge_dsc.evaluate.evaluation import (
    EVALUATION,
    Evaluation,
    evaluate_runner,
    format_evaluation,
    format_validation,
    read_accuracies,
)
from edge_dsc.evaluate.metrics import classification_metrics
from engines.contract import ModelContract
from engines.errors import ArtefactError, BadInputError, NotComparableError
from engines.record import BatchRange, EngineRecord, Precision, Validation

LABELS = ("clear", "diffuse", "focal")


class StubRunner:
    """Answers by the brightness of the picture: class 0 below 100, 1 below 200, else 2; or as ``answer`` says."""

    thread_safe = True
    together = 1
    slots = 1

    def __init__(
        self,
        name: str = "stub.engine",
        *,
        labels: tuple[str, ...] = LABELS,
        answer: Callable[[int], int] = lambda grey: grey // 100,
    ) -> None:
        self._answer = answer
        self.record = EngineRecord(
            engine=name,
            engine_sha256="0" * 64,
            engine_bytes=1,
            runtime="onnxruntime",
            runtime_version="1",
            platform={},
            precision=Precision.FP32,
            batch=BatchRange(),
            contract=ModelContract(labels=labels, architecture="dsc"),
            onnx="model.onnx",
            onnx_sha256="0" * 64,
            calibration_sha256=None,
            layers={},
            layers_source="",
            build_seconds=0.0,
            build_command="",
            edge_dsc="0",
            created="",
        )

    def run(self, batch: np.ndarray) -> np.ndarray:
        greys = batch.reshape(len(batch), -1)[:, 0]
        return np.eye(3, dtype=np.float32)[[self._answer(int(grey)) for grey in greys]] * 0.75 + 0.125


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Grey pictures: 50, 60, 150, 160, 250 and a damaged one."""
    for grey in (50, 60, 150, 160, 250):
        cv2.imwrite(str(tmp_path / f"{grey}.png"), np.full((224, 224), grey, np.uint8))
    (tmp_path / "damaged.png").write_bytes(b"no image")
    return tmp_path


def samples(**labels: str) -> list[Sample]:
    return [
        Sample(path=f"{name.lstrip('x')}.png", label=label, patient=name, sha256="0" * 64)
        for name, label in labels.items()
    ]


SAMPLES = samples(x50="clear", damaged="clear", x60="diffuse", x150="diffuse", x160="diffuse", x250="focal")


def test_an_engine_alone(folder: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    found = evaluate_runner(
        StubRunner(), folder, SAMPLES, threads=2, progress=lambda *call: calls.append(call)
    )
    assert (found.engine, found.images, found.agreement) == ("stub.engine", 5, None)
    assert [(Path(path).name, reason) for path, reason in found.skipped] == [
        ("damaged.png", found.skipped[0][1])
    ]
    assert "is damaged or no image" in found.skipped[0][1]
    assert found.metrics.confusion == ((1, 0, 0), (1, 2, 0), (0, 0, 1))
    assert found.metrics.accuracy == 4 / 5
    assert calls == [("evaluating stub.engine", done, 6) for done in range(1, 7)]


def test_an_engine_against_a_reference(folder: Path) -> None:
    def brighter(grey: int) -> int:
        return min(2, (grey + 45) // 100)

    reference = StubRunner("reference.engine")
    found = evaluate_runner(
        StubRunner("candidate.engine", answer=brighter), folder, SAMPLES, reference=reference
    )
    agreement = found.agreement
    assert agreement is not None
    assert (agreement.reference, agreement.images, agreement.same_top1) == ("reference.engine", 5, 3)
    assert [(Path(flip.path).name, flip.reference, flip.candidate) for flip in agreement.flipped] == [
        ("60.png", "clear", "diffuse"),
        ("160.png", "diffuse", "focal"),
    ]
    assert (agreement.lost, agreement.won) == (1, 1)
    assert agreement.accuracy.reference == agreement.accuracy.candidate == found.metrics.accuracy == 4 / 5
    text = format_evaluation(found)
    assert "candidate.engine: 5 images, 1 skipped" in text
    assert "160.png is diffuse: diffuse -> focal" in text


def test_what_cannot_be_evaluated(folder: Path) -> None:
    with pytest.raises(
        BadInputError, match=r"stub\.engine does not know the class cats \(name .*: clear, diffuse, focal\)"
    ):
        evaluate_runner(StubRunner(), folder, samples(x50="cats"))
    with pytest.raises(BadInputError, match=r"none of the 1 images could be read \(first: .*damaged\.png"):
        evaluate_runner(StubRunner(), folder, samples(damaged="clear"))
    with pytest.raises(
        NotComparableError, match=r"other\.engine knows clear, focal, stub\.engine knows clear,"
    ):
        other = StubRunner("other.engine", labels=("clear", "focal"))
        evaluate_runner(StubRunner(), folder, SAMPLES, reference=other)


METRICS = classification_metrics(np.array([0, 1, 2, 2]), np.eye(3)[[0, 1, 2, 0]], LABELS)


def evaluation(**changes: Any) -> Evaluation:
    images = LabelledImages(true=np.array([0, 1]), labels=LABELS, paths=["a", "b"], patients=["a", "b"])
    agreement = compare_answers(images, np.eye(3)[[0, 1]], np.eye(3)[[0, 2]], name="FP32")
    found = {"engine": "a.b.engine", "images": 4, "skipped": (("x", "bad"),), "metrics": METRICS}
    return Evaluation(**{**found, "agreement": agreement, **changes})


@pytest.mark.parametrize("agreement", [True, False])
def test_an_evaluation_is_saved_and_loaded(tmp_path: Path, agreement: bool) -> None:
    found = evaluation() if agreement else evaluation(agreement=None)
    EVALUATION.save(tmp_path / "found.json", found)
    assert EVALUATION.load(tmp_path / "found.json") == found
    assert read_accuracies([tmp_path / "found.json"]) == {"a.b": 3 / 4}


def test_an_evaluation_of_version_1_is_read(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    EVALUATION.save(path, evaluation())
    document = {**json.loads(path.read_text()), "schema_version": 1}
    path.write_text(json.dumps(document))
    assert EVALUATION.load(path) == evaluation()
    # The first releases wrote an agreement without paired statistics, under the same number.
    early = {
        "reference": "FP32",
        "images": 2,
        "same_top1": 1,
        "largest_difference": 1.0,
        "flipped": [["b", "x", "y"]],
    }
    path.write_text(json.dumps({**document, "agreement": early}))
    assert EVALUATION.load(path) == evaluation(agreement=None)
    assert read_accuracies([path]) == {"a.b": 3 / 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": {}}, r"missing required field `count` - at `\$\.metrics`"),
        ({"metrics": None}, r"Expected `object`, got `null` - at `\$\.metrics`"),
        ({"kind": "edge-dsc/split"}, r"is not an edge-dsc/evaluation document"),
        (
            {"schema_version": 4},
            r"schema version 4, this edge-dsc reads 1 and 2 and 3 \(make it again: edge-dsc evaluate",
        ),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "found.json"
    EVALUATION.save(path, evaluation())
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtefactError, match=message):
        read_accuracies([path])


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ((0, 0), (0, 1), "50.00 points lost, BEYOND the budget of 1"),
        ((0, 1), (0, 0), "50.00 points gained, within the budget of 1"),
        ((0, 0), (0, 0), "0.00 points lost, within the budget of 1"),
    ],
)
def test_a_gate_says_lost_or_gained(before: tuple[int, ...], after: tuple[int, ...], text: str) -> None:
    images = LabelledImages(true=np.array([0, 0]), labels=LABELS, paths=["a", "b"], patients=["a", "b"])
    found = Validation(
        images="all",
        images_sha256="0",
        answered_by="the engine",
        max_drop=1,
        skipped=0,
        agreement=compare_answers(images, np.eye(3)[list(before)], np.eye(3)[list(after)], name="FP32"),
    )
    assert format_validation(found, precision="int8").splitlines()[0] == f"accuracy gate: {text}"
