"""A fine-tuning run: from a trained run folder to one whose network and ranges were trained for INT8."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibration.layers import find_layers
from calibration.methods import QAT_METHOD
from calibration.table import CalibrationImage, CalibrationTable, save_table
from edge_dsc.building.calibration import CALIBRATION_NAME
from edge_dsc.data.discover import Sample, discover
from edge_dsc.data.loading import load_images
from edge_dsc.data.split import Split, load_split
from edge_dsc.export import export_run
from edge_dsc.export.folding import fold_network
from edge_dsc.networks import load_network
from edge_dsc.qat.network import deployed_weights, learnt_ranges, quantized_network
from edge_dsc.training.augmentation import Batches
from edge_dsc.training.completion import RunImages, TrainResult, finish_run
from edge_dsc.training.loop import fit_model, seed_everything
from edge_dsc.training.optimization import compile_model
from edge_dsc.training.options import RECIPES, Recipe, ReportProgress, TrainOptions
from edge_dsc.training.record import MODEL_FILE, SPLIT_FILE, TrainingRecord, load_training_record
from edge_dsc.training.run import check_folder, make_batches, pixels_by_part
from edge_dsc.training.state import TrainState
from engines.contract import ModelContract
from engines.errors import BadInputError, UsageError
from engines.files import sha256_file
from engines.graph import load_model
from engines.packages import load
from engines.runtimes import Progress

Array = Any
Model = Any

EPOCHS = 5
# The share of the recipe's learning rate: the network is trained, it only has to move by fractions of a step.
RATE_SHARE = 0.03
_RANGE_IMAGES = 64


@dataclass(frozen=True, kw_only=True)
class QatOptions:
    """What a fine-tuning run is asked for.

    Attributes:
        data: The folder of images that the run was trained on.
        run: The trained run folder.
        out: The new run folder.
        epochs: Passes over the training images.
        seed: Decides order and augmentation.
        overwrite: Replace the run in ``out``.
    """

    data: Path
    run: Path
    out: Path
    epochs: int = EPOCHS
    seed: int = 0
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class QatResult:
    """What a fine-tuning run gave.

    Attributes:
        trained: The run; its metrics are those of the INT8 form.
        onnx: The exported FP32 graph.
        table: The calibration table of the learnt ranges, which ``build-engine --int8`` takes.
    """

    trained: TrainResult
    onnx: Path
    table: Path


@dataclass(frozen=True, kw_only=True)
class TaughtBatches(Batches):
    """Training images whose targets are the answers of the network that is to be followed, not their labels.

    INT8 shall answer as FP32 does; labels would move the network elsewhere, and its answers with it.
    Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, arXiv 1503.02531 (2015); for
    quantised networks Mishra and Marr, Apprentice, ICLR 2018.

    Attributes:
        teacher: The FP32 network in its deployed form.
    """

    teacher: Model

    def of_epoch(self, epoch: int) -> Iterator[tuple[Array, Array, Array]]:
        """Yield an epoch's batches, see :meth:`Batches.of_epoch`, with probabilities as targets."""
        for images, _, weights in super().of_epoch(epoch):
            yield images, self.teacher.predict_on_batch(images), weights


def fine_tune(
    options: QatOptions, *, progress: ReportProgress | None = None, reading: Progress | None = None
) -> QatResult:
    """Fine-tune a trained network for INT8 and write a run folder that needs no calibration.

    The graph that is trained is the one that is deployed: folded, with every rounding of the signed INT8 graph. It
    is trained to answer as the trained run does in FP32. The new folder holds the same split, the deployed network
    as ``model.keras``, ``model.onnx`` and a calibration table
    with the method ``qat``. Same run, images, seed and machine: same weights.

    Raises:
        UsageError: ``out`` is the run itself or in use.
        ArtefactError: ``run`` is no finished run.
        BadInputError: The images of the run's split are not all in ``data``.
        EnvironmentProblem: A package is missing, or the folder cannot be written.
        KeyboardInterrupt: Ctrl-C before the first epoch was done.
    """
    parent = load_training_record(options.run)
    settings = _settings(options, parent)
    check_folder(settings)
    recipe = _recipe(parent, options.epochs)
    images = _read_images(options, load_split(options.run / SPLIT_FILE), parent, reading)
    seed_everything(options.seed)
    deployed = fold_network(load_network(options.run / MODEL_FILE))
    batches = make_batches(images, recipe, options.seed)
    stride = max(1, len(batches.pixels) // _RANGE_IMAGES)
    model = quantized_network(deployed, batches.pixels[::stride][:_RANGE_IMAGES])
    compile_model(model, recipe, batches.steps)
    batches = TaughtBatches(**vars(batches), teacher=deployed)
    state = TrainState(settings={"recipe": recipe.to_dict()})
    started = time.monotonic()
    interrupted = fit_model(
        model, batches, images.pixels["validation"], state, save=lambda state: None, progress=progress
    )
    tuned = fold_network(load_network(options.run / MODEL_FILE))
    deployed_weights(model, tuned)
    trained = finish_run(
        settings,
        model,
        images,
        state,
        interrupted=interrupted,
        seconds=time.monotonic() - started,
        deployed=tuned,
        parent_sha256=parent.model_sha256,
    )
    onnx = export_run(options.out, data=options.data).path
    table = options.out / CALIBRATION_NAME
    save_table(table, _table(onnx, list(learnt_ranges(model, tuned).values()), images.split, options))
    return QatResult(trained=trained, onnx=onnx, table=table)


def _settings(options: QatOptions, parent: TrainingRecord) -> TrainOptions:
    if options.out.resolve() == options.run.resolve():
        raise UsageError(f"{options.out} is the run to start from", remedy="give another folder with --out")
    if options.epochs < 1:
        raise UsageError(f"{options.epochs} epochs", remedy="train for at least 1")
    if parent.parent_sha256 is not None:
        raise UsageError(
            f"{options.run} was fine-tuned for INT8 already", remedy="start from the run it came from"
        )
    return TrainOptions(
        data=options.data,
        out=options.out,
        architecture=parent.architecture,
        epochs=options.epochs,
        seed=options.seed,
        overwrite=options.overwrite,
    )


def _recipe(parent: TrainingRecord, epochs: int) -> Recipe:
    base = RECIPES["default"][parent.architecture]
    return replace(
        base,
        name=QAT_METHOD,
        epochs=epochs,
        learning_rate=base.learning_rate * RATE_SHARE,
        warmup=0,
        label_smoothing=0.0,
        dense_start=False,
        convolution_start=False,
    )


def _read_images(
    options: QatOptions, split: Split, parent: TrainingRecord, reading: Progress | None
) -> RunImages:
    """Read the images of the run's own split, found by their content wherever they lie below the folder."""
    found = discover(options.data)
    by_content = {sample.sha256: sample for sample in found.samples}
    wanted = [sample for part in split.parts for sample in split.samples(part)]
    missing = [sample.path for sample in wanted if sample.sha256 not in by_content]
    if missing:
        raise BadInputError(
            f"{options.data} lacks {len(missing)} of the {len(wanted)} images of {options.run}, such as {missing[0]}",
            remedy="give the folder that the run was trained on",
        )
    here = {
        part: tuple(_moved(sample, by_content[sample.sha256]) for sample in split.samples(part))
        for part in split.parts
    }
    contract = ModelContract(labels=parent.labels, architecture=parent.architecture)
    moved = [sample for samples in here.values() for sample in samples]
    loaded = load_images(options.data, moved, contract, progress=reading)
    if loaded.skipped:
        raise BadInputError(
            f"{loaded.skipped[0][0]} can no longer be read: {loaded.skipped[0][1]}",
            remedy="restore the images that the run was trained on",
        )
    pixels = pixels_by_part(loaded, replace(split, parts=here), found)
    return RunImages(split=split, pixels=pixels, skipped=())


def _moved(sample: Sample, seen: Sample) -> Sample:
    return replace(sample, path=seen.path)


def _table(
    onnx: Path, ranges: list[tuple[float, float]], split: Split, options: QatOptions
) -> CalibrationTable:
    model = load_model(onnx)
    contract_hash = ModelContract(labels=split.labels, architecture=model.graph.name).preprocess_sha256
    return CalibrationTable(
        method=QAT_METHOD,
        parameters={"epochs": options.epochs},
        seed=options.seed,
        ranges={layer.input: bounds for layer, bounds in zip(find_layers(model), ranges, strict=True)},
        onnx_sha256=sha256_file(onnx),
        preprocess_sha256=contract_hash,
        images=tuple(
            CalibrationImage(sample.path, sample.label, sample.sha256) for sample in split.samples("train")
        ),
        versions={name: load(name).__version__ for name in ("numpy", "tensorflow", "keras")},
    )
