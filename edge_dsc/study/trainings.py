"""What a study is, which trainings it has, what each of them leaves: the folder that the same command goes on with."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from edge_dsc import __version__
from edge_dsc.data.discover import Dataset, discover
from edge_dsc.data.synthetic import load_synthesis
from edge_dsc.networks import BACKBONES, default_name, open_network
from edge_dsc.study.variants import add_variant, parse_variant, variant_folder, variant_title
from edge_dsc.training.recipes import NO_INGREDIENTS, TrainOptions
from edge_dsc.training.run_folder import (
    RECORD_FILE,
    STATE_FILE,
    TrainingRecord,
    load_state,
    load_training_record,
)
from engines.contract import Count, Labels, Name, Sha256, Text
from engines.errors import ArtefactError, UsageError
from engines.files import DocumentKind, canonical_json, require_writable, sha256_bytes

if sys.platform != "win32":
    import fcntl

STUDY_FILE = "study.json"
ANSWERS_FILE = "answers.json"  # beside the model; a training with one is done
REFERENCE = "onnxruntime fp32"  # answers for the trained network, on every part of its split
MOST_TRAININGS = 1000
AUGMENTATION = {"both": (False, True), "on": (True,), "off": (False,)}  # as --augmentation says it
_LOCK = ".lock"
_Share: TypeAlias = Annotated[float, Meta(ge=0, le=1.001)]


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What a study is asked for.

    Attributes:
        data: Folder of class folders.
        out: The study's folder.
        networks: Their names, as ``train --arch`` takes them; differences are to ``cnn``, or to the first.
        augmentation: Without (False), with (True), or both.
        variants: What is added to the recipe (:mod:`edge_dsc.study.variants`): each is a row more of every network.
        seeds: Trainings of each network, with the seeds 0, 1, ...; None with folds.
        folds: Instead of seeds: parts of the data, each of which judges once.
        recipe: Name of a recipe.
        epochs: Instead of the recipe's.
        weights: Where networks of Keras start, as ``train --weights`` takes it; the paper's two start from none.
        keep_split: Keep the split that the data come in; then all seeds are judged on the same images.
        margin: Percentage points of accuracy that ``dsc`` may lose and still count as not inferior.
        jobs: Trainings at a time, each a process on its share of the processors.
        bench: Whether the engines' latency is measured.
    """

    data: Path
    out: Path
    networks: tuple[str, ...] = ("cnn", "dsc")
    augmentation: tuple[bool, ...] = (False, True)
    variants: tuple[str, ...] = ()
    seeds: int | None = 5
    folds: int | None = None
    recipe: str = "paper"
    epochs: int | None = None
    weights: str | None = None
    keep_split: bool = False
    margin: float = 2.0
    jobs: int = 1
    bench: bool = True


class StudyPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides a study; ``study.json``. A study goes on only with an equal one, wherever the data lie.

    Attributes:
        data: The data folder.
        images: Images in it.
        patients: Patients that they are of.
        images_sha256: Hash of their paths, classes, patients and contents.
        labels: Class names, sorted.
        networks: As :attr:`StudyOptions.networks`.
        augmentation: The same.
        variants: The same, as :func:`edge_dsc.study.variants.parse_variant` returns them.
        seeds: The same.
        folds: The same.
        recipe: The same.
        epochs: The same.
        weights: The same.
        keep_split: The same.
        margin: The same: chosen before the first training, and not changed once figures are known.
        trained_sha256: Hash of what the recipe says of each network, and of the files that networks come from.
        created: UTC time, ISO 8601.
        edge_dsc: Version of edge-dsc.
    """

    data: str
    images: Count
    patients: Count
    images_sha256: Sha256
    labels: Labels
    networks: tuple[Text, ...]
    augmentation: tuple[bool, ...]
    variants: tuple[Text, ...]
    seeds: Count | None
    folds: Count | None
    recipe: Text
    epochs: Count | None
    weights: Text | None
    keep_split: bool
    margin: Annotated[float, Meta(gt=0, le=100)]
    trained_sha256: Sha256
    created: Text
    edge_dsc: Text


def without_variants(plan: dict[str, object]) -> dict[str, object]:
    """Return a plan of version 1 as one of version 2: it had no variants."""
    return {**plan, "variants": []}


STUDY = DocumentKind(
    name="edge-dsc/study",
    version=2,
    body=StudyPlan,
    renew="edge-dsc study DATA --out NEW_FOLDER",
    seal="study_sha256",
    older={1: without_variants},
)
# A study of other options is another study; how each is said on the command line.
_OPTIONS = {
    "networks": "--arch",
    "augmentation": "--augmentation",
    "variants": "--with",
    "seeds": "--seeds",
    "folds": "--folds",
    "recipe": "--recipe",
    "epochs": "--epochs",
    "weights": "--weights",
    "keep_split": "--keep-split",
    "margin": "--margin",
}


class AnsweredImage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One image of a training's split, and what its engines answered.

    Attributes:
        path: Relative to the data folder.
        patient: Its patient.
        label: Its class.
        part: ``train``, ``validation``, ``evaluation`` or ``test``.
        probabilities: Of every class, by engine (``onnxruntime int8``); all parts have those of :data:`REFERENCE`,
            and the images that judge those of every engine.
    """

    path: str
    patient: str
    label: Name
    part: str
    probabilities: Mapping[str, tuple[_Share, ...]]


class BuiltFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An engine of a training.

    Attributes:
        file: Its name in the run folder.
        runtime: What built it.
        precision: Its precision.
        engine_bytes: Its size.
        engine_sha256: Its hash.
        answered_by: ``engine``, or ``graph`` where it cannot run here and ONNX Runtime ran its graph.
    """

    file: str
    runtime: Text
    precision: Text
    engine_bytes: Count
    engine_sha256: Sha256
    answered_by: str

    @property
    def name(self) -> str:
        """The key of its answers."""
        return f"{self.runtime} {self.precision}"


class Answers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a finished training leaves for the study; ``answers.json`` in its run folder.

    Attributes:
        labels: Class names, in the order of the probabilities.
        model_sha256: Hash of the ``model.keras`` that all of it came from.
        onnx_bytes: Size of the exported model.
        multiply_adds: Of one image, in the exported model.
        engines: In the order in which they were built.
        images: Those of the split that could be read.
        notes: What could not be built here, and why.
    """

    labels: Labels
    model_sha256: Sha256
    onnx_bytes: Count
    multiply_adds: Count
    engines: tuple[BuiltFile, ...]
    images: tuple[AnsweredImage, ...]
    notes: tuple[str, ...]


ANSWERS = DocumentKind(
    name="edge-dsc/study-answers",
    version=1,
    body=Answers,
    renew="the study's command goes on and makes it again",
    seal="answers_sha256",
)


@dataclass(frozen=True)
class Setting:
    """A network with or without augmentation, and what is added: what a row of the paper's table stands for."""

    network: str
    augmentation: bool
    variant: str = ""

    @property
    def title(self) -> str:
        """As tables name it."""
        name = default_name(self.network)
        name = f"{name} aug." if self.augmentation else name
        return f"{name} + {variant_title(self.variant)}" if self.variant else name


@dataclass(frozen=True)
class Training:
    """One training of a study.

    Attributes:
        setting: Which network, with or without augmentation.
        seed: Its seed.
        fold: Which fold of how many judges it, counted from 1; None where the seed decides.
    """

    setting: Setting
    seed: int = 0
    fold: tuple[int, int] | None = None

    @property
    def number(self) -> int:
        """The seed or the fold: what the trainings of one setting differ in."""
        return self.fold[0] if self.fold else self.seed

    @property
    def title(self) -> str:
        """As tables and messages name it."""
        which = f"fold {self.fold[0]} of {self.fold[1]}" if self.fold else f"seed {self.seed}"
        return f"{self.setting.title}, {which}"

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        kind = "augmented" if self.setting.augmentation else "plain"
        which = f"fold{self.fold[0]}of{self.fold[1]}" if self.fold else f"seed{self.seed}"
        added = f"{variant_folder(self.setting.variant)}-" if self.setting.variant else ""
        return f"{default_name(self.setting.network)}-{kind}-{added}{which}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study with its folder.

    Attributes:
        folder: Where everything goes.
        plan: What it is.
    """

    folder: Path
    plan: StudyPlan

    @property
    def data(self) -> Path:
        """The data folder."""
        return Path(self.plan.data)

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Every network, without augmentation and with it; then the same with each variant: the first may teach it."""
        plan = self.plan
        return tuple(
            Setting(name, on, variant)
            for variant in ("", *plan.variants)
            for on in plan.augmentation
            for name in plan.networks
        )

    @property
    def trainings(self) -> tuple[Training, ...]:
        """All trainings, seed by seed or fold by fold: what was begun first compares all networks."""
        folds = self.plan.folds
        if folds:
            return tuple(
                Training(setting, fold=(number, folds))
                for number in range(1, folds + 1)
                for setting in self.settings
            )
        return tuple(
            Training(setting, seed=seed) for seed in range(self.plan.seeds or 0) for setting in self.settings
        )

    @property
    def reference(self) -> str:
        """The network that the others are held against."""
        return "cnn" if "cnn" in self.plan.networks else self.plan.networks[0]

    def run_folder(self, training: Training) -> Path:
        """Return a training's run folder."""
        return self.folder / training.folder

    def train_options(self, training: Training) -> TrainOptions:
        """Return what a training is asked for; it goes on where its folder holds a state."""
        out = self.run_folder(training)
        begun = (out / STATE_FILE).is_file()
        variant = training.setting.variant
        options = TrainOptions(
            data=self.data,
            out=out,
            architecture=training.setting.network,
            recipe=self.plan.recipe,
            augmentation=training.setting.augmentation,
            epochs=self.plan.epochs,
            weights=self.plan.weights if training.setting.network in BACKBONES else None,
            seed=training.seed,
            fold=training.fold,
            keep_split=self.plan.keep_split,
            resume=begun,
            overwrite=not begun,
        )
        return add_variant(options, variant, training.number) if variant else options

    def trained(self, training: Training) -> TrainingRecord | None:
        """Return the record of a training that went to its end; None of another.

        Raises:
            ArtefactError: The record or its model was changed.
        """
        run = self.run_folder(training)
        if not (run / RECORD_FILE).is_file():
            return None
        record = load_training_record(run)
        return None if record.interrupted else record

    def answers(self, training: Training) -> Answers | None:
        """Return what a training left; None where it is not done, or its answers are of another model."""
        path = self.run_folder(training) / ANSWERS_FILE
        if not path.is_file():
            return None
        try:
            found, record = ANSWERS.load(path), self.trained(training)
        except ArtefactError:
            return None  # it is derived from the model: made again, or the model is refused by name
        return found if record is not None and found.model_sha256 == record.model_sha256 else None

    def epochs_done(self, training: Training) -> int:
        """Return how many whole epochs of a training are kept.

        Raises:
            ArtefactError: Its state, or its record, is damaged.
        """
        record = self.trained(training)
        if record is not None:
            return len(record.history["loss"])
        state = self.run_folder(training) / STATE_FILE
        return load_state(state).epoch if state.is_file() else 0


def check_options(options: StudyOptions) -> None:
    """Refuse what no study can be.

    Raises:
        UsageError: No network, one twice, none or too many trainings, folds and seeds together, a margin outside 0 to
            100, more jobs than processors; or options that no training takes.
    """
    names = options.networks
    if not names or len(set(names)) != len(names):
        raise UsageError(f"the networks {','.join(names)!r}", remedy="name each once: --arch cnn,dsc")
    if (options.seeds is None) == (options.folds is None):
        raise UsageError("a study goes over seeds or over folds", remedy="give --seeds N or --folds N")
    if options.folds is not None and options.folds < 3:
        raise UsageError(f"{options.folds} folds", remedy="give --folds 3 or more: 5 is usual")
    if not 0 < options.margin <= 100:
        raise UsageError(f"a margin of {options.margin:g} points", remedy="give --margin above 0, such as 2")
    count = len(names) * len(options.augmentation) * (1 + len(options.variants))
    count *= options.seeds or options.folds or 0
    if not 1 <= count <= MOST_TRAININGS:
        raise UsageError(f"{count} trainings", remedy=f"ask for 1 to {MOST_TRAININGS}")
    processors = usable_cores()
    if not 1 <= options.jobs <= len(processors):
        raise UsageError(
            f"--jobs {options.jobs} on {len(processors)} processors", remedy="give each job one at least"
        )


def usable_cores() -> list[int]:
    """Return the numbers of the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def open_study(options: StudyOptions) -> Iterator[Study]:
    """Begin a study, or go on with the one in the folder; nobody else works in it meanwhile.

    Raises:
        UsageError: Options that cannot be met; a folder of other things, of a study with other options, or in use.
        ArtefactError: The folder's study is of other images, or of another version's recipe; synthetic images or a
            teacher that is not there.
        BadInputError: The data cannot be used.
        EnvironmentProblem: The folder cannot be written.
    """
    check_options(options)
    if os.path.lexists(options.out) and not options.out.is_dir():
        raise UsageError(f"{options.out} is not a folder", remedy="choose another with --out")
    if Path(os.path.realpath(options.out)).is_relative_to(os.path.realpath(options.data)):
        raise UsageError(
            f"{options.out} is in the data folder, whose pictures are trained on",
            remedy="choose a folder beside it with --out",
        )
    plan = _plan_of(options, discover(options.data))
    study = Study(folder=options.out.absolute(), plan=plan)
    file = study.folder / STUDY_FILE
    if (
        not file.is_file()
        and study.folder.is_dir()
        and {one.name for one in study.folder.iterdir()} - {_LOCK}
    ):
        raise UsageError(
            f"{options.out} is not empty and holds no study", remedy="choose another folder with --out"
        )
    if file.is_file():
        _refuse_another(STUDY.load(file), plan, options.out)
    _require_added(study)
    require_writable(file, STUDY.name)
    with hold_folder(study.folder, wait=False):
        if not file.is_file() or STUDY.load(file).data != plan.data:
            STUDY.save(file, plan)
        yield study


def _require_added(study: Study) -> None:
    """Refuse synthetic images and teachers that are not there, before hours are spent on the trainings before theirs.

    Raises:
        ArtefactError: There are none, or they were changed.
    """
    for training in study.trainings:
        if training.setting.variant and study.answers(training) is None:
            asked = study.train_options(training)
            if asked.synthetic is not None:
                load_synthesis(asked.synthetic)
            for run in asked.teachers:
                if not run.is_relative_to(study.folder):  # its own are still to be trained
                    load_training_record(run)


def load_study(folder: Path) -> Study:
    """Return the study of a folder, as a training's process opens it.

    Raises:
        ArtefactError: There is none, or it was edited.
    """
    return Study(folder=folder, plan=STUDY.load(folder / STUDY_FILE))


@contextlib.contextmanager
def hold_folder(folder: Path, *, wait: bool) -> Iterator[None]:
    """Keep a folder for this process; the system lets go of it however the process ends.

    Args:
        folder: The folder of a study, or of one of its trainings.
        wait: Whether to wait for another process: one that was left behind by a killed study ends by itself.

    Raises:
        UsageError: Another process has it.
    """
    if sys.platform == "win32":
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Neither emptied, should it be someone's, nor waited for, should it be a pipe.
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    with os.fdopen(handle, "rb+", buffering=0):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UsageError(
                f"another study is at work in {folder}", remedy="wait for it, or choose another --out"
            ) from error
        except OSError:  # a file system that knows no locks
            pass
        yield


def _plan_of(options: StudyOptions, dataset: Dataset) -> StudyPlan:
    networks = tuple(map(_absolute, options.networks))
    variants = tuple(map(parse_variant, options.variants))
    trained = {}
    for name in networks:
        weights = options.weights if name in BACKBONES else None
        asked = TrainOptions(
            data=options.data,
            out=options.out,
            architecture=name,
            weights=weights,
            recipe=options.recipe,
            epochs=options.epochs,
            keep_split=options.keep_split,
            fold=(1, options.folds) if options.folds else None,
        )
        network = open_network(asked.network)
        sources = [network.source_sha256, network.weights_sha256]
        trained[network.name] = [_recipe_of(asked), *sources]
        for variant in variants:
            trained[f"{network.name} {variant}"] = [_recipe_of(add_variant(asked, variant, 0)), *sources]
    if len(set(map(variant_folder, variants))) != len(variants):
        raise UsageError(
            f"two of --with {' --with '.join(options.variants)} have the same name",
            remedy="name each once, and folders apart by their last part",
        )
    if len(trained) != len(networks) * (1 + len(variants)):
        raise UsageError(
            f"two of the networks {','.join(options.networks)} have the same name",
            remedy="rename a file: run folders and engines are named after it",
        )
    samples = [(one.path, one.label, one.patient, one.sha256) for one in dataset.samples]
    return StudyPlan(
        data=os.path.realpath(options.data),
        images=len(samples),
        patients=len({patient for _, _, patient, _ in samples}),
        images_sha256=sha256_bytes(canonical_json(samples)),
        labels=dataset.labels,
        networks=networks,
        augmentation=options.augmentation,
        variants=variants,
        seeds=options.seeds,
        folds=options.folds,
        recipe=options.recipe,
        epochs=options.epochs,
        weights=options.weights,
        keep_split=options.keep_split,
        margin=float(options.margin),
        trained_sha256=sha256_bytes(canonical_json(trained)),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        edge_dsc=__version__,
    )


def _recipe_of(asked: TrainOptions) -> dict[str, object]:
    """Return a recipe's values; what nobody added is left out, so that studies of earlier versions go on."""
    recipe = asdict(asked.resolve_recipe())
    return {name: value for name, value in recipe.items() if name not in vars(NO_INGREDIENTS) or value}


def _absolute(network: str) -> str:
    """Return a network of a file with the file's whole path: trainings run in another folder."""
    file, colon, function = network.rpartition(":") if ".py:" in network else (network, "", "")
    return f"{Path(file).absolute()}{colon}{function}" if file.endswith((".keras", ".py")) else network


def _refuse_another(begun: StudyPlan, asked: StudyPlan, out: Path) -> None:
    """Refuse to go on with a study of other options or images.

    Raises:
        UsageError: Other options.
        ArtefactError: Other images, another version's recipe, or another file of a network.
    """
    other = [name for name in _OPTIONS if getattr(begun, name) != getattr(asked, name)]
    if other:
        words = [f"{_OPTIONS[name]} {_say(name, getattr(begun, name))}" for name in other]
        raise UsageError(
            f"{out} holds a study with {', '.join(words)}",
            remedy="go on with the same options, or begin another study with --out",
        )
    if begun.images_sha256 != asked.images_sha256:
        raise ArtefactError(
            f"{out} holds a study of other images: {begun.images} were in {begun.data}, {asked.images} are in"
            f" {asked.data}",
            remedy="restore them, or begin another study with --out",
        )
    if begun.trained_sha256 != asked.trained_sha256:
        raise ArtefactError(
            f"{out} was begun by edge-dsc {begun.edge_dsc} with another recipe {begun.recipe!r}, or another file of a"
            " network",
            remedy="go on with those, or begin another study with --out",
        )


def _say(name: str, value: object) -> str:
    """Return an option's value as the command line takes it."""
    if name == "augmentation":
        return next((word for word, found in AUGMENTATION.items() if found == value), "both")
    if value is None or value is False or value == ():
        return "left out"
    if isinstance(value, tuple):
        return (f" {_OPTIONS[name]} " if name == "variants" else ",").join(map(str, value))
    return "given" if value is True else f"{value:g}" if isinstance(value, float) else str(value)
