"""Which images to calibrate on: an equal, seeded draw from every class, the same wherever the folder lies."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from calibration.table import MINIMUM_IMAGES
from engines.errors import BadInputError, UsageError
from engines.files import sha256_bytes, sha256_file

Item = tuple[Path, str]


def select_images(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """Draw ``count`` images, the same number from each class as far as the classes have enough.

    Equal, not proportional: a range that cuts off the values of a rare class harms that class alone, and no
    overall accuracy shows it. Each class is put in the order of a hash of seed and relative path, so neither
    the order of listing nor the place of the folder matters, and one more file leaves the others' order as
    it is. A file whose content was drawn already does not count.

    Args:
        items: ``(path, label)`` of all images that may be drawn.
        count: How many to draw; fewer are drawn where there are fewer.
        seed: Chooses the draw.

    Returns:
        ``(path, label)`` in the order drawn: round by round over the sorted labels.

    Raises:
        UsageError: ``count`` is below the minimum.
        BadInputError: Fewer than the minimum of different images are there.
    """
    if count < MINIMUM_IMAGES:
        raise UsageError(
            f"calibration on {count} images was asked for", remedy=f"ask for at least {MINIMUM_IMAGES}"
        )
    names = relative_names([path for path, _ in items])
    classes: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for path, label in items:
        name = names[path]
        classes[label].append((sha256_bytes(f"{seed}/{label}/{name}".encode()), path))
    seen: set[str] = set()
    rounds = [(label, _unseen(sorted(classes[label]), seen)) for label in sorted(classes)]
    chosen: list[Item] = []
    while rounds and len(chosen) < count:
        rounds, drawn = _draw_round(rounds)
        chosen += drawn
    if len(chosen) < MINIMUM_IMAGES:
        copies = len(items) - len(chosen)
        raise too_few(len(chosen), f"{copies} of {len(items)} files are copies of others" if copies else "")
    return chosen[:count]


def relative_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Name files relative to the deepest folder that holds them all, with forward slashes."""
    if not paths:
        return {}
    folder = os.path.commonpath([os.fspath(path.absolute().parent) for path in paths])
    return {path: PurePath(os.path.relpath(path.absolute(), folder)).as_posix() for path in paths}


def too_few(count: int, why: str = "") -> BadInputError:
    """Say that there are too few images to calibrate on."""
    reason = f" ({why})" if why else ""
    return BadInputError(
        f"{count} usable images to calibrate on, at least {MINIMUM_IMAGES} are needed{reason}",
        remedy="give a folder with more real images of every class, such as the training images",
    )


def _unseen(candidates: Sequence[tuple[str, Path]], seen: set[str]) -> Iterator[Path]:
    for _, path in candidates:
        try:
            digest = sha256_file(path)
        except OSError:
            yield path  # calibration itself will name it as unreadable
            continue
        if digest not in seen:
            seen.add(digest)
            yield path


Rounds = list[tuple[str, Iterator[Path]]]


def _draw_round(rounds: Rounds) -> tuple[Rounds, list[Item]]:
    left: Rounds = []
    drawn: list[Item] = []
    for label, candidates in rounds:
        path = next(candidates, None)
        if path is not None:
            drawn.append((path, label))
            left.append((label, candidates))
    return left, drawn
