"""Read the images of many samples into one array, in threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_dsc.data.discover import Sample
from engines.contract import ModelContract
from engines.errors import BadInputError, ImageError
from engines.images import quiet_decoder, read_input
from engines.runtimes import Progress

Array = Any


@dataclass(frozen=True, kw_only=True)
class LoadedImages:
    """The readable images of some samples.

    Attributes:
        pixels: ``uint8 [N, height, width, 1]``, raw 0..255, one for each sample.
        samples: The samples that could be read, in the order given.
        skipped: What was left out: relative path and reason.
    """

    pixels: Array
    samples: tuple[Sample, ...]
    skipped: tuple[tuple[str, str], ...]


def load_images(
    root: Path, samples: Sequence[Sample], contract: ModelContract, *, progress: Progress | None = None
) -> LoadedImages:
    """Read every sample by the contract; the damaged ones are named and left out.

    Raises:
        BadInputError: Not one image can be read.
    """
    quiet_decoder()
    pixels = np.empty((len(samples), *contract.input_shape), np.uint8)
    kept: list[Sample] = []
    skipped: list[tuple[str, str]] = []

    def read(sample: Sample) -> Any:
        try:
            return read_input(root / sample.path, contract)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, (sample, image) in enumerate(zip(samples, pool.map(read, samples), strict=True), start=1):
            if isinstance(image, ImageError):
                skipped.append((sample.path, image.what))
            else:
                pixels[len(kept)] = image
                kept.append(sample)
            if progress:
                progress("reading images", done, len(samples))
    if samples and not kept:
        raise BadInputError(
            f"none of {len(samples)} images below {root} can be read: {skipped[0][1]}",
            remedy="check that the files are whole",
        )
    return LoadedImages(pixels=pixels[: len(kept)], samples=tuple(kept), skipped=tuple(skipped))
