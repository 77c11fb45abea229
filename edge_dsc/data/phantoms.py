"""Chest phantoms: procedural pictures of three classes, to try the whole line without any patient's data.

``clear`` lungs, ``focal`` opacities (one to three soft patches) and ``diffuse`` ones (a net over both lungs).
Exposure, contrast, size and noise vary more than the classes differ in mean brightness. Some files are in
colour, stained so that the stain vanishes in the right luma and shows as a net when red and blue are swapped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.errors import UsageError
from engines.files import write_bytes, write_text
from engines.runtimes import Progress

CLASSES = ("clear", "diffuse", "focal")
_MOST_IMAGES_OF_A_PATIENT = 3
_COLOUR_SHARE = 0.25
_PNG_SHARE = 0.4
_JPEG_QUALITY = 90

_Plane = NDArray[np.floating]  # one value for each pixel, ``[H, W]``


@dataclass(frozen=True, kw_only=True)
class _Anatomy:
    """What all images of one patient share; lengths are shares of half the picture.

    Attributes:
        lung_x: Distance of the lungs' centres from the middle.
        lung_y: Height of their centres.
        lung_rx: Half width.
        lung_ry: Half height.
        heart: Centre x and y, half width.
        ribs: Number of pairs, and how strongly they bend.
        lesions: x, y, radius and strength of each focal opacity.
        net: Strength of the diffuse net; 0 without.
    """

    lung_x: float
    lung_y: float
    lung_rx: float
    lung_ry: float
    heart: tuple[float, float, float]
    ribs: tuple[int, float]
    lesions: tuple[tuple[float, float, float, float], ...]
    net: float


def write_phantoms(root: Path, per_class: int, seed: int, progress: Progress | None = None) -> None:
    """Write a folder of phantoms: ``root/CLASS/pNNNN-K.png|jpg`` and ``groups.csv``.

    Args:
        root: A new or empty folder.
        per_class: Images of each class, at least 1; one to three of them share a patient.
        seed: The same seed gives the same pictures.
        progress: Called after every image.

    Raises:
        UsageError: ``root`` holds something already, or ``per_class`` is below 1.
        EnvironmentProblem: ``root`` cannot be written.
    """
    if per_class < 1:
        raise UsageError(f"{per_class} phantoms a class", remedy="ask for at least 1")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(f"{root} is not an empty folder", remedy="choose a new folder for the phantoms")
    rows = ["class,file,patient"]
    patient = 0
    for number, label in enumerate(CLASSES):
        done = 0
        while done < per_class:
            patient += 1
            rng = np.random.default_rng([seed, patient])
            anatomy = _draw_anatomy(label, rng)
            for image in range(min(int(rng.integers(1, _MOST_IMAGES_OF_A_PATIENT + 1)), per_class - done)):
                data, suffix = _encode(_expose(_paint(anatomy, rng), rng), rng)
                name = f"p{patient:04d}-{image + 1}{suffix}"
                write_bytes(root / label / name, data)
                rows.append(f"{label},{name},p{patient:04d}")
                done += 1
                if progress:
                    progress("drawing phantoms", number * per_class + done, len(CLASSES) * per_class)
    write_text(root / "groups.csv", "\n".join(rows) + "\n")


def draw_phantom(label: str, seed: int) -> NDArray[np.uint8]:
    """Draw one phantom of a class.

    Returns:
        ``uint8 [H, W]``, 256 to 512 pixels a side.
    """
    rng = np.random.default_rng(seed)
    return _expose(_paint(_draw_anatomy(label, rng), rng), rng)


def _draw_anatomy(label: str, rng: np.random.Generator) -> _Anatomy:
    lung_x, lung_y = rng.uniform(0.40, 0.48), rng.uniform(-0.12, 0.05)
    lung_rx, lung_ry = rng.uniform(0.27, 0.35), rng.uniform(0.55, 0.70)
    lesions = []
    for _ in range(int(rng.integers(1, 4)) if label == "focal" else 0):
        side, turn, reach = rng.choice((-1.0, 1.0)), rng.uniform(0, 6.283), rng.uniform(0.1, 0.7)
        x = side * lung_x + lung_rx * reach * math.cos(turn)
        y = lung_y + lung_ry * reach * math.sin(turn)
        lesions.append((float(x), float(y), float(rng.uniform(0.12, 0.22)), float(rng.uniform(60, 95))))
    return _Anatomy(
        lung_x=lung_x,
        lung_y=lung_y,
        lung_rx=lung_rx,
        lung_ry=lung_ry,
        heart=(rng.uniform(0.05, 0.16), rng.uniform(0.22, 0.38), rng.uniform(0.24, 0.36)),
        ribs=(int(rng.integers(7, 10)), rng.uniform(0.15, 0.45)),
        lesions=tuple(lesions),
        net=float(rng.uniform(12, 20)) if label == "diffuse" else 0.0,
    )


def _paint(anatomy: _Anatomy, rng: np.random.Generator) -> NDArray[np.float32]:
    """Paint the anatomy in a position of its own: ``[H, W]``, about 0..255."""
    height, width = (int(side) for side in rng.integers(256, 513, 2))
    y, x = np.meshgrid(
        np.linspace(-1, 1, height, dtype=np.float32),
        np.linspace(-1, 1, width, dtype=np.float32),
        indexing="ij",
    )
    x, y = x - rng.uniform(-0.06, 0.06), y - rng.uniform(-0.06, 0.06)
    lungs = sum(
        _soft_ellipse(x - side * anatomy.lung_x, y - anatomy.lung_y, anatomy.lung_rx, anatomy.lung_ry, 8.0)
        for side in (-1, 1)
    )
    lungs = np.clip(lungs, 0, 1)
    picture = 165 - 95 * lungs - 60 * np.clip(x * x + 0.3 * y * y - 0.75, 0, 1)
    picture += 38 * np.exp(-((x / 0.09) ** 2)) * (1 + 0.15 * np.sin(y * 28))
    picture += _ribs(anatomy, x, y) * (0.35 + 0.65 * lungs)
    heart_x, heart_y, heart_r = anatomy.heart
    picture += (
        62 * _soft_ellipse(x - heart_x, y - heart_y, heart_r, heart_r * 1.15, 6.0) * (0.25 + 0.75 * lungs)
    )
    picture += 7 * lungs * _band_noise(height, width, 0.10, rng)
    if anatomy.lesions:
        edge = 1 + 0.25 * _band_noise(height, width, 0.08, rng)
        grain = 1 + 0.3 * _band_noise(height, width, 0.035, rng)
        for lesion_x, lesion_y, radius, strength in anatomy.lesions:
            distance = ((x - lesion_x) ** 2 + (y - lesion_y) ** 2) / (radius * edge) ** 2
            picture += strength * np.exp(-(distance**2)) * grain * lungs
    if anatomy.net:
        picture += anatomy.net * lungs * _band_noise(height, width, 0.030, rng)
    return picture.astype(np.float32)


def _ribs(anatomy: _Anatomy, x: _Plane, y: _Plane) -> _Plane:
    pairs, bend = anatomy.ribs
    picture = np.zeros_like(x)
    for rib in range(pairs):
        line = -0.85 + rib * 1.5 / pairs + bend * (np.abs(x) - 0.35) ** 2 * (1 if rib % 2 else 0.6)
        picture += 17 * np.exp(-(((y - line) / 0.035) ** 2))
    return picture


def _soft_ellipse(x: _Plane, y: _Plane, half_width: float, half_height: float, sharpness: float) -> _Plane:
    inside = 1 - (x / half_width) ** 2 - (y / half_height) ** 2
    return 1 / (1 + np.exp(-np.clip(inside * sharpness, -30, 30)))


def _band_noise(height: int, width: int, scale: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return noise of one grain, ``scale`` of the picture's side; mean 0, standard deviation 1."""
    cells = max(4, round(1 / scale))
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    noise: NDArray[np.float32] = np.asarray(
        cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.float32
    )
    noise = (noise - noise.mean()) / noise.std()
    return noise


def _expose(picture: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Vary contrast, brightness, gamma and noise as machines do: ``uint8 [H, W]``."""
    height, width = picture.shape
    tone = np.clip(picture / 255, 0, 1) ** rng.uniform(0.85, 1.2)
    tone = (tone - 0.5) * rng.uniform(0.8, 1.15) + 0.5 + rng.uniform(-0.10, 0.10)
    noise = rng.standard_normal((height, width), dtype=np.float32) * rng.uniform(2, 7)
    return np.clip(tone * 255 + noise + 0.5, 0, 255).astype(np.uint8)


def _encode(grey: NDArray[np.uint8], rng: np.random.Generator) -> tuple[bytes, str]:
    pixels = _stain(grey, rng) if rng.random() < _COLOUR_SHARE else grey
    suffix, settings = (
        (".png", []) if rng.random() < _PNG_SHARE else (".jpg", [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    )
    return cv2.imencode(suffix, pixels, settings)[1].tobytes(), suffix


def _stain(grey: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Colour a grey picture without changing its luma: ``uint8 [H, W, 3]``, BGR."""
    # Source: ITU-R BT.601 luma, 0.299 R + 0.587 G + 0.114 B. What red gains, blue must lose 2.62 times.
    red = 18 * _band_noise(grey.shape[0], grey.shape[1], 0.035, rng)
    room = np.minimum(grey, 255 - grey.astype(np.float32))
    red = np.clip(red, -room / 2.62, room / 2.62)
    blue = -red * 0.299 / 0.114
    stained = np.stack([grey + blue, grey, grey + red], axis=2)
    return np.clip(stained + 0.5, 0, 255).astype(np.uint8)
