"""One picture of a video or a camera on its way to the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from engines.images import Array


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One picture of a video or a camera.

    Attributes:
        index: Counted from 0 as the source gave them, dropped ones included.
        pixels: ``uint8 [H, W]`` grey or ``uint8 [H, W, 3]`` BGR; or the bytes of a JPEG that nobody has decoded
            yet, so that a dropped frame costs no decoding.
        captured: Monotonic time at which the frame was there, seconds.
        seconds: Position in a video file; None for a camera.
        dropped: Frames that a camera had given and that were replaced by newer ones, up to this frame.
    """

    index: int
    pixels: Array = field(compare=False, repr=False)
    captured: float
    seconds: float | None = None
    dropped: int = 0
