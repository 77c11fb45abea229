"""Ranges by the error at the logits, searched layer by layer from the image on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibration.chain import Bounds, Chain, Grid, grid_of
from calibration.layers import Layer
from calibration.qdq import PIXEL_RANGE
from calibration.rewrites import (
    SUFFIX,
    can_scale,
    center_pixels,
    centred_range,
    channel_count,
    scale_channels,
)
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
    centred = center_pixels(model)
    chain = Chain(centred, signed=True)
    places = np.unique(np.linspace(0, len(pixels) - 1, min(SEARCHED_IMAGES, len(pixels))).astype(int))
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
        best = candidates[int(np.argmin(errors))]
        if not layer.raw_pixels:
            found.ranges[layer.input] = best.bounds
        if best.factors is not None:
            found.channel_factors[layer.input] = tuple(float(factor) for factor in best.factors)
        values = _chunked(_stepper(index, best), values)
        if progress is not None:
            progress("searching ranges", index + 1, len(chain.layers) - 1)
    return found


def _candidates(chain: Chain, model: Model, layer: Layer, extremes: Array) -> list[_Candidate]:
    exponents = ((0.0, 1.0) if layer.depthwise else EXPONENTS) if can_scale(model, layer) else (0.0,)
    found = []
    for exponent in exponents:
        factors, changed = None, chain
        scaled = extremes
        if exponent:
            largest = np.abs(extremes).max(axis=0).astype(np.float64)
            largest = np.maximum(largest, largest.max() / LARGEST_FACTOR)
            factors = ((largest.max() / largest) ** exponent).astype(np.float32).astype(np.float64)
            changed = Chain(scale_channels(model, {layer.input: factors}), signed=True)
            scaled = extremes * factors
        low, high = float(scaled[0].min()), float(scaled[1].max())
        found += [_Candidate(factors, (low * cut, high * cut), changed) for cut in CUTS]
    return found


def _channel_extremes(chain: Chain, model: Model, pixels: Array) -> list[Array]:
    """Smallest and largest value of each layer's input over all images: float32 [2, channels], or [2, 1]."""
    seen: list[Array] = []
    for start in range(0, len(pixels), _CHUNK):
        values = chain.start(pixels[start : start + _CHUNK])
        for index, layer in enumerate(chain.layers[:-1]):
            channels = channel_count(model, layer) if can_scale(model, layer) else 1
            flat = values.reshape(len(values), channels, -1)
            both = np.stack([flat.min(axis=(0, 2)), flat.max(axis=(0, 2))])
            if start == 0:
                seen.append(both)
            else:
                seen[index] = np.stack(
                    [np.minimum(seen[index][0], both[0]), np.maximum(seen[index][1], both[1])]
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
            flat = part.reshape(len(part), len(candidate.factors), -1)
            scaled = (flat * candidate.factors[:, None]).astype(np.float32).reshape(part.shape)
        return candidate.chain.step(index, scaled, grid, int8=True)

    return step


def _chunked(function: Callable[[Array], Array], values: Array) -> Array:
    return np.concatenate(
        [function(values[start : start + _CHUNK]) for start in range(0, len(values), _CHUNK)]
    )
