"""JPEGs decoded on the GPU by nvJPEG: the decoder of rule ``grey8-nvjpeg-v1``, through NVIDIA's nvImageCodec."""

from __future__ import annotations

import os
import threading
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.errors import EnvironmentProblem, ImageError
from engines.packages import load
from engines.trt.cuda import find_gpu

_PACKAGE = "nvidia.nvimgcodec"
_ELSEWHERE = "run it where that works, or build an engine without --decode nvjpeg"
_SIDE = 64  # of the picture that a decoder is tried with
# Whatever part of the GPU does it, but not nvImageCodec's own decoder on the processor: its pixels are others.
_BACKENDS = ("HW_GPU_ONLY", "GPU_ONLY", "HYBRID_CPU_GPU")


class _Decoder:
    """nvImageCodec's decoder, tried once; each thread has its own, because one decodes one picture at a time."""

    def __init__(self) -> None:
        gpu, reason = find_gpu()
        if gpu is None:
            raise _missing(reason)
        # Its own messages go to the terminal, past us; each bad picture already gets one line of ours.
        os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
        self._codec: Any = load(_PACKAGE)
        try:
            self._open()
        except AttributeError as error:
            raise _missing(f"nvImageCodec has no {error.name} here: update it") from error
        except RuntimeError as error:  # what its binding raises for every CUDA error
            raise _missing(" ".join(str(error).split())) from error
        _, sample = cv2.imencode(".jpg", np.full((_SIDE, _SIDE), 128, np.uint8))
        # Without the library nvJPEG there is a decoder all the same, and it decodes nothing.
        if self.decode(sample.tobytes()) is None:
            raise _missing("nvImageCodec decodes no JPEG on this GPU: nvJPEG is not installed, or too old")

    def _open(self) -> None:
        codec = self._codec
        backends = [codec.Backend(getattr(codec.BackendKind, name)) for name in _BACKENDS]
        self._decoder = codec.Decoder(max_num_cpu_threads=1, backends=backends)
        self._stream = codec.CodeStream
        # The luma of the file, as OpenCV's decoder gives it.
        self._grey = codec.DecodeParams(
            apply_exif_orientation=True, color_spec=codec.ColorSpec.GRAY, allow_any_depth=False
        )

    def decode(self, data: bytes) -> NDArray[np.uint8] | None:
        """Return ``uint8 [H, W]``, or None where nvJPEG does not decode this file."""
        try:
            image = self._decoder.decode(self._stream(data), params=self._grey)
            host = None if image is None else image.cpu()
        except RuntimeError as error:
            raise _missing(" ".join(str(error).split())) from error
        if host is None:
            return None
        pixels = np.array(host)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 1:
            return None
        return cast(NDArray[np.uint8], pixels[:, :, 0])


_OF_THREAD = threading.local()


def require_nvjpeg() -> None:
    """Open this thread's decoder.

    Raises:
        EnvironmentProblem: No GPU, no nvImageCodec, no nvJPEG.
    """
    if not hasattr(_OF_THREAD, "decoder"):
        _OF_THREAD.decoder = _Decoder()


def decode_jpeg(data: bytes, *, name: str) -> NDArray[np.uint8]:
    """Decode a JPEG to its luma on the GPU, whole and with its EXIF orientation.

    Args:
        data: The file's bytes, whose header and end were checked; :func:`require_nvjpeg` was called in this thread.
        name: Named in errors.

    Returns:
        ``uint8 [H, W]``; a few grey levels off OpenCV's here and there, because the inverse cosine transform is
        rounded otherwise, and because a large picture is not reduced while it is decoded.

    Raises:
        EnvironmentProblem: The GPU fails.
        ImageError: nvJPEG does not decode this file: it is damaged, or lossless.
    """
    pixels: NDArray[np.uint8] | None = _OF_THREAD.decoder.decode(data)
    if pixels is None:
        raise ImageError(
            f"{name} is a JPEG that nvJPEG does not decode ({len(data)} bytes)",
            remedy="copy the file again, or save it as PNG",
        )
    return pixels


def _missing(reason: str) -> EnvironmentProblem:
    return EnvironmentProblem(f"JPEGs of this engine are decoded by nvJPEG: {reason}", remedy=_ELSEWHERE)
