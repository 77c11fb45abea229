"""Find the labelled images of a folder: which class, and which patient."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engines.errors import BadInputError
from engines.files import sha256_file
from engines.images import IMAGE_SUFFIXES

_COLUMNS = ("class", "file", "patient")
# NIH ChestX-ray8: patient_follow-up. Kaggle chest X-ray: personN_kind_M and [NORMAL2-]IM-patient-image.
_NAMES = (
    re.compile(r"^(\d{8})_\d{3}\."),
    re.compile(r"^(person\d+)_", re.IGNORECASE),
    re.compile(r"^((?:NORMAL2-)?IM-\d{4})-\d{4}"),
)


def name_patient(path: str) -> str:
    """Return the patient that a relative path tells, or the path itself: a patient of its own."""
    name = path.rsplit("/", 1)[-1]
    for pattern in _NAMES:
        found = pattern.match(name)
        if found:
            return found[1]
    return f"file:{path}"


def read_groups(path: Path) -> dict[tuple[str, str], str]:
    """Read ``groups.csv`` (columns class, file, patient): ``{(class, file): patient}``, empty without the file.

    Raises:
        BadInputError: Not UTF-8, other columns, an empty field, or one file with two patients; names the line.
    """
    if not path.exists():
        return {}
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines(), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInputError(
            f"cannot read {path}: {error}", remedy="write it as UTF-8 CSV: class,file,patient"
        ) from error
    if not rows or tuple(rows[0]) != _COLUMNS:
        seen = ",".join(rows[0]) if rows else "nothing"
        raise BadInputError(f"{path} line 1 is {seen!r}", remedy="its first line must be class,file,patient")
    groups: dict[tuple[str, str], str] = {}
    for line, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != len(_COLUMNS) or not all(field.strip() for field in row):
            raise BadInputError(f"{path} line {line} is {','.join(row)!r}", remedy="write class,file,patient")
        label, file, patient = row
        if groups.setdefault((label, file), patient) != patient:
            raise BadInputError(
                f"{path} line {line} gives {label}/{file} a second patient, {patient!r}",
                remedy="keep one line a file",
            )
    return groups


def unite_patients(patients: Sequence[str], hashes: Sequence[str]) -> list[str]:
    """Make one patient of all that share a file.

    Args:
        patients: The patient of every file.
        hashes: SHA-256 of every file, in the same order.

    Returns:
        The patient of every file; united ones carry the name that sorts first.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    first: dict[str, str] = {}
    for patient, digest in zip(patients, hashes, strict=True):
        one, other = sorted((root(patient), root(first.setdefault(digest, patient))))
        parent[other] = one
    return [root(patient) for patient in patients]


_SPLIT_FOLDERS = frozenset({"test", "train", "training", "val", "valid", "validation"})
_KAGGLE_CLASSES = frozenset({"NORMAL", "PNEUMONIA"})
_LAYOUT = "lay images out as FOLDER/CLASS/IMAGE, one folder a class"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One labelled image.

    Attributes:
        path: Relative to the dataset's root, with forward slashes.
        label: Class name.
        patient: Samples of one patient stay on one side of every split.
        sha256: Hash of the file.
    """

    path: str
    label: str
    patient: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The labelled images of a folder.

    Attributes:
        root: The folder.
        samples: Sorted by path.
        labels: Class names, sorted.
        ignored: Files that are no images by their suffix, or whose class cannot be told; relative paths.
    """

    root: Path
    samples: tuple[Sample, ...]
    labels: tuple[str, ...]
    ignored: tuple[str, ...] = ()


def discover(root: Path) -> Dataset:
    """Find the labelled images below a folder.

    Layouts: ``root/CLASS/...image``; the same below ``train``, ``val`` and ``test``, which are then taken
    together; and the Kaggle chest X-ray set, whose PNEUMONIA files name ``bacteria`` or ``virus``, which gives
    the classes ``normal``, ``bacteria`` and ``virus``. Patients come from ``root/groups.csv``, else from the
    file name, else every file is a patient; files of equal content belong to one patient.

    Raises:
        BadInputError: No such folder, no images, a single class, an empty class, a malformed ``groups.csv``.
    """
    if not root.is_dir():
        reason = "is not a folder" if root.exists() else "does not exist"
        raise BadInputError(f"the data folder {root} {reason}", remedy=_LAYOUT)
    found: list[tuple[str, str]] = []
    ignored: list[str] = []
    kaggle = _is_kaggle(root)
    for folder, label in _class_folders(root):
        before = len(found)
        for path in _files_below(folder, root):
            name = path.relative_to(root).as_posix()
            known = _kaggle_label(label, path.name) if kaggle else label
            if path.suffix.lower() in IMAGE_SUFFIXES and known:
                found.append((name, known))
            else:
                ignored.append(name)
        if len(found) == before and not (kaggle or _is_presplit(root)):
            raise BadInputError(
                f"the class folder {folder} holds no images",
                remedy=f"put {', '.join(sorted(IMAGE_SUFFIXES))} files there or remove the folder",
            )
    labels = tuple(sorted({label for _, label in found}))
    _check_classes(root, labels)
    samples = _with_patients(root, sorted(found))
    return Dataset(root=root, samples=samples, labels=labels, ignored=tuple(sorted(ignored)))


def count_labels(samples: tuple[Sample, ...]) -> dict[str, int]:
    """Count samples by class name, in the order of the names."""
    return dict(sorted(Counter(sample.label for sample in samples).items()))


def _check_classes(root: Path, labels: tuple[str, ...]) -> None:
    if not labels:
        raise BadInputError(f"there are no images in class folders below {root}", remedy=_LAYOUT)
    if len(labels) == 1:
        raise BadInputError(
            f"{root} holds a single class, {labels[0]!r}",
            remedy="a classifier needs at least two; " + _LAYOUT,
        )


def _folders(parent: Path) -> list[Path]:
    try:
        entries = sorted(parent.iterdir())
    except OSError as error:
        raise BadInputError(
            f"cannot list {parent}: {error.strerror}", remedy="check the folder's permissions"
        ) from error
    return [entry for entry in entries if not _is_hidden(entry.name) and entry.is_dir()]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_presplit(root: Path) -> bool:
    folders = _folders(root)
    return bool(folders) and all(
        folder.name.lower() in _SPLIT_FOLDERS and _folders(folder) for folder in folders
    )


def _is_kaggle(root: Path) -> bool:
    if not _is_presplit(root):
        return False
    classes = [folder for part in _folders(root) for folder in _folders(part)]
    if {folder.name.upper() for folder in classes} != _KAGGLE_CLASSES:
        return False
    files = (
        path
        for folder in classes
        if folder.name.upper() == "PNEUMONIA"
        for path in _files_below(folder, root)
    )
    return any(_kaggle_label("PNEUMONIA", path.name) for path in files)


def _kaggle_label(folder: str, file: str) -> str | None:
    if folder.upper() == "NORMAL":
        return "normal"
    kinds = [kind for kind in ("bacteria", "virus") if kind in file.lower()]
    return kinds[0] if len(kinds) == 1 else None


def _class_folders(root: Path) -> Iterator[tuple[Path, str]]:
    for parent in _folders(root) if _is_presplit(root) else [root]:
        for folder in _folders(parent):
            yield folder, folder.name


def _files_below(folder: Path, root: Path) -> Iterator[Path]:
    """Yield the visible files below a folder, links followed, each real folder entered once, the root never."""
    entered = {os.path.realpath(root), os.path.realpath(folder.parent)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        yield from (Path(parent) / name for name in sorted(files) if not _is_hidden(name))


def _with_patients(root: Path, found: list[tuple[str, str]]) -> tuple[Sample, ...]:
    groups = read_groups(root / "groups.csv")
    patients = [groups.get((label, path.rsplit("/", 1)[-1])) or name_patient(path) for path, label in found]
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(lambda item: _hash(root / item[0]), found))
    return tuple(
        Sample(path=path, label=label, patient=patient, sha256=digest)
        for (path, label), patient, digest in zip(
            found, unite_patients(patients, hashes), hashes, strict=True
        )
    )


def _hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise BadInputError(
            f"cannot read {path}: {error.strerror}",
            remedy="check the file, or remove it from the class folder",
        ) from error
