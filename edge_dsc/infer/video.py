"""Frames, and every one of a video file in order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_dsc.infer.source import Source
from edge_dsc.infer.stop import Stop
from engines.errors import BadInputError


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One picture of a video or a camera.

    Attributes:
        index: Counted from 0 as the source gave them, dropped ones included.
        pixels: ``uint8 [H, W]`` grey or ``uint8 [H, W, 3]`` BGR; or the bytes of a JPEG that nobody has decoded
            yet, so that a dropped frame costs no decoding. Empty bytes in an answer, which keeps a picture only
            where somebody will draw it.
        captured: Monotonic time at which the frame was there, seconds.
        seconds: Position in a video file; None for a camera.
        dropped: Frames that a camera had given and that were replaced by newer ones, up to this frame.
    """

    index: int
    pixels: NDArray[np.uint8] | bytes = field(compare=False, repr=False)
    captured: float
    seconds: float | None = None
    dropped: int = 0


class VideoFile(Source):
    """An open video file.

    Attributes:
        total: Frames that its header states, or None where it states none.
        read: Frames read so far.
    """

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            BadInputError: There is no such file, or it is no video that OpenCV can read.
        """
        if not path.is_file():
            raise BadInputError(f"there is no video file {path}", remedy="check the path")
        self._path = path
        self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise BadInputError(
                f"{path} is damaged or no video that OpenCV can read ({path.stat().st_size} bytes)",
                remedy="convert it: ffmpeg -i FILE -c:v mjpeg video.avi",
            )
        stated = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.total = stated if stated > 0 else None
        self.read = 0
        self._fps = float(self._capture.get(cv2.CAP_PROP_FPS)) or None

    def items(self, stop: Stop) -> Iterator[Frame]:
        """Yield the frames; ``seconds`` is the index over the frame rate.

        Args:
            stop: Not looked at: the next frame is always at hand.

        Raises:
            BadInputError: Not one frame can be decoded.
        """
        while True:
            good, pixels = self._capture.read()
            if not good:
                break
            seconds = round(self.read / self._fps, 6) if self._fps else 0.0
            picture = cast("NDArray[np.uint8]", pixels)
            yield Frame(index=self.read, pixels=picture, captured=time.monotonic(), seconds=seconds)
            self.read += 1
        if not self.read:
            raise BadInputError(f"no frame of {self._path} can be decoded", remedy="check the file")

    @property
    def note(self) -> str | None:
        """How many frames are missing at the end, or None where all that the header states could be read."""
        if self.total is None or self.read >= self.total:
            return None
        return (
            f"{self._path} tells {self.total} frames, {self.read} could be read: it is damaged or truncated"
        )

    def close(self) -> None:
        """Close the file."""
        self._capture.release()
