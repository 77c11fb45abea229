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
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnx
from msgspec import structs
from numpy.typing import NDArray

from calibration.chain import Floats, Pixels, chunks, map_in_threads, runs_in_pieces
from calibration.chain.rounding import learn_corrections
from calibration.chain.search import SEARCHED_IMAGES, search_ranges
from calibration.layers import (
    is_chain,
    raw_pixel_tensors,
    share_ranges,
    tensors_to_calibrate,
    unclipped_tensors,
)
from calibration.rewrites import Bounds, Factors, fold_norms
from calibration.select import CalibrationSet
from calibration.table import (
    DEFAULT_ROUNDING,
    HISTOGRAM_BINS,
    QUANTIZED_BINS,
    CalibrationOptions,
    CalibrationTable,
)
from engines.cpu.ort import SILENT, failures_of
from engines.errors import BadInputError, UsageError
from engines.graph import EXPORT_AGAIN, OnnxModel
from engines.packages import load
from engines.runtimes import Progress

if TYPE_CHECKING:
    from onnx import ModelProto

Ranges = dict[str, Bounds]
Result = TypeVar("Result")

CHUNK = 8  # images; 8 times about 1 million floats of the depthwise network are 34 MB
MOST_VALUES = 16 << 20  # of all watched tensors at a time: 64 MB, for each thread and each chunk that waits
# Parts of the range seen that a tensor's own range is searched among: 1 down to an eighth.
RANGE_CUTS = tuple(2 ** (-step / 16) for step in range(49))


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
        ArtefactError: The graph cannot run.
        BadInputError: A tensor never changes over the images.
        UsageError: Learnt roundings or corrected biases of a network that is no chain.
    """
    factors: dict[str, tuple[float, ...]] = {}
    by_layer = options.method == "mse" or options.rounding == "adaround" or bool(options.bias_correction)
    cut = by_layer and runs_in_pieces(model.proto)
    rounding, bias = _corrections(model, options, cut=cut)
    pieces = options.method == "mse" and cut
    graph = fold_norms(model.proto)
    with failures_of(str(model.path), remedy=EXPORT_AGAIN):
        if options.method in ("minmax", "mse"):
            ranges = _find_extremes(graph, images, progress)
        else:
            ranges = _cut_histograms(graph, images, options, progress)
        if options.method == "mse" and pieces:
            found = search_ranges(graph, images.pixels, progress)
            ranges, factors = {**ranges, **found.ranges}, found.channel_factors
        elif options.method == "mse":
            ranges = _least_errors(graph, images, ranges, progress)
    table = CalibrationTable(
        method=options.method,
        parameters=_parameters(options, pieces=pieces),
        seed=options.seed,
        ranges=share_ranges(graph, ranges),
        onnx_sha256=model.sha256,
        preprocess_sha256=model.contract.preprocess_sha256,
        images=images.images,
        skipped=images.skipped,
        versions={name: load(name).__version__ for name in ("numpy", "onnxruntime")},
        channel_factors=factors,
        pixel_levels=images.count_levels(model.contract),
    )
    if rounding == "nearest" and not bias:
        return table
    with failures_of(str(model.path), remedy=EXPORT_AGAIN):
        corrections = learn_corrections(
            model.proto, table, images.pixels, rounding=rounding, bias=bias, progress=progress
        )
    return structs.replace(table, corrections=corrections)


def _corrections(model: OnnxModel, options: CalibrationOptions, *, cut: bool) -> tuple[str, bool]:
    """Return how weights are rounded, and whether biases are corrected: by default beside ranges by ``mse`` alone.

    Args:
        model: The model, for the message.
        options: What was asked for.
        cut: Whether the model is a chain that is cut at its layers.

    Raises:
        UsageError: It is not, and one of both was asked for by name.
    """
    if cut:
        usual = options.method == "mse"
        bias = usual if options.bias_correction is None else options.bias_correction
        return options.rounding or (DEFAULT_ROUNDING if usual else "nearest"), bias
    asked = ["--bias-correction"] if options.bias_correction else []
    asked += [f"--rounding {options.rounding}"] if options.rounding not in (None, "nearest") else []
    if asked:
        raise UsageError(
            f"{asked[0]} looks at one layer after the other, and {model.path} is no small chain of layers",
            remedy=f"leave {asked[0]} out",
        )
    return "nearest", False


def watch_tensors(
    graph: ModelProto,
    tensors: Sequence[str],
    pixels: Pixels,
    look: Callable[[Sequence[Floats]], Result],
    report: Callable[[int], None] = lambda done: None,
) -> Iterator[Result]:
    """Run a graph over images, and yield what ``look`` sees in its tensors, a few images at a time and in their order.

    Args:
        graph: The FP32 graph.
        tensors: Which of its tensors.
        pixels: ``uint8 [N, height, width, channels]``.
        look: Called in threads with the values of the tensors over a few images, each ``float32 [n, ...]``. They are
            not kept: what a network with hundreds of large tensors needs stays bounded.
        report: Called with the number of images done.
    """
    session, name = _session(graph, tensors), graph.graph.input[0].name

    def run(part: slice) -> Result:
        return look(session.run(list(tensors), {name: pixels[part]}))

    parts = chunks(len(pixels), _images_at_once(graph, tensors))
    for part, found in zip(parts, map_in_threads(run, parts), strict=True):
        yield found
        report(part.stop)


def _images_at_once(graph: ModelProto, tensors: Sequence[str]) -> int:
    """Return how many images fit into :data:`MOST_VALUES` of these tensors; 1 to :data:`CHUNK`."""
    wanted = set(tensors)
    inferred = onnx.shape_inference.infer_shapes(graph, data_prop=True).graph
    each = sum(
        math.prod(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:])
        for value in inferred.value_info
        if value.name in wanted
    )
    return max(1, min(CHUNK, MOST_VALUES // max(1, int(each))))


def _reporting(phase: str, images: CalibrationSet, progress: Progress | None) -> Callable[[int], None]:
    return lambda done: progress(phase, done, len(images.pixels)) if progress is not None else None


def _find_extremes(graph: ModelProto, images: CalibrationSet, progress: Progress | None) -> Ranges:
    """Return the smallest and the largest value of each tensor: onnxruntime's minmax in a tenth of its time."""
    tensors = tensors_to_calibrate(graph)

    def measure(values: Sequence[Floats]) -> list[Bounds]:
        return [(float(array.min()), float(array.max())) for array in values]

    report = _reporting("calibrate", images, progress)
    seen = list(watch_tensors(graph, tensors, images.pixels, measure, report))
    lows, highs = np.array(seen).min(axis=0)[:, 0], np.array(seen).max(axis=0)[:, 1]
    ranges = {name: (float(lows[i]), float(highs[i])) for i, name in enumerate(tensors)}
    return _usable(ranges, graph)


def _least_errors(
    graph: ModelProto, images: CalibrationSet, extremes: Ranges, progress: Progress | None
) -> Ranges:
    """Return the range of each tensor with the least squared error of its values on the signed grid of TensorRT.

    Each tensor for itself: what its error does to the logits is not asked, as :mod:`calibration.chain.search` does.
    """
    kept = unclipped_tensors(graph)
    tensors = [name for name in tensors_to_calibrate(graph) if name not in kept]
    spans = [extremes[name] for name in tensors]

    def count(values: Sequence[Floats]) -> NDArray[np.int64]:
        return np.stack([_histogram(array, *span) for array, span in zip(values, spans, strict=True)])

    report = _reporting("searching ranges", images, progress)
    counts = np.zeros((len(tensors), HISTOGRAM_BINS), np.int64)
    for found in watch_tensors(graph, tensors, images.pixels, count, report):
        counts += found
    searched = {
        name: _least_error(seen, span) for name, seen, span in zip(tensors, counts, spans, strict=True)
    }
    return {**extremes, **searched}


def _histogram(values: Floats, low: float, high: float) -> NDArray[np.int64]:
    """Count values in :data:`HISTOGRAM_BINS` equal bins over their range: as numpy does."""
    places = (values.reshape(-1) - np.float32(low)) * np.float32(HISTOGRAM_BINS / (high - low))
    bins = np.minimum(places.astype(np.int32), HISTOGRAM_BINS - 1)
    return np.bincount(bins, minlength=HISTOGRAM_BINS)


def _least_error(counts: NDArray[np.int64], span: Bounds) -> Bounds:
    """Return the one of :data:`RANGE_CUTS` of a range in which rounding its histogram errs least."""
    low, high = span
    width = (high - low) / len(counts)
    middles: Factors = low + (np.arange(len(counts), dtype=np.float64) + 0.5) * width
    middles[np.abs(middles) < width] = 0.0  # the many zeros behind ReLU are exact on every grid
    best = min(RANGE_CUTS, key=lambda cut: _rounding_error(counts, middles, cut * max(-low, high)))
    return low * best, high * best


def _rounding_error(counts: NDArray[np.int64], middles: Factors, largest: float) -> float:
    scale = largest / 127
    rounded = np.clip(np.rint(middles / scale), -127, 127) * scale
    return float((counts * (rounded - middles) ** 2).sum())


def _cut_histograms(
    graph: ModelProto, images: CalibrationSet, options: CalibrationOptions, progress: Progress | None
) -> Ranges:
    """Return the ranges that onnxruntime's collector makes of each tensor's histogram by the method asked for."""
    tensors = tensors_to_calibrate(graph)
    collector = load("onnxruntime.quantization.calibrate").HistogramCollector(
        method=options.method,
        symmetric=False,
        num_bins=HISTOGRAM_BINS,
        num_quantized_bins=QUANTIZED_BINS,
        percentile=options.percentile,
        scenario="same",
    )

    report = _reporting("calibrate", images, progress)
    for values in watch_tensors(graph, tensors, images.pixels, list, report):
        with _quiet():
            collector.collect(dict(zip(tensors, values, strict=True)))
    histograms = collector.get_histogram_dict()
    extremes = {name: (float(seen[2]), float(seen[3])) for name, seen in histograms.items()}
    extremes = _usable(extremes, graph)
    silent = {name for name, seen in histograms.items() if not seen[2] < seen[3]}
    for name in (unclipped_tensors(graph) | silent) & set(histograms):
        del histograms[name]
    if options.method == "entropy":
        for counts, *_ in histograms.values():
            _level_zero(counts)
    with _quiet():
        found = collector.compute_collection_result()
    return {**extremes, **{name: (float(value[0]), float(value[1])) for name, value in found.items()}}


def _usable(extremes: Ranges, graph: ModelProto) -> Ranges:
    """Refuse tensors that never change; one of a silent branch among others that do gets a range of its own.

    Raises:
        BadInputError: A tensor of a chain never changes, or the pixels, or one holds no number.
    """
    pixels, chain = raw_pixel_tensors(graph), is_chain(graph)
    usable = {}
    for name, (low, high) in extremes.items():
        silent = low == high and not chain and name not in pixels
        if not low < high and not silent:  # also refuses NaN
            where = "the images' pixels" if name in pixels else name
            raise BadInputError(
                f"calibration saw only the constant value {low:g} in {where}",
                remedy="give real images: these leave the network without a signal",
            )
        usable[name] = (min(low, 0.0), max(high, 0.0) or float(low == 0)) if silent else (low, high)
    return usable


def _level_zero(counts: NDArray[np.int64]) -> None:
    """Give the bin that starts at zero its neighbour's count, in place.

    After ReLU half of all values are exactly zero, which every scale represents exactly; left in, they pull
    the entropy threshold down until half of the range is cut off.

    Source: NVIDIA's pytorch-quantization, calib/histogram.py, ``_compute_amax_entropy``: ``bins[0] = bins[1]``.
    """
    zero = counts.size // 2
    counts[zero] = counts[zero + 1]


def _parameters(options: CalibrationOptions, *, pieces: bool) -> dict[str, int | float]:
    if options.method == "minmax":
        return {}
    if options.method == "mse":
        return {"searched_images": SEARCHED_IMAGES} if pieces else {"histogram_bins": HISTOGRAM_BINS}
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
