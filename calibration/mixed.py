"""Mixed precision: the cheapest mix of INT8 and float layers that keeps the accuracy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx

from calibration.chain import Chain, Floats, Grid, Pixels, chunks, map_in_threads, quantized_chain
from calibration.layers import Layer, find_layers
from calibration.table import CalibrationTable
from engines.errors import AccuracyGateError, ArtefactError, BadInputError, UsageError
from engines.runtimes import Progress

if TYPE_CHECKING:
    from onnx import ModelProto

Choice = tuple[bool, ...]  # of each layer: whether it runs in INT8

# Multiply-adds a cycle of Orin's tensor cores: INT8 twice FP16.
# Source: NVIDIA Jetson AGX Orin Series technical brief, table of dense INT8 and FP16 throughput.
INT8_FACTOR = 0.5
# Depthwise convolutions do not run on tensor cores: INT8 was not faster than FP16 there.
# Source: NVIDIA/TensorRT issues 4529 and 1409.
DEPTHWISE_INT8_FACTOR = 1.0
CHANGE_FACTOR = 1.0  # a converted element counts as a multiply-add
MOST_LAYERS = 10  # 1,024 mixes; beyond that the search would have to choose


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Cost of one layer, in weighted multiply-adds of one image or in any other unit common to all.

    Attributes:
        int8: In INT8.
        rest: In FP16, or what else the rest of the engine runs in.
        change: Added where the layer before it has the other precision.
    """

    int8: float
    rest: float
    change: float = 0.0


def predict_costs(model: ModelProto) -> dict[str, LayerCost]:
    """Predict the cost of every layer from its multiply-adds.

    A multiply-add counts 1 in FP16, 0.5 in INT8, and 1 in INT8 on a depthwise layer; each element of a tensor
    that is converted between two layers counts 1. Launches, memory traffic and fusion are left out: measure where
    you can.

    Raises:
        ArtefactError: The shapes of the graph cannot be inferred.
    """
    single = onnx.ModelProto()
    single.CopyFrom(model)
    for value in [*single.graph.input, *single.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del single.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(single, data_prop=True).graph
    sizes = {}
    for value in [*inferred.value_info, *inferred.output]:
        size = 1
        for dim in value.type.tensor_type.shape.dim:
            size *= int(dim.dim_value)
        sizes[value.name] = size
    outputs = {node.name: node.output[0] for node in single.graph.node}
    found = {}
    for layer in find_layers(model):
        if not sizes.get(outputs[layer.name]) or not sizes.get(layer.input):
            raise ArtefactError(
                f"the shapes around {layer.name} are not known", remedy="export it again: edge-dsc export RUN"
            )
        weights = 1
        for size in layer.shape:
            weights *= size
        multiply_adds = sizes[outputs[layer.name]] * (weights // layer.shape[layer.axis])
        factor = DEPTHWISE_INT8_FACTOR if layer.depthwise else INT8_FACTOR
        found[layer.name] = LayerCost(
            int8=multiply_adds * factor, rest=multiply_adds, change=sizes[layer.input] * CHANGE_FACTOR
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Mix:
    """One assignment of precisions and what it does to the answers.

    Attributes:
        float_layers: Layers that stay in floating point, in the order of the graph.
        correct: Images answered right.
        same_top1: Images with the same top class as in floating point.
        error: Mean squared difference of the centred logits from those in floating point.
        cost: Predicted, in the unit of the costs.
    """

    float_layers: tuple[str, ...]
    correct: int
    same_top1: int
    error: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class MixedSearch:
    """The result of a search.

    Attributes:
        best: The mix that was chosen.
        all_int8: All layers in INT8.
        all_float: No layer in INT8.
        tried: How many mixes were run.
        possible: How many there are, all-float among them.
        images: Images that each was run on.
        unit: The unit of the costs.
    """

    best: Mix
    all_int8: Mix
    all_float: Mix
    tried: int
    possible: int
    images: int
    unit: str

    @property
    def float_layers(self) -> tuple[str, ...]:
        """Layers that stay in floating point."""
        return self.best.float_layers

    @property
    def drop(self) -> float:
        """Accuracy lost against floating point, in points; negative is a gain."""
        return 100 * (self.all_float.correct - self.best.correct) / self.images

    @property
    def text(self) -> str:
        """The result on one line."""
        kept = ", ".join(self.float_layers) or "none"
        return (
            f"mixed precision: {self.tried} of {self.possible} mixes tried on {self.images} images; "
            f"left out of INT8: {kept}; accuracy drop {self.drop:.2f} points, same top class "
            f"{self.best.same_top1}/{self.images}; predicted cost {self.best.cost:.4g} {self.unit} "
            f"(all INT8 {self.all_int8.cost:.4g}, all float {self.all_float.cost:.4g})"
        )


def search(
    model: ModelProto,
    table: CalibrationTable,
    pixels: Pixels,
    labels: Sequence[int],
    *,
    signed: bool,
    max_drop: float,
    costs: Mapping[str, LayerCost] | None = None,
    progress: Progress | None = None,
) -> MixedSearch:
    """Find the mix of INT8 and float layers that keeps the accuracy at the least predicted cost.

    All mixes are run on all images. Allowed are those that lose at most ``max_drop`` points, answer no fewer
    images right than all-INT8, and cost no more than all-float. Of these only such stay as change at most
    ``max_drop`` percent of all answers, for better or worse (at least one image; as few as any mix can, where
    none can so few). The cheapest is taken; among equally cheap ones the one with the most unchanged answers,
    then the least error. Same inputs, same answer.

    Args:
        model: The deployed FP32 graph.
        table: Its calibration table.
        pixels: ``uint8 [N, height, width, 1]``: labelled images that neither trained nor calibrated.
        labels: Class index of each.
        signed: Which kind of INT8 graph: signed for TensorRT.
        max_drop: Points of accuracy that may be lost against floating point.
        costs: Cost of each layer; None predicts them: :func:`predict_costs`.
        progress: Called with (phase, images done, images in all).

    Raises:
        UsageError: More than :data:`MOST_LAYERS` layers, or a negative budget.
        BadInputError: No images.
        AccuracyGateError: No mix with at least one INT8 layer keeps the budget.
    """
    if max_drop < 0:
        raise UsageError(f"an accuracy budget of {max_drop} points", remedy="give 0 or more points")
    if len(labels) == 0 or len(labels) != len(pixels):
        raise BadInputError(
            f"{len(pixels)} images with {len(labels)} labels to search on", remedy="give labelled images"
        )
    chain, grids = quantized_chain(model, table, signed=signed)
    layers = [layer for layer in chain.layers if not layer.last]
    if len(layers) > MOST_LAYERS:
        raise UsageError(
            f"{len(layers)} layers have {2 ** len(layers)} mixes", remedy="build with --int8 or --fp16"
        )
    unit = "measured" if costs else "weighted multiply-adds"
    known = costs or predict_costs(model)
    tally = _try_all(chain, grids, pixels, labels, progress)
    mixes = [_mix(choice, layers, tally[choice], known, len(labels)) for choice in sorted(tally)]
    by_name = {mix.float_layers: mix for mix in mixes}
    all_int8, all_float = by_name[()], by_name[tuple(layer.name for layer in layers)]
    best = _choose(mixes, all_int8, all_float, max_drop, len(labels))
    return MixedSearch(
        best=best,
        all_int8=all_int8,
        all_float=all_float,
        tried=len(mixes),
        possible=2 ** len(layers),
        images=len(labels),
        unit=unit,
    )


def _try_all(
    chain: Chain, grids: Sequence[Grid], pixels: Pixels, labels: Sequence[int], progress: Progress | None
) -> dict[Choice, list[float]]:
    """Run every mix: ``{choice: [right, same top class, summed squared error]}``."""

    def run(part: slice) -> dict[Choice, tuple[int, int, float]]:
        true = np.asarray(labels[part])
        first = chain.start(pixels[part])
        reference = chain.finish(0, first)
        found = {}
        for choice, logits in _leaves(chain, grids, first, ()):
            if not any(choice):
                logits = reference  # without any INT8 layer there is no pair either
            right = int((logits.argmax(1) == true).sum())
            same = int((logits.argmax(1) == reference.argmax(1)).sum())
            found[choice] = (right, same, squared_error(reference, logits))
        return found

    tally: dict[Choice, list[float]] = {}
    parts = chunks(len(pixels))
    for part, found in zip(parts, map_in_threads(run, parts), strict=True):
        for choice, counts in found.items():
            summed = tally.setdefault(choice, [0, 0, 0.0])
            tally[choice] = [old + new for old, new in zip(summed, counts, strict=True)]
        if progress is not None:
            progress("mixed precision", part.stop, len(pixels))
    return tally


def _leaves(
    chain: Chain, grids: Sequence[Grid], values: Floats, choice: Choice
) -> Iterator[tuple[Choice, Floats]]:
    """Walk the tree of choices, so that mixes with a common beginning share it."""
    index = len(choice)
    last = chain.layers[index].last
    for int8 in (False,) if last else (True, False):
        grid = chain.input_grid(index, grids, int8=int8)
        after = chain.step(index, values, grid, int8=int8)
        if last:
            yield choice, after
        else:
            yield from _leaves(chain, grids, after, (*choice, int8))


def squared_error(reference: Floats, logits: Floats) -> float:
    """Return the summed squared difference of logits, centred: a common shift changes no probability."""
    difference = reference - logits
    difference = difference - difference.mean(axis=1, keepdims=True)
    return float((difference**2).sum())


def _mix(
    choice: Choice, layers: Sequence[Layer], counts: list[float], costs: Mapping[str, LayerCost], images: int
) -> Mix:
    cost = sum(
        costs[layer.name].int8 if int8 else costs[layer.name].rest
        for layer, int8 in zip(layers, choice, strict=True)
    )
    # Where the precision changes between two layers the tensor between them is converted.
    for (_, before), (layer, after) in itertools.pairwise(zip(layers, choice, strict=True)):
        cost += costs[layer.name].change if before != after else 0.0
    return Mix(
        float_layers=tuple(layer.name for layer, int8 in zip(layers, choice, strict=True) if not int8),
        correct=int(counts[0]),
        same_top1=int(counts[1]),
        error=counts[2] / images,
        cost=cost,
    )


def _choose(mixes: Sequence[Mix], all_int8: Mix, all_float: Mix, max_drop: float, images: int) -> Mix:
    allowed = [
        mix
        for mix in mixes
        if mix is not all_float
        and 100 * (all_float.correct - mix.correct) / images <= max_drop
        and mix.correct >= all_int8.correct
        and mix.cost <= all_float.cost
    ]
    if not allowed:
        raise AccuracyGateError(
            f"none of {len(mixes) - 1} mixes of INT8 and float layers loses at most {max_drop:g} points "
            f"(all INT8 loses {100 * (all_float.correct - all_int8.correct) / images:.2f})",
            remedy="allow more with --max-drop, calibrate with another --calib-method, or build with --fp16",
        )
    # On a few hundred images gains hide losses, so what changes at all is held to the budget where that can be.
    most = max(math.floor(max_drop * images / 100), 1, images - max(mix.same_top1 for mix in allowed))
    steady = [mix for mix in allowed if images - mix.same_top1 <= most]
    return min(steady, key=lambda mix: (mix.cost, -mix.same_top1, mix.error, mix.float_layers))
