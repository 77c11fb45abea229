"""From images and an FP32 model to the range of every tensor: onnxruntime's calibration over the model's own input.

onnxruntime's calibrators run the model with every intermediate tensor as an output, keep all of those for all
images and write temporary models. Here the model gives only the tensors that need a range, a chunk of images at
a time, and onnxruntime's collector sees each chunk once: memory stays flat, and nothing is written. Its
statistics and thresholds are used as they are.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from calibration.layers import raw_pixel_tensors, tensors_to_calibrate, unclipped_tensors
from calibration.search import SEARCHED_IMAGES, search_ranges
from calibration.select import relative_names, too_few
from calibration.table import (
    HISTOGRAM_BINS,
    MINIMUM_IMAGES,
    QUANTIZED_BINS,
    CalibrationImage,
    CalibrationTable,
    SkippedImage,
)
from calibration.table import CalibrationOptions as CalibrationOptions
from engines.contract import ModelContract
from engines.errors import BadInputError, ImageError
from engines.files import sha256_file
from engines.graph import OnnxModel
from engines.images import read_input
from engines.packages import load
from engines.runtimes import Progress

Array = Any
Ranges = dict[str, tuple[float, float]]

CHUNK = 8  # images; 8 times about 1 million floats of the depthwise network are 34 MB


def calibrate(
    model: OnnxModel,
    images: Sequence[tuple[Path, str]],
    options: CalibrationOptions,
    progress: Progress | None = None,
) -> CalibrationTable:
    """Find the ranges of a model's activations over image files.

    There is no way to hand over arrays: ranges come from files that went through the model's own preprocess.

    Args:
        model: The FP32 ONNX model.
        images: ``(path, label)``, as :func:`calibration.select.select_images` drew them.
        options: Method and its settings.
        progress: Called with (phase, images done, images in all).

    Returns:
        The table; images that cannot be read are skipped and named in it.

    Raises:
        ArtefactError: The model is not one of ours.
        BadInputError: Fewer readable images than the minimum, or a tensor that never changes over them.
    """
    graph, contract = model.proto, model.contract
    names = relative_names([path for path, _ in images])
    # Histograms grow with what comes, so the order must be one of the images' own.
    images = sorted(images, key=lambda item: (item[1], names[item[0]]))
    reader = _Reader(contract, names)
    collector = _collector(options)
    tensors = tensors_to_calibrate(graph)
    session = _session(graph, tensors)
    pixels: list[Array] = []  # 50 kB an image
    done = 0
    for chunk in _chunks(images, CHUNK):
        batch = reader.read(chunk)
        if batch is not None:
            pixels.append(batch)
            values = session.run(list(tensors), {contract.input_name: batch})
            with _quiet():
                collector.collect(dict(zip(tensors, values, strict=True)))
        done += len(chunk)
        if progress is not None:
            progress("calibrate", done, len(images))
    reader.check()
    ranges = _ranges(collector, options, graph)
    factors: dict[str, tuple[float, ...]] = {}
    if options.method == "mse":
        found = search_ranges(graph, np.concatenate(pixels), progress)
        ranges, factors = {**ranges, **found.ranges}, found.channel_factors
    return CalibrationTable(
        method=options.method,
        parameters=_parameters(options),
        seed=options.seed,
        ranges=ranges,
        onnx_sha256=model.sha256,
        preprocess_sha256=contract.preprocess_sha256,
        images=tuple(reader.read_images),
        skipped=tuple(reader.skipped),
        versions={name: load(name).__version__ for name in ("numpy", "onnxruntime")},
        channel_factors=factors,
    )


@dataclass
class _Reader:
    """Reads images by the contract and remembers which could be read."""

    contract: ModelContract
    names: dict[Path, str]
    read_images: list[CalibrationImage] = field(default_factory=list)
    skipped: list[SkippedImage] = field(default_factory=list)

    def read(self, chunk: Sequence[tuple[Path, str]]) -> Array | None:
        """Return ``uint8 [n, height, width, 1]`` of the readable images of a chunk, or None if none is."""
        pixels = []
        for path, label in chunk:
            name = self.names[path]
            try:
                pixels.append(read_input(path, self.contract))
            except ImageError as error:
                # Without the folder: a table must not depend on where its images lie.
                self.skipped.append(SkippedImage(name, error.what.replace(str(path), name)))
                continue
            self.read_images.append(CalibrationImage(name, label, sha256_file(path)))
        return np.stack(pixels) if pixels else None

    def check(self) -> None:
        """Refuse what is too little to calibrate on; a copied image counts once."""
        different = len({image.sha256 for image in self.read_images})
        if different >= MINIMUM_IMAGES:
            return
        why = f"{len(self.read_images) - different} copies"
        if self.skipped:
            why += f", {len(self.skipped)} cannot be read: {self.skipped[0].reason}"
        raise too_few(different, why)


def _chunks(images: Sequence[tuple[Path, str]], size: int) -> Iterator[Sequence[tuple[Path, str]]]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _session(graph: Any, tensors: Sequence[str]) -> Any:
    """Open the model on the CPU with ``tensors`` as its only outputs, without files."""
    ort = load("onnxruntime")
    augmented = onnx.ModelProto()
    augmented.CopyFrom(graph)
    del augmented.graph.output[:]
    augmented.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors
    )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # As in onnxruntime's own calibrators: what is measured is the graph as it was exported.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(augmented.SerializeToString(), options, providers=["CPUExecutionProvider"])


class _Extremes:
    """Stands for onnxruntime's collector where no histogram is needed, in a tenth of its time."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}

    def collect(self, values: dict[str, Array]) -> None:
        for name, array in values.items():
            low, high = self._seen.get(name, (math.inf, -math.inf))
            self._seen[name] = (min(low, float(array.min())), max(high, float(array.max())))

    def get_histogram_dict(self) -> dict[str, tuple[None, None, float, float]]:
        return {name: (None, None, low, high) for name, (low, high) in self._seen.items()}


def _collector(options: CalibrationOptions) -> Any:
    if options.method in ("minmax", "mse"):
        return _Extremes()
    collector = load("onnxruntime.quantization.calibrate").HistogramCollector
    return collector(
        method=options.method,
        symmetric=False,
        num_bins=HISTOGRAM_BINS,
        num_quantized_bins=QUANTIZED_BINS,
        percentile=options.percentile,
        scenario="same",
    )


def _parameters(options: CalibrationOptions) -> dict[str, float]:
    if options.method == "minmax":
        return {}
    if options.method == "mse":
        return {"searched_images": SEARCHED_IMAGES}
    if options.method == "percentile":
        return {"percentile": options.percentile, "histogram_bins": HISTOGRAM_BINS}
    return {"histogram_bins": HISTOGRAM_BINS, "quantized_bins": QUANTIZED_BINS}


def _ranges(collector: Any, options: CalibrationOptions, graph: Any) -> Ranges:
    """Turn the collector's histograms into ranges by the method asked for."""
    histograms = collector.get_histogram_dict()
    pixels = raw_pixel_tensors(graph)
    extremes = {name: (float(seen[2]), float(seen[3])) for name, seen in histograms.items()}
    for name, (low, high) in extremes.items():
        if not low < high:  # also refuses NaN
            where = "the images' pixels" if name in pixels else name
            raise BadInputError(
                f"calibration saw only the constant value {low:g} in {where}",
                remedy="give real images: these leave the network without a signal",
            )
    if options.method in ("minmax", "mse"):
        return extremes
    for name in unclipped_tensors(graph):
        del histograms[name]
    if options.method == "entropy":
        for counts, *_ in histograms.values():
            _level_zero(counts)
    with _quiet():
        found = collector.compute_collection_result()
    return {**extremes, **{name: (float(value[0]), float(value[1])) for name, value in found.items()}}


def _level_zero(counts: Array) -> None:
    """Give the bin that starts at zero its neighbour's count, in place.

    After ReLU half of all values are exactly zero, which every scale represents exactly; left in, they pull
    the entropy threshold down until half of the range is cut off.

    Source: NVIDIA's pytorch-quantization, calib/histogram.py, ``_compute_amax_entropy``: ``bins[0] = bins[1]``.
    """
    zero = counts.size // 2
    counts[zero] = counts[zero + 1]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallow what onnxruntime's collector prints on standard output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
