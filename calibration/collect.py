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
from typing import Any

import onnx

from calibration.layers import raw_pixel_tensors, tensors_to_calibrate, unclipped_tensors
from calibration.search import SEARCHED_IMAGES, search_ranges
from calibration.select import CalibrationSet
from calibration.table import HISTOGRAM_BINS, QUANTIZED_BINS, CalibrationOptions, CalibrationTable
from engines.errors import BadInputError
from engines.graph import OnnxModel
from engines.packages import load
from engines.runtimes import Progress

Array = Any
Ranges = dict[str, tuple[float, float]]

CHUNK = 8  # images; 8 times about 1 million floats of the depthwise network are 34 MB


def calibrate(
    model: OnnxModel,
    images: CalibrationSet,
    options: CalibrationOptions,
    progress: Progress | None = None,
) -> CalibrationTable:
    """Find the ranges of a model's activations over images.

    Args:
        model: The FP32 ONNX model.
        images: What :func:`calibration.select.read_set` read by the model's contract.
        options: Method and its settings.
        progress: Called with (phase, images done, images in all).

    Raises:
        BadInputError: A tensor never changes over the images.
    """
    graph, contract = model.proto, model.contract
    collector = _collector(options)
    tensors = tensors_to_calibrate(graph)
    session = _session(graph, tensors)
    count = len(images.pixels)
    for start in range(0, count, CHUNK):
        values = session.run(list(tensors), {contract.input_name: images.pixels[start : start + CHUNK]})
        with _quiet():
            collector.collect(dict(zip(tensors, values, strict=True)))
        if progress is not None:
            progress("calibrate", min(start + CHUNK, count), count)
    ranges = _ranges(collector, options, graph)
    factors: dict[str, tuple[float, ...]] = {}
    if options.method == "mse":
        found = search_ranges(graph, images.pixels, progress)
        ranges, factors = {**ranges, **found.ranges}, found.channel_factors
    return CalibrationTable(
        method=options.method,
        parameters=_parameters(options),
        seed=options.seed,
        ranges=ranges,
        onnx_sha256=model.sha256,
        preprocess_sha256=contract.preprocess_sha256,
        images=images.images,
        skipped=images.skipped,
        versions={name: load(name).__version__ for name in ("numpy", "onnxruntime")},
        channel_factors=factors,
    )


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
