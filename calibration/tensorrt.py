"""TensorRT's own calibration: its text cache made of a table, and its calibrators, whose cache becomes a table."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibration.layers import find_layers, is_chain, tensors_to_calibrate
from calibration.qdq import activation_ranges
from calibration.rewrites import SUFFIX, fold_norms
from calibration.select import CalibrationSet
from calibration.table import TENSORRT_METHODS, CalibrationTable, calibrate_command
from engines import packages
from engines.contract import ModelContract
from engines.errors import ArtefactError, EnvironmentProblem, UsageError
from engines.graph import OnnxModel
from engines.trt.cuda import primary_context

if TYPE_CHECKING:
    from onnx import ModelProto

ENTROPY, MINMAX = TENSORRT_METHODS.values()
ALGORITHMS = (ENTROPY, MINMAX)
TENSORRT_BATCH = 8  # images that TensorRT calibrates on at a time
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
        UsageError: A method that scales channels or writes its own cache, or a release that reads no cache.
    """
    version_number(version)
    if method in TENSORRT_METHODS:
        raise UsageError(
            f"{method} keeps the cache of the release that calibrates", remedy="leave --trt-cache out"
        )
    if method == "mse":
        raise _scaled(method)


def _scaled(method: str) -> UsageError:
    return UsageError(
        f"ranges by {method} are of a network with scaled channels, which TensorRT's cache cannot hold",
        remedy="calibrate with --calib-method entropy, percentile or minmax for a cache",
    )


def tensor_scales(table: CalibrationTable, model: ModelProto) -> dict[str, float]:
    """Return the symmetric int8 scale of every tensor between the layers, in the order of the graph.

    In a graph that is no chain, of every tensor that has a range: TensorRT runs what takes another one in float.
    """
    order = [name for node in model.graph.node for name in node.output]
    if not is_chain(model):
        pairs = tensors_to_calibrate(fold_norms(model))
        bounds = activation_ranges(model, table, signed=True, pairs=pairs)
        return {name: _scale(*bounds[name]) for name in order if name in bounds}
    ranges = activation_ranges(model, table, signed=True)
    by_output = {name: node for node in model.graph.node for name in node.output}
    stored = {tensor.name for tensor in model.graph.initializer}
    layers = find_layers(model)
    names = {layer.name for layer in layers}
    found: dict[str, float] = {}
    for layer in layers:
        assert not layer.input.endswith(SUFFIX), "a cache is of the graph as it was exported"
        scale = _scale(*ranges[layer.input])
        name = layer.input
        while name in by_output:
            found[name] = scale
            node = by_output[name]
            # Before a Cast lie integers; before a layer with weights another range begins.
            if node.name in names or node.op_type == "Cast":
                break
            name = next(value for value in node.input if value not in stored)
    return {name: found[name] for name in order if name in found}


def _scale(low: float, high: float) -> float:
    """Return a symmetric range's scale as float32 holds it."""
    found: float = struct.unpack(">f", struct.pack(">f", max(-low, high) / 127))[0]
    return found


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
    major, minor, patch = (*packages.parse_version(version), 0, 0, 0)[:3]
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


class OwnCalibration:
    """TensorRT's own calibration, while it builds: over images, or by the cache that it wrote in an earlier one.

    Attributes:
        cache: TensorRT's text: the one that was given, or what it has written.
    """

    def __init__(
        self,
        method: str,
        contract: ModelContract,
        images: CalibrationSet | None = None,
        cache: bytes | None = None,
    ) -> None:
        """Prepare; nothing of TensorRT or the GPU is touched.

        Args:
            method: One of :data:`calibration.table.TENSORRT_METHODS`.
            contract: The model's contract.
            images: What :func:`calibration.select.read_set` read by that contract; whole batches of it are fed as
                raw uint8 pixels, in the order of the draw. None where there is a cache.
            cache: Offered to TensorRT instead of images.
        """
        self.cache = cache
        self._method = method
        self._input_name = contract.input_name
        self._pixels = None if images is None else images.pixels[list(fed_images(images))]

    @contextlib.contextmanager
    def attach(self, trt: Any) -> Iterator[Any]:
        """Hold an ``IInt8EntropyCalibrator2`` or ``IInt8MinMaxCalibrator`` for ``config.int8_calibrator``.

        What a calibrator raises is printed and dropped by the binding (pyInt8.cpp): it is kept, TensorRT hears that
        there are no more images, and it is raised when the block is left.

        Args:
            trt: The module ``tensorrt``, of a release that has calibrators.

        Raises:
            EnvironmentProblem: TensorRT does not take its own cache, or pycuda is missing.
        """
        with contextlib.ExitStack() as frees:
            calibrator = self._make(trt, frees)
            try:
                yield calibrator
            finally:
                if calibrator.failure is not None:
                    raise calibrator.failure

    def _make(self, trt: Any, frees: contextlib.ExitStack) -> Any:
        base = getattr(trt, f"IInt8{TENSORRT_METHODS[self._method].replace('Calibration', 'Calibrator')}")
        load_batch = self._refuse_batch if self._pixels is None else _feed(self._pixels, frees)
        calibration, input_name = self, self._input_name

        class Calibrator(base):  # type: ignore[misc,valid-type]
            def __init__(self) -> None:
                base.__init__(self)
                self.failure: BaseException | None = None

            def get_batch_size(self) -> int:
                return TENSORRT_BATCH

            def get_batch(self, names: list[str]) -> list[int] | None:
                if self.failure is not None:
                    return None
                try:
                    assert names == [input_name], f"the network takes {names}"
                    address = load_batch()
                except BaseException as error:  # noqa: BLE001 - raised when the builder is done
                    self.failure = error
                    return None
                return None if address is None else [address]

            def read_calibration_cache(self) -> bytes | None:
                return calibration.cache

            def write_calibration_cache(self, cache: Any) -> None:
                calibration.cache = bytes(cache)

        return Calibrator()

    def _refuse_batch(self) -> int | None:
        raise EnvironmentProblem(
            "TensorRT does not take the cache that it wrote, and asks for images",
            remedy="calibrate again here: edge-dsc calibrate MODEL --calib-data DIR --calib-method "
            + self._method,
        )


def _feed(pixels: NDArray[np.uint8], frees: contextlib.ExitStack) -> Callable[[], int | None]:
    """Return what copies one batch after the other to the GPU and gives its address, and None after the last."""
    cuda = packages.load("pycuda.driver")
    frees.enter_context(primary_context(cuda))
    host = cuda.pagelocked_empty((TENSORRT_BATCH, *pixels.shape[1:]), np.uint8)
    frees.callback(host.base.free)
    memory = cuda.mem_alloc(host.nbytes)
    frees.callback(memory.free)
    streams = [cuda.Stream()]
    frees.callback(streams.clear)  # it has no other way to go before its context
    starts = iter(range(0, len(pixels), TENSORRT_BATCH))

    def load_batch() -> int | None:
        start = next(starts, None)
        if start is None:
            return None
        host[:] = pixels[start : start + TENSORRT_BATCH]
        cuda.memcpy_htod_async(memory, host, streams[0])
        streams[0].synchronize()
        return int(memory)

    return load_batch


def fed_images(images: CalibrationSet) -> tuple[int, ...]:
    """Return the places of the images that TensorRT gets, in the order of the draw: those that fill whole batches."""
    return images.drawn[: len(images.drawn) // TENSORRT_BATCH * TENSORRT_BATCH]


def table_of_cache(
    text: bytes | None, method: str, seed: int, model: OnnxModel, images: CalibrationSet, version: str
) -> CalibrationTable:
    """Return the table that ties what TensorRT found to model, preprocess, images and release.

    Args:
        text: The cache that TensorRT wrote.
        method: One of :data:`calibration.table.TENSORRT_METHODS`.
        seed: The seed that chose the images.
        model: The model.
        images: The images.
        version: The release.

    Raises:
        EnvironmentProblem: TensorRT wrote no cache.
        ArtefactError: Or one that is none.
    """
    if text is None:
        raise EnvironmentProblem(
            f"TensorRT {version} wrote no calibration cache", remedy="choose another --calib-method"
        )
    cache = read_cache(text.decode(errors="replace"), source=f"the cache that TensorRT {version} wrote")
    fed = {images.images[place].sha256 for place in fed_images(images)}
    return CalibrationTable(
        method=method,
        parameters={"trt_version": cache.version},
        seed=seed,
        onnx_sha256=model.sha256,
        preprocess_sha256=model.contract.preprocess_sha256,
        versions={"tensorrt": version},
        ranges={name: (-127 * scale, 127 * scale) for name, scale in cache.scales.items()},
        images=tuple(image for image in images.images if image.sha256 in fed),
        skipped=images.skipped,
        pixel_levels=images.count_levels(model.contract),
    )


def cache_of_table(table: CalibrationTable) -> str:
    """Return the text that TensorRT wrote, or one that gives it the same scales, from :func:`table_of_cache`."""
    lines = [f"TRT-{table.parameters['trt_version']:.0f}-{TENSORRT_METHODS[table.method]}"]
    lines += [f"{name}: {encode_scale(high / 127)}" for name, (_, high) in table.ranges.items()]
    return "\n".join(lines) + "\n"


def check_release(table: CalibrationTable, version: str) -> None:
    """Hold a table of TensorRT's own calibration against the release that is to build.

    Raises:
        ArtefactError: Another release.
    """
    there = table.versions.get("tensorrt", "")
    if packages.parse_version(there) != packages.parse_version(version):
        raise ArtefactError(
            f"the calibration is of TensorRT {there}, {version} is here",
            remedy=f"calibrate again: {calibrate_command(method=table.method)}",
        )
