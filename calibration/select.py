"""Which images to calibrate on, and those images read: the same draw and the same order wherever the folder lies."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from calibration.table import MINIMUM_IMAGES, CalibrationImage, SkippedImage
from engines.contract import ModelContract
from engines.errors import BadInputError, ImageError, UsageError
from engines.files import sha256_bytes
from engines.images import count_levels, read_inputs
from engines.runtimes import Progress


@dataclass(frozen=True)
class Candidate:
    """An image file that may be calibrated on.

    Attributes:
        path: The file.
        label: Its class.
        sha256: Hash of its content, as it was found.
    """

    path: Path
    label: str
    sha256: str


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """The images that a model is calibrated on, read once by its contract.

    Attributes:
        pixels: ``uint8 [N, height, width, channels]``, raw 0..255, sorted by class and name.
        images: Name, class and hash of each, in the same order.
        skipped: Those that could not be read, and why.
        drawn: Places in ``pixels`` in the order of the draw, a round over the classes at a time, so that every
            part of it holds all of them.
    """

    pixels: NDArray[np.uint8]
    images: tuple[CalibrationImage, ...]
    skipped: tuple[SkippedImage, ...]
    drawn: tuple[int, ...]

    def count_levels(self, contract: ModelContract) -> tuple[int, ...]:
        """Count the grey levels of all images in :data:`engines.images.LEVEL_BINS` bins; a table keeps them."""
        counts = sum(
            count_levels(image, contract) for image in self.pixels
        )  # one at a time: OpenCV counts in float32
        return tuple(np.asarray(counts).tolist())


def select_images(candidates: Sequence[Candidate], count: int, seed: int) -> list[Candidate]:
    """Draw ``count`` images, the same number from each class as far as the classes have enough.

    Equal, not proportional: a range that cuts off the values of a rare class harms that class alone, and no
    overall accuracy shows it. Each class is put in the order of a hash of seed and relative path, so neither
    the order of listing nor the place of the folder matters, and one more file leaves the others' order as
    it is. A file whose content was drawn already does not count.

    Args:
        candidates: All images that may be drawn; no file is opened.
        count: How many to draw; fewer are drawn where there are fewer.
        seed: Chooses the draw.

    Returns:
        The images in the order drawn: round by round over the sorted labels.

    Raises:
        UsageError: ``count`` is below the minimum.
        BadInputError: Fewer than the minimum of different images are there.
    """
    if count < MINIMUM_IMAGES:
        raise UsageError(
            f"calibration on {count} images was asked for", remedy=f"ask for at least {MINIMUM_IMAGES}"
        )
    names = relative_names([candidate.path for candidate in candidates])
    classes: dict[str, list[tuple[str, Path, Candidate]]] = defaultdict(list)
    for candidate in candidates:
        key = sha256_bytes(f"{seed}/{candidate.label}/{names[candidate.path]}".encode())
        classes[candidate.label].append((key, candidate.path, candidate))
    queues = [iter(sorted(classes[label], key=lambda entry: entry[:2])) for label in sorted(classes)]
    seen: set[str] = set()
    chosen: list[Candidate] = []
    while queues and len(chosen) < count:
        for queue in tuple(queues):
            drawn = _draw(queue, seen)
            if drawn is None:
                queues.remove(queue)
            else:
                chosen.append(drawn)
    if len(chosen) < MINIMUM_IMAGES:
        copies = len(candidates) - len(chosen)
        raise _too_few(
            len(chosen), f"{copies} of {len(candidates)} files are copies of others" if copies else ""
        )
    return chosen[:count]


def read_set(
    chosen: Sequence[Candidate], contract: ModelContract, progress: Progress | None = None
) -> CalibrationSet:
    """Read the images that were drawn: each file is read, hashed and decoded once, in threads.

    Args:
        chosen: The images, as :func:`select_images` drew them.
        contract: The model's contract.
        progress: Called with (phase, images done, images in all).

    Returns:
        The set; images that cannot be read are left out and named in it.

    Raises:
        BadInputError: Fewer different readable images than the minimum, or a file that was changed since it was
            found.
    """
    names = relative_names([candidate.path for candidate in chosen])
    # Histograms grow with what comes, so the order must be one of the images' own.
    order = sorted(range(len(chosen)), key=lambda place: (chosen[place].label, names[chosen[place].path]))
    pixels: list[NDArray[np.uint8]] = []
    images: list[CalibrationImage] = []
    places: list[int] = []
    skipped: list[SkippedImage] = []
    found = read_inputs((chosen[place].path for place in order), contract)
    for done, (place, image) in enumerate(zip(order, found, strict=True), start=1):
        candidate, name = chosen[place], names[image.path]
        if image.sha256 and image.sha256 != candidate.sha256:
            raise BadInputError(
                f"{candidate.path} was changed while the images were being read",
                remedy="run the command again",
            )
        if isinstance(image.pixels, ImageError):
            # Without the folder: a table must not depend on where its images lie.
            skipped.append(SkippedImage(name, image.pixels.what.replace(str(image.path), name)))
        else:
            pixels.append(np.asarray(image.pixels, np.uint8))  # as every model takes them
            images.append(CalibrationImage(name, candidate.label, image.sha256))
            places.append(place)
        if progress is not None:
            progress("reading images", done, len(chosen))
    _require_enough(images, skipped)
    drawn = tuple(int(index) for index in np.argsort(places))
    return CalibrationSet(np.stack(pixels), tuple(images), tuple(skipped), drawn)


def relative_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Name files relative to the deepest folder that holds them all, with forward slashes."""
    if not paths:
        return {}
    folder = os.path.commonpath([os.fspath(path.absolute().parent) for path in paths])
    return {path: PurePath(os.path.relpath(path.absolute(), folder)).as_posix() for path in paths}


def _draw(queue: Iterator[tuple[str, Path, Candidate]], seen: set[str]) -> Candidate | None:
    """Take the next image of a class whose content has not been drawn yet, or None where none is left."""
    for _, _, candidate in queue:
        if candidate.sha256 not in seen:
            seen.add(candidate.sha256)
            return candidate
    return None


def _require_enough(images: Sequence[CalibrationImage], skipped: Sequence[SkippedImage]) -> None:
    """Refuse what is too little to calibrate on; a copied image counts once."""
    different = len({image.sha256 for image in images})
    if different < MINIMUM_IMAGES:
        why = f"{len(images) - different} copies"
        if skipped:
            why += f", {len(skipped)} cannot be read: {skipped[0].reason}"
        raise _too_few(different, why)


def _too_few(count: int, why: str) -> BadInputError:
    reason = f" ({why})" if why else ""
    return BadInputError(
        f"{count} usable images to calibrate on, at least {MINIMUM_IMAGES} are needed{reason}",
        remedy="give a folder with more real images of every class, such as the training images",
    )
