"""A training run from a folder of images to a complete run folder."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_dsc import __version__
from edge_dsc.data.loading import LoadedImages, load_dataset, load_synthetic
from edge_dsc.data.purposes import (
    PARTS_FOR,
    Purpose,
    images_that_train_too,
    images_to_train,
    require_mixable,
    require_teachable,
)
from edge_dsc.data.split import (
    PARTS,
    SPLIT_FILE,
    Split,
    keep_split,
    load_split,
    save_split,
    split_dataset,
)
from edge_dsc.data.synthetic import RECORD_FILE as SYNTHESIS_FILE
from edge_dsc.data.synthetic import load_synthesis
from edge_dsc.evaluate.confidence import fit_temperature
from edge_dsc.evaluate.metrics import Metrics, classification_metrics
from edge_dsc.infer.classify import calibrate_probabilities
from edge_dsc.networks import (
    IMAGENET,
    INPUT_SIDE,
    NO_WEIGHTS,
    Network,
    count_parameters,
    identify,
    load_network,
    open_network,
    save_network,
)
from edge_dsc.networks.separable import Separation
from edge_dsc.page.figures import draw_confusion, draw_curves
from edge_dsc.training.batches import Batches, MixedBatches, class_weights, mix_in
from edge_dsc.training.fit import (
    compile_model,
    fit_model,
    predict,
    seed_everything,
    start_convolutions,
    start_dense,
)
from edge_dsc.training.recipes import (
    NO_INGREDIENTS,
    Recipe,
    ReportProgress,
    TrainOptions,
    TrainProgress,
)
from edge_dsc.training.run_folder import (
    METRICS,
    METRICS_FILE,
    MODEL_FILE,
    RECORD_FILE,
    STATE_FILE,
    Mixed,
    Refit,
    RunMetrics,
    Teacher,
    TrainedNetwork,
    TrainingRecord,
    TrainState,
    load_state,
    load_training_record,
    package_versions,
    save_training_record,
)
from engines.errors import ArtefactError, BadInputError, UsageError
from engines.files import KERAS_MODEL, atomic_path, require_unread, require_writable, sha256_file
from engines.runtimes import Progress

if TYPE_CHECKING:
    from keras import Model

_START_IMAGES = 16  # on which the convolutions' start is scaled


@dataclass(frozen=True, kw_only=True, eq=False)
class RunImages:
    """The images of a run.

    Attributes:
        split: Which image is on which side.
        pixels: Of each part: raw grey ``[N, height, width, 1]`` and class indices ``[N]``.
        skipped: Images that were left out: (path, reason).
    """

    split: Split
    pixels: dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A network after training.

    Attributes:
        model: The network with its best weights; it is the one that is measured.
        architecture: Its name.
        network: Which network that is.
        recipe: How it was trained.
        state: History and best epoch.
        interrupted: Whether the user ended it early; then ``state.npz`` stays.
        seconds: Time of training.
        deployed: What to write as ``model.keras`` instead of ``model``.
        parent_sha256: Hash of the ``model.keras`` that this one was made of.
        separation: For a separable twin, what became of every convolution.
        origin: For a refit, the record of the run whose recipe it is.
        refit: For a refit, what is known of that recipe.
        teachers: The runs whose answers it followed beside the labels.
        synthetic: The synthetic images that trained it too.
    """

    model: Model
    architecture: str
    network: TrainedNetwork
    recipe: Recipe
    state: TrainState
    interrupted: bool
    seconds: float
    deployed: Model | None = None
    parent_sha256: str | None = None
    separation: Separation | None = None
    origin: TrainingRecord | None = None
    refit: Refit | None = None
    teachers: tuple[Teacher, ...] = ()
    synthetic: Mixed | None = None


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training run gave.

    Attributes:
        run: The run folder.
        record: Its record.
        metrics: By part: ``evaluation``, ``test`` and ``held_out``, both together; empty after a refit, which
            leaves no image to judge by.
        split: Which image is on which side.
        notes: Pictures that could not be drawn, and why.
    """

    run: Path
    record: TrainingRecord
    metrics: dict[str, Metrics]
    split: Split
    notes: tuple[str, ...] = ()


def train(
    options: TrainOptions,
    *,
    progress: ReportProgress | None = None,
    reading: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train a network and write its run folder.

    The folder is complete when ``training.json`` is there. Until then ``state.npz`` holds the last whole
    epoch, from which ``resume`` goes on to the same weights, bit for bit. Ctrl-C after the first epoch ends
    training early, keeps the best weights so far and completes the folder; ``state.npz`` stays for ``resume``.

    Args:
        options: What to do.
        progress: Called after every step.
        reading: Called while the images are read.
        say: Called before the first epoch with each line that is wrong with a split that is kept.

    Raises:
        UsageError: Options that cannot be met, or a run folder in use.
        BadInputError: The data, or the function that builds the network, cannot be used.
        ArtefactError: A state that cannot be resumed; a network or weights of a file that cannot be used.
        EnvironmentProblem: A package is missing, or the run folder cannot be written.
        KeyboardInterrupt: Ctrl-C before the first epoch was done.
    """
    recipe = options.resolve_recipe()
    origin = None
    if options.refit is not None:
        origin = load_training_record(options.refit)
        options, recipe = _as_before(options, options.refit, origin)
    check_folder(options)
    network = open_network(options.network)
    if origin is not None and options.refit is not None:
        images, refit = _read_all(options, options.refit, origin, network, reading)
    else:
        images, refit = read_images(options, network.size, reading), None
    for line in images.split.warnings():
        if say:
            say(line)
    taught_by = _find_teachers(options, network, images.split)
    batches = make_batches(images, recipe, options.seed)
    mixed = None
    if options.synthetic is not None:
        batches, mixed = _mix_synthetic(batches, options.synthetic, options.synthetic_share, images.split)
    batches = replace(batches, teachers=tuple(taught_by.values()))
    state = _begin(options, recipe, network, images.split, (tuple(taught_by), mixed))
    seed_everything(options.seed)
    model = network.make(len(images.split.labels))
    if recipe.convolution_start:
        stride = max(1, len(batches.pixels) // _START_IMAGES)
        start_convolutions(model, batches.pixels[::stride][:_START_IMAGES])
    if recipe.dense_start:
        start_dense(model, options.seed)
    trained = compile_model(model, recipe, batches.steps)
    started = time.monotonic()
    interrupted = fit_model(trained, batches, images.pixels["validation"], state, progress)
    seconds = time.monotonic() - started
    fitted = Fitted(
        model=model,
        architecture=network.name,
        network=TrainedNetwork.of(network),
        recipe=recipe,
        state=state,
        interrupted=interrupted,
        seconds=seconds,
        origin=origin,
        refit=refit,
        teachers=tuple(taught_by),
        synthetic=mixed,
    )
    return finish_run(options, images, fitted)


def _find_teachers(options: TrainOptions, network: Network, split: Split) -> dict[Teacher, Model]:
    """Return the networks whose answers are to be followed, by what the record says of them.

    Raises:
        ArtefactError: A run is damaged, or Keras cannot load its network.
        UsageError: It takes other images or knows other classes, or it learnt from images that this run holds back.
    """
    found: dict[Teacher, Model] = {}
    for run in options.teachers:
        record, known = load_training_record(run), load_split(run / SPLIT_FILE)
        if known.sha256 != record.split_sha256:
            raise _not_of_one_run(run)
        theirs, ours = (record.labels, record.network.size), (split.labels, network.size)
        if theirs != ours:
            raise UsageError(
                f"{run} takes images of {theirs[1]} pixels of {', '.join(theirs[0])}, this run of {ours[1]} pixels of "
                f"{', '.join(ours[0])}",
                remedy="name runs of the same classes and --size with --teacher",
            )
        require_teachable(split, known, run)
        if (record.teachers or record.synthetic) and known.sha256 != split.sha256:
            raise UsageError(
                f"{run} followed teachers or synthetic images: what these learnt from is known for its own split alone",
                remedy="train with its --seed, --fold, --keep-split and --last, or leave it out of --teacher",
            )
        teacher = Teacher(
            run=Path(os.path.realpath(run)).name,
            model_sha256=record.model_sha256,
            split_sha256=record.split_sha256,
        )
        if teacher in found:
            raise UsageError(f"--teacher names {run} twice", remedy="name each run once")
        digest = record.network.config_sha256
        found[teacher] = load_network(
            run / MODEL_FILE, record.architecture, len(split.labels), config_sha256=digest
        )
    return found


def _mix_synthetic(batches: Batches, folder: Path, share: float, split: Split) -> tuple[MixedBatches, Mixed]:
    """Mix the images of a synthesis into the training images, where this run may have them.

    Raises:
        ArtefactError: The folder is no synthesis, or an image is not the one that it names.
        BadInputError: The run may not have them.
    """
    record = load_synthesis(folder)
    require_mixable(record, split, folder)
    pixels = load_synthetic(folder, record, size=batches.pixels.shape[1])
    made = mix_in(batches, pixels, split.labels.index(record.label), share)
    described = Mixed(
        folder=Path(os.path.realpath(folder)).name,
        synthesis_sha256=sha256_file(folder / SYNTHESIS_FILE),
        generator_sha256=record.generator_sha256,
        label=record.label,
        images=made.made,
        share=share,
        mixed=made.mixed,
    )
    return made, described


def _as_before(options: TrainOptions, run: Path, record: TrainingRecord) -> tuple[TrainOptions, Recipe]:
    """Return the network and the recipe of a finished run, for a fixed schedule.

    Raises:
        ArtefactError: Its recipe has values that this version does not know.
        UsageError: It was made from another network, with synthetic images, or interrupted: it has no recipe of its own
            to go by.
    """
    made = record.parent_sha256 is not None or record.refit is not None
    if made or record.interrupted or record.synthetic is not None:
        why = "was made from another run" if made else "was trained with synthetic images"
        why = "was interrupted" if record.interrupted else why
        raise UsageError(f"{run} {why}", remedy="refit a run of train, on real images, that went to its end")
    if os.path.realpath(options.out) == os.path.realpath(run):
        raise UsageError(f"{run} would replace itself", remedy="choose another run folder with --out")
    try:
        recipe = replace(Recipe(**record.recipe), fixed=True)  # type: ignore[arg-type]
    except TypeError as error:
        raise ArtefactError(
            f"{run} has a recipe of another version: {error}", remedy="train it again, then refit it"
        ) from error
    if bool(options.teachers) != (recipe.distillation > 0):
        had, remedy = (
            ("teachers", "name them, or their refits, with --teacher")
            if recipe.distillation
            else ("no teachers", "leave --teacher out")
        )
        raise UsageError(f"{run} had {had}", remedy=remedy)
    network = record.network
    choice = replace(
        options,
        architecture=network.source
        if options.architecture == TrainOptions.architecture
        else options.architecture,
        size=network.size,
        weights=options.weights or (network.weights if network.weights == IMAGENET else None),
        unfreeze=network.unfreeze,
    )
    return choice, recipe


def _read_all(
    options: TrainOptions, run: Path, record: TrainingRecord, network: Network, reading: Progress | None
) -> tuple[RunImages, Refit]:
    """Read the images of a run, all of them to train, and what is known of its recipe.

    Raises:
        UsageError: The network is not the run's.
    """
    wanted = msgspec.structs.replace(record.network, config_sha256=None)
    if TrainedNetwork.of(network) != wanted:
        raise UsageError(
            f"{network.name} is not the network that {run} started from",
            remedy=f"name it as then: --arch {wanted.source} --weights {wanted.weights}",
        )
    split = load_split(run / SPLIT_FILE)
    metrics = METRICS.load(run / METRICS_FILE)
    if split.sha256 != record.split_sha256 or metrics.model_sha256 != record.model_sha256:
        raise _not_of_one_run(run)
    images = read_run_images(options.data, split, run=run, size=network.size, reading=reading)
    refit = Refit(
        run=Path(os.path.realpath(run)).name,
        model_sha256=record.model_sha256,
        split_sha256=split.sha256,
        held_out=metrics.held_out,
    )
    return _let_train(images, PARTS[1:]), refit


def _not_of_one_run(run: Path) -> ArtefactError:
    return ArtefactError(
        f"the files of {run} are not of one run", remedy="train it again: edge-dsc train DATA --overwrite"
    )


def _let_train(images: RunImages, parts: Sequence[str]) -> RunImages:
    """Let the images of some parts train too, in the order of the split that says so."""
    split = images_that_train_too(images.split, parts)
    place = {
        sample: row
        for part in ("train", *parts)
        for sample, *row in zip(images.split.samples(part), *images.pixels[part], strict=True)
    }
    rows = [place[sample] for sample in split.samples("train")]
    moved = (np.stack([pixels for pixels, _ in rows]), np.array([target for _, target in rows], np.int64))
    empty = (moved[0][:0], moved[1][:0])
    return replace(
        images, split=split, pixels={**images.pixels, **dict.fromkeys(parts, empty), "train": moved}
    )


def require_validation(split: Split, run: Path) -> None:
    """Refuse a run that holds no images back to choose an epoch by.

    Raises:
        UsageError: It was trained with ``--last`` or ``--refit``.
    """
    if not split.samples("validation"):
        raise UsageError(
            f"{run} holds no validation images back: it was trained with a fixed schedule",
            remedy="fine-tune a run of the same images that was trained without --last and --refit",
        )


def check_folder(options: TrainOptions) -> None:
    """Refuse a run folder that is in use, one without a run to resume, or one whose model the run starts from.

    Raises:
        UsageError: It is.
    """
    out = options.out
    teachers = (run / MODEL_FILE for run in options.teachers)
    require_unread(out / MODEL_FILE, options.architecture, options.weights or "", *teachers)
    has_state, has_record = (out / STATE_FILE).exists(), (out / RECORD_FILE).exists()
    if os.path.lexists(out) and not out.is_dir():
        raise UsageError(f"{out} is not a folder", remedy="choose another run folder with --out")
    # Path.resolve() raises where links lead in a circle.
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(options.data)):
        raise UsageError(
            f"{out} is in the data folder, whose pictures are trained on",
            remedy="choose a run folder beside it with --out",
        )
    if options.resume and not has_state:
        what = "holds a finished run" if has_record else "holds no run"
        raise UsageError(f"{out} {what}, there is nothing to resume", remedy="train without --resume")
    if options.resume or options.overwrite:
        return
    if has_state:
        raise UsageError(
            f"{out} holds an unfinished run",
            remedy="go on with --resume, begin anew with --overwrite, or give --out",
        )
    if has_record:
        raise UsageError(
            f"{out} holds a finished run", remedy="choose another --out, or replace it with --overwrite"
        )


def read_images(options: TrainOptions, size: int, reading: Progress | None) -> RunImages:
    """Read everything, leave out what is damaged, and split the rest, or keep the split that it comes in.

    Raises:
        BadInputError: The data cannot be used.
    """
    found, loaded = load_dataset(options.data, size=size, kinds=options.kinds, progress=reading)
    usable = replace(found, samples=loaded.samples)
    left_out: tuple[tuple[str, str], ...] = ()
    if options.keep_split:
        split, left_out = keep_split(usable, options.seed)
    else:
        split = split_dataset(usable, options.seed, fold=options.fold)
    pixels = pixels_by_part(loaded, split)
    images = RunImages(split=split, pixels=pixels, skipped=loaded.skipped + left_out)
    return _let_train(images, PARTS_FOR[Purpose.CHOOSE]) if options.last else images


def read_run_images(
    data: Path, split: Split, *, run: Path, size: int = INPUT_SIDE, reading: Progress | None = None
) -> RunImages:
    """Read the images of a run's own split, found by their content wherever they lie below a folder.

    Raises:
        BadInputError: Not all of them are there, or one can no longer be read.
    """
    dataset, loaded = load_dataset(data, size=size, progress=reading)
    here = images_to_train(dataset, split, run=run)
    wanted = {sample.path for samples in here.parts.values() for sample in samples}
    for path, reason in loaded.skipped:
        if path in wanted:
            raise BadInputError(
                f"{path} can no longer be read: {reason}",
                remedy="restore the images that the run was trained on",
            )
    return RunImages(split=split, pixels=pixels_by_part(loaded, here), skipped=())


def pixels_by_part(
    loaded: LoadedImages, split: Split
) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Return the pixels and class indices of each part of a split."""
    place = {sample.path: index for index, sample in enumerate(loaded.samples)}
    parts = {}
    for part, samples in split.parts.items():
        targets = np.array([split.labels.index(sample.label) for sample in samples], np.int64)
        parts[part] = (loaded.pixels[[place[sample.path] for sample in samples]], targets)
    return parts


def make_batches(images: RunImages, recipe: Recipe, seed: int) -> Batches:
    """Return the training images as the recipe wants them drawn."""
    pixels, targets = images.pixels["train"]
    classes = len(images.split.labels)
    weights = class_weights(targets, classes) if recipe.class_weights else np.ones(len(targets), np.float32)
    return Batches(pixels=pixels, targets=targets, weights=weights, classes=classes, recipe=recipe, seed=seed)


def finish_run(options: TrainOptions, images: RunImages, fitted: Fitted) -> TrainResult:
    """Measure a trained network on the images held back and complete its run folder.

    ``training.json`` comes after all that a later stage reads. The pictures come after it: whatever goes wrong with
    them becomes a note, and costs no training.

    Args:
        options: What the run was asked for.
        images: The split and its pixels.
        fitted: The network and how it was trained.
    """
    out, split, model, state = options.out, images.split, fitted.model, fitted.state
    written = fitted.deployed or model
    origin = fitted.origin
    temperature = _fit_temperature(model, images) if origin is None else origin.temperature
    metrics = _measure(model, images, temperature)
    save_split(split, out / SPLIT_FILE)
    with atomic_path(out / MODEL_FILE, KERAS_MODEL) as temporary:
        save_network(written, temporary)
    model_sha256 = sha256_file(out / MODEL_FILE)
    if metrics:
        METRICS.save(out / METRICS_FILE, RunMetrics(model_sha256=model_sha256, **metrics))
    else:
        (out / METRICS_FILE).unlink(missing_ok=True)  # of the run that is replaced
    record = TrainingRecord(
        architecture=fitted.architecture,
        network=msgspec.structs.replace(fitted.network, config_sha256=identify(written)),
        labels=split.labels,
        recipe=asdict(fitted.recipe),
        seed=options.seed,
        split_sha256=split.sha256,
        model_sha256=model_sha256,
        parameters=count_parameters(model),
        history=state.history,
        best_epoch=state.best_epoch,
        interrupted=fitted.interrupted,
        skipped=images.skipped,
        seconds=round(fitted.seconds, 3),
        versions=package_versions(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        edge_dsc=__version__,
        parent_sha256=fitted.parent_sha256,
        separation=fitted.separation,
        temperature=temperature,
        refit=fitted.refit,
        teachers=fitted.teachers,
        synthetic=fitted.synthetic,
    )
    save_training_record(out, record)
    if not fitted.interrupted:
        with contextlib.suppress(OSError):
            (out / STATE_FILE).unlink()
    notes = _draw_pictures(out, record, metrics.get("held_out"))
    return TrainResult(run=out, record=record, metrics=metrics, split=split, notes=notes)


def step_progress(architecture: str, progress: Progress) -> Callable[[TrainProgress], None]:
    """Return training's callback that feeds a progress bar: epoch, loss, accuracy, time left."""

    def report(state: TrainProgress) -> None:
        validation = ""
        if state.validation_accuracy is not None:
            validation = f", validation {state.validation_accuracy:.1%}"
        minutes, seconds = divmod(round(state.seconds_left), 60)
        detail = (
            f"epoch {state.epoch}/{state.epochs}, loss {state.loss:.3f}, accuracy {state.accuracy:.1%}"
            f"{validation}, {minutes}:{seconds:02} left"
        )
        done = (state.epoch - 1) * state.steps + state.step
        progress(f"training {architecture}\t{detail}", done, state.epochs * state.steps)

    return report


def _begin(
    options: TrainOptions,
    recipe: Recipe,
    network: Network,
    split: Split,
    helped_by: tuple[tuple[Teacher, ...], Mixed | None],
) -> TrainState:
    """Return the state of a new run, or of the one to resume, which must have been begun with the same settings."""
    file = options.out / STATE_FILE
    settings = {
        "architecture": network.name,
        "network": msgspec.to_builtins(TrainedNetwork.of(network)),
        "recipe": asdict(recipe),
        "seed": options.seed,
        "split_sha256": split.sha256,
        "teachers": msgspec.to_builtins(list(helped_by[0])),
        "synthetic": msgspec.to_builtins(helped_by[1]),
    }
    if not options.resume:
        require_writable(file)  # said before an epoch is trained
        return TrainState(file=file, settings=settings)
    state = load_state(file)
    try:
        begun = _settings_of(state)
        if begun == settings:
            return state
        words = _words(begun)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(
            f"{file} is no readable training state: {error}", remedy="begin anew with --overwrite"
        ) from error
    if {**begun, "split_sha256": split.sha256} == settings:
        raise ArtefactError(
            f"the images in {options.data}, or their split, changed since {options.out} was begun",
            remedy="restore them, and give the same --fold, --keep-split and --kinds; or begin anew with --overwrite",
        )
    if words == _words(settings):
        raise ArtefactError(
            f"{options.out} was begun with a {recipe.name} recipe, a network or synthetic images of other values",
            remedy="go on with the version and the files that it was begun with, or begin anew with --overwrite",
        )
    raise UsageError(f"{options.out} was begun with other options", remedy=f"resume it with {words}")


def _settings_of(state: TrainState) -> dict[str, Any]:
    """Return what a run was begun with; states of before have neither a network's own facts nor its latest fields."""
    begun = dict(state.settings)
    network = {"source": begun["architecture"], **begun.get("network", {})}
    recipe = {"flip_vertical": False, "augmentation": True, "fixed": False}
    recipe |= {**asdict(NO_INGREDIENTS), **begun["recipe"]}
    return {
        "teachers": [],
        "synthetic": None,
        **begun,
        "recipe": recipe,
        "network": msgspec.to_builtins(msgspec.convert(network, TrainedNetwork)),
    }


def _words(settings: Mapping[str, Any]) -> str:
    """Write the options of the command line that a run was begun with."""
    recipe, network = settings["recipe"], settings["network"]
    words = [f"--arch {network['source']} --recipe {recipe['name']} --epochs {recipe['epochs']}"]
    words += [] if recipe["augmentation"] else ["--no-augmentation"]
    words += ["--last"] if recipe["fixed"] else []
    words += [f"--size {network['size']}"] if network["size"] != INPUT_SIDE else []
    words += (
        [f"--weights {network['weights']}"]
        if network["weights"] not in (NO_WEIGHTS, network["source"])
        else []
    )
    words += [f"--unfreeze {network['unfreeze']}"] if network["unfreeze"] is not None else []
    words += [
        f"--{name.replace('_', '-')} {recipe[name]:g}"
        for name, usual in asdict(NO_INGREDIENTS).items()
        if recipe[name] != usual
    ]
    words += (
        [f"--teacher {','.join(each['run'] for each in settings['teachers'])}"]
        if settings["teachers"]
        else []
    )
    if mixed := settings["synthetic"]:
        words += [f"--synthetic {mixed['folder']} --synthetic-share {mixed['share']:g}"]
    return " ".join([*words, f"--seed {settings['seed']}"])


def _fit_temperature(model: Model, images: RunImages) -> float:
    """Return the temperature that the images allowed for it ask for."""
    parts = [images.pixels[part] for part in PARTS_FOR[Purpose.FIT] if len(images.pixels[part][1])]
    if not parts:
        return 1.0
    answers = np.concatenate([predict(model, pixels) for pixels, _ in parts])
    return fit_temperature(np.concatenate([targets for _, targets in parts]), answers)


def _measure(model: Model, images: RunImages, temperature: float) -> dict[str, Metrics]:
    """Measure a network on the images held back, with its answers as an engine of it gives them."""
    labels = images.split.labels
    if not len(images.pixels["test"][1]):
        return {}
    answers = {
        part: calibrate_probabilities(predict(model, images.pixels[part][0]), temperature)
        for part in ("evaluation", "test")
    }
    truth = {part: images.pixels[part][1] for part in answers}
    answers["held_out"] = np.concatenate([answers["evaluation"], answers["test"]])
    truth["held_out"] = np.concatenate([truth["evaluation"], truth["test"]])
    return {part: classification_metrics(truth[part], answers[part], labels) for part in answers}


def _draw_pictures(out: Path, record: TrainingRecord, held_out: Metrics | None) -> tuple[str, ...]:
    title = f"{record.architecture}, evaluation and test"

    def confusion(path: Path) -> None:
        if held_out is not None:
            draw_confusion(held_out, path, title=title)

    pictures: dict[str, Callable[[Path], None]] = {
        "curves.png": lambda path: draw_curves(record.history, path, best_epoch=record.best_epoch),
        "confusion.png": confusion,
    }
    notes = []
    for name, draw in pictures.items():
        try:
            (out / name).unlink(missing_ok=True)  # that of a run that is replaced would pass for this one's
            draw(out / name)
        except Exception as error:  # noqa: BLE001  matplotlib raises what it likes, such as at the class name $x^$
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            notes.append(f"{name} was not drawn: {reason}")
    return tuple(notes)
