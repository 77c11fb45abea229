"""From what a person names (a file, a folder, a glob) to the image files, in a stable order."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from engines.dicom import is_dicom
from engines.errors import BadInputError
from engines.images import IMAGE_SUFFIXES

_GLOB_CHARACTERS = frozenset("*?[")


def expand_source(source: str) -> list[Path]:
    """Name the image files of a source.

    Args:
        source: A file (taken whatever its suffix), a folder (searched recursively for image suffixes and for
            DICOM files without one; hidden files and folders are left out, links to folders are not followed) or a glob
            (``**`` allowed).

    Returns:
        Paths sorted by name, without repetition.

    Raises:
        BadInputError: Nothing is there, or no image is in it.
    """
    path = Path(source)
    if path.is_dir():
        found = _walk(path)
    elif path.exists():
        return [path]
    elif _GLOB_CHARACTERS & set(source):
        matches = (Path(match) for match in glob.glob(source, recursive=True))  # noqa: PTH207 - absolute patterns
        found = [match for match in matches if match.is_file() and _is_image(match)]
    else:
        raise BadInputError(f"there is no file, folder or glob match {source!r}", remedy="check the path")
    if not found:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise BadInputError(f"no images in {source!r}", remedy=f"image files end in one of {suffixes}")
    return sorted(set(found))


def _walk(root: Path) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(folder, name) for name in files if not name.startswith(".") and _is_image(Path(folder, name))
        ]
    return found


def _is_image(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    # Archives export DICOM as IM000001, or as a UID, whose last number looks like a suffix.
    if (suffix and not suffix[1:].isdigit()) or not path.is_file():
        return False
    try:
        with path.open("rb") as stream:
            return is_dicom(stream.read(132))
    except OSError:
        return False
