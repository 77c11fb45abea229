"""Mixed precision: the cheapest mix of INT8 and float layers that keeps the accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx

from calibration.branched import MixedGraph
from calibration.chain import (
    Chain,
    Floats,
    Grid,
    Pixels,
    chunks,
    map_in_threads,
    quantized_chain,
    runs_in_pieces,
)
from calibration.layers import Layer, find_layers, followers, quantizable_layers
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
MOST_MIXES = 256  # all of so many are tried; of more, chosen ones
MOST_TRIES = 48  # of chosen mixes
ORDERING_IMAGES = 32  # that put layers in the order in which they are left in float


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
        possible = self.possible if self.possible <= 10**6 else f"2^{self.possible.bit_length() - 1}"
        return (
            f"mixed precision: {self.tried} of {possible} mixes tried on {self.images} images; "
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
    weight_bits: int = 8,
    max_drop: float,
    costs: Mapping[str, LayerCost] | None = None,
    progress: Progress | None = None,
) -> MixedSearch:
    """Find the mix of INT8 and float layers that keeps the accuracy at the least predicted cost.

    Up to :data:`MOST_MIXES` all mixes of a chain are run on all images. Of others at most :data:`MOST_TRIES` are: the
    layers are put in the order of what each alone does to the logits in INT8, worst first. As few from the worst on as
    keep the budget are left in float, found by doubling and halving; then each is tried in INT8 again, from the least
    harmful on.

    Of the mixes that were run allowed are those that lose at most ``max_drop`` points, answer no fewer
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
        weight_bits: As in :func:`calibration.qdq.quantize`.
        max_drop: Points of accuracy that may be lost against floating point.
        costs: Cost of each layer; None predicts them: :func:`predict_costs`.
        progress: Called with (phase, images done, images in all).

    Raises:
        UsageError: No layer is meant for INT8, or a negative budget.
        BadInputError: No images.
        AccuracyGateError: No mix with at least one INT8 layer keeps the budget.
    """
    if max_drop < 0:
        raise UsageError(f"an accuracy budget of {max_drop} points", remedy="give 0 or more points")
    if len(labels) == 0 or len(labels) != len(pixels):
        raise BadInputError(
            f"{len(pixels)} images with {len(labels)} labels to search on", remedy="give labelled images"
        )
    layers = quantizable_layers(model)
    if not layers:
        raise UsageError("no layer of this network is meant for INT8", remedy="build with --fp16 or --fp32")
    unit = "measured" if costs else "weighted multiply-adds"
    known = costs or predict_costs(model)
    scales = _Scales(layers, known, followers(model, layers), len(labels), max_drop)
    if runs_in_pieces(model) and 2 ** len(layers) <= MOST_MIXES:
        chain, grids = quantized_chain(model, table, signed=signed, weight_bits=weight_bits)
        tally = _try_all(chain, grids, pixels, labels, progress)
    else:
        graph = MixedGraph(model, table, signed=signed, weight_bits=weight_bits)
        tally = _GreedySearch(graph, pixels, labels, scales, progress).run()
    mixes = [scales.weigh(choice, tally[choice]) for choice in sorted(tally)]
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


class _GreedySearch:
    """Mixes of a network that has too many of them, each chosen by what the ones before it gave."""

    def __init__(
        self,
        graph: MixedGraph,
        pixels: Pixels,
        labels: Sequence[int],
        scales: _Scales,
        progress: Progress | None,
    ) -> None:
        self._graph, self._pixels, self._labels = graph, pixels, np.asarray(labels)
        self._scales, self._progress = scales, progress
        self._reference = graph.logits(pixels, graph.names)
        right = int((self._reference.argmax(1) == self._labels).sum())
        nothing = tuple(False for _ in graph.names)
        self._tally: dict[Choice, list[float]] = {nothing: [right, len(pixels), 0.0]}

    def run(self) -> dict[Choice, list[float]]:
        """Return what each mix that was tried gave: ``{choice: [right, same top class, summed squared error]}``."""
        if not self._keeps(()):
            order = self._order()
            self._give_back(order[: self._fewest(order)])
        return self._tally

    def _order(self) -> list[str]:
        """Return the layers by what each alone does to the logits, worst first."""
        few = self._pixels[:: max(1, len(self._pixels) // ORDERING_IMAGES)][:ORDERING_IMAGES]
        reference = self._graph.logits(few, self._graph.names)
        errors = {}
        for done, name in enumerate(self._graph.names, start=1):
            errors[name] = squared_error(reference, self._graph.alone(few, name).logits)
            if self._progress is not None:
                self._progress("sensitivity", done, len(self._graph.names))
        return sorted(errors, key=lambda name: -errors[name])

    def _fewest(self, order: Sequence[str]) -> int:
        """Return how many of the worst layers must stay in float; all but one where no number that was tried keeps."""
        most = len(order) - 1
        failing, keeping = 0, 1
        while keeping < most and not self._keeps(order[:keeping]):
            failing, keeping = keeping, min(2 * keeping, most)
        while keeping - failing > 1:
            middle = (failing + keeping) // 2
            if self._keeps(order[:middle]):
                keeping = middle
            else:
                failing = middle
        return keeping

    def _give_back(self, floating: Sequence[str]) -> None:
        """Try each layer in INT8 again, the least harmful first, as long as tries are left."""
        kept = list(floating)
        for name in reversed(floating):
            if len(self._tally) >= MOST_TRIES:
                return
            fewer = [other for other in kept if other != name]
            if self._keeps(fewer):
                kept = fewer

    def _keeps(self, floating: Sequence[str]) -> bool:
        """Whether a mix loses no more than allowed, and changes no more answers; it is run unless it was before."""
        choice = tuple(name not in floating for name in self._graph.names)
        if choice not in self._tally:
            logits = self._graph.logits(self._pixels, floating)
            right = int((logits.argmax(1) == self._labels).sum())
            same = int((logits.argmax(1) == self._reference.argmax(1)).sum())
            self._tally[choice] = [right, same, squared_error(self._reference, logits)]
            if self._progress is not None:
                self._progress("mixed precision", len(self._tally), MOST_TRIES)
        return self._scales.keeps(choice, self._tally)


@dataclass(frozen=True)
class _Scales:
    """What mixes are weighed by.

    Attributes:
        layers: The layers that each mix is about.
        costs: The cost of each.
        changes: Places of layers that follow one another: where their precisions differ a tensor is converted.
        images: How many images each mix was run on.
        max_drop: Points of accuracy that may be lost.
    """

    layers: Sequence[Layer]
    costs: Mapping[str, LayerCost]
    changes: Sequence[tuple[int, int]]
    images: int
    max_drop: float

    def weigh(self, choice: Choice, counts: Sequence[float]) -> Mix:
        """Join what a mix gave with what it costs."""
        cost = sum(
            self.costs[layer.name].int8 if int8 else self.costs[layer.name].rest
            for layer, int8 in zip(self.layers, choice, strict=True)
        )
        # Where the precision changes between two layers the tensor between them is converted, once for all its takers.
        differ = [self.layers[after] for before, after in self.changes if choice[before] != choice[after]]
        converted = {layer.input: layer.name for layer in differ}
        cost += sum(self.costs[name].change for name in converted.values())
        return Mix(
            float_layers=tuple(
                layer.name for layer, int8 in zip(self.layers, choice, strict=True) if not int8
            ),
            correct=int(counts[0]),
            same_top1=int(counts[1]),
            error=counts[2] / self.images,
            cost=cost,
        )

    def keeps(self, choice: Choice, tally: Mapping[Choice, Sequence[float]]) -> bool:
        """Whether a mix may be chosen: within the budget, no worse than all-INT8, no dearer than all-float.

        Args:
            choice: A mix in ``tally``.
            tally: What the mixes gave, all-INT8 and all-float among them.
        """
        everything, nothing = (tuple(value for _ in choice) for value in (True, False))
        mix, whole, plain = (self.weigh(each, tally[each]) for each in (choice, everything, nothing))
        return (
            100 * (plain.correct - mix.correct) / self.images <= self.max_drop
            and mix.correct >= whole.correct
            and mix.cost <= plain.cost
            and self.images - mix.same_top1 <= most_changes(self.max_drop, self.images)
        )


def most_changes(max_drop: float, images: int) -> int:
    """Return how many answers a mix may change: the budget's share of all of them, at least one."""
    return max(math.floor(max_drop * images / 100), 1)


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
    most = max(most_changes(max_drop, images), images - max(mix.same_top1 for mix in allowed))
    steady = [mix for mix in allowed if images - mix.same_top1 <= most]
    return min(steady, key=lambda mix: (mix.cost, -mix.same_top1, mix.error, mix.float_layers))
