"""The end of a training run: measured, written, and marked as complete."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edge_dsc.data.split import Split, save_split
from edge_dsc.evaluation.metrics import Metrics, classification_metrics
from edge_dsc.networks import feature_extractor_parameters, save_network
from edge_dsc.pictures import draw_confusion, draw_curves
from edge_dsc.training import record as records
from edge_dsc.training.loop import predict
from edge_dsc.training.options import TrainOptions
from edge_dsc.training.state import FILE as STATE_FILE
from edge_dsc.training.state import TrainState
from engines.files import atomic_path, sha256_file, write_document
from engines.packages import load

Array = Any
Model = Any


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training run gave.

    Attributes:
        run: The run folder.
        record: Its record.
        metrics: By part: ``evaluation``, ``test`` and ``held_out``, both together.
        split: Which image is on which side.
    """

    run: Path
    record: records.TrainingRecord
    metrics: dict[str, Metrics]
    split: Split


@dataclass(frozen=True, kw_only=True)
class RunImages:
    """The images of a run.

    Attributes:
        split: Which image is on which side.
        pixels: Of each part: ``uint8 [N, height, width, 1]`` and class indices ``int [N]``.
        skipped: Damaged images: (path, reason).
    """

    split: Split
    pixels: dict[str, tuple[Array, Array]]
    skipped: tuple[tuple[str, str], ...]


def finish_run(
    options: TrainOptions,
    model: Model,
    images: RunImages,
    state: TrainState,
    *,
    interrupted: bool,
    seconds: float,
    deployed: Model | None = None,
    parent_sha256: str | None = None,
) -> TrainResult:
    """Measure a trained network on the images held back and write its run folder; ``training.json`` comes last.

    Args:
        options: What the run was asked for.
        model: The network with its best weights; it is the one that is measured.
        images: The split and its pixels.
        state: History and best epoch.
        interrupted: Whether the user ended it early; then ``state.npz`` stays.
        seconds: Time of training.
        deployed: What to write as ``model.keras`` instead of ``model``.
        parent_sha256: Hash of the ``model.keras`` that was trained further.
    """
    out, split = options.out, images.split
    metrics = _measure(model, images)
    save_split(split, out / records.SPLIT_FILE)
    with atomic_path(out / records.MODEL_FILE) as temporary:
        save_network(deployed or model, temporary)
    model_sha256 = sha256_file(out / records.MODEL_FILE)
    write_document(
        out / records.METRICS_FILE,
        records.METRICS_KIND,
        records.METRICS_SCHEMA_VERSION,
        {"model_sha256": model_sha256, **{part: figures.to_dict() for part, figures in metrics.items()}},
    )
    draw_curves(state.history, out / "curves.png", best_epoch=state.best_epoch)
    draw_confusion(
        metrics["held_out"], out / "confusion.png", title=f"{options.architecture}, evaluation and test"
    )
    record = records.TrainingRecord(
        architecture=options.architecture,
        labels=split.labels,
        recipe=state.settings["recipe"],
        seed=options.seed,
        split_sha256=split.sha256,
        model_sha256=model_sha256,
        parameters={
            "feature_extractor": feature_extractor_parameters(model),
            "trainable": sum(int(weight.shape.num_elements()) for weight in model.trainable_weights),
            "total": sum(int(weight.shape.num_elements()) for weight in model.weights),
        },
        history=state.history,
        best_epoch=state.best_epoch,
        interrupted=interrupted,
        skipped=images.skipped,
        seconds=round(seconds, 3),
        versions=records.package_versions(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        parent_sha256=parent_sha256,
    )
    records.save_training_record(out, record)
    if not interrupted:
        with contextlib.suppress(OSError):
            (out / STATE_FILE).unlink()
    return TrainResult(run=out, record=record, metrics=metrics, split=split)


def _measure(model: Model, images: RunImages) -> dict[str, Metrics]:
    numpy = load("numpy")
    labels = images.split.labels
    answers = {part: predict(model, images.pixels[part][0]) for part in ("evaluation", "test")}
    truth = {part: images.pixels[part][1] for part in answers}
    answers["held_out"] = numpy.concatenate([answers["evaluation"], answers["test"]])
    truth["held_out"] = numpy.concatenate([truth["evaluation"], truth["test"]])
    return {part: classification_metrics(truth[part], answers[part], labels) for part in answers}
