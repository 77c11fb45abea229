"""Ranges by the error at the logits, searched layer by layer from the image on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from calibration.chain import Chain, Floats, Pixels, chunks, grid_of, map_in_threads
from calibration.layers import Layer
from calibration.rewrites import (
    Bounds,
    Factors,
    can_scale,
    center_pixels,
    channel_count,
    pixel_range,
    scale_channels,
)
from engines.runtimes import Progress

if TYPE_CHECKING:
    from onnx import ModelProto

SEARCHED_IMAGES = 96
CUTS = tuple(2 ** (-step / 4) for step in range(5))  # of the largest value seen: 1 to a half
# How far channels are brought together: 0 not at all, 1 to equal ranges. For depthwise layers 1 costs nothing.
EXPONENTS = (0.0, 0.5, 1.0)
# A channel that is nearly silent is raised by no more than this.
LARGEST_FACTOR = 1000.0
_CHUNK = 2  # images: with more, the values leave the processor's cache and every array costs page faults
_ROUNDS = 6  # parts of the images that candidates are run on, one after the other


@dataclass(frozen=True)
class SearchedRanges:
    """What the search found.

    Attributes:
        ranges: Range of every searched tensor, after its channels were multiplied by their factors.
        channel_factors: One factor per channel, for the tensors where that helps.
    """

    ranges: dict[str, Bounds]
    channel_factors: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class _Scaling:
    """One way to bring a layer's channels together, and the ranges to try with it."""

    factors: Factors | None
    chain: Chain  # with this layer's weights divided by the factors
    bounds: tuple[Bounds, ...]

    def scale(self, values: Floats) -> Floats:
        if self.factors is None:
            return values
        flat = values.reshape(len(values), len(self.factors), -1)
        return (flat * self.factors.astype(np.float32)[:, None]).reshape(values.shape)


def search_ranges(model: ModelProto, pixels: Pixels, progress: Progress | None = None) -> SearchedRanges:
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
    extremes = _channel_extremes(chain, centred, pixels)
    places = np.unique(np.linspace(0, len(pixels) - 1, min(SEARCHED_IMAGES, len(pixels))).astype(int))
    searched: Pixels = pixels[places]
    values = list(map_in_threads(lambda part: chain.start(searched[part]), chunks(len(searched), _CHUNK)))
    reference = list(map_in_threads(lambda part: chain.finish(0, part), values))
    ranges: dict[str, Bounds] = {}
    channel_factors: dict[str, tuple[float, ...]] = {}
    for index, layer in enumerate(chain.layers[:-1]):
        if layer.raw_pixels:
            bounds = pixel_range(layer.input, signed=True)
            best = _Scaling(None, chain, (bounds,))
        else:
            scalings = _scalings(chain, centred, layer, extremes[index])
            best, bounds = _choose(chain, index, scalings, values, reference)
            ranges[layer.input] = bounds
        if best.factors is not None:
            channel_factors[layer.input] = tuple(float(factor) for factor in best.factors)
        values = list(map_in_threads(partial(_step, index, best, bounds), values))
        if progress is not None:
            progress("searching ranges", index + 1, len(chain.layers) - 1)
    return SearchedRanges(ranges, channel_factors)


def _scalings(chain: Chain, model: ModelProto, layer: Layer, extremes: Floats) -> list[_Scaling]:
    exponents = ((0.0, 1.0) if layer.depthwise else EXPONENTS) if can_scale(model, layer) else (0.0,)
    found = []
    for exponent in exponents:
        factors, changed, scaled = None, chain, extremes
        if exponent:
            largest = np.abs(extremes).max(axis=0).astype(np.float64)
            largest = np.maximum(largest, largest.max() / LARGEST_FACTOR)
            factors = ((largest.max() / largest) ** exponent).astype(np.float32).astype(np.float64)
            changed = Chain(scale_channels(model, {layer.input: factors}), signed=True)
            scaled = extremes * factors
        low, high = float(scaled[0].min()), float(scaled[1].max())
        found.append(_Scaling(factors, changed, tuple((low * cut, high * cut) for cut in CUTS)))
    return found


def _channel_extremes(chain: Chain, model: ModelProto, pixels: Pixels) -> list[Floats]:
    """Smallest and largest value of each layer's input over all images: float32 [2, channels], or [2, 1]."""
    layers = chain.layers[:-1]
    channels = [channel_count(model, layer) if can_scale(model, layer) else 1 for layer in layers]

    def measure(part: slice) -> list[Floats]:
        values = chain.start(pixels[part])
        seen = []
        for index, count in enumerate(channels):
            flat = values.reshape(len(values), count, -1)
            seen.append(np.stack([flat.min(axis=(0, 2)), flat.max(axis=(0, 2))]))
            if index + 1 < len(channels):
                values = chain.step(index, values, None, int8=False)
        return seen

    parts = list(map_in_threads(measure, chunks(len(pixels), _CHUNK)))
    return [
        np.stack([np.min([both[0] for both in seen], axis=0), np.max([both[1] for both in seen], axis=0)])
        for seen in zip(*parts, strict=True)
    ]


def _choose(
    chain: Chain,
    index: int,
    scalings: Sequence[_Scaling],
    values: Sequence[Floats],
    reference: Sequence[Floats],
) -> tuple[_Scaling, Bounds]:
    """Return the scaling and the range with the least error at the logits; the first of equal ones.

    The error is the mean square of the centred logits with this layer rounded and those behind it in float. It can
    only grow with the images: a candidate that has more on some of them than the leader on all is not run on the rest.

    Args:
        chain: The float network.
        index: The layer.
        scalings: What to choose from.
        values: The layer's input, in chunks of images.
        reference: The logits of the float network for each chunk.
    """
    candidates = [(scaling, bounds) for scaling in scalings for bounds in scaling.bounds]
    differences: list[dict[int, Floats]] = [{} for _ in candidates]  # of each chunk that was run

    def run(numbers: Sequence[int], places: Sequence[int]) -> None:
        def answer(place: int) -> list[Floats]:
            found: list[Floats] = []
            scaled_by, scaled = None, values[place]
            for scaling, bounds in (candidates[number] for number in numbers):
                if scaling is not scaled_by:
                    scaled_by, scaled = scaling, scaling.scale(values[place])
                rounded = scaling.chain.step(index, scaled, grid_of(bounds, signed=True), int8=True)
                difference = chain.finish(index + 1, rounded) - reference[place]
                found.append(difference - difference.mean(axis=1, keepdims=True))
            return found

        for place, found in zip(places, map_in_threads(answer, places), strict=True):
            for number, difference in zip(numbers, found, strict=True):
                differences[number][place] = difference

    def summed(number: int) -> float:
        return sum(float(np.square(part, dtype=np.float64).sum()) for part in differences[number].values())

    first, *rounds = [range(start, len(values), _ROUNDS) for start in range(min(_ROUNDS, len(values)))]
    alive = list(range(len(candidates)))
    run(alive, first)
    leader = min(alive, key=summed)
    run([leader], [place for places in rounds for place in places])
    limit = 1.001 * summed(leader)  # more than rounding can make
    for places in rounds:
        alive = [number for number in alive if number != leader and summed(number) <= limit]
        run(alive, places)
    errors = {
        number: float(
            (np.concatenate([differences[number][place] for place in range(len(values))]) ** 2).mean()
        )
        for number in sorted([leader, *alive])
    }
    return candidates[min(errors, key=lambda number: errors[number])]


def _step(index: int, scaling: _Scaling, bounds: Bounds, part: Floats) -> Floats:
    """Return the next layer's input with this layer as it was chosen."""
    return scaling.chain.step(index, scaling.scale(part), grid_of(bounds, signed=True), int8=True)
