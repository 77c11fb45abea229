"""Ranges chosen by what they do to the network's output: the squared error of the logits (method ``mse``).

Layer by layer from the image on, with all layers before already in INT8 as chosen: channels are brought to one
range (:mod:`calibration.equalize`) by more or less, the range is cut by more or less, and what leaves the logits
nearest to those of the float network is kept. So a layer also makes up for what those before it spoilt.

The error is that of the signed grid, the coarser of the two. A search on the sum of both grids' errors made those of
three trained CNNs' unsigned graphs 5 to 12 % less and of their signed ones 3 to 6 % more, at nearly twice the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from calibration.centering import SUFFIX, center_pixels, centred_range
from calibration.chain import Bounds, Chain, Grid, grid_of
from calibration.equalize import can_scale, channel_count, scale_channels
from calibration.layers import Layer
from calibration.qdq import PIXEL_RANGE
from engines.packages import load
from engines.runtimes import Progress

Model = Any  # onnx.ModelProto
Array = Any

SEARCHED_IMAGES = 96
CUTS = tuple(2 ** (-step / 4) for step in range(5))  # of the largest value seen: 1 to a half
# How far channels are brought together: 0 not at all, 1 to equal ranges. For depthwise layers 1 costs nothing.
EXPONENTS = (0.0, 0.5, 1.0)
# A channel that is nearly silent is raised by no more than this.
LARGEST_FACTOR = 1000.0
_CHUNK = 16  # images


@dataclass(frozen=True)
class SearchedRanges:
    """What the search found.

    Attributes:
        ranges: Range of every searched tensor, after its channels were multiplied by their factors.
        channel_factors: One factor a channel, for the tensors where that helps.
    """

    ranges: dict[str, Bounds]
    channel_factors: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class _Candidate:
    factors: Array | None  # float64 [channels]
    bounds: Bounds
    chain: Chain  # with this layer's weights divided by the factors


def search_ranges(model: Model, pixels: Array, progress: Progress | None = None) -> SearchedRanges:
    """Search ranges and channel factors of all layers but the last, on the signed grid of TensorRT.

    Args:
        model: The deployed FP32 graph.
        pixels: ``uint8 [N, height, width, 1]``: all calibration images. The extremes are taken from all of them,
            the error from :data:`SEARCHED_IMAGES` spread evenly over them.
        progress: Called with (phase, layers done, layers in all).

    Raises:
        ArtefactError: The graph is no chain of layers.
    """
    numpy = load("numpy")
    centred = center_pixels(model)
    chain = Chain(centred, signed=True)
    places = numpy.unique(numpy.linspace(0, len(pixels) - 1, min(SEARCHED_IMAGES, len(pixels))).astype(int))
    values = _chunked(chain.start, pixels[places])
    reference = _chunked(lambda part: chain.finish(0, part), values)
    extremes = _channel_extremes(chain, centred, pixels)
    found = SearchedRanges({}, {})
    for index, layer in enumerate(chain.layers[:-1]):
        if layer.raw_pixels:
            bounds = centred_range(signed=True) if layer.input.endswith(SUFFIX) else PIXEL_RANGE
            candidates = [_Candidate(None, bounds, chain)]
        else:
            candidates = _candidates(chain, centred, layer, extremes[index])
        errors = [_error(chain, index, candidate, values, reference) for candidate in candidates]
        best = candidates[int(numpy.argmin(errors))]
        if not layer.raw_pixels:
            found.ranges[layer.input] = best.bounds
        if best.factors is not None:
            found.channel_factors[layer.input] = tuple(float(factor) for factor in best.factors)
        values = _chunked(_stepper(index, best), values)
        if progress is not None:
            progress("searching ranges", index + 1, len(chain.layers) - 1)
    return found


def _candidates(chain: Chain, model: Model, layer: Layer, extremes: Array) -> list[_Candidate]:
    numpy = load("numpy")
    exponents = ((0.0, 1.0) if layer.depthwise else EXPONENTS) if can_scale(model, layer) else (0.0,)
    found = []
    for exponent in exponents:
        factors, changed = None, chain
        scaled = extremes
        if exponent:
            largest = numpy.abs(extremes).max(axis=0).astype(numpy.float64)
            largest = numpy.maximum(largest, largest.max() / LARGEST_FACTOR)
            factors = ((largest.max() / largest) ** exponent).astype(numpy.float32).astype(numpy.float64)
            changed = Chain(scale_channels(model, {layer.input: factors}), signed=True)
            scaled = extremes * factors
        low, high = float(scaled[0].min()), float(scaled[1].max())
        found += [_Candidate(factors, (low * cut, high * cut), changed) for cut in CUTS]
    return found


def _channel_extremes(chain: Chain, model: Model, pixels: Array) -> list[Array]:
    """Smallest and largest value of each layer's input over all images: float32 [2, channels], or [2, 1]."""
    numpy = load("numpy")
    seen: list[Array] = []
    for start in range(0, len(pixels), _CHUNK):
        values = chain.start(pixels[start : start + _CHUNK])
        for index, layer in enumerate(chain.layers[:-1]):
            channels = channel_count(model, layer) if can_scale(model, layer) else 1
            flat = values.reshape(len(values), channels, -1)
            both = numpy.stack([flat.min(axis=(0, 2)), flat.max(axis=(0, 2))])
            if start == 0:
                seen.append(both)
            else:
                seen[index] = numpy.stack(
                    [numpy.minimum(seen[index][0], both[0]), numpy.maximum(seen[index][1], both[1])]
                )
            values = chain.step(index, values, None, int8=False)
    return seen


def _error(chain: Chain, index: int, candidate: _Candidate, values: Array, reference: Array) -> float:
    """Mean squared error of the centred logits with this layer as in the candidate and those behind in float."""
    step = _stepper(index, candidate)
    logits = _chunked(lambda part: chain.finish(index + 1, step(part)), values)
    difference = logits - reference
    difference = difference - difference.mean(axis=1, keepdims=True)
    return float((difference**2).mean())


def _stepper(index: int, candidate: _Candidate) -> Callable[[Array], Array]:
    grid: Grid = grid_of(candidate.bounds, signed=True)

    def step(part: Array) -> Array:
        scaled = part
        if candidate.factors is not None:
            numpy = load("numpy")
            flat = part.reshape(len(part), len(candidate.factors), -1)
            scaled = (flat * candidate.factors[:, None]).astype(numpy.float32).reshape(part.shape)
        return candidate.chain.step(index, scaled, grid, int8=True)

    return step


def _chunked(function: Callable[[Array], Array], values: Array) -> Array:
    numpy = load("numpy")
    return numpy.concatenate(
        [function(values[start : start + _CHUNK]) for start in range(0, len(values), _CHUNK)]
    )
