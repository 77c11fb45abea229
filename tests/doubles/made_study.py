"""Run folders as the trainings of a study leave them, with made answers: nobody trained."""

from __future__ import annotations

from collections.abc import Sequence

from edge_dsc.study.trainings import (
    ANSWERS,
    ANSWERS_FILE,
    REFERENCE,
    AnsweredImage,
    Answers,
    BuiltFile,
    Study,
    Training,
)
from edge_dsc.training.run_folder import MODEL_FILE, TrainedNetwork, TrainingRecord, save_training_record
from engines.files import sha256_file


def leave_record(
    study: Study, training: Training, *, epochs: int = 3, interrupted: bool = False
) -> TrainingRecord:
    """Leave the run folder of a training that went to its end."""
    run = study.run_folder(training)
    run.mkdir(parents=True, exist_ok=True)
    (run / MODEL_FILE).write_bytes(f"model of {training.title}".encode())
    figures = [0.5 + 0.1 * epoch for epoch in range(epochs)]
    record = TrainingRecord(
        architecture=training.setting.network,
        network=TrainedNetwork(source=training.setting.network),
        labels=study.plan.labels,
        recipe={"name": study.plan.recipe},
        seed=training.seed,
        split_sha256="0" * 64,
        model_sha256=sha256_file(run / MODEL_FILE),
        parameters={"feature_extractor": 4_640, "trainable": 406_307, "total": 406_499},
        history=dict.fromkeys(("loss", "accuracy", "validation_loss", "validation_accuracy"), figures),
        best_epoch=2,
        interrupted=interrupted,
        skipped=(),
        seconds=1.0,
        versions={},
        created="2026-01-01T00:00:00+00:00",
        edge_dsc="0",
    )
    save_training_record(run, record)
    return record


def leave_answers(
    study: Study,
    training: Training,
    wrong: Sequence[int],
    *,
    images: int = 12,
    notes: tuple[str, ...] = ("INT8 is slower here",),
) -> Answers:
    """Leave the answers of a training: test images 0, 1, ... of two patients each two, some of them wrong.

    Image n is of class n modulo 3; a wrong one gets the next class. Training and validation have three images each,
    all right. INT8 is wrong on the first image, too.
    """
    record = leave_record(study, training)
    labels = study.plan.labels

    def answer(index: int, missed: bool) -> tuple[float, ...]:
        top = (index + missed) % 3
        return tuple(0.8 if place == top else 0.1 for place in range(3))

    def image(part: str, index: int) -> AnsweredImage:
        judges = part == "test"
        probabilities = {REFERENCE: answer(index, judges and index in wrong)}
        if judges:
            probabilities["onnxruntime int8"] = answer(index, index in {*wrong, 0})
        return AnsweredImage(
            path=f"{labels[index % 3]}/{part}{index}.png",
            patient=f"{part}{index // 2}",
            label=labels[index % 3],
            part=part,
            probabilities=probabilities,
        )

    found = Answers(
        labels=labels,
        model_sha256=record.model_sha256,
        onnx_bytes=1_600_000,
        multiply_adds=36_453_056,
        engines=tuple(
            BuiltFile(
                file=f"{training.setting.network}-{precision}.onnxruntime.engine",
                runtime="onnxruntime",
                precision=precision,
                engine_bytes=size,
                engine_sha256="1" * 64,
                answered_by="engine",
            )
            for precision, size in (("fp32", 1_600_000), ("int8", 420_000))
        ),
        images=(
            *(image(part, index) for part in ("train", "validation") for index in range(3)),
            *(image("test", index) for index in range(images)),
        ),
        notes=notes,
    )
    ANSWERS.save(study.run_folder(training) / ANSWERS_FILE, found)
    return found
