"""From images and an FP32 model to the range of every tensor: onnxruntime's calibration over the model's own input.

onnxruntime's calibrators run the model with every intermediate tensor as an output, keep all of those for all
images and write temporary models. Here the model gives only the tensors that need a range, a chunk of images at
a time, and onnxruntime's collector sees each chunk once: memory stays flat, and nothing is written. Its
statistics and thresholds are used as they are.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calibration.chain import Floats, chunks, map_in_threads
from calibration.layers import raw_pixel_tensors, tensors_to_calibrate, unclipped_tensors
from calibration.rewrites import Bounds
from calibration.search import SEARCHED_IMAGES, search_ranges
from calibration.select import CalibrationSet
from calibration.table import HISTOGRAM_BINS, QUANTIZED_BINS, CalibrationOptions, CalibrationTable
from engines.errors import BadInputError
from engines.graph import EXPORT_AGAIN, OnnxModel
from engines.ort import SILENT, failures_of
from engines.packages import load
from engines.runtimes import Progress

if TYPE_CHECKING:
    from onnx import ModelProto

Ranges = dict[str, Bounds]

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
        ArtefactError: The graph is no chain of layers, or cannot run.
        BadInputError: A tensor never changes over the images.
    """
    factors: dict[str, tuple[float, ...]] = {}
    with failures_of(str(model.path), remedy=EXPORT_AGAIN):
        if options.method in ("minmax", "mse"):
            ranges = _find_extremes(model, images, progress)
        else:
            ranges = _cut_histograms(model, images, options, progress)
        if options.method == "mse":
            found = search_ranges(model.proto, images.pixels, progress)
            ranges, factors = {**ranges, **found.ranges}, found.channel_factors
    return CalibrationTable(
        method=options.method,
        parameters=_parameters(options),
        seed=options.seed,
        ranges=ranges,
        onnx_sha256=model.sha256,
        preprocess_sha256=model.contract.preprocess_sha256,
        images=images.images,
        skipped=images.skipped,
        versions={name: load(name).__version__ for name in ("numpy", "onnxruntime")},
        channel_factors=factors,
    )


def _find_extremes(model: OnnxModel, images: CalibrationSet, progress: Progress | None) -> Ranges:
    """Return the smallest and the largest value of each tensor: onnxruntime's minmax in a tenth of its time."""
    tensors = tensors_to_calibrate(model.proto)
    session = _session(model.proto, tensors)

    def measure(part: slice) -> list[Bounds]:
        values = session.run(list(tensors), {model.contract.input_name: images.pixels[part]})
        return [(float(array.min()), float(array.max())) for array in values]

    seen = []
    parts = chunks(len(images.pixels), CHUNK)
    for part, bounds in zip(parts, map_in_threads(measure, parts), strict=True):
        seen.append(bounds)
        if progress is not None:
            progress("calibrate", part.stop, len(images.pixels))
    lows, highs = np.array(seen).min(axis=0)[:, 0], np.array(seen).max(axis=0)[:, 1]
    ranges = {name: (float(lows[i]), float(highs[i])) for i, name in enumerate(tensors)}
    _refuse_constants(ranges, model.proto)
    return ranges


def _cut_histograms(
    model: OnnxModel, images: CalibrationSet, options: CalibrationOptions, progress: Progress | None
) -> Ranges:
    """Return the ranges that onnxruntime's collector makes of each tensor's histogram by the method asked for."""
    tensors = tensors_to_calibrate(model.proto)
    session = _session(model.proto, tensors)
    collector = load("onnxruntime.quantization.calibrate").HistogramCollector(
        method=options.method,
        symmetric=False,
        num_bins=HISTOGRAM_BINS,
        num_quantized_bins=QUANTIZED_BINS,
        percentile=options.percentile,
        scenario="same",
    )

    def run(part: slice) -> list[Floats]:
        values: list[Floats] = session.run(list(tensors), {model.contract.input_name: images.pixels[part]})
        return values

    parts = chunks(len(images.pixels), CHUNK)
    for part, values in zip(parts, map_in_threads(run, parts), strict=True):
        with _quiet():
            collector.collect(dict(zip(tensors, values, strict=True)))
        if progress is not None:
            progress("calibrate", part.stop, len(images.pixels))
    histograms = collector.get_histogram_dict()
    extremes = {name: (float(seen[2]), float(seen[3])) for name, seen in histograms.items()}
    _refuse_constants(extremes, model.proto)
    for name in unclipped_tensors(model.proto):
        del histograms[name]
    if options.method == "entropy":
        for counts, *_ in histograms.values():
            _level_zero(counts)
    with _quiet():
        found = collector.compute_collection_result()
    return {**extremes, **{name: (float(value[0]), float(value[1])) for name, value in found.items()}}


def _refuse_constants(extremes: Ranges, graph: ModelProto) -> None:
    pixels = raw_pixel_tensors(graph)
    for name, (low, high) in extremes.items():
        if not low < high:  # also refuses NaN
            where = "the images' pixels" if name in pixels else name
            raise BadInputError(
                f"calibration saw only the constant value {low:g} in {where}",
                remedy="give real images: these leave the network without a signal",
            )


def _level_zero(counts: NDArray[np.int64]) -> None:
    """Give the bin that starts at zero its neighbour's count, in place.

    After ReLU half of all values are exactly zero, which every scale represents exactly; left in, they pull
    the entropy threshold down until half of the range is cut off.

    Source: NVIDIA's pytorch-quantization, calib/histogram.py, ``_compute_amax_entropy``: ``bins[0] = bins[1]``.
    """
    zero = counts.size // 2
    counts[zero] = counts[zero + 1]


def _parameters(options: CalibrationOptions) -> dict[str, int | float]:
    if options.method == "minmax":
        return {}
    if options.method == "mse":
        return {"searched_images": SEARCHED_IMAGES}
    if options.method == "percentile":
        return {"percentile": options.percentile, "histogram_bins": HISTOGRAM_BINS}
    return {"histogram_bins": HISTOGRAM_BINS, "quantized_bins": QUANTIZED_BINS}


def _session(graph: ModelProto, tensors: Sequence[str]) -> Any:
    """Open the model on one thread of the CPU with ``tensors`` as its only outputs, without files."""
    ort = load("onnxruntime")
    augmented = onnx.ModelProto()
    augmented.CopyFrom(graph)
    del augmented.graph.output[:]
    augmented.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors
    )
    options = ort.SessionOptions()
    options.log_severity_level = SILENT
    options.intra_op_num_threads = 1
    # As in onnxruntime's own calibrators: what is measured is the graph as it was exported.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(augmented.SerializeToString(), options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallow what onnxruntime's collector prints on standard output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
