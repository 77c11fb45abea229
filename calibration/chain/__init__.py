"""A deployed graph cut at the inputs of its layers, so that any mix of INT8 and float layers runs piece by piece.

What a Q/DQ graph computes is imitated: the input of a layer is rounded to its grid by ONNX Runtime's own
QuantizeLinear and DequantizeLinear, and its weights are rounded once. Pieces that two mixes have in common are
computed once, which makes all 256 mixes of eight layers cost about as much as ten runs of the whole network.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from calibration.layers import Layer, find_layers, is_chain
from calibration.qdq import activation_ranges, correct_layer, prepare
from calibration.rewrites import Bounds
from calibration.table import CalibrationTable, Correction
from engines import images
from engines.cpu.ort import SILENT
from engines.errors import ArtefactError
from engines.graph import count_multiply_adds
from engines.packages import load

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK = 16  # images; what one run holds of the depthwise network's tensors is about 70 MB
MOST_THREADS = 8  # each holds a chunk
# Layers times multiply-adds of one image. A search runs what follows each layer for every candidate: seconds for the
# paper's networks (1e9), hours for VGG19 at 224x224 (4e11).
MOST_WORK = 2e10
_EXPORT_AGAIN = "export it again: edge-dsc export RUN"


def chunks(count: int, size: int = CHUNK) -> list[slice]:
    """Return the slices that cut ``count`` images into pieces of ``size``, the last one of what is left."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Call a function with each item in threads, one for each usable processor, and yield the results in order.

    At most :data:`MOST_THREADS` run, and two results for each of them wait for the caller.
    """
    threads = min(images.usable_processors(), MOST_THREADS)
    return images.map_in_threads(function, items, threads=threads, ahead=2)


def runs_in_pieces(model: ModelProto) -> bool:
    """Whether a graph is a chain, and small enough to be searched layer by layer.

    All others are run as a whole: :mod:`calibration.branched`.
    """
    return is_chain(model) and len(find_layers(model)) * count_multiply_adds(model) <= MOST_WORK


@dataclass(frozen=True)
class Grid:
    """The integers that stand for a tensor's values.

    Attributes:
        scale: Step between two of them, float32, in the tensor's own unit.
        zero_point: The integer that stands for zero; 0 on a signed grid.
        signed: int8, or uint8.
    """

    scale: float
    zero_point: int
    signed: bool


def grid_of(bounds: Bounds, *, signed: bool) -> Grid:
    """Return the grid that onnxruntime's quantiser makes of a range; the range is widened to hold zero.

    Source: onnxruntime.quantization.quant_utils, ``compute_scale_zp``: symmetric int8 spans -127..127,
    asymmetric uint8 0..255.
    """
    low, high = (np.float32(value) for value in bounds)
    low, high = min(low, np.float32(0)), max(high, np.float32(0))
    if signed:
        largest = max(-low, high)
        return Grid(float(np.float32((largest + largest) / np.float32(254))), 0, True)
    scale = np.float32((high - low) / np.float32(255))
    return Grid(float(scale), int(np.rint(-low / scale)), False)


class Chain:
    """The pieces of a graph: from the image to the first layer, from each layer to the next, and the last one.

    A piece runs on one thread, and threads may share a chain: chunks of images that run side by side keep the
    processors busier than one convolution that is split between them, and give the same numbers.

    Attributes:
        layers: All layers with weights, in order; the last one gives the logits.
        signed: Which kind of graph is imitated: signed for TensorRT, unsigned for onnxruntime.
    """

    def __init__(
        self,
        model: ModelProto,
        *,
        signed: bool,
        weight_bits: int = 8,
        corrections: Mapping[str, Correction] | None = None,
    ) -> None:
        """Cut a graph.

        Args:
            model: The graph as :func:`calibration.qdq.prepare` gives it.
            signed: Which kind of INT8 graph.
            weight_bits: As in :func:`calibration.qdq.quantize`.
            corrections: Of the layers that run in INT8, by name; only a signed graph has them.

        Raises:
            ArtefactError: A layer's input depends on more than the layer before it.
        """
        self.layers = find_layers(model)
        self.signed = signed
        self._weight_bits = weight_bits
        self._input = model.graph.input[0].name
        self._cuts = [layer.input for layer in self.layers] + [logits_tensor(model)]
        sources = [self._input, *self._cuts[:-1]]
        self._graphs = [
            _cut(model, source, target) for source, target in zip(sources, self._cuts, strict=True)
        ]
        self._corrections = dict(corrections or {}) if signed else {}
        self._opened: dict[tuple[int, bool, bool], Any] = {}
        self._opening = threading.Lock()

    def correct(self, layer: str, correction: Correction) -> None:
        """Set the correction of a layer that has not yet run in INT8."""
        self._corrections[layer] = correction

    def start(self, pixels: Pixels) -> Floats:
        """Return the first layer's input for ``uint8 [N, height, width, 1]``."""
        found: Floats = self._piece(-1, int8=False, pair=False).run(None, {self._input: pixels})[0]
        return found

    def step(self, index: int, values: Floats, grid: Grid | None, *, int8: bool) -> Floats:
        """Run one layer and what follows it up to the next layer's input; the last one gives the logits.

        Args:
            index: Which layer.
            values: Its input, float32.
            grid: What its input is rounded to; None leaves it as it is.
            int8: Whether its weights are rounded; the last layer's never are.
        """
        feeds: dict[str, NDArray[Any]] = {self._cuts[index]: values}
        if grid is not None:
            feeds["edge.scale"] = np.array(grid.scale, np.float32)
            feeds["edge.zero"] = np.array(grid.zero_point, np.int8 if grid.signed else np.uint8)
        found: Floats = self._piece(index, int8=int8, pair=grid is not None).run(None, feeds)[0]
        return found

    def finish(self, index: int, values: Floats) -> Floats:
        """Run the layers from ``index`` on in float, from that layer's input to the logits."""
        for place in range(index, len(self.layers)):
            values = self.step(place, values, None, int8=False)
        return values

    def run(self, pixels: Pixels, grids: Sequence[Grid], float_layers: Sequence[str] = ()) -> Floats:
        """Return the logits of the INT8 graph in which ``float_layers`` stay in floating point.

        Args:
            pixels: ``uint8 [N, height, width, 1]``.
            grids: One for every layer's input, the last one's among them.
            float_layers: As in :func:`calibration.qdq.quantize`.

        Returns:
            ``float32 [N, classes]``.
        """
        values = self.start(pixels)
        for index, layer in enumerate(self.layers):
            int8 = not layer.last and layer.name not in float_layers
            values = self.step(index, values, self.input_grid(index, grids, int8=int8), int8=int8)
        return values

    def input_grid(self, index: int, grids: Sequence[Grid], *, int8: bool) -> Grid | None:
        """Return what a layer's input is rounded to: an unsigned graph has a pair before float layers, too."""
        return grids[index] if int8 or not self.signed else None

    def _piece(self, index: int, *, int8: bool, pair: bool) -> Any:
        """Return the session of one layer, opened when it is first needed; -1 is what lies before the first."""
        key = (index, int8, pair)
        with self._opening:
            if key not in self._opened:
                self._opened[key] = open_graph(self._graph(index, int8=int8, pair=pair))
            return self._opened[key]

    def _graph(self, index: int, *, int8: bool, pair: bool) -> ModelProto:
        graph = onnx.ModelProto()
        graph.CopyFrom(self._graphs[index + 1])
        layer = self.layers[index]
        correction = self._corrections.get(layer.name) if int8 else None
        learnt = correct_layer(graph, layer, correction)
        for tensor in graph.graph.initializer if int8 and not learnt else ():
            if tensor.name == layer.weight:
                rounded = round_weight(tensor, layer.axis, layer.bits(self._weight_bits))
                tensor.CopyFrom(onnx.numpy_helper.from_array(rounded, tensor.name))
        if pair:
            _add_pair(graph, self._cuts[index], layer, signed=self.signed)
        return graph


def quantized_chain(
    model: ModelProto, table: CalibrationTable, *, signed: bool, weight_bits: int = 8
) -> tuple[Chain, list[Grid]]:
    """Cut the graph that a table's INT8 graph is made of; give each layer's input its grid.

    Args:
        model: The deployed FP32 graph.
        table: Its calibration table.
        signed: Which kind of INT8 graph.
        weight_bits: As in :func:`calibration.qdq.quantize`.

    Raises:
        ArtefactError: The graph is no chain of layers, or the table is of another one.
    """
    prepared = prepare(model, table)
    chain = Chain(prepared, signed=signed, weight_bits=weight_bits, corrections=table.corrections)
    ranges = activation_ranges(prepared, table, signed=signed)
    return chain, [grid_of(ranges[layer.input], signed=signed) for layer in chain.layers]


def logits_tensor(model: ModelProto) -> str:
    """Name the tensor that softmax takes, or the output where there is no softmax."""
    last = model.graph.node[-1]
    return str(last.input[0] if last.op_type == "Softmax" else model.graph.output[0].name)


def _cut(model: ModelProto, source: str, target: str) -> ModelProto:
    """Return the part of a graph that computes ``target`` from ``source`` alone."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    needed: set[str] = set()
    waiting = [target]
    while waiting:
        name = waiting.pop()
        if name == source or name in stored or name in needed or not name:
            continue
        if name not in producers:
            raise ArtefactError(
                f"{model.graph.name!r} is no chain of layers: {target} needs more than {source}",
                remedy=_EXPORT_AGAIN,
            )
        needed.add(name)
        waiting += producers[name].input
    nodes = [node for node in model.graph.node if needed & set(node.output)]
    used = {name for node in nodes for name in node.input}
    kind = onnx.TensorProto.UINT8 if source == model.graph.input[0].name else onnx.TensorProto.FLOAT
    if not nodes:
        nodes = [onnx.helper.make_node("Identity", [source], [target])]
    graph = onnx.helper.make_graph(
        nodes,
        "piece",
        [onnx.helper.make_tensor_value_info(source, kind, None)],
        [onnx.helper.make_tensor_value_info(target, onnx.TensorProto.FLOAT, None)],
        [stored[name] for name in sorted(used & set(stored))],
    )
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _add_pair(graph: ModelProto, source: str, layer: Layer, *, signed: bool) -> None:
    """Put QuantizeLinear and DequantizeLinear before the layer; scale and zero point come with each run."""
    types = onnx.TensorProto
    names = ["edge.scale", "edge.zero"]
    for name, kind in zip(names, (types.FLOAT, types.INT8 if signed else types.UINT8), strict=True):
        graph.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, []))
    for node in graph.graph.node:
        if node.name == layer.name:
            node.input[0] = "edge.rounded"
    graph.graph.node.insert(0, onnx.helper.make_node("QuantizeLinear", [source, *names], ["edge.integers"]))
    graph.graph.node.insert(
        1, onnx.helper.make_node("DequantizeLinear", ["edge.integers", *names], ["edge.rounded"])
    )


def round_weight(tensor: TensorProto, output_axis: int, bits: int = 8) -> Floats:
    """Return a layer's weight on its int8 grid, symmetric and one scale per output channel.

    Source: onnxruntime.quantization.quant_utils: symmetric int8 spans -127..127, its reduced range -64..64.
    """
    most = {8: 127, 7: 64}[bits]
    weight = onnx.numpy_helper.to_array(tensor)
    others = tuple(axis for axis in range(weight.ndim) if axis != output_axis)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    scale = ((largest + largest) / np.float32(2 * most)).astype(np.float32)
    scale = np.where(scale > 0, scale, np.float32(1))
    rounded: Floats = (np.rint(weight / scale).clip(-most, most) * scale).astype(np.float32)
    return rounded


def open_graph(graph: ModelProto) -> Any:
    """Open a graph on one thread of the CPU."""
    ort = load("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = SILENT
    options.intra_op_num_threads = 1
    return ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
