"""TensorRT's own calibration: its text cache made of a table, and its calibrators over the pixels that ours sees."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibration.layers import find_layers
from calibration.qdq import activation_ranges
from calibration.rewrites import SUFFIX
from calibration.select import CalibrationSet
from calibration.table import CalibrationTable
from engines.contract import ModelContract
from engines.errors import ArtefactError, EnvironmentProblem, UsageError
from engines.files import read_regular, write_bytes
from engines.packages import parse_version

if TYPE_CHECKING:
    from onnx import ModelProto

ENTROPY = "EntropyCalibration2"
MINMAX = "MinMaxCalibration"
ALGORITHMS = (ENTROPY, MINMAX)
CALIBRATORS = ("entropy", "minmax")
_WRITE_AGAIN = "write it again from the calibration table"
_HEADER = re.compile(r"TRT-(\d+)-(\w+)")
_LINE = re.compile(r"(.+): ([0-9a-f]{1,8})")


@dataclass(frozen=True)
class TrtCache:
    """What a text cache of TensorRT holds.

    Attributes:
        version: ``NV_TENSORRT_VERSION`` of the release that it is for, such as 8602 or 100300.
        algorithm: One of :data:`ALGORITHMS`, or another that TensorRT knows.
        scales: Scale of each tensor, a float32 value.
    """

    version: int
    algorithm: str
    scales: Mapping[str, float]


def write_cache(
    table: CalibrationTable, model: ModelProto, version: str, *, algorithm: str | None = None
) -> str:
    """Return the text of the cache that holds a table's ranges.

    Tensors between two layers (behind bias, ReLU and pooling) get the scale of the tensor that the next layer
    takes: TensorRT fuses them, and pooling moves no value out of its range.

    Args:
        table: The calibration table of the model.
        model: The FP32 graph.
        version: The TensorRT release that will read it, such as ``8.6.2`` or ``10.3.0``.
        algorithm: Which calibrator will read it; None takes the one of the table's method.

    Raises:
        UsageError: The table has channel factors, which no cache can hold; or a version or algorithm that has no
            calibrators.
    """
    if table.channel_factors:
        raise _scaled(table.method)
    algorithm = algorithm or (MINMAX if table.method == "minmax" else ENTROPY)
    if algorithm not in ALGORITHMS:
        raise UsageError(
            f"there is no calibration algorithm {algorithm!r}",
            remedy=f"choose one of {', '.join(ALGORITHMS)}",
        )
    lines = [f"TRT-{version_number(version)}-{algorithm}"]
    lines += [f"{name}: {encode_scale(scale)}" for name, scale in tensor_scales(table, model).items()]
    return "\n".join(lines) + "\n"


def check_cache_request(method: str, version: str) -> None:
    """Refuse before the calibration what :func:`write_cache` would refuse after it.

    Raises:
        UsageError: A method that scales channels, or a release that reads no cache.
    """
    version_number(version)
    if method == "mse":
        raise _scaled(method)


def _scaled(method: str) -> UsageError:
    return UsageError(
        f"ranges by {method} are of a network with scaled channels, which TensorRT's cache cannot hold",
        remedy="calibrate with --calib-method entropy, percentile or minmax for a cache",
    )


def tensor_scales(table: CalibrationTable, model: ModelProto) -> dict[str, float]:
    """Return the symmetric int8 scale of every tensor between the layers, in the order of the graph."""
    ranges = activation_ranges(model, table, signed=True)
    by_output = {name: node for node in model.graph.node for name in node.output}
    stored = {tensor.name for tensor in model.graph.initializer}
    layers = find_layers(model)
    names = {layer.name for layer in layers}
    found: dict[str, float] = {}
    for layer in layers:
        assert not layer.input.endswith(SUFFIX), "a cache is of the graph as it was exported"
        low, high = ranges[layer.input]
        scale = struct.unpack(">f", struct.pack(">f", max(-low, high) / 127))[0]
        name = layer.input
        while name in by_output:
            found[name] = scale
            node = by_output[name]
            # Before a Cast lie integers; before a layer with weights another range begins.
            if node.name in names or node.op_type == "Cast":
                break
            name = next(value for value in node.input if value not in stored)
    order = [name for node in model.graph.node for name in node.output]
    return {name: found[name] for name in order if name in found}


def read_cache(text: str, *, source: str) -> TrtCache:
    """Read a cache.

    Raises:
        ArtefactError: Another header, a line that is none, a tensor twice, or a scale that is not positive.
    """
    header, *lines = text.splitlines() or [""]
    match = _HEADER.fullmatch(header)
    if match is None:
        raise ArtefactError(
            f"{source} line 1 is {header[:60]!r}, not TRT-VERSION-ALGORITHM", remedy=_WRITE_AGAIN
        )
    scales: dict[str, float] = {}
    for number, line in enumerate(lines, start=2):
        entry = _LINE.fullmatch(line)
        scale = decode_scale(entry[2]) if entry else 0.0
        if entry is None or not 0 < scale < float("inf") or entry[1] in scales:
            raise ArtefactError(f"{source} line {number} is {line[:60]!r}", remedy=_WRITE_AGAIN)
        scales[entry[1]] = scale
    return TrtCache(int(match[1]), match[2], scales)


def check_cache(cache: TrtCache, table: CalibrationTable, model: ModelProto, version: str) -> None:
    """Hold a cache against the table, the model and the release that it is to serve.

    Raises:
        ArtefactError: For another release, with a tensor missing, foreign, or of another scale.
    """
    if cache.version != version_number(version):
        raise ArtefactError(
            f"the cache is for TensorRT {cache.version}, not {version_number(version)}", remedy=_WRITE_AGAIN
        )
    expected = tensor_scales(table, model)
    for name in sorted(expected.keys() | cache.scales.keys()):
        here, there = expected.get(name), cache.scales.get(name)
        if here != there:
            raise ArtefactError(
                f"the cache gives {name} the scale {there}, the table gives it {here}", remedy=_WRITE_AGAIN
            )


def version_number(version: str) -> int:
    """Return ``NV_TENSORRT_VERSION``: 8602 for 8.6.2, 100300 for 10.3.0.

    Source: NvInferVersion.h; from TensorRT 10 on the major number counts 10,000.

    Raises:
        UsageError: No version, or 11 and later, which have no calibrators.
    """
    major, minor, patch = (*parse_version(version), 0, 0, 0)[:3]
    if not 8 <= major <= 10:
        raise UsageError(
            f"TensorRT {version} reads no calibration cache", remedy="name a release from 8.6 to 10.x"
        )
    return major * (10_000 if major >= 10 else 1000) + minor * 100 + patch


def encode_scale(scale: float) -> str:
    """Return a float32's bits as hexadecimal digits, most significant first: 1.0 gives ``3f800000``."""
    return struct.pack(">f", scale).hex()


def decode_scale(digits: str) -> float:
    """Return the float32 whose bits these hexadecimal digits are; leading zeros may be missing."""
    return float(struct.unpack(">f", bytes.fromhex(digits.rjust(8, "0")))[0])


@dataclass(frozen=True, kw_only=True)
class CalibratorOptions:
    """How TensorRT is to calibrate.

    Attributes:
        algorithm: One of :data:`CALIBRATORS`.
        batch: Images per batch.
        cache: Where TensorRT's text cache is kept; an existing one is offered to TensorRT instead of images.
    """

    algorithm: str = "entropy"
    batch: int = 8
    cache: Path | None = None


def make_calibrator(
    trt: Any,
    cuda: Any,
    images: CalibrationSet,
    contract: ModelContract,
    options: CalibratorOptions = CalibratorOptions(),
) -> Any:
    """Return an ``IInt8EntropyCalibrator2`` or ``IInt8MinMaxCalibrator`` for ``config.int8_calibrator``.

    It feeds the network's raw uint8 pixels in whole batches, in the order of the draw; the last images that fill
    none are left out. An exception must not cross TensorRT's C++ frames: it is kept in ``failure``, TensorRT hears
    that there are no more images, and the caller raises it after the build.

    Args:
        trt: The module ``tensorrt``.
        cuda: The module ``pycuda.driver``; the calling thread owns a current context.
        images: What :func:`calibration.select.read_set` read by the model's contract.
        contract: The model's contract.
        options: Which calibrator, and how.

    Returns:
        The calibrator; it owns its device memory until ``release()``.

    Raises:
        EnvironmentProblem: This release has no calibrators.
        UsageError: Another algorithm, or fewer images than a batch.
    """
    pixels: NDArray[np.uint8] = images.pixels[list(images.drawn)]
    _check_calibrator(trt, len(pixels), options)
    entropy = options.algorithm == "entropy"
    base = trt.IInt8EntropyCalibrator2 if entropy else trt.IInt8MinMaxCalibrator
    batches = iter(
        [pixels[end - options.batch : end] for end in range(options.batch, len(pixels) + 1, options.batch)]
    )

    class Calibrator(base):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            self.failure: BaseException | None = None
            self._memory = cuda.mem_alloc(pixels[: options.batch].nbytes)
            self._stream = cuda.Stream()

        def get_batch_size(self) -> int:
            return options.batch

        def get_batch(self, names: list[str]) -> list[int] | None:
            try:
                batch = next(batches, None)
                if batch is None or names != [contract.input_name]:
                    return None
                cuda.memcpy_htod_async(self._memory, batch, self._stream)
                self._stream.synchronize()
                return [int(self._memory)]
            except BaseException as error:  # noqa: BLE001 - raised again by whoever builds
                self.failure = error
                return None

        def read_calibration_cache(self) -> bytes | None:
            cache = options.cache
            return read_regular(cache) if cache is not None and cache.is_file() else None

        def write_calibration_cache(self, data: Any) -> None:
            try:
                if options.cache is not None:
                    write_bytes(options.cache, bytes(data))
            except BaseException as error:  # noqa: BLE001 - raised again by whoever builds
                self.failure = error

        def release(self) -> None:
            self._memory.free()

    return Calibrator()


def _check_calibrator(trt: Any, images: int, options: CalibratorOptions) -> None:
    if options.algorithm not in CALIBRATORS:
        raise UsageError(
            f"TensorRT has no calibrator {options.algorithm!r} here",
            remedy=f"choose one of {', '.join(CALIBRATORS)}",
        )
    if not hasattr(trt, "IInt8EntropyCalibrator2"):
        raise EnvironmentProblem(
            f"TensorRT {trt.__version__} has no calibrators: they ended with 10",
            remedy="use edge-dsc calibrate and build-engine --int8, which need none",
        )
    if images < options.batch:
        raise UsageError(f"{images} images for batches of {options.batch}", remedy="give more images")
