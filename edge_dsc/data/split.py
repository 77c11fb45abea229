"""Split a dataset into train, validation, evaluation and test, whole patients at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_dsc.data.discover import Dataset, Sample, count_labels
from engines.errors import ArtefactError, BadInputError
from engines.files import canonical_json, read_document, sha256_bytes, write_document

SPLIT_FILE = "split.json"  # beside the model, in its run folder
KIND = "edge-dsc/split"
SCHEMA_VERSION = 1
PARTS = ("train", "validation", "evaluation", "test")
# Source: the paper's split, section "Dataset".
FRACTIONS = {"train": 0.63, "validation": 0.18, "evaluation": 0.09, "test": 0.10}
_ATTEMPTS = 5
_RENEW = "edge-dsc train DATA --overwrite"

Array = Any


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
        return sha256_bytes(canonical_json(_parts_to_json(self.parts)))


def split_dataset(dataset: Dataset, seed: int) -> Split:
    """Split 63/18/9/10, stratified by class, whole patients, the same for the same samples and seed.

    Patients are dealt in a seeded order, those with most images first, each to the part that lacks most of
    its classes; then single ones move where that brings the counts nearer to the shares. Of five such deals
    the nearest is taken. A patient with
    images of several classes stays whole.

    Raises:
        BadInputError: A class has too few patients for four parts.
    """
    patients: dict[str, list[Sample]] = {}
    for sample in sorted(dataset.samples, key=lambda sample: sample.path):
        patients.setdefault(sample.patient, []).append(sample)
    for label in dataset.labels:
        holders = _count_holders(patients, label)
        if holders < len(PARTS):
            raise _too_few(label, holders)
    deals = [_deal(patients, dataset.labels, seed, attempt) for attempt in range(_ATTEMPTS)]
    whole = [deal for deal in deals if not deal.lacking]
    if not whole:
        label = deals[0].lacking[0]
        raise _too_few(label, _count_holders(patients, label))
    best = min(whole, key=lambda deal: deal.misfit)
    return Split(root=dataset.root, labels=dataset.labels, seed=seed, parts=best.parts)


def save_split(split: Split, path: Path) -> None:
    """Write ``split.json``: every file with its class, patient and hash."""
    body = {
        "root": str(split.root.resolve()),
        "labels": list(split.labels),
        "seed": split.seed,
        "fractions": FRACTIONS,
        "counts": {part: count_labels(split.parts[part]) for part in PARTS},
        "parts": _parts_to_json(split.parts),
        "split_sha256": split.sha256,
    }
    write_document(path, KIND, SCHEMA_VERSION, body)


def load_split(path: Path) -> Split:
    """Read ``split.json`` and check it.

    Raises:
        ArtefactError: Unreadable, edited, or with a patient or a file on two sides.
    """
    body = read_document(path, KIND, SCHEMA_VERSION, renew=_RENEW)
    try:
        parts = {part: tuple(Sample(**sample) for sample in body["parts"][part]) for part in PARTS}
        split = Split(
            root=Path(body["root"]), labels=tuple(body["labels"]), seed=int(body["seed"]), parts=parts
        )
        seal = body["split_sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(
            f"{path} is no readable split: {error!r}", remedy=f"make it anew: {_RENEW}"
        ) from error
    if seal != split.sha256:
        raise ArtefactError(f"{path} was edited after training", remedy=f"make it anew: {_RENEW}")
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
                        f"{source} has the {key[0]} {key[1]} in {side[key]} and in {part}",
                        remedy=f"make it anew: {_RENEW}",
                    )


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
    place = np.zeros(len(names), int)
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


def _refine(counts: Array, wanted: Array, given: Array, place: Array, order: Array) -> None:
    """Move single patients wherever that lowers the misfit and leaves every part its classes; twice over all."""
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


def _parts_to_json(parts: Mapping[str, tuple[Sample, ...]]) -> dict[str, list[dict[str, str]]]:
    return {part: [asdict(sample) for sample in parts[part]] for part in PARTS}


def _too_few(label: str, holders: int) -> BadInputError:
    return BadInputError(
        f"the class {label!r} has images of {holders} patients, too few for {len(PARTS)} parts",
        remedy="add images of more patients (at least a dozen a class give usable figures)",
    )
