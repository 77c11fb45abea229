"""Split a dataset into train, validation, evaluation and test, whole patients at a time, or keep the split it has."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_dsc.data.discover import Dataset, Sample, count_labels
from engines.contract import Count, Labels, Seed, Sha256
from engines.errors import ArtefactError, BadInputError, UsageError
from engines.files import DocumentKind, canonical_json, sha256_bytes

SPLIT_FILE = "split.json"  # beside the model, in its run folder
PARTS = ("train", "validation", "evaluation", "test")
# Source: the paper's split, section "Dataset".
FRACTIONS = {"train": 0.63, "validation": 0.18, "evaluation": 0.09, "test": 0.10}
_ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True)
class Split:
    """A dataset in four parts that share no file, and no patient unless they were kept as a folder gave them.

    Attributes:
        root: The data folder.
        labels: Class names, sorted.
        seed: Seed of the shuffle.
        parts: Samples of each part, sorted by path.
        fold: Where evaluation and test are fold K of N: (K, N), K counted from 1.
        kept: Whether the parts are those that the folder came in; then patients may be in several.
    """

    root: Path
    labels: tuple[str, ...]
    seed: int
    parts: Mapping[str, tuple[Sample, ...]]
    fold: tuple[int, int] | None = None
    kept: bool = False

    def samples(self, part: str) -> tuple[Sample, ...]:
        """Return the samples of ``train``, ``validation``, ``evaluation`` or ``test``."""
        return self.parts[part]

    @property
    def sha256(self) -> str:
        """Hash of what is on which side: paths, labels, patients and contents; not of the folder's place."""
        return sha256_bytes(canonical_json(msgspec.to_builtins({part: self.parts[part] for part in PARTS})))

    def seen_patients(self) -> frozenset[str]:
        """Return the patients of train and validation who have images in evaluation or test too."""
        made, judged = (
            {sample.patient for part in parts for sample in self.parts[part]}
            for parts in (PARTS[:2], PARTS[2:])
        )
        return frozenset(made & judged)

    def warnings(self) -> tuple[str, ...]:
        """Say by number what is wrong with a split that was kept; nothing of one that was dealt here."""
        seen = self.seen_patients()
        held_out = [sample for part in PARTS[2:] for sample in self.parts[part]]
        found = []
        if seen:
            images = sum(sample.patient in seen for sample in held_out)
            found.append(
                f"{len(seen)} patients, such as {min(seen)}, have images in train or validation and in evaluation or"
                f" test: {images} of the {len(held_out)} held-out images flatter the network"
            )
        for part in PARTS:
            lacking = sorted(set(self.labels) - {sample.label for sample in self.parts[part]})
            if lacking and self.parts[part]:  # an empty part was left so on purpose
                found.append(f"{part} holds no image of {', '.join(lacking)}")
        return tuple(found)


def split_dataset(dataset: Dataset, seed: int, *, fold: tuple[int, int] | None = None) -> Split:
    """Split 63/18/9/10, stratified by class, whole patients, the same for the same samples and seed.

    Patients are dealt in a seeded order, those with most images first, each to the part that lacks most of
    its classes; then single ones move where that brings the counts nearer to the shares. Of five such deals
    the nearest is taken. A patient with images of several classes stays whole.

    With a fold the patients are dealt in N equal folds first, the same ones for every K. Fold K is dealt in evaluation
    and test, the others in train and validation, each 9 to 10 and 63 to 18: over all K every image is held out once.

    Args:
        dataset: The samples.
        seed: Of the order in which patients are dealt.
        fold: (K, N), K counted from 1.

    Raises:
        BadInputError: A class has too few patients for its parts, or a name that no later stage takes.
        UsageError: There is no such fold.
    """
    check_labels(dataset)
    patients = _by_patient(dataset.samples)
    if fold is None:
        parts = _deal_best(patients, dataset.labels, seed, FRACTIONS)
    else:
        parts = _deal_fold(patients, dataset.labels, seed, fold)
    return Split(root=dataset.root, labels=dataset.labels, seed=seed, parts=parts, fold=fold)


def keep_split(dataset: Dataset, seed: int) -> tuple[Split, tuple[tuple[str, str], ...]]:
    """Keep the split that a folder comes in; a part that has no folder is dealt from the patients of train.

    Patients may be on two sides then, and :meth:`Split.warnings` counts them. One file is never on two sides: of equal
    files the one in test stays, else that in evaluation, in validation, in train.

    Args:
        dataset: Of a folder with train and test, and perhaps validation and evaluation.
        seed: Of what is dealt.

    Returns:
        The split, and the files that were left out: relative path and reason.

    Raises:
        BadInputError: The folder does not come split, a part of it is empty, or train lacks a class.
    """
    check_labels(dataset)
    by_part: dict[str, list[Sample]] = {part: [] for part in PARTS if part in dataset.given.values()}
    if "train" not in by_part or "test" not in by_part:
        seen = ", ".join(by_part) or "none"
        raise BadInputError(
            f"{dataset.root} does not come split (folders of parts: {seen})",
            remedy="lay it out as train|validation|evaluation|test/CLASS/IMAGE (train and test at least), "
            "or leave --keep-split out",
        )
    first: dict[str, str] = {}
    left_out = []
    for part in reversed(by_part):
        for sample in dataset.samples:
            if dataset.given[sample.path] != part:
                continue
            other = first.setdefault(sample.sha256, sample.path)
            if dataset.given[other] == part:
                by_part[part].append(sample)
            else:
                left_out.append((sample.path, f"is the same file as {other}"))
    parts = {part: tuple(samples) for part, samples in by_part.items()}
    empty = [part for part, samples in parts.items() if not samples]
    lacking = sorted(set(dataset.labels) - {sample.label for sample in parts["train"]})
    if empty or lacking:
        what = f"{empty[0]} holds no usable image" if empty else f"train holds no image of {lacking[0]}"
        raise BadInputError(
            f"the split of {dataset.root} cannot be kept: {what}",
            remedy="add images, or leave --keep-split out",
        )
    missing = [part for part in PARTS if part not in parts]
    if missing:
        shares = _shares(("train", *missing))
        parts |= _deal_best(_by_patient(parts["train"]), dataset.labels, seed, shares)
    split = Split(root=dataset.root, labels=dataset.labels, seed=seed, parts=parts, kept=True)
    return split, tuple(sorted(left_out))


def check_labels(dataset: Dataset) -> None:
    """Refuse class names that no later stage takes.

    Raises:
        BadInputError: There is one.
    """
    try:
        msgspec.convert(dataset.labels, Labels, strict=True)
    except msgspec.ValidationError as error:
        raise BadInputError(
            f"the classes {', '.join(map(repr, dataset.labels))[:200]} cannot be used: {error}",
            remedy="give their folders short names without control characters",
        ) from error


def _by_patient(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    patients: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.path):
        patients.setdefault(sample.patient, []).append(sample)
    return patients


def _shares(parts: Iterable[str]) -> dict[str, float]:
    """Return the paper's shares of some parts, scaled to a sum of 1."""
    shares = {part: FRACTIONS[part] for part in parts}
    return {part: share / sum(shares.values()) for part, share in shares.items()}


def _deal_fold(
    patients: Mapping[str, list[Sample]], labels: tuple[str, ...], seed: int, fold: tuple[int, int]
) -> dict[str, tuple[Sample, ...]]:
    number, folds = fold
    if not 1 <= number <= folds or folds < 2:
        raise UsageError(
            f"there is no fold {number} of {folds}", remedy="count from 1/N to N/N, N at least 2, such as 1/5"
        )
    dealt = _deal_best(patients, labels, seed, {f"fold {place}": 1 / folds for place in range(1, folds + 1)})
    held_out = dealt.pop(f"fold {number}")
    rest = [sample for samples in dealt.values() for sample in samples]
    return {
        **_deal_best(_by_patient(rest), labels, seed, _shares(PARTS[:2])),
        **_deal_best(_by_patient(held_out), labels, seed, _shares(PARTS[2:])),
    }


def _deal_best(
    patients: Mapping[str, list[Sample]], labels: tuple[str, ...], seed: int, shares: Mapping[str, float]
) -> dict[str, tuple[Sample, ...]]:
    """Deal patients several times and take the deal that is nearest to the shares.

    Raises:
        BadInputError: A class has too few patients.
    """
    for label in labels:
        if _count_holders(patients, label) < len(shares):
            raise _too_few(patients, label, shares)
    deals = [_deal(patients, labels, seed, attempt, shares) for attempt in range(_ATTEMPTS)]
    whole = [deal for deal in deals if not deal.lacking]
    if not whole:
        raise _too_few(patients, deals[0].lacking[0], shares)
    return min(whole, key=lambda deal: deal.misfit).parts


@dataclass(frozen=True, kw_only=True)
class _Deal:
    """One way to deal the patients: how far it is from the wanted counts, and the classes that a part lacks."""

    parts: dict[str, tuple[Sample, ...]]
    misfit: float
    lacking: list[str]


def _deal(
    patients: Mapping[str, list[Sample]],
    labels: tuple[str, ...],
    seed: int,
    attempt: int,
    shares: Mapping[str, float],
) -> _Deal:
    parts = list(shares)
    names = sorted(patients)
    counts = np.zeros((len(names), len(labels)))
    for row, name in enumerate(names):
        for sample in patients[name]:
            counts[row, labels.index(sample.label)] += 1
    wanted = np.outer([shares[part] for part in parts], counts.sum(axis=0))
    given = np.zeros_like(wanted)
    place = np.zeros(len(names), np.int64)
    order = np.random.default_rng([seed, attempt]).permutation(len(names))
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
    for index in order:
        lack = ((wanted - given) / wanted * counts[index]).sum(axis=1)
        place[index] = np.argmax(lack)
        given[place[index]] += counts[index]
    _refine(counts, wanted, given, place, order)
    dealt: dict[str, list[Sample]] = {part: [] for part in parts}
    for index in order:
        dealt[parts[place[index]]] += patients[names[index]]
    return _Deal(
        parts={
            part: tuple(sorted(samples, key=lambda sample: sample.path)) for part, samples in dealt.items()
        },
        misfit=float(((given - wanted) ** 2 / wanted).sum()),
        lacking=[labels[column] for column in np.flatnonzero((given == 0).any(axis=0))],
    )


def _refine(
    counts: NDArray[np.float64],
    wanted: NDArray[np.float64],
    given: NDArray[np.float64],
    place: NDArray[np.int64],
    order: NDArray[np.int64],
) -> None:
    """Move single patients wherever that lowers the misfit and leaves every part its classes; twice over all.

    Args:
        counts: Images of each patient by class, ``[patients, classes]``.
        wanted: Images of each part by class, ``[parts, classes]``.
        given: The same as dealt so far; changed in place.
        place: The part of each patient; changed in place.
        order: In which the patients are tried.
    """
    for index in np.concatenate([order, order]):
        moved, part = counts[index], place[index]
        left = given[part] - moved
        if ((left == 0) & (given[part] > 0)).any():
            continue
        gain = ((given[part] - wanted[part]) ** 2 - (left - wanted[part]) ** 2) / wanted[part]
        cost = (moved * (2 * (given - wanted) + moved) / wanted).sum(axis=1)
        cost[part] = np.inf
        best = int(np.argmin(cost))
        if cost[best] < gain.sum() - 1e-9:
            given[part], place[index] = left, best
            given[best] += moved


def _count_holders(patients: Mapping[str, list[Sample]], label: str) -> int:
    return sum(any(sample.label == label for sample in samples) for samples in patients.values())


def _too_few(patients: Mapping[str, list[Sample]], label: str, shares: Mapping[str, float]) -> BadInputError:
    what = f"{len(shares)} parts" if len(shares) == len(PARTS) else ", ".join(shares)
    return BadInputError(
        f"the class {label!r} has images of {_count_holders(patients, label)} patients, too few for {what}",
        remedy="add images of more patients (at least a dozen a class give usable figures)",
    )


class _Parts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The samples of each part; its fields are :data:`PARTS`."""

    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    evaluation: tuple[Sample, ...]
    test: tuple[Sample, ...]


class _SplitBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``split.json`` holds; shares, counts and ``split_sha256`` follow from the rest."""

    root: str
    labels: Labels
    seed: Seed
    fractions: Mapping[str, float]
    counts: Mapping[str, Mapping[str, Count]]
    parts: _Parts
    fold: tuple[Count, Count] | None
    kept: bool
    split_sha256: Sha256  # of the parts alone: what training records name


def _from_version_1(body: dict[str, Any]) -> dict[str, Any]:
    """Version 1 held the same, sealed by ``split_sha256`` alone: root, labels and seed could be edited."""
    return body


def _from_version_2(body: dict[str, Any]) -> dict[str, Any]:
    """Version 2 knew neither folds nor splits that are kept."""
    return {**body, "fold": None, "kept": False}


_SPLIT = DocumentKind(
    name="edge-dsc/split",
    version=3,
    body=_SplitBody,
    renew="edge-dsc train DATA --overwrite",
    seal="document_sha256",
    sealed_from=2,
    older={1: _from_version_1, 2: _from_version_2},
)
_REMEDY = f"make it again: {_SPLIT.renew}"


def _fractions(split: Split) -> dict[str, float]:
    """Return the share of each part that was wanted; of a split that was kept, or has an empty part, what it has."""
    if split.kept or not all(split.parts.values()):
        total = sum(map(len, split.parts.values()))
        return {part: len(split.parts[part]) / total for part in PARTS}
    if split.fold is None:
        return FRACTIONS
    held_out = 1 / split.fold[1]
    made, judged = _shares(PARTS[:2]), _shares(PARTS[2:])
    return {part: share * (1 - held_out) for part, share in made.items()} | {
        part: share * held_out for part, share in judged.items()
    }


def save_split(split: Split, path: Path) -> None:
    """Write ``split.json``: every file with its class, patient and hash."""
    body = _SplitBody(
        root=os.path.realpath(split.root),
        labels=split.labels,
        seed=split.seed,
        fractions=_fractions(split),
        counts={part: count_labels(split.parts[part]) for part in PARTS},
        parts=_Parts(**split.parts),
        fold=split.fold,
        kept=split.kept,
        split_sha256=split.sha256,
    )
    _SPLIT.save(path, body)


def load_split(path: Path) -> Split:
    """Read ``split.json`` and check it.

    Raises:
        ArtefactError: Unreadable, edited, or with a patient or a file on two sides.
    """
    body = _SPLIT.load(path)
    split = Split(
        root=Path(body.root),
        labels=body.labels,
        seed=body.seed,
        parts=msgspec.structs.asdict(body.parts),
        fold=body.fold,
        kept=body.kept,
    )
    # The hash is of the parts alone, and version 1 has no other seal; the labels are theirs, in order.
    labels = {sample.label for part in PARTS for sample in split.parts[part]}
    ordered = tuple(sorted(labels.union(split.labels))) == split.labels
    if body.split_sha256 != split.sha256 or not ordered:
        raise ArtefactError(f"{path} was edited after it was made", remedy=_REMEDY)
    check_sides(split, source=str(path))
    return split


def check_sides(split: Split, *, source: str) -> None:
    """Prove that no patient and no file content is on two sides; of a split that was kept, no file content.

    Its patients are the folder's own, and :meth:`Split.warnings` counts them.

    Raises:
        ArtefactError: One is; names it.
    """
    side: dict[tuple[str, str], str] = {}
    for part in PARTS:
        for sample in split.parts[part]:
            for key in (("patient", sample.patient), ("file", sample.sha256)):
                if split.kept and key[0] == "patient":
                    continue
                if side.setdefault(key, part) != part:
                    raise ArtefactError(
                        f"{source} has the {key[0]} {key[1]} in {side[key]} and in {part}", remedy=_REMEDY
                    )
