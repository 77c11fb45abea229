"""Which images belong to one patient: from a table, from file names, and from equal files."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from engines.errors import BadInputError

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
