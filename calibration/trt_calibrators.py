"""TensorRT's own calibrators over real images, for those who ask TensorRT 8.6 to 10.x to calibrate itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.contract import ModelContract
from engines.errors import EnvironmentProblem, ImageError, UsageError
from engines.files import write_bytes
from engines.images import read_input
from engines.packages import load

ALGORITHMS = ("entropy", "minmax")


def make_calibrator(
    trt: Any,
    cuda: Any,
    images: Sequence[Path],
    contract: ModelContract,
    *,
    algorithm: str = "entropy",
    batch: int = 8,
    cache: Path | None = None,
) -> Any:
    """Return an ``IInt8EntropyCalibrator2`` or ``IInt8MinMaxCalibrator`` for ``config.int8_calibrator``.

    It feeds the network's raw uint8 pixels, made by the contract like everywhere else, in whole batches; the
    last images that fill none are left out. An exception must not cross TensorRT's C++ frames: it is kept in
    ``failure``, TensorRT is told that there are no more images, and the caller raises it after the build.

    Args:
        trt: The module ``tensorrt``.
        cuda: The module ``pycuda.driver``; the calling thread owns a current context.
        images: Real image files, as :func:`calibration.select.select_images` drew them.
        contract: The model's contract.
        algorithm: ``entropy`` or ``minmax``.
        batch: Images a batch.
        cache: Where TensorRT's text cache is kept; an existing one is offered to TensorRT instead of images.

    Returns:
        The calibrator; it owns its device memory until ``release()``.

    Raises:
        EnvironmentProblem: This release has no calibrators.
        UsageError: Another algorithm, or fewer images than a batch.
    """
    _check(trt, images, algorithm, batch)
    base = trt.IInt8EntropyCalibrator2 if algorithm == "entropy" else trt.IInt8MinMaxCalibrator
    batches = _Batches(images, contract, batch)

    class Calibrator(base):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            self.failure: BaseException | None = None
            self.skipped = batches.skipped
            self._memory = cuda.mem_alloc(batch * contract.height * contract.width)
            self._stream = cuda.Stream()

        def get_batch_size(self) -> int:
            return batch

        def get_batch(self, names: list[str]) -> list[int] | None:
            try:
                pixels = batches.read()
                if pixels is None or names != [contract.input_name]:
                    return None
                cuda.memcpy_htod_async(self._memory, pixels, self._stream)
                self._stream.synchronize()
                return [int(self._memory)]
            except BaseException as error:  # noqa: BLE001 - raised again by whoever builds
                self.failure = error
                return None

        def read_calibration_cache(self) -> bytes | None:
            return cache.read_bytes() if cache is not None and cache.is_file() else None

        def write_calibration_cache(self, data: Any) -> None:
            try:
                if cache is not None:
                    write_bytes(cache, bytes(data))
            except BaseException as error:  # noqa: BLE001 - raised again by whoever builds
                self.failure = error

        def release(self) -> None:
            self._memory.free()

    return Calibrator()


def _check(trt: Any, images: Sequence[Path], algorithm: str, batch: int) -> None:
    if algorithm not in ALGORITHMS:
        raise UsageError(
            f"TensorRT has no calibrator {algorithm!r} here", remedy=f"choose of {', '.join(ALGORITHMS)}"
        )
    if not hasattr(trt, "IInt8EntropyCalibrator2"):
        raise EnvironmentProblem(
            f"TensorRT {trt.__version__} has no calibrators: they ended with 10",
            remedy="use edge-dsc calibrate and build-engine --int8, which need none",
        )
    if len(images) < batch:
        raise UsageError(f"{len(images)} images for batches of {batch}", remedy="give more images")


class _Batches:
    """Whole batches of readable images."""

    def __init__(self, images: Sequence[Path], contract: ModelContract, size: int) -> None:
        self.skipped: list[str] = []
        self._waiting = iter(images)
        self._contract = contract
        self._size = size

    def read(self) -> Any:
        """Return ``uint8 [size, height, width, 1]``, or None where too few images are left."""
        numpy = load("numpy")
        pixels: list[Any] = []
        for path in self._waiting:
            try:
                pixels.append(read_input(path, self._contract))
            except ImageError as error:
                self.skipped.append(str(error))
                continue
            if len(pixels) == self._size:
                return numpy.ascontiguousarray(numpy.stack(pixels))
        return None
