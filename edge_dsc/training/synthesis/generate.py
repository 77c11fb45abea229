"""A synthesis from a folder of X-rays to a folder of synthetic ones: learn one class, go on after a stop, write."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_dsc import __version__
from edge_dsc.data.purposes import images_to_synthesize
from edge_dsc.data.split import Split
from edge_dsc.data.synthetic import (
    GENERATOR_FILE,
    RECORD_FILE,
    SYNTHESIS,
    SynthesisRecord,
    SyntheticImage,
    encode_marked,
    load_synthesis,
)
from edge_dsc.networks import save_network
from edge_dsc.page.figures import draw_contact_sheet
from edge_dsc.training.batches import augment_image
from edge_dsc.training.fit import seed_everything
from edge_dsc.training.recipes import OTHER, RECIPES, TrainOptions
from edge_dsc.training.run_folder import TrainState, load_state, package_versions, save_state
from edge_dsc.training.synthesis.began import (
    ARCHITECTURES,
    SIZES,
    Began,
    BeganPair,
    convergence,
    draw_latent,
    next_balance,
)
from edge_dsc.training.synthesis.worth import (
    Classifier,
    MadeImages,
    Neighbours,
    count_costs,
    measure_costs,
    measure_worth,
    open_classifier,
)
from edge_dsc.training.train import read_images
from engines.errors import ArtefactError, UnstableError, UsageError
from engines.files import (
    KERAS_MODEL,
    atomic_path,
    require_writable,
    sha256_bytes,
    sha256_file,
    write_bytes,
)
from engines.runtimes import Progress
from engines.text_table import align_rows

if TYPE_CHECKING:
    from keras import Model

STATE_FILE = "synthesis-state.npz"
SHEET_FILE = "contact.png"
IMAGE_FOLDER = "images"
EPOCHS = 200
PATIENCE = 10  # epochs in which M may stand still before the learning rate is halved
MOST_HALVINGS = 3  # M stands still once more: it has converged
_BEGIN_ANEW = "begin anew with --overwrite"
_LEAST_COUNT = 2  # of which one can be held against the other
_MOST_DRAWS = 4  # for each image that is asked for, near copies left out
_PAINTED = 50  # images in one call of the generator
_LEARNING, _WRITING = 1, 2  # what a random draw is for, beside seed and place
# As the paper changes images, but never mirrored: a heart on the right is another patient's.
_CHANGES = replace(RECIPES["paper"][OTHER], flip=False, flip_vertical=False)
_Pixels = NDArray[np.uint8]


def choose_began(architecture: str, size: int) -> Began:
    """Return the networks of a name and a size.

    Raises:
        UsageError: There is no such architecture or size.
    """
    if architecture not in ARCHITECTURES:
        raise UsageError(
            f"there is no generator {architecture!r}", remedy=f"choose one of {', '.join(ARCHITECTURES)}"
        )
    if size not in SIZES:
        raise UsageError(
            f"no generator makes images of {size} pixels",
            remedy=f"choose one of {', '.join(map(str, SIZES))}",
        )
    return Began(architecture=architecture, size=size)


@dataclass(frozen=True, kw_only=True)
class SynthesisOptions:
    """What a synthesis is asked for.

    Attributes:
        data: Folder of class folders.
        label: The class.
        out: Folder of the images and their record.
        count: Images to write, at least two.
        began: The networks.
        epochs: At most, each of :attr:`Began.steps` steps.
        seconds: At most, of learning; a whole epoch at a time.
        seed: Decides the split, as in ``train``, the first weights, the order and the images.
        fold: As :attr:`edge_dsc.training.TrainOptions.fold`.
        keep_split: As :attr:`edge_dsc.training.TrainOptions.keep_split`.
        kinds: As :func:`edge_dsc.data.discover.list_images` takes it.
        features: A trained run of the same split, whose features the images are judged by.
        compare: Measure a step of both architectures.
        resume: Go on with the unfinished synthesis in ``out``.
        overwrite: Replace the synthesis in ``out``.
    """

    data: Path
    label: str
    out: Path
    count: int = 300
    began: Began = field(default_factory=Began)
    epochs: int = EPOCHS
    seconds: float | None = None
    seed: int = 0
    fold: tuple[int, int] | None = None
    keep_split: bool = False
    kinds: bool | None = None
    features: Path | None = None
    compare: bool = False
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """What a synthesis gave.

    Attributes:
        out: The folder.
        record: Its record.
        notes: Real images that were left out, what was not drawn, and why; images that were not made.
    """

    out: Path
    record: SynthesisRecord
    notes: tuple[str, ...]


def synthesize(
    options: SynthesisOptions, *, progress: Progress | None = None, reading: Progress | None = None
) -> Synthesis:
    """Learn the images of one class in the training part, and write synthetic ones.

    The folder is complete when ``synthesis.json`` is there. Until then the state holds the last whole epoch, from which
    ``resume`` goes on to the same weights, bit for bit. Ctrl-C after the first epoch ends learning early and writes
    the images of the best epoch so far; the state stays for ``resume``, as it does where a limit of time ended it.

    Args:
        options: What to do.
        progress: Called after every step.
        reading: Called while the images are read.

    Raises:
        UsageError: Options that cannot be met, or a folder in use.
        BadInputError: The data cannot be used, or has too few images of the class.
        ArtefactError: A state that cannot be resumed.
        EnvironmentProblem: A package is missing, or the folder cannot be written.
        UnstableError: The loss is no number any more, or all images are near copies of training images.
        KeyboardInterrupt: Ctrl-C before the first epoch was done.
    """
    _check(options)
    began = options.began
    wanted = TrainOptions(
        data=options.data,
        out=options.out,
        seed=options.seed,
        fold=options.fold,
        keep_split=options.keep_split,
        kinds=options.kinds,
    )
    images = read_images(wanted, began.size, reading)
    samples = images_to_synthesize(images.split, options.label, began.batch)
    place = {sample: row for row, sample in enumerate(images.split.samples("train"))}
    real = images.pixels["train"][0][[place[sample] for sample in samples], :, :, 0]
    classifier = open_classifier(options.features, images.split) if options.features else None
    state = _begin(options, images.split)
    seed_everything(options.seed)
    pair = BeganPair(began)
    started = time.monotonic()
    ended = learn(pair, real, state, options, progress)
    seconds = time.monotonic() - started
    pair.average.set_weights(state.best_weights)
    learnt = _Learnt(
        split=images.split,
        seen=tuple(sample.sha256 for sample in samples),
        real=real,
        state=state,
        ended=ended,
        seconds=seconds,
    )
    made = _write(options, pair.average, learnt, classifier)
    skipped = tuple(f"skipped {path}: {reason}" for path, reason in images.skipped)
    return replace(made, notes=skipped + made.notes)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Learnt:
    """What learning left.

    Attributes:
        split: Of the data.
        seen: Hashes of the images that were learnt from.
        real: These images, ``[N, H, W]``.
        state: History and best epoch.
        ended: As :attr:`SynthesisRecord.ended`.
        seconds: Time of learning.
    """

    split: Split
    seen: tuple[str, ...]
    real: _Pixels
    state: TrainState
    ended: str
    seconds: float


def _check(options: SynthesisOptions) -> None:
    """Refuse what can be refused before an image is read.

    Raises:
        UsageError: Options that cannot be met, or a folder in use.
    """
    out = options.out
    if options.count < _LEAST_COUNT:
        raise UsageError(f"{options.count} images", remedy=f"ask for at least {_LEAST_COUNT}: --count 300")
    if options.epochs < 1 or not (options.seconds is None or options.seconds > 0):
        raise UsageError("there is no time to learn in", remedy="give --epochs and --seconds above 0")
    if options.resume and options.overwrite:
        raise UsageError("--resume and --overwrite exclude each other", remedy="give one of them")
    if os.path.lexists(out) and not out.is_dir():
        raise UsageError(f"{out} is not a folder", remedy="choose another one with --out")
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(options.data)):
        raise UsageError(
            f"{out} is in the data folder, whose pictures are real",
            remedy="choose a folder beside it with --out",
        )
    has_state, has_record = (out / STATE_FILE).exists(), (out / RECORD_FILE).exists()
    if options.resume and not has_state:
        what = "holds a finished synthesis" if has_record else "holds no synthesis"
        raise UsageError(f"{out} {what}, there is nothing to resume", remedy="leave --resume out")
    if (has_state or has_record) and not (options.resume or options.overwrite):
        which = "an unfinished" if has_state else "a finished"
        go_on = "go on with --resume, " if has_state else ""
        raise UsageError(
            f"{out} holds {which} synthesis",
            remedy=f"{go_on}replace it with --overwrite, or give another --out",
        )


def _begin(options: SynthesisOptions, split: Split) -> TrainState:
    """Return the state of a new synthesis, or of the one to resume, which must have been begun with the same settings.

    Raises:
        ArtefactError: The state cannot be used, or the images changed.
        UsageError: It was begun with other options.
    """
    file = options.out / STATE_FILE
    settings: dict[str, Any] = {
        "label": options.label,
        "began": asdict(options.began),
        "seed": options.seed,
        "split_sha256": split.sha256,
    }
    if not options.resume:
        require_writable(file)  # said before an epoch is learnt
        return TrainState(file=file, settings=settings)
    state = load_state(file, remedy=_BEGIN_ANEW)
    begun = state.settings
    if begun == settings:
        return state
    if {**begun, "split_sha256": split.sha256} == settings:
        raise ArtefactError(
            f"the images in {options.data}, or their split, changed since {options.out} was begun",
            remedy=f"restore them, and give the same --fold, --keep-split and --kinds; or {_BEGIN_ANEW}",
        )
    try:
        networks = begun["began"]
        words = f"--class {begun['label']} --arch {networks['architecture']} --size {networks['size']}"
        words += f" --seed {begun['seed']}"
    except (KeyError, TypeError) as error:
        raise ArtefactError(f"{file} is no state of a synthesis", remedy=_BEGIN_ANEW) from error
    raise UsageError(
        f"{options.out} was begun with other options", remedy=f"resume it with {words}, or {_BEGIN_ANEW}"
    )


def count_halvings(measures: Sequence[float]) -> int:
    """Count how often M stood still for :data:`PATIENCE` epochs, since its lowest or since it last was counted.

    Source: Berthelot et al. (2017), section 4.1: the learning rate decays when the measure of convergence stalls.
    """
    lowest, still, count = math.inf, 0, 0
    for measure in measures:
        lowest, still = (measure, 0) if measure < lowest else (lowest, still + 1)
        if still == PATIENCE:
            count, still = count + 1, 0
    return count


def learn(
    pair: BeganPair,
    real: _Pixels,
    state: TrainState,
    options: SynthesisOptions,
    progress: Progress | None = None,
) -> str:
    """Learn until M has converged, a limit is reached, or the user stops it.

    Args:
        pair: New; a resumed one is brought to ``state`` first.
        real: Images to learn, ``[N, H, W]``.
        state: Changed in place and saved, a whole epoch at a time.
        options: Limits and seed.
        progress: Called after every step.

    Returns:
        Why it ended, as :attr:`SynthesisRecord.ended`.

    Raises:
        UnstableError: The loss is no number any more.
        KeyboardInterrupt: Stopped before the first epoch was done: there is nothing to keep.
    """
    if state.epoch:
        _restore(pair, state)
    started = time.monotonic()
    first = state.epoch
    try:
        while state.epoch < options.epochs:
            halvings = count_halvings(state.history.get("convergence", []))
            if halvings > MOST_HALVINGS:
                return "converged"
            spent, done = time.monotonic() - started, state.epoch - first
            # Whole epochs alone: the next one must fit into what is left.
            if options.seconds is not None and done and spent * (done + 1) / done > options.seconds:
                return "seconds"
            pair.set_learning_rate(pair.began.learning_rate / 2**halvings)
            _learn_epoch(pair, real, state, options, progress)
            save_state(state)
    except KeyboardInterrupt:
        if not state.epoch:
            raise
        return "interrupted"
    return "epochs"


def _restore(pair: BeganPair, state: TrainState) -> None:
    """Bring a pair to a state.

    Raises:
        ArtefactError: The state is of other networks.
    """
    try:
        for variables, values in (
            (pair.variables, state.variables),
            (pair.optimizer_variables, state.optimizer),
        ):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        pair.average.set_weights(state.best_weights)
        for variable, value in zip(pair.variables, state.variables, strict=True):
            variable.assign(value)
        state.history["balance"][-1]
    except (ValueError, TypeError, LookupError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtefactError(
            f"{state.file} does not fit these networks: {reason}", remedy=_BEGIN_ANEW
        ) from error


def _learn_epoch(
    pair: BeganPair,
    real: _Pixels,
    state: TrainState,
    options: SynthesisOptions,
    progress: Progress | None,
) -> None:
    """Take an epoch's steps. The state's fields change together, last, so that Ctrl-C cannot part them."""
    began, epoch = pair.began, state.epoch
    balance = state.history["balance"][-1] if epoch else 0.0
    losses = []
    for step in range(began.steps):
        place = [_LEARNING, options.seed, epoch, step]
        losses.append(
            pair.step(_draw_batch(real, place, began), draw_latent(place, began.batch, began), balance)
        )
        if not all(map(math.isfinite, losses[-1])):
            kept = (
                f"--resume --epochs {epoch} writes the images of epoch {state.best_epoch}; or "
                if epoch
                else ""
            )
            raise UnstableError(
                f"learning diverged: the losses are {losses[-1]} in epoch {epoch + 1}, step {step + 1}",
                remedy=f"{kept}begin anew with another --seed",
            )
        balance = next_balance(balance, *losses[-1], began)
        if progress:
            _report(progress, options, state, [convergence(*pair_of, began) for pair_of in losses])
    loss_real, loss_fake = np.mean(losses, axis=0).tolist()
    row = {
        "real": loss_real,
        "fake": loss_fake,
        "balance": balance,
        "convergence": convergence(loss_real, loss_fake, began),
        "learning_rate": pair.learning_rate,
    }
    history = {name: [*state.history.get(name, []), value] for name, value in row.items()}
    changes: dict[str, Any] = {
        "history": history,
        "variables": [variable.numpy() for variable in pair.variables],
        "optimizer": [variable.numpy() for variable in pair.optimizer_variables],
        "epoch": epoch + 1,
    }
    if history["convergence"][-1] == min(history["convergence"]):
        changes |= {"best_epoch": epoch + 1, "best_weights": pair.average.get_weights()}
    vars(state).update(changes)


def _draw_batch(real: _Pixels, place: Sequence[int], began: Began) -> NDArray[np.float32]:
    """Draw a step's real images, a little moved: ``[B, H, W, 1]``, -1 to 1."""
    rng = np.random.default_rng([*place, 0])
    chosen = rng.choice(len(real), began.batch, replace=False)
    moved = np.stack([augment_image(real[index], _CHANGES, rng) for index in chosen])
    return moved[..., None].astype(np.float32) / 127.5 - 1


def _report(
    progress: Progress, options: SynthesisOptions, state: TrainState, measures: Sequence[float]
) -> None:
    lowest = ""
    if state.best_epoch:
        lowest = f", lowest {min(state.history['convergence']):.4f} in epoch {state.best_epoch}"
    detail = f"epoch {state.epoch + 1}/{options.epochs}, M {np.mean(measures):.4f}{lowest}"
    steps = options.began.steps
    done = state.epoch * steps + len(measures)
    progress(f"learning {options.label}\t{detail}", done, options.epochs * steps)


def paint(generator: Model, latent: NDArray[np.float32]) -> _Pixels:
    """Return the images ``[N, H, W]`` that a generator makes of its input ``[N, latent]``."""
    painted = generator.predict_on_batch(latent)[..., 0]
    return np.asarray(np.rint(np.clip((painted + 1) * 127.5, 0, 255)), np.uint8)


def make_images(generator: Model, neighbours: Neighbours, options: SynthesisOptions) -> MadeImages:
    """Make images until there are enough, without those that come too near to a training image.

    Raises:
        UnstableError: Hardly one does not.
    """
    kept: list[tuple[_Pixels, int, int, float]] = []
    copies = 0
    for start in range(0, _MOST_DRAWS * max(options.count, _PAINTED), _PAINTED):
        draws = range(start, start + _PAINTED)
        latent = [draw_latent([_WRITING, options.seed, draw], 1, options.began) for draw in draws]
        pixels = paint(generator, np.concatenate(latent))
        nearest, distances = neighbours.find(pixels)
        for row in zip(pixels, draws, nearest.tolist(), distances.tolist(), strict=True):
            if row[3] < neighbours.copy_below:
                copies += 1
            elif len(kept) < options.count:
                kept.append(row)
            if len(kept) == options.count:
                break
        if len(kept) == options.count:
            break
    if len(kept) < _LEAST_COUNT:
        raise UnstableError(
            f"{copies} of {copies + len(kept)} images are near copies of training images: the generator learnt these by"
            " heart",
            remedy="learn from more images, or for fewer --epochs",
        )
    images, numbers, indices, apart = zip(*kept, strict=True)
    return MadeImages(
        pixels=np.stack(images),
        draws=list(numbers),
        nearest=list(indices),
        distances=list(apart),
        copies=copies,
    )


def _write(
    options: SynthesisOptions, generator: Model, learnt: _Learnt, classifier: Classifier | None
) -> Synthesis:
    """Make and write the images, and the record last; what stood there before goes, if a record named it."""
    out, state = options.out, learnt.state
    neighbours = Neighbours.of(learnt.real)
    made = make_images(generator, neighbours, options)
    worth = measure_worth(made, neighbours, classifier, seed=options.seed)
    others = [name for name in ARCHITECTURES if name != options.began.architecture]
    measure = measure_costs if options.compare else count_costs
    pairs = [options.began, *(replace(options.began, architecture=name) for name in others)]
    costs = tuple(measure(pair) for pair in pairs)
    _remove_images(out)
    with atomic_path(out / GENERATOR_FILE, KERAS_MODEL) as temporary:
        save_network(generator, temporary)
    generator_sha256 = sha256_file(out / GENERATOR_FILE)
    record = SynthesisRecord(
        label=options.label,
        labels=learnt.split.labels,
        settings=asdict(options.began),
        seed=options.seed,
        split_sha256=learnt.split.sha256,
        seen=learnt.seen,
        generator_sha256=generator_sha256,
        asked=options.count,
        images=_write_images(options, made, learnt.seen, generator_sha256),
        history=state.history,
        best_epoch=state.best_epoch,
        ended=learnt.ended,
        seconds=round(learnt.seconds, 3),
        costs=costs,
        worth=worth,
        versions=package_versions(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        edge_dsc=__version__,
    )
    notes = _draw_sheet(out / SHEET_FILE, learnt.real, made.pixels, record)
    if len(made.draws) < options.count:
        notes += (f"{len(made.draws)} of {options.count} images were made: the others were near copies",)
    SYNTHESIS.save(out / RECORD_FILE, record)
    if learnt.ended in ("epochs", "converged"):
        (out / STATE_FILE).unlink(missing_ok=True)
    return Synthesis(out=out, record=record, notes=notes)


def _write_images(
    options: SynthesisOptions, made: MadeImages, seen: Sequence[str], generator_sha256: str
) -> tuple[SyntheticImage, ...]:
    written = []
    for pixels, draw, nearest, distance in zip(
        made.pixels, made.draws, made.nearest, made.distances, strict=True
    ):
        path = f"{IMAGE_FOLDER}/{options.label}/{draw:06}.png"
        data = encode_marked(pixels, seed=options.seed, draw=draw, generator_sha256=generator_sha256)
        write_bytes(options.out / path, data)
        written.append(
            SyntheticImage(
                path=path,
                sha256=sha256_bytes(data),
                draw=draw,
                nearest_sha256=seen[nearest],
                distance=round(distance, 4),
            )
        )
    return tuple(written)


def _remove_images(out: Path) -> None:
    """Remove the record of an earlier synthesis, then the images that it names, and no other file."""
    if not (out / RECORD_FILE).exists():
        return
    try:
        named = [out / image.path for image in load_synthesis(out).images]
    except ArtefactError:
        named = []  # what it names is not known to be ours
    (out / RECORD_FILE).unlink()
    for path in named:
        path.unlink(missing_ok=True)


def _draw_sheet(path: Path, real: _Pixels, made: _Pixels, record: SynthesisRecord) -> tuple[str, ...]:
    title = f"{record.label}, {record.settings['architecture']}, epoch {record.best_epoch}: not real patients, right"
    try:
        path.unlink(missing_ok=True)
        draw_contact_sheet(real, made, path, title=title)
    except Exception as error:  # noqa: BLE001  matplotlib raises what it likes; a picture costs no synthesis
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return (f"{path.name} was not drawn: {reason}",)
    return ()


def format_synthesis(record: SynthesisRecord) -> str:
    """Return what a synthesis gave, and what it is worth, as text."""
    worth, history = record.worth, record.history
    measure = history["convergence"][record.best_epoch - 1]
    lines = [
        f"{len(record.images)} synthetic images of {record.label}, learnt from {len(record.seen)} of the training part",
        f"learning ended ({record.ended}) after {len(history['convergence'])} epochs; lowest M {measure:.4f} in epoch"
        f" {record.best_epoch}",
        f"near copies dropped: {worth.copies} (below {worth.copy_below:.1f} grey levels from a training image)",
    ]
    rows = [
        ("nearest training image, grey levels", f"{worth.nearest:.1f}", f"{worth.nearest_real:.1f}"),
        (
            f"MS-SSIM among themselves, {worth.scales} scales",
            f"{worth.similarity:.3f}",
            f"{worth.similarity_real:.3f}",
        ),
    ]
    if (found := worth.features) is not None:
        rows += [
            (
                f"Frechet distance from {found.images} real, features of {found.run}",
                f"{found.frechet:.2f}",
                f"{found.frechet_real:.2f}",
            ),
            ("precision, recall (k = 3)", f"{found.precision:.2f}, {found.recall:.2f}", ""),
        ]
    lines += ["", align_rows(("", "synthetic", "real"), rows), ""]
    if found is None:
        lines.append(
            "no Frechet distance, precision and recall: --features RUN, a run of the same split, gives them"
        )
    elif found.images < 2 * found.dimensions:
        lines.append(
            f"{found.images} images are few for {found.dimensions} features: compare the distances with each other, and"
            " with nothing else"
        )
    return "\n".join([*lines, align_rows(*_cost_rows(record))])


def _cost_rows(record: SynthesisRecord) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    header = (
        "networks",
        "generator",
        "discriminator",
        "multiply-adds",
        "state, MiB",
        "step, ms",
        "peak, MiB",
    )
    rows: list[tuple[str, ...]] = []
    for cost in record.costs:
        step = "-" if cost.step_seconds is None else f"{1000 * cost.step_seconds:.0f}"
        peak = "-" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**20:.0f}"
        counts = (f"{cost.generator:,}", f"{cost.discriminator:,}", f"{cost.multiply_adds:,}")
        rows.append((cost.architecture, *counts, f"{cost.state_bytes / 2**20:.1f}", step, peak))
    return header, rows


def describe_synthesis(synthesis: Synthesis) -> Mapping[str, Any]:
    """Return a synthesis for ``--json``: the folder, the record's figures, how many images there are."""
    record = synthesis.record
    return {
        "out": str(synthesis.out),
        "label": record.label,
        "images": len(record.images),
        "best_epoch": record.best_epoch,
        "convergence": record.history["convergence"],
        "ended": record.ended,
        "worth": record.worth,
        "costs": record.costs,
        "notes": synthesis.notes,
    }
