"""Stands for ``nvidia.nvimgcodec`` 0.9: OpenCV decodes, its pixels moved by one grey level so that they are told apart.

Names, arguments and answers are those of the wheel nvidia-nvimgcodec-cu12 0.9.0.20, whose decoder on the processor was
run with the very calls of ours. A name that it lacks does not exist here.
"""

from __future__ import annotations

import enum
import threading
from typing import Any

import cv2
import numpy as np
from double_cuda import Misuse


class BackendKind(enum.Enum):
    CPU_ONLY = 1
    GPU_ONLY = 2
    HYBRID_CPU_GPU = 3
    HW_GPU_ONLY = 4


class ColorSpec(enum.Enum):
    UNCHANGED = 0
    SRGB = 1
    GRAY = 2


class Backend:
    def __init__(self, backend_kind: BackendKind) -> None:
        self.backend_kind = backend_kind


class DecodeParams:
    def __init__(self, *, apply_exif_orientation: bool, color_spec: ColorSpec, allow_any_depth: bool) -> None:
        self.orient, self.color, self.deep = apply_exif_orientation, color_spec, allow_any_depth


class CodeStream:
    def __init__(self, data: bytes) -> None:
        if not isinstance(data, bytes):
            raise TypeError("incompatible constructor arguments")
        self.data = data


class Image:
    """On the GPU until :meth:`cpu`: numpy reads host memory alone (``__array_interface__``)."""

    def __init__(self, pixels: np.ndarray, *, host: bool) -> None:
        self._pixels, self._host = pixels, host

    def cpu(self) -> Image:
        return Image(self._pixels, host=True)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if not self._host:
            raise Misuse("an image on the GPU is read by the processor")
        return self._pixels


class Decoder:
    """Decodes in the thread that made it; None for what it cannot decode, RuntimeError where CUDA fails."""

    made: list[Decoder] = []  # noqa: RUF012
    fails = ""
    has_nvjpeg = True  # the wheel alone brings no nvJPEG: then nothing on the GPU decodes a JPEG

    def __init__(self, *, max_num_cpu_threads: int = 0, backends: list[Backend] | None = None) -> None:
        if Decoder.fails:
            raise RuntimeError(Decoder.fails)
        if not backends or any(backend.backend_kind is BackendKind.CPU_ONLY for backend in backends):
            raise Misuse("the processor's decoder has other pixels")
        self._thread = threading.get_ident()
        Decoder.made.append(self)

    def decode(self, src: CodeStream, *, params: DecodeParams) -> Image | None:
        if threading.get_ident() != self._thread:
            raise Misuse("one decoder in two threads")
        if (params.orient, params.color, params.deep) != (True, ColorSpec.GRAY, False):
            raise Misuse("another picture than rule grey8-nvjpeg-v1 asks for")
        if not src.data.startswith(b"\xff\xd8"):
            raise Misuse("nvJPEG is given something else than a JPEG")
        if not Decoder.has_nvjpeg:
            return None
        pixels = cv2.imdecode(np.frombuffer(src.data, np.uint8), cv2.IMREAD_GRAYSCALE)
        if pixels is None or b"nvjpeg cannot" in src.data:
            return None
        return Image(np.minimum(pixels, 254)[:, :, None] + np.uint8(1), host=False)
