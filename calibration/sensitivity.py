"""What INT8 does in each layer: at its output, at the logits, in decisions, in time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

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
from calibration.layers import Layer
from calibration.mixed import squared_error
from calibration.table import CalibrationTable
from engines.cpu.ort import KERNEL_TIME, profile_nodes
from engines.errors import BadInputError
from engines.graph import EXPORT_AGAIN, WEIGHTED_OPERATORS, source_layers
from engines.runtimes import Progress

if TYPE_CHECKING:
    from onnx import ModelProto

RUNS = 30  # of one image, for the time of each layer


class LayerSensitivity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happens when one layer alone runs in INT8, or alone does not.

    Attributes:
        name: Name of the layer.
        op: ``Conv``, ``MatMul`` or ``Gemm``.
        depthwise: Whether it is a depthwise convolution, where INT8 seldom pays.
        output_error: Alone in INT8: root mean square error of what the next layer gets (behind bias, ReLU and
            pooling), relative to that tensor's root mean square; in a graph that is no chain, of its own output.
        logit_error: Alone in INT8: mean squared error of the centred logits, summed over the classes.
        flips: Alone in INT8: images whose top class changes.
        logit_error_without: All others in INT8 and this one in float: the same error.
        flips_without: All others in INT8 and this one in float: images whose top class changes.
        time_ms: Its own time for one image by precision, such as ``{"FP32": 0.05, "INT8": 0.09}``, where a
            runtime reports it; empty elsewhere.
    """

    name: str
    op: str
    depthwise: bool
    output_error: float
    logit_error: float
    flips: int
    logit_error_without: float
    flips_without: int
    time_ms: Mapping[str, float]


class Sensitivity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The sensitivity of all layers of a network.

    Attributes:
        images: Images that this was measured on.
        signed: On the signed grid of TensorRT, or the unsigned one of onnxruntime.
        logit_error: All layers in INT8: mean squared error of the centred logits, summed over the classes.
        flips: All layers in INT8: images whose top class changes.
        layers: One entry for each layer that INT8 is meant for, in the order of the graph.
    """

    images: int
    signed: bool
    logit_error: float
    flips: int
    layers: tuple[LayerSensitivity, ...]

    @property
    def worst(self) -> LayerSensitivity:
        """The layer whose return to float would help most."""
        return min(self.layers, key=lambda layer: (layer.logit_error_without, layer.name))

    def harmful(self, count: int) -> tuple[LayerSensitivity, ...]:
        """Return the layers that do most to the logits alone in INT8, at most ``count``, in the order of the graph."""
        most = sorted(self.layers, key=lambda layer: -layer.logit_error)[:count]
        return tuple(layer for layer in self.layers if layer in most)


def measure_sensitivity(
    model: ModelProto,
    table: CalibrationTable,
    pixels: Pixels,
    *,
    signed: bool,
    times: Mapping[str, Mapping[str, float]] | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Run each layer alone in INT8, and each alone in float, and compare with the float network.

    Args:
        model: The deployed FP32 graph.
        table: Its calibration table.
        pixels: ``uint8 [N, height, width, 1]``.
        signed: Which kind of INT8 graph.
        times: For each layer, its time by precision in ms, where a runtime reports it.
        progress: Called with (phase, images done, images in all), or with layers where the graph is no chain.

    Raises:
        BadInputError: No images.
    """
    if len(pixels) == 0:
        raise BadInputError("no images to measure sensitivity on", remedy="give a folder of real X-rays")
    if runs_in_pieces(model):
        layers, tallies, whole = _measure_chain(
            *quantized_chain(model, table, signed=signed), pixels, progress
        )
    else:
        layers, tallies, whole = _measure_graph(MixedGraph(model, table, signed=signed), pixels, progress)
    found = tuple(
        LayerSensitivity(
            name=layer.name,
            op=layer.op,
            depthwise=layer.depthwise,
            output_error=(tally.output / tally.power) ** 0.5 if tally.power else 0.0,
            logit_error=tally.alone / len(pixels),
            flips=tally.flips,
            logit_error_without=tally.without / len(pixels),
            flips_without=tally.flips_without,
            time_ms=(times or {}).get(layer.name, {}),
        )
        for layer, tally in zip(layers, tallies, strict=True)
    )
    return Sensitivity(
        layers=found,
        logit_error=whole.alone / len(pixels),
        flips=whole.flips,
        images=len(pixels),
        signed=signed,
    )


@dataclass
class _Tally:
    """What is summed up of one layer; of all of them together only ``alone`` and ``flips``."""

    output: float = 0.0
    power: float = 0.0
    alone: float = 0.0
    flips: int = 0
    without: float = 0.0
    flips_without: int = 0

    def add(self, other: _Tally) -> None:
        self.output += other.output
        self.power += other.power
        self.alone += other.alone
        self.flips += other.flips
        self.without += other.without
        self.flips_without += other.flips_without


_Measured = tuple[
    tuple[Layer, ...], list[_Tally], _Tally
]  # each layer with its tally, and that of all together


def _measure_chain(
    chain: Chain, grids: Sequence[Grid], pixels: Pixels, progress: Progress | None
) -> _Measured:
    """Take all layers of a few images at a time, so that what they have in common is computed once."""
    layers = tuple(chain.layers[:-1])
    tallies = [_Tally() for _ in layers]
    whole = _Tally()
    parts = chunks(len(pixels))
    measured = map_in_threads(lambda part: _measure_chunk(chain, grids, pixels[part]), parts)
    for part, (each, together) in zip(parts, measured, strict=True):
        for tally, found in zip(tallies, each, strict=True):
            tally.add(found)
        whole.add(together)
        if progress is not None:
            progress("sensitivity", part.stop, len(pixels))
    return layers, tallies, whole


def _measure_graph(graph: MixedGraph, pixels: Pixels, progress: Progress | None) -> _Measured:
    """Take all images of one layer at a time."""
    reference = graph.logits(pixels, graph.names)
    together = graph.logits(pixels)
    tallies = []
    for place, name in enumerate(graph.names, start=1):
        alone = graph.alone(pixels, name)
        rest = graph.logits(pixels, (name,))
        tallies.append(
            _Tally(
                output=alone.error,
                power=alone.power,
                alone=squared_error(reference, alone.logits),
                flips=_changed(reference, alone.logits),
                without=squared_error(reference, rest),
                flips_without=_changed(reference, rest),
            )
        )
        if progress is not None:
            progress("sensitivity", place, len(graph.names))
    whole = _Tally(alone=squared_error(reference, together), flips=_changed(reference, together))
    return graph.layers, tallies, whole


def _measure_chunk(chain: Chain, grids: Sequence[Grid], pixels: Pixels) -> tuple[list[_Tally], _Tally]:
    """Return the tally of each layer, and that of all of them in INT8."""
    last = len(chain.layers) - 1
    floats = [chain.start(pixels)]
    for index in range(last + 1):
        floats.append(chain.step(index, floats[-1], None, int8=False))
    reference = floats[-1]
    rounded = floats[0]
    tallies = []
    for index in range(last):
        alone = chain.step(index, floats[index], grids[index], int8=True)
        expected = floats[index + 1]
        logits = chain.finish(index + 1, alone)
        grid = chain.input_grid(index, grids, int8=False)
        rest = _finish_int8(chain, grids, index + 1, chain.step(index, rounded, grid, int8=False))
        tallies.append(
            _Tally(
                output=float(np.square(alone - expected, dtype=np.float64).sum()),
                power=float(np.square(expected, dtype=np.float64).sum()),
                alone=squared_error(reference, logits),
                flips=_changed(reference, logits),
                without=squared_error(reference, rest),
                flips_without=_changed(reference, rest),
            )
        )
        rounded = chain.step(index, rounded, grids[index], int8=True)
    logits = _finish_int8(chain, grids, last, rounded)
    whole = _Tally(alone=squared_error(reference, logits), flips=_changed(reference, logits))
    return tallies, whole


def _finish_int8(chain: Chain, grids: Sequence[Grid], index: int, values: Floats) -> Floats:
    for place in range(index, len(chain.layers)):
        int8 = not chain.layers[place].last
        values = chain.step(place, values, chain.input_grid(place, grids, int8=int8), int8=int8)
    return values


def _changed(reference: Floats, logits: Floats) -> int:
    return int((reference.argmax(axis=1) != logits.argmax(axis=1)).sum())


def time_layers(model: ModelProto, layers: Sequence[str], pixels: Pixels) -> dict[str, float]:
    """Return the median time of each layer for one image on one thread, ms.

    A layer's time holds what was fused into it, and not what stays beside it.

    Args:
        model: A graph in FP32, or unsigned INT8.
        layers: Names of all its layers with weights, in order.
        pixels: ``uint8 [N, height, width, 1]``; its first image is run :data:`RUNS` times.

    Returns:
        ``{layer: ms}``; empty where ONNX Runtime fused layers with one another, so that they cannot be told apart.

    Raises:
        ArtefactError: ONNX Runtime cannot run the graph.
        EnvironmentProblem: ``onnxruntime``, memory or a place for the profile is missing.
    """
    events = profile_nodes(
        model.SerializeToString(),
        {model.graph.input[0].name: pixels[:1]},
        runs=RUNS,
        source=f"the graph {model.graph.name}",
        remedy=EXPORT_AGAIN,
    )
    kernels = [event for event in events if event["args"].get("op_name") in WEIGHTED_OPERATORS]
    called = [str(event["name"]).removesuffix(KERNEL_TIME) for event in kernels]
    seen: dict[str, list[float]] = {}
    for owner, event in zip(source_layers(called, layers, model), kernels, strict=True):
        if owner is not None:
            seen.setdefault(owner, []).append(event["dur"] / 1000)
    if {name: len(times) for name, times in seen.items()} != dict.fromkeys(layers, RUNS):
        return {}
    return {name: statistics.median(seen[name]) for name in layers}
