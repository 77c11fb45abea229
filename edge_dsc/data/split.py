"""Split a dataset into train, validation, evaluation and test, whole patients at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_dsc.data.discover import Dataset, Sample, count_labels
from engines.contract import Count, Labels, Seed, Sha256
from engines.errors import ArtefactError, BadInputError
from engines.files import DocumentKind, canonical_json, sha256_bytes

SPLIT_FILE = "split.json"  # beside the model, in its run folder
PARTS = ("train", "validation", "evaluation", "test")
# Source: the paper's split, section "Dataset".
FRACTIONS = {"train": 0.63, "validation": 0.18, "evaluation": 0.09, "test": 0.10}
_ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True)
class Split:
    """A dataset in four parts that share no patient.

    Attributes:
        root: The data folder.
        labels: Class names, sorted.
        seed: Seed of the shuffle.
        parts: Samples of each part, sorted by path.
    """

    root: Path
    labels: tuple[str, ...]
    seed: int
    parts: Mapping[str, tuple[Sample, ...]]

    def samples(self, part: str) -> tuple[Sample, ...]:
        """Return the samples of ``train``, ``validation``, ``evaluation`` or ``test``."""
        return self.parts[part]

    @property
    def sha256(self) -> str:
        """Hash of what is on which side: paths, labels, patients and contents; not of the folder's place."""
        return sha256_bytes(canonical_json(msgspec.to_builtins({part: self.parts[part] for part in PARTS})))


def split_dataset(dataset: Dataset, seed: int) -> Split:
    """Split 63/18/9/10, stratified by class, whole patients, the same for the same samples and seed.

    Patients are dealt in a seeded order, those with most images first, each to the part that lacks most of
    its classes; then single ones move where that brings the counts nearer to the shares. Of five such deals
    the nearest is taken. A patient with images of several classes stays whole.

    Raises:
        BadInputError: A class has too few patients for four parts, or a name that no later stage takes.
    """
    try:
        msgspec.convert(dataset.labels, Labels, strict=True)
    except msgspec.ValidationError as error:
        raise BadInputError(
            f"the classes {', '.join(map(repr, dataset.labels))[:200]} cannot be used: {error}",
            remedy="give their folders short names without control characters",
        ) from error
    patients: dict[str, list[Sample]] = {}
    for sample in sorted(dataset.samples, key=lambda sample: sample.path):
        patients.setdefault(sample.patient, []).append(sample)
    for label in dataset.labels:
        if _count_holders(patients, label) < len(PARTS):
            raise _too_few(patients, label)
    deals = [_deal(patients, dataset.labels, seed, attempt) for attempt in range(_ATTEMPTS)]
    whole = [deal for deal in deals if not deal.lacking]
    if not whole:
        raise _too_few(patients, deals[0].lacking[0])
    best = min(whole, key=lambda deal: deal.misfit)
    return Split(root=dataset.root, labels=dataset.labels, seed=seed, parts=best.parts)


@dataclass(frozen=True, kw_only=True)
class _Deal:
    """One way to deal the patients: how far it is from the wanted counts, and the classes that a part lacks."""

    parts: dict[str, tuple[Sample, ...]]
    misfit: float
    lacking: list[str]


def _deal(patients: Mapping[str, list[Sample]], labels: tuple[str, ...], seed: int, attempt: int) -> _Deal:
    names = sorted(patients)
    counts = np.zeros((len(names), len(labels)))
    for row, name in enumerate(names):
        for sample in patients[name]:
            counts[row, labels.index(sample.label)] += 1
    wanted = np.outer([FRACTIONS[part] for part in PARTS], counts.sum(axis=0))
    given = np.zeros_like(wanted)
    place = np.zeros(len(names), np.int64)
    order = np.random.default_rng([seed, attempt]).permutation(len(names))
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
    for index in order:
        lack = ((wanted - given) / wanted * counts[index]).sum(axis=1)
        place[index] = np.argmax(lack)
        given[place[index]] += counts[index]
    _refine(counts, wanted, given, place, order)
    dealt: dict[str, list[Sample]] = {part: [] for part in PARTS}
    for index in order:
        dealt[PARTS[place[index]]] += patients[names[index]]
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


def _too_few(patients: Mapping[str, list[Sample]], label: str) -> BadInputError:
    return BadInputError(
        f"the class {label!r} has images of {_count_holders(patients, label)} patients,"
        f" too few for {len(PARTS)} parts",
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
    split_sha256: Sha256  # of the parts alone: what training records name


def _from_version_1(body: dict[str, Any]) -> dict[str, Any]:
    """Version 1 held the same, sealed by ``split_sha256`` alone: root, labels and seed could be edited."""
    return body


_SPLIT = DocumentKind(
    name="edge-dsc/split",
    version=2,
    body=_SplitBody,
    renew="edge-dsc train DATA --overwrite",
    seal="document_sha256",
    sealed_from=2,
    older={1: _from_version_1},
)
_REMEDY = f"make it again: {_SPLIT.renew}"


def save_split(split: Split, path: Path) -> None:
    """Write ``split.json``: every file with its class, patient and hash."""
    body = _SplitBody(
        root=os.path.realpath(split.root),
        labels=split.labels,
        seed=split.seed,
        fractions=FRACTIONS,
        counts={part: count_labels(split.parts[part]) for part in PARTS},
        parts=_Parts(**split.parts),
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
        root=Path(body.root), labels=body.labels, seed=body.seed, parts=msgspec.structs.asdict(body.parts)
    )
    # The hash is of the parts alone, and version 1 has no other seal; the labels are theirs, in order.
    labels = {sample.label for part in PARTS for sample in split.parts[part]}
    ordered = tuple(sorted(labels.union(split.labels))) == split.labels
    if body.split_sha256 != split.sha256 or not ordered:
        raise ArtefactError(f"{path} was edited after it was made", remedy=_REMEDY)
    check_sides(split, source=str(path))
    return split


def check_sides(split: Split, *, source: str) -> None:
    """Prove that no patient and no file content is on two sides.

    Raises:
        ArtefactError: One is; names it.
    """
    side: dict[tuple[str, str], str] = {}
    for part in PARTS:
        for sample in split.parts[part]:
            for key in (("patient", sample.patient), ("file", sample.sha256)):
                if side.setdefault(key, part) != part:
                    raise ArtefactError(
                        f"{source} has the {key[0]} {key[1]} in {side[key]} and in {part}", remedy=_REMEDY
                    )
