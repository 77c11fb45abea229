"""Which image may be used for what: to train, to choose, to calibrate, to compare, to judge. Decided here alone.

A figure of accuracy says something about new patients only where no image behind it had a part in making the network.
A training run therefore deals its images into four parts, whole patients at a time (:mod:`edge_dsc.data.split`), and
each part serves some purposes and no others:

    purpose     train   validation   evaluation   test   in no part   synthetic
    TRAIN       yes     -            -            -      -            (4)
    CHOOSE      (1)     yes          (1)          (1)    (1)          -
    FIT         -       yes          -            -      -            -
    CALIBRATE   yes     -            -            -      yes          -
    COMPARE     (3)     yes          yes          yes    -            -
    JUDGE       -       -            yes          yes    (2)          -

(1) Only for the layers of a mixed engine, and only where the folder holds no image of the validation part: then the
    images of the calibration table, which cannot judge anyway, else half of all images, which may then not judge.
(2) Only where the folder holds no image of evaluation or test that may judge.
(3) Only where no image of the split is in another part.
(4) Only where a person names their folder (``train --synthetic``), and only where their generator saw no image that
    this run holds back. A data folder that holds one is refused for every purpose, so none is ever in a split.

A generator of synthetic images learns as a network does: from the training part.

A network whose answers another one follows (``train --teacher``) hands on what it learnt: of the images that the other
run holds back it may have trained on none, and have chosen its epoch on none that judge.

A training with a fixed schedule chooses no epoch: its validation images train (``train --last``), and that part of its
split is empty. A network for deployment (``train --refit``) may learn from every image: its split has all of them in
train, and what judges it must come from elsewhere.

An image is known by the SHA-256 of its file, never by its name or folder: a copy of a test image under another name
is that test image. Images of a model without a split are in no part. Whatever its part, an image that the calibration
table names, or that the layers of this engine were chosen on under (1), does not judge the engine.

A split that was kept as its folder gave it may have a patient in train and in test; a file it never has twice. Its
evaluation and test judge all the same, for that is what was asked for, and the line that says which images judged
counts those of patients that training saw.

What this does not see: the same X-ray in another file (cropped, saved again), a synthetic image that was saved again
without its comment, and a new image of a patient whose other
images are in the split. A split keeps patients whole, but names of patients mean nothing in another folder.

Everything here works on names and hashes. No image is opened; the mark of a synthetic one is seen where a folder is
listed (:mod:`edge_dsc.data.synthetic`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from edge_dsc.data.discover import Dataset, Sample
from edge_dsc.data.split import PARTS, SPLIT_FILE, Split, load_split
from edge_dsc.data.synthetic import SynthesisRecord
from engines.errors import BadInputError, UsageError


class Purpose(enum.Enum):
    """What an image is wanted for."""

    TRAIN = "train"  # the weights follow it, or in fine-tuning for INT8 the ranges too
    CHOOSE = "choose"  # it decides on an epoch, or on the layers of a mixed engine
    FIT = "fit"  # the temperature of the probabilities, or a threshold, is found on it
    CALIBRATE = "calibrate"  # the ranges of INT8 are found over it
    COMPARE = "compare"  # two forms of one network must answer alike on it; nothing is adjusted
    JUDGE = "judge"  # a reported accuracy, or an engine's accuracy gate, is measured on it


PARTS_FOR: dict[Purpose, tuple[str, ...]] = {
    Purpose.TRAIN: ("train",),
    Purpose.CHOOSE: ("validation",),
    Purpose.FIT: ("validation",),
    Purpose.CALIBRATE: ("train",),
    Purpose.COMPARE: ("evaluation", "test", "validation"),
    Purpose.JUDGE: ("evaluation", "test"),
}


@dataclass(frozen=True, kw_only=True)
class SearchImages:
    """The images that the layers of a mixed engine are chosen on.

    Attributes:
        samples: The images.
        spent: Hashes of those among them that could otherwise have judged the engine, and may not now.
    """

    samples: tuple[Sample, ...]
    spent: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class JudgingImages:
    """The images that an engine is judged on.

    Attributes:
        samples: The images.
        origin: Which they are: one line for the engine's record.
    """

    samples: tuple[Sample, ...]
    origin: str


def split_beside(model: Path) -> Split | None:
    """Read the split of the training run that a model or an engine belongs to: ``split.json`` beside it, if any.

    Raises:
        ArtefactError: It was edited, or it has a patient or a file on two sides.
    """
    path = model.parent / SPLIT_FILE
    return load_split(path) if path.is_file() else None


def images_to_train(dataset: Dataset, split: Split, *, run: Path) -> Split:
    """Find the images of a run's split again, wherever they lie in a folder now, so that it can be trained further.

    All four parts are asked for: the run that is written holds the same split, and is judged on the same images.

    Args:
        dataset: The folder.
        split: The run's split.
        run: The run, for the error.

    Returns:
        The split with each path as it is in the folder.

    Raises:
        BadInputError: One is missing.
    """
    here = {sample.sha256: sample.path for sample in dataset.samples}
    wanted = [sample for samples in split.parts.values() for sample in samples]
    missing = [sample.path for sample in wanted if sample.sha256 not in here]
    if missing:
        raise BadInputError(
            f"{dataset.root} lacks {len(missing)} of the {len(wanted)} images of {run}, such as {missing[0]}",
            remedy="give the folder that the run was trained on",
        )
    parts = {part: tuple(_moved(sample, here) for sample in samples) for part, samples in split.parts.items()}
    return replace(split, root=dataset.root, parts=parts)


def images_that_train_too(split: Split, parts: Collection[str]) -> Split:
    """Return a split in which some parts train too, because nothing is left to choose or to judge on them.

    Args:
        split: The split.
        parts: ``validation`` for a fixed schedule; all but ``train`` for a network that is to be deployed.
    """
    train = [sample for part in ("train", *parts) for sample in split.samples(part)]
    train.sort(key=lambda sample: sample.path)
    return replace(split, parts={**split.parts, **dict.fromkeys(parts, ()), "train": tuple(train)})


def require_teachable(split: Split, teacher: Split, run: Path) -> None:
    """Decide whether the network of a run may teach one with another split, or with the same.

    Its answers carry what it learnt. So it may have trained on no image that the new run holds back, and have chosen
    its epoch on none that will judge the new one.

    Args:
        split: Of the new run.
        teacher: Of the teacher's run.
        run: The teacher's run, for the error.

    Raises:
        UsageError: It has.
    """
    for learnt, held_back in (
        (PARTS_FOR[Purpose.TRAIN], (*PARTS_FOR[Purpose.CHOOSE], *PARTS_FOR[Purpose.JUDGE])),
        (PARTS_FOR[Purpose.CHOOSE], PARTS_FOR[Purpose.JUDGE]),
    ):
        seen = _content(teacher, learnt)
        leaked = [one.path for part in held_back for one in split.samples(part) if one.sha256 in seen]
        if leaked:
            raise UsageError(
                f"{run} learnt from {len(leaked)} images that this run holds back, such as {leaked[0]}",
                remedy="train both with the same --seed, --fold, --keep-split and --last, or leave it out of --teacher",
            )


def images_to_synthesize(split: Split, label: str, least: int) -> tuple[Sample, ...]:
    """Choose the images that a generator of one class may learn from: those of the class that train.

    Args:
        split: The split, as a training run makes it.
        label: The class.
        least: Images that it takes.

    Raises:
        UsageError: There is no such class.
        BadInputError: There are fewer.
    """
    if label not in split.labels:
        raise UsageError(
            f"{split.root} has no class {label!r}", remedy=f"choose one of {', '.join(split.labels)}"
        )
    parts = PARTS_FOR[Purpose.TRAIN]
    chosen = tuple(sample for part in parts for sample in split.samples(part) if sample.label == label)
    if len(chosen) < least:
        raise BadInputError(
            f"{len(chosen)} images of {label!r} are in the training part, a generator needs {least} at least",
            remedy="add images of that class",
        )
    return chosen


def require_mixable(record: SynthesisRecord, split: Split, folder: Path) -> None:
    """Decide whether the synthetic images of a folder may train a network with this split; all of them, or none.

    Args:
        record: Of the folder.
        split: The run's.
        folder: For the error.

    Raises:
        BadInputError: They are of a class that the run does not know; or the generator saw an image that the run
            holds back: what it made would carry that image into training.
    """
    if record.label not in split.labels:
        raise BadInputError(
            f"{folder} holds synthetic images of {record.label!r}, which is no class of {split.root}",
            remedy=f"give synthetic images of one of {', '.join(split.labels)}",
        )
    allowed = PARTS_FOR[Purpose.TRAIN]
    held_back = {
        sample.sha256: sample.path for part in PARTS if part not in allowed for sample in split.samples(part)
    }
    leaked = [held_back[digest] for digest in record.seen if digest in held_back]
    if leaked:
        raise BadInputError(
            f"the generator of {folder} learnt from {len(leaked)} images that this run holds back, such as {leaked[0]}",
            remedy=f"train with the split that it knew (--seed {record.seed}, and the same --fold and --keep-split), or"
            " synthesize again for this one",
        )


def images_to_choose_layers(dataset: Dataset, split: Split | None, calibrated: Set[str]) -> SearchImages:
    """Choose the images on which the layers of a mixed engine are searched: others than those that will judge it.

    They are the split's validation part where the folder holds any of it. Else they are what calibration saw, which
    cannot judge anyway. Else every second image by content searches, and the rest is left to judge.

    Args:
        dataset: A folder of labelled images.
        split: The model's split, if any.
        calibrated: Hashes of the calibration table's images.
    """
    if split is not None:
        chosen = _with_content(dataset.samples, _content(split, PARTS_FOR[Purpose.CHOOSE]))
        if chosen:
            return SearchImages(samples=chosen, spent=frozenset())
    chosen = _with_content(dataset.samples, calibrated)
    if chosen:
        return SearchImages(samples=chosen, spent=frozenset())
    chosen = tuple(sorted(dataset.samples, key=lambda sample: sample.sha256)[::2])
    return SearchImages(samples=chosen, spent=frozenset(sample.sha256 for sample in chosen))


def images_to_calibrate(dataset: Dataset, split: Split | None) -> tuple[Sample, ...]:
    """Choose the images that may calibrate: all but those of the parts that the split holds back from it.

    Ranges that were tuned on an image would flatter the INT8 engine's accuracy on it.
    """
    if split is None:
        return dataset.samples
    allowed = PARTS_FOR[Purpose.CALIBRATE]
    held_back = _content(split, [part for part in split.parts if part not in allowed])
    return tuple(sample for sample in dataset.samples if sample.sha256 not in held_back)


def images_to_compare(split: Split, there: Callable[[Sample], bool]) -> tuple[Sample, ...]:
    """Choose the images on which two forms of a run's network are held against each other, part by part.

    Args:
        split: The run's split.
        there: Whether an image's file is where the split says.
    """
    parts = [part for part in PARTS_FOR[Purpose.COMPARE] if split.samples(part)] or ["train"]
    return tuple(sample for part in parts for sample in split.samples(part) if there(sample))


def images_to_judge(dataset: Dataset, split: Split | None, used: Set[str]) -> JudgingImages:
    """Choose the images that may judge an engine.

    Where the folder holds images of the split's evaluation and test parts, it is these: neither training, nor the
    choice of the best epoch, nor calibration saw them. Elsewhere it is every image of no part at all. Images in
    ``used`` are left out either way.

    Args:
        dataset: A folder of labelled images.
        split: The model's split, if any.
        used: Hashes of the calibration table's images, and of those that a search for layers has spent.

    Raises:
        BadInputError: None is left.
    """
    known = frozenset(used)
    if split is not None:
        parts = PARTS_FOR[Purpose.JUDGE]
        chosen = _with_content(dataset.samples, _content(split, parts) - known)
        if chosen:
            origin = f"{' and '.join(parts)} of the model's split, in {dataset.root}"
            return JudgingImages(samples=chosen, origin=origin + _seen(split, chosen))
        known |= _content(split, split.parts)
    chosen = tuple(sample for sample in dataset.samples if sample.sha256 not in known)
    if not chosen:
        raise BadInputError(
            f"training or calibration saw all {len(dataset.samples)} images of {dataset.root}",
            remedy="give images of your own that the model has not seen: --validate DIR",
        )
    left_out = len(dataset.samples) - len(chosen)
    but = f" but {left_out} that the model has seen" if left_out else ""
    return JudgingImages(samples=chosen, origin=f"all of {dataset.root}{but}")


def images_as_asked(dataset: Dataset, split: Split, parts: Sequence[str]) -> tuple[Sample, ...]:
    """Choose the images of the parts that a person named: what the figures then mean is theirs to say.

    Raises:
        UsageError: There is no such part.
    """
    unknown = sorted(set(parts) - set(split.parts))
    if unknown:
        raise UsageError(
            f"there is no part {', '.join(unknown)}", remedy=f"choose of {', '.join(split.parts)}"
        )
    return _with_content(dataset.samples, _content(split, parts))


def _seen(split: Split, samples: Sequence[Sample]) -> str:
    """Count the images of patients that training saw, by the names that the split has for them."""
    patients = split.seen_patients()
    content = {
        sample.sha256 for part in split.parts for sample in split.samples(part) if sample.patient in patients
    }
    count = len(_with_content(samples, content))
    return f"; {count} of them of patients that training saw" if count else ""


def _moved(sample: Sample, paths: Mapping[str, str]) -> Sample:
    path = paths[sample.sha256]
    return Sample(path=path, label=sample.label, patient=sample.patient, sha256=sample.sha256)


def _content(split: Split, parts: Collection[str]) -> frozenset[str]:
    return frozenset(sample.sha256 for part in parts for sample in split.samples(part))


def _with_content(samples: Sequence[Sample], content: Set[str]) -> tuple[Sample, ...]:
    return tuple(sample for sample in samples if sample.sha256 in content)
