"""From a file or a frame to the network's input, through the contract's one function."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from edge_dsc.loop.answers import Prepared
from edge_dsc.sources.frames import Frame
from engines.contract import ModelContract
from engines.errors import ImageError
from engines.images import decode_grey, grey8, prepare_pixels, read_bytes, read_input


def prepare_file(path: Path, contract: ModelContract, *, keep_picture: bool = False) -> Prepared:
    """Decode and resize an image file; a bad one becomes its error."""
    started = time.perf_counter()
    picture = None
    try:
        if keep_picture:
            picture = decode_grey(read_bytes(path), name=str(path))
            pixels = prepare_pixels(picture, contract, name=str(path))
        else:
            pixels = read_input(path, contract)
    except ImageError as error:
        return Prepared(path, error, time.perf_counter() - started)
    return Prepared(path, pixels, time.perf_counter() - started, picture)


def prepare_video_frame(
    frame: Frame, name: str, contract: ModelContract, *, keep_picture: bool = False
) -> Prepared:
    """Decode and resize a frame; a damaged one becomes its error.

    Args:
        frame: Grey or BGR pixels, or the bytes of a JPEG.
        name: The video or camera.
        contract: The model's contract.
        keep_picture: Keep the picture to draw on.
    """
    started = time.perf_counter()
    title = f"frame {frame.index} of {name}"
    picture = frame.pixels
    frame = replace(frame, pixels=None)  # an answer that waits must not hold a picture that nobody draws
    try:
        if isinstance(picture, bytes):
            picture = decode_grey(picture, name=title)
        pixels = prepare_pixels(grey8(picture, name=title), contract, name=title)
    except ImageError as error:
        return Prepared(name, error, time.perf_counter() - started, frame=frame)
    return Prepared(name, pixels, time.perf_counter() - started, picture if keep_picture else None, frame)
