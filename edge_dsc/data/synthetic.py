"""What a synthetic image is: the mark inside each file, and the record of the folder that it was written to.

A synthetic image may train, where a person asks for it by its folder. It may not choose, calibrate or judge anything:
what a generator learnt of an image, or made up, says nothing of a patient. Wherever a folder of X-rays is listed, a
file with the mark is refused (:func:`require_real`); a folder of synthetic images is taken by its record alone
(:func:`load_synthesis`), and :func:`edge_dsc.data.purposes.require_mixable` says whether this run may have it.
"""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import cv2
import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from engines.contract import Count, Labels, Name, Number, Seconds, Seed, Sha256, Text
from engines.errors import ArtefactError, BadInputError
from engines.files import DocumentKind

RECORD_FILE = "synthesis.json"
GENERATOR_FILE = "generator.keras"
_MARK = b"edge-dsc synthetic image"
_HEAD = 4096  # bytes of a file in which the mark is looked for
_AFTER_HEADER = 33  # of a PNG file: signature and IHDR; text may stand there
_Share = Annotated[float, Meta(ge=0, le=1)]


class SyntheticImage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One image that a generator made.

    Attributes:
        path: Relative to the folder, with forward slashes.
        sha256: Hash of the file.
        draw: Which draw of the generator's input it was made of; with the seed it decides the pixels.
        nearest_sha256: The training image that it is nearest to.
        distance: From that one: root mean square difference in grey levels.
    """

    path: Text
    sha256: Sha256
    draw: Count
    nearest_sha256: Sha256
    distance: Number


class NetworkCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a pair of networks costs while it learns.

    Attributes:
        architecture: Which pair.
        generator: Parameters of the generator.
        discriminator: Parameters of the discriminator.
        multiply_adds: Of one image through the generator and the discriminator, forwards.
        state_bytes: Weights, their gradients, both moments of Adam and the moving average, as they are kept.
        step_seconds: Median time of a step; None where it was not measured.
        peak_bytes: Most memory that learning took beyond what TensorFlow takes by itself; None where not measured.
    """

    architecture: Text
    generator: Count
    discriminator: Count
    multiply_adds: Count
    state_bytes: Count
    step_seconds: Seconds | None = None
    peak_bytes: Count | None = None


class FeatureFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the synthetic images lie among the real ones, in the features of a trained classifier.

    Attributes:
        run: Name of the classifier's run.
        model_sha256: Hash of its ``model.keras``.
        dimensions: Features of each image.
        images: On each side of a Frechet distance, so that both are of as many.
        frechet: Frechet distance of synthetic images from real ones.
        frechet_real: That of one half of the real images from the other half.
        precision: Share of the synthetic images that lie among the real ones.
        recall: Share of the real images that lie among the synthetic ones.
    """

    run: Text
    model_sha256: Sha256
    dimensions: Count
    images: Count
    frechet: Number
    frechet_real: Number
    precision: _Share
    recall: _Share


class Worth(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the images are worth.

    Attributes:
        real: Real images that they were held against: those that the generator learnt from.
        copies: Images that were dropped, because they came too near to a training image.
        copy_below: The distance below which they did; grey levels.
        nearest: Median distance of a synthetic image from the nearest training image.
        nearest_real: Median distance of a training image from the nearest other one.
        similarity: Mean MS-SSIM of pairs of synthetic images: near 1 they are all one image.
        similarity_real: That of pairs of real images.
        scales: Of MS-SSIM; a small image has fewer than five.
        features: None where no classifier was given.
    """

    real: Count
    copies: Count
    copy_below: Number
    nearest: Number
    nearest_real: Number
    similarity: Number
    similarity_real: Number
    scales: Count
    features: FeatureFigures | None = None


class SynthesisRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the images of a folder come from.

    Attributes:
        label: Their class.
        labels: All classes of the data.
        settings: What decided the networks; a mapping, because other versions have other fields.
        seed: Of the split, the first weights, the order and the images.
        split_sha256: Of the split whose training part the generator learnt from.
        seen: Hashes of the images that it learnt from.
        generator_sha256: Hash of ``generator.keras``, which every image's mark names.
        asked: How many images were asked for.
        images: Those that were written.
        history: ``real``, ``fake``, ``balance``, ``convergence`` and ``learning_rate``, one figure per epoch.
        best_epoch: The epoch with the lowest measure of convergence, counted from 1: its generator made the images.
        ended: Why learning ended: ``epochs``, ``converged``, ``seconds`` or ``interrupted``.
        seconds: Wall-clock time of learning in the last call.
        costs: Of this pair, and of the other one where they were compared.
        worth: What the images are worth.
        versions: Package versions.
        created: UTC time, ISO 8601.
        edge_dsc: Version of edge-dsc.
    """

    label: Name
    labels: Labels
    settings: Mapping[str, str | int | float]
    seed: Seed
    split_sha256: Sha256
    seen: tuple[Sha256, ...]
    generator_sha256: Sha256
    asked: Count
    images: tuple[SyntheticImage, ...]
    history: Mapping[Text, list[float]]
    best_epoch: Count
    ended: Text
    seconds: Seconds
    costs: tuple[NetworkCost, ...]
    worth: Worth
    versions: Mapping[Text, Text]
    created: Text
    edge_dsc: Text


SYNTHESIS = DocumentKind(
    name="edge-dsc/synthesis-record",
    version=1,
    body=SynthesisRecord,
    renew="edge-dsc synthesize DATA --class CLASS --overwrite",
    seal="record_sha256",
)


def load_synthesis(folder: Path) -> SynthesisRecord:
    """Read the record of a folder of synthetic images; the images are held against it where they are read.

    Raises:
        ArtefactError: There is none, it was edited, or it names a file outside its folder.
    """
    record = SYNTHESIS.load(folder / RECORD_FILE)
    for image in record.images:
        if Path(image.path).is_absolute() or ".." in Path(image.path).parts:
            raise ArtefactError(
                f"{folder / RECORD_FILE} names {image.path}, outside its folder",
                remedy=f"make it again: {SYNTHESIS.renew}",
            )
    return record


def encode_marked(pixels: NDArray[np.uint8], *, seed: int, draw: int, generator_sha256: str) -> bytes:
    """Return an image as PNG whose text says that it is synthetic, and what made it.

    Args:
        pixels: ``[H, W]``, grey.
        seed: Of the synthesis.
        draw: As :attr:`SyntheticImage.draw`.
        generator_sha256: Hash of the generator.

    Source: W3C PNG, 11.3.3.2: tEXt is a keyword, a zero byte and Latin-1 text.
    """
    encoded = bytes(cv2.imencode(".png", pixels)[1])
    words = f"; seed {seed}; draw {draw}; generator {generator_sha256}".encode()
    text = b"tEXt" + b"Comment\0" + _MARK + words
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return encoded[:_AFTER_HEADER] + chunk + encoded[_AFTER_HEADER:]


def is_synthetic(path: Path) -> bool:
    """Say whether a file carries the mark, whatever its format; False of one that cannot be read.

    Programs that convert an image with its comment keep the mark; one that drops comments drops the mark with them.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb", buffering=0) as stream:
            return _MARK in stream.read(_HEAD)
    except (OSError, ValueError):
        return False  # whoever reads it says why it cannot be read


def require_real(root: Path, paths: Iterable[str]) -> None:
    """Refuse a data folder that holds synthetic images: there they would validate, calibrate and judge.

    Args:
        root: The folder.
        paths: Its images, relative.

    Raises:
        BadInputError: One carries the mark.
    """
    marked = [path for path in paths if is_synthetic(root / path)]
    if marked:
        count = f"{len(marked)} synthetic images, such as" if len(marked) > 1 else "a synthetic image,"
        raise BadInputError(
            f"{root} holds {count} {marked[0]}",
            remedy="take them out of the folder: they can train, with train --synthetic DIR, and nothing else",
        )
