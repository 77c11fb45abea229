"""What goes into an engine and what comes out, one picture at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edge_dsc.sources.frames import Frame
from engines.errors import ImageError
from engines.images import Array


@dataclass(frozen=True)
class Prepared:
    """A picture made ready for the engine, or why that failed.

    Attributes:
        path: The file, or the name of the video or camera.
        pixels: ``uint8 [height, width, 1]``, or the error.
        seconds: What decoding and resizing took.
        picture: The picture to draw on, ``uint8 [H, W]`` or ``uint8 [H, W, 3]``, where somebody will.
        frame: The frame that it was, for videos and cameras.
    """

    path: Path | str
    pixels: Array | ImageError
    seconds: float = 0.0
    picture: Array | None = None
    frame: Frame | None = None


@dataclass(frozen=True)
class Answer:
    """What an engine said about one picture.

    Attributes:
        path: The image as the source named it, or the name of the video or camera.
        probabilities: One a class, in the order of the contract's labels; None where the image is bad.
        error: Why there is no answer; None where there is one.
        latency_ms: Decoding, preprocessing and executing this picture, without waiting.
        age_ms: From the moment a camera's frame was there to the answer; None for files and videos.
        frame: The frame that it was, for videos and cameras.
        picture: The picture to draw on, where somebody will.
    """

    path: Path | str
    probabilities: tuple[float, ...] | None
    error: str | None = None
    latency_ms: float = field(default=0.0, compare=False)
    age_ms: float | None = field(default=None, compare=False)
    frame: Frame | None = None
    picture: Array | None = field(default=None, compare=False, repr=False)

    @property
    def top(self) -> int | None:
        """Index of the most probable class, or None where there is no answer."""
        if self.probabilities is None:
            return None
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)
