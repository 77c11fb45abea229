"""Find the labelled images of a folder: which class, which patient, which content."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edge_dsc.data.synthetic import require_real
from engines.errors import BadInputError
from engines.files import read_regular, sha256_file
from engines.images import IMAGE_SUFFIXES, usable_processors

# The part of a split that a folder's name stands for, in lower case.
_PART_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("eval", "evaluation"), "evaluation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_KAGGLE_CLASSES = frozenset({"NORMAL", "PNEUMONIA"})
KINDS = ("bacteria", "normal", "virus")
_LAYOUT = "lay images out as FOLDER/CLASS/IMAGE, one folder a class"
_GROUP_COLUMNS = ("class", "file", "patient")
# NIH ChestX-ray8: patient_follow-up. Kaggle chest X-ray: personN_kind_M and [NORMAL2-]IM-patient-image.
_PATIENT_NAMES = (
    re.compile(r"^(\d{8})_\d{3}\."),
    re.compile(r"^(person\d+)_", re.IGNORECASE),
    re.compile(r"^((?:NORMAL2-)?IM-\d{4})-\d{4}"),
)


class Sample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
        ignored: Files that are no images by their suffix, or whose class is unknown; relative paths.
        given: Where the folder comes split, the part that each sample's path lies in, such as ``validation``.
    """

    root: Path
    samples: tuple[Sample, ...]
    labels: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    given: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What names and ``groups.csv`` say of a folder, before any image is read.

    Attributes:
        root: The folder.
        files: Of every image its relative path, class and patient, sorted by path.
        labels: Class names, sorted.
        ignored: As :attr:`Dataset.ignored`.
        given: As :attr:`Dataset.given`.
    """

    root: Path
    files: tuple[tuple[str, str, str], ...]
    labels: tuple[str, ...]
    ignored: tuple[str, ...]
    given: Mapping[str, str]

    def paths(self) -> list[Path]:
        """Return the path of every image."""
        return [self.root / path for path, _, _ in self.files]


def discover(root: Path, *, labels: Sequence[str] | None = None) -> Dataset:
    """Find the labelled images below a folder and hash them.

    Layouts: ``root/CLASS/...image``; the same below ``train``, ``val``, ``evaluation`` and ``test``, in ``root`` or in
    its one folder, as archives unpack; and chest-xray-pneumonia from Kaggle, whose PNEUMONIA files name ``bacteria`` or
    ``virus``, which gives the classes of :data:`KINDS`. A folder that comes split is taken together, and the part of
    every image kept in :attr:`Dataset.given`. Patients come from ``root/groups.csv``, else from the file name, else
    every file is a patient; files of equal content belong to one patient.

    Args:
        root: The folder.
        labels: Classes of the model that is asked about the images: where names can be read in two ways, as three
            kinds or as the two class folders, they are read as these.

    Raises:
        BadInputError: No such folder, no images, a single class, an empty class, a malformed ``groups.csv``, or a
            file that cannot be read.
    """
    listing = list_images(root, kinds=_kinds_of(root, labels))
    with ThreadPoolExecutor(usable_processors()) as pool:
        hashes = list(pool.map(hash_image, listing.paths()))
    return make_dataset(listing, hashes)


def list_images(root: Path, *, kinds: bool | None = None) -> Listing:
    """List the images below a folder without decoding them; see :func:`discover`.

    Args:
        root: The folder.
        kinds: Whether NORMAL and PNEUMONIA become the classes of :data:`KINDS` by the kind that a file's name gives.
            None: where the folder comes split and its names give kinds.

    Raises:
        BadInputError: No such folder, no images, a single class, an empty class, a malformed ``groups.csv``; kinds of
            a folder that has no such classes; an image that edge-dsc made itself.
    """
    if not root.is_dir():
        reason = "is not a folder" if root.exists() else "does not exist"
        raise BadInputError(f"the data folder {root} {reason}", remedy=_LAYOUT)
    tree = _read_tree(root)
    by_kind = _reads_kinds(tree, kinds)
    found: list[tuple[str, str]] = []
    given: dict[str, str] = {}
    ignored = list(tree.ignored)
    for part, folder in tree.classes:
        before = len(found)
        for path in _files_below(folder, root):
            name = path.relative_to(root).as_posix()
            label = _kind(folder.name, path.name) if by_kind else folder.name
            if path.suffix.lower() in IMAGE_SUFFIXES and label:
                found.append((name, label))
                if part:
                    given[name] = part
            else:
                ignored.append(name)
        if len(found) == before and not part:
            raise BadInputError(
                f"the class folder {folder} holds no images",
                remedy=f"put {', '.join(sorted(IMAGE_SUFFIXES))} files there or remove the folder",
            )
    labels = tuple(sorted({label for _, label in found}))
    if not labels:
        raise BadInputError(f"there are no images in class folders below {root}", remedy=_LAYOUT)
    if len(labels) == 1:
        raise BadInputError(
            f"{root} holds a single class, {labels[0]!r}",
            remedy="a classifier needs at least two; " + _LAYOUT,
        )
    require_real(root, (path for path, _ in found))
    groups = _read_groups(root / "groups.csv")
    files = tuple(
        (path, label, groups.get((label, path.rsplit("/", 1)[-1])) or _patient_by_name(path))
        for path, label in sorted(found)
    )
    return Listing(root=root, files=files, labels=labels, ignored=tuple(sorted(ignored)), given=given)


def make_dataset(listing: Listing, hashes: Sequence[str]) -> Dataset:
    """Make a dataset of a listing and the SHA-256 of each of its files, in the same order."""
    patients = _unite_patients([patient for _, _, patient in listing.files], hashes)
    samples = tuple(
        Sample(path=path, label=label, patient=patient, sha256=digest)
        for (path, label, _), patient, digest in zip(listing.files, patients, hashes, strict=True)
    )
    return Dataset(
        root=listing.root,
        samples=samples,
        labels=listing.labels,
        ignored=listing.ignored,
        given=listing.given,
    )


def hash_image(path: Path) -> str:
    """Return the SHA-256 of an image file.

    Raises:
        BadInputError: It cannot be read, such as a broken link.
    """
    try:
        return sha256_file(path)
    except OSError as error:
        raise BadInputError(
            f"cannot read {path}: {error.strerror}",
            remedy="check the file, or remove it from the class folder",
        ) from error


def count_labels(samples: Sequence[Sample]) -> dict[str, int]:
    """Count samples by class name, in the order of the names."""
    return dict(sorted(Counter(sample.label for sample in samples).items()))


@dataclass(frozen=True, kw_only=True)
class _Tree:
    """How a folder is laid out.

    Attributes:
        classes: The part, None in a folder that does not come split, and the class folder.
        ignored: Folders that are left out.
    """

    classes: tuple[tuple[str | None, Path], ...]
    ignored: tuple[str, ...] = ()


def _read_tree(root: Path) -> _Tree:
    """Find the class folders; see :func:`discover`.

    The archive of chest-xray-pneumonia holds everything twice: ``chest_xray/train`` and
    ``chest_xray/chest_xray/train``.
    """
    inside = _folders(root)
    if len(inside) == 1 and _parts_of(_folders(inside[0])):
        inside = _folders(inside[0])
    parts = _parts_of(inside)
    if not parts:
        return _Tree(classes=tuple((None, folder) for folder in inside))
    classes = tuple((part, folder) for part, parent in parts for folder in _folders(parent))
    copies = tuple(
        f"{folder.relative_to(root).as_posix()}/"
        for folder in inside
        if folder.name.lower() not in _PART_FOLDERS
    )
    return _Tree(classes=classes, ignored=copies)


def _parts_of(folders: Sequence[Path]) -> list[tuple[str, Path]]:
    """Return the part that each folder is; none of them, unless all are parts but for copies of the whole."""
    parts = [(_PART_FOLDERS.get(folder.name.lower()), folder) for folder in folders]
    named = [(part, folder) for part, folder in parts if part is not None]
    whole = {part for part, _ in named}
    for part, folder in parts if named else []:
        inside = _folders(folder)
        if part is None and {part for part, _ in _parts_of(inside)} != whole:
            return []
        if part is not None and not inside:
            return []
    return named


def _folders(parent: Path) -> list[Path]:
    try:
        entries = sorted(parent.iterdir())
    except OSError as error:
        raise BadInputError(
            f"cannot list {parent}: {error.strerror}", remedy="check the folder's permissions"
        ) from error
    return [entry for entry in entries if not _is_hidden(entry.name) and entry.is_dir()]


def _files_below(folder: Path, root: Path) -> Iterator[Path]:
    """Yield the visible files below a folder, each real folder entered once, the root never.

    Links are followed, but not the links to folders that lie behind one: a link to /proc would lead through the whole
    disk. Such a link is yielded like a file.
    """
    entered = {os.path.realpath(root), os.path.realpath(folder.parent)}
    top = os.path.realpath(folder)
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        behind_link = os.path.commonpath([top, real]) != top
        further = [name for name in folders if behind_link and Path(parent, name).is_symlink()]
        folders[:] = sorted(name for name in folders if not _is_hidden(name) and name not in further)
        yield from (Path(parent) / name for name in sorted(files + further) if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _reads_kinds(tree: _Tree, asked: bool | None) -> bool:
    """Decide whether classes are kinds of pneumonia that file names give.

    Raises:
        BadInputError: That is asked of folders that are not NORMAL and PNEUMONIA, or whose files name no kind.
    """
    if asked is False:
        return False
    names = {folder.name.upper() for _, folder in tree.classes}
    sick = [folder for _, folder in tree.classes if folder.name.upper() == "PNEUMONIA"]
    if asked is None and not any(part for part, _ in tree.classes):
        return False
    found = names == _KAGGLE_CLASSES and any(
        _kind(folder.name, path.name) for folder in sick for path in _files_below(folder, folder.parent)
    )
    if asked and not found:
        raise BadInputError(
            f"the class folders {', '.join(sorted(names)) or 'of nothing'} give no kinds of pneumonia",
            remedy="kinds need folders NORMAL and PNEUMONIA with bacteria or virus in the file names",
        )
    return found


def _kinds_of(root: Path, labels: Sequence[str] | None) -> bool | None:
    """Return whether the folders NORMAL and PNEUMONIA are to be read as kinds, for a model's classes."""
    if labels is None or not root.is_dir():
        return None
    names = {folder.name.upper() for _, folder in _read_tree(root).classes}
    return set(labels) == set(KINDS) if names == _KAGGLE_CLASSES else None


def _kind(folder: str, file: str) -> str | None:
    if folder.upper() == "NORMAL":
        return "normal"
    kinds = [kind for kind in ("bacteria", "virus") if kind in file.lower()]
    return kinds[0] if len(kinds) == 1 else None


def _read_groups(path: Path) -> dict[tuple[str, str], str]:
    """Read ``groups.csv`` (columns class, file, patient): ``{(class, file): patient}``, empty without the file."""
    if not path.exists():
        return {}
    try:
        rows = list(csv.reader(read_regular(path).decode("utf-8-sig").splitlines(), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInputError(
            f"cannot read {path}: {error}", remedy="write it as UTF-8 CSV: class,file,patient"
        ) from error
    if not rows or tuple(rows[0]) != _GROUP_COLUMNS:
        seen = ",".join(rows[0]) if rows else "nothing"
        raise BadInputError(f"{path} line 1 is {seen!r}", remedy="its first line must be class,file,patient")
    groups: dict[tuple[str, str], str] = {}
    for line, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != len(_GROUP_COLUMNS) or not all(field.strip() for field in row):
            raise BadInputError(f"{path} line {line} is {','.join(row)!r}", remedy="write class,file,patient")
        label, file, patient = row
        if groups.setdefault((label, file), patient) != patient:
            raise BadInputError(
                f"{path} line {line} gives {label}/{file} a second patient, {patient!r}",
                remedy="keep one line a file",
            )
    return groups


def _patient_by_name(path: str) -> str:
    """Return the patient that a file name gives, or the path itself: a patient of its own."""
    name = path.rsplit("/", 1)[-1]
    for pattern in _PATIENT_NAMES:
        found = pattern.match(name)
        if found:
            return found[1]
    return f"file:{path}"


def _unite_patients(patients: Sequence[str], hashes: Sequence[str]) -> list[str]:
    """Make one patient of all that share a file; united ones carry the name that sorts first."""
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
