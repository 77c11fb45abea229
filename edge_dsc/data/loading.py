"""Read the images of a dataset into one array: each file is read, hashed and decoded once, in threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_dsc.data.discover import Dataset, Sample, hash_image, list_images, make_dataset
from edge_dsc.data.synthetic import RECORD_FILE, SYNTHESIS, SynthesisRecord
from engines.contract import ModelContract
from engines.errors import ArtefactError, BadInputError
from engines.images import InputImage, read_inputs
from engines.runtimes import Progress


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedImages:
    """The readable images of some samples.

    Attributes:
        pixels: ``uint8 [N, height, width, channels]``, raw 0..255, one for each sample.
        samples: The samples that could be read, in the order given.
        skipped: What was left out: relative path and reason.
    """

    pixels: NDArray[np.uint8]
    samples: tuple[Sample, ...]
    skipped: tuple[tuple[str, str], ...]


def load_images(
    root: Path, samples: Sequence[Sample], contract: ModelContract, *, progress: Progress | None = None
) -> LoadedImages:
    """Read every sample by the contract; the damaged ones are named and left out.

    Raises:
        BadInputError: Not one image can be read.
    """
    stack = _Stack(len(samples), contract)
    for image in _read([root / sample.path for sample in samples], contract, progress):
        stack.add(image)
    return stack.loaded(root, samples)


def load_dataset(
    root: Path, *, size: int = 224, kinds: bool | None = None, progress: Progress | None = None
) -> tuple[Dataset, LoadedImages]:
    """Find the labelled images below a folder, as :func:`edge_dsc.data.discover`, and read them in the same pass.

    A sample's hash is that of the very bytes that were decoded to its pixels.

    Args:
        root: The folder.
        size: Height and width of the pixels.
        kinds: As :func:`edge_dsc.data.discover.list_images` takes it.
        progress: Called after every image.

    Returns:
        All samples, and those that can be read with their pixels.

    Raises:
        BadInputError: As :func:`edge_dsc.data.discover`, or not one image can be read.
    """
    listing = list_images(root, kinds=kinds)
    # All networks see grey pixels by the same rules, in a size of their own.
    contract = ModelContract(labels=listing.labels, architecture="", height=size, width=size)
    stack = _Stack(len(listing.files), contract)
    hashes = []
    for image in _read(listing.paths(), contract, progress):
        stack.add(image)
        # An image that is empty or too large to be decoded has a content all the same.
        hashes.append(image.sha256 or hash_image(image.path))
    dataset = make_dataset(listing, hashes)
    return dataset, stack.loaded(root, dataset.samples)


def load_synthetic(folder: Path, record: SynthesisRecord, *, size: int) -> NDArray[np.uint8]:
    """Read the images that a synthesis wrote, by the rules of all images, each held against its record.

    Args:
        folder: What :func:`edge_dsc.data.synthetic.load_synthesis` read.
        record: Its record.
        size: Height and width of the pixels.

    Returns:
        ``[N, size, size, 1]``, raw 0..255.

    Raises:
        ArtefactError: One is missing, or is not the one that was written.
    """
    contract = ModelContract(labels=record.labels, architecture="", height=size, width=size)
    pixels = np.empty((len(record.images), *contract.input_shape), np.uint8)
    paths = [folder / image.path for image in record.images]
    for place, found in enumerate(read_inputs(paths, contract)):
        if not isinstance(found.pixels, np.ndarray) or found.sha256 != record.images[place].sha256:
            reason = "" if isinstance(found.pixels, np.ndarray) else f": {found.pixels.what}"
            raise ArtefactError(
                f"{found.path} is not the image that {RECORD_FILE} names{reason}",
                remedy=f"make them again: {SYNTHESIS.renew}",
            )
        pixels[place] = found.pixels
    return pixels


def _read(paths: Sequence[Path], contract: ModelContract, progress: Progress | None) -> Iterator[InputImage]:
    for done, image in enumerate(read_inputs(paths, contract), start=1):
        yield image
        if progress:
            progress("reading images", done, len(paths))


class _Stack:
    """Pixels of the good images one after the other, and why the others have none."""

    def __init__(self, count: int, contract: ModelContract) -> None:
        shape = (count, *contract.input_shape)
        self._pixels = np.empty(shape, np.uint8)
        self._reasons: list[str | None] = []
        self._good = 0

    def add(self, image: InputImage) -> None:
        if isinstance(image.pixels, np.ndarray):
            self._pixels[self._good] = image.pixels
            self._good += 1
            self._reasons.append(None)
        else:
            self._reasons.append(image.pixels.what)

    def loaded(self, root: Path, samples: Sequence[Sample]) -> LoadedImages:
        rows = list(zip(samples, self._reasons, strict=True))
        skipped = tuple((sample.path, reason) for sample, reason in rows if reason is not None)
        if samples and not self._good:
            raise BadInputError(
                f"none of {len(samples)} images below {root} can be read: {skipped[0][1]}",
                remedy="check that the files are whole",
            )
        good = tuple(sample for sample, reason in rows if reason is None)
        return LoadedImages(pixels=self._pixels[: self._good], samples=good, skipped=skipped)
