"""A deployed graph of any shape with any mix of INT8 and float layers, run as a whole.

A chain is cut at its layers, and mixes with a common beginning share it (:mod:`calibration.chain`). Where branches meet
again there is no such cut: here each mix is one graph, opened for as long as it runs. Its roundings are the same:
activations by ONNX Runtime's own QuantizeLinear and DequantizeLinear, weights once, before it is opened.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from calibration.chain import (
    Floats,
    Grid,
    Pixels,
    chunks,
    grid_of,
    logits_tensor,
    map_in_threads,
    open_graph,
    round_weight,
)
from calibration.layers import find_layers, paired_tensors, quantizable_layers
from calibration.qdq import activation_ranges, prepare
from calibration.table import CalibrationTable

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

CHUNK = 8  # images of one run: 8 of DenseNet121 at 224x224 hold about 200 MB at a time
_ERROR, _POWER = "edge.error", "edge.power"


@dataclass(frozen=True)
class LayerAlone:
    """What one layer does when it alone runs in INT8.

    Attributes:
        logits: ``float32 [N, classes]``.
        error: Summed squared difference of its own output from that in float.
        power: Summed square of that output in float.
    """

    logits: Floats
    error: float
    power: float


class MixedGraph:
    """A graph whose layers run in INT8 or in float, as each call says.

    Attributes:
        layers: The layers that INT8 is meant for, in the order of the graph.
        signed: Which kind of graph is imitated: signed for TensorRT, unsigned for onnxruntime.
    """

    def __init__(
        self, model: ModelProto, table: CalibrationTable, *, signed: bool, weight_bits: int = 8
    ) -> None:
        """Round every weight once, and find the grid of every tensor that may get a pair.

        Args:
            model: The deployed FP32 graph.
            table: Its calibration table.
            signed: Which kind of INT8 graph.
            weight_bits: As in :func:`calibration.qdq.quantize`.

        Raises:
            ArtefactError: The table is of another graph.
        """
        self._model = prepare(model, table)
        self.layers = quantizable_layers(self._model)
        self.signed = signed
        pairs = paired_tensors(self._model, self.layers, signed=signed)
        ranges = activation_ranges(self._model, table, signed=signed, pairs=pairs)
        self._grids = {name: grid_of(bounds, signed=signed) for name, bounds in ranges.items()}
        stored = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self._rounded = {
            layer.name: numpy_helper.from_array(
                round_weight(stored[layer.weight], layer.axis, layer.bits(weight_bits)),
                f"{layer.name}.rounded_weight",
            )
            for layer in self.layers
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layers."""
        return tuple(layer.name for layer in self.layers)

    def logits(self, pixels: Pixels, float_layers: Collection[str] = ()) -> Floats:
        """Return the logits of the graph in which ``float_layers`` stay in floating point.

        Args:
            pixels: ``uint8 [N, height, width, channels]``.
            float_layers: As in :func:`calibration.qdq.quantize`; with all of them nothing is rounded.

        Returns:
            ``float32 [N, classes]``.
        """
        return np.concatenate([found[0] for found in _run(self.graph(float_layers), pixels)])

    def graph(self, float_layers: Collection[str] = ()) -> ModelProto:
        """Return the graph that :meth:`logits` runs: what a Q/DQ graph computes, its weights rounded already."""
        return self._graph([name for name in self.names if name not in float_layers])

    def alone(self, pixels: Pixels, layer: str) -> LayerAlone:
        """Run one layer in INT8 and all others in float.

        Args:
            pixels: ``uint8 [N, height, width, channels]``.
            layer: Its name.
        """
        found = _run(self._graph([layer], watched=layer), pixels)
        return LayerAlone(
            logits=np.concatenate([each[0] for each in found]),
            error=sum(float(each[1]) for each in found),
            power=sum(float(each[2]) for each in found),
        )

    def _graph(self, integer: Collection[str], watched: str | None = None) -> ModelProto:
        """Return the graph with pairs around ``integer`` layers; the error of a watched one is another output."""
        layers = {layer.name: layer for layer in find_layers(self._model)}
        chosen = [layers[name] for name in integer]
        pairs = paired_tensors(self._model, chosen, signed=self.signed) if chosen else ()
        stored: list[TensorProto] = [*self._model.graph.initializer, *map(self._rounded.__getitem__, integer)]
        outputs = [logits_tensor(self._model)]
        nodes: list[NodeProto] = []
        renamed: dict[str, str] = {}
        for node in self._model.graph.node:
            made = onnx.NodeProto()
            made.CopyFrom(node)
            made.input[:] = [renamed.get(name, name) for name in node.input]
            if node.name in integer:
                made.input[1] = f"{node.name}.rounded_weight"
            nodes.append(made)
            if node.name == watched:
                nodes += _watch(node)
                outputs += [_ERROR, _POWER]
            for name in set(node.output) & set(pairs):
                renamed[name] = f"{name}.rounded"
                stored += _grid_constants(name, self._grids[name])
                nodes += _pair(name)
        outputs[0] = renamed.get(outputs[0], outputs[0])
        used = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes,
            self._model.graph.name,
            list(self._model.graph.input),
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
            [tensor for tensor in stored if tensor.name in used],
        )
        return helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
        )


def _run(graph: ModelProto, pixels: Pixels) -> list[list[Any]]:
    """Return the outputs of a graph for each chunk of images."""
    session = open_graph(graph)
    name = graph.graph.input[0].name
    return list(
        map_in_threads(lambda part: session.run(None, {name: pixels[part]}), chunks(len(pixels), CHUNK))
    )


def _grid_constants(tensor: str, grid: Grid) -> list[TensorProto]:
    kind = np.int8 if grid.signed else np.uint8
    return [
        numpy_helper.from_array(np.array(grid.scale, np.float32), f"{tensor}.scale"),
        numpy_helper.from_array(np.array(grid.zero_point, kind), f"{tensor}.zero"),
    ]


def _pair(tensor: str) -> list[NodeProto]:
    grid = [f"{tensor}.scale", f"{tensor}.zero"]
    return [
        helper.make_node("QuantizeLinear", [tensor, *grid], [f"{tensor}.integers"]),
        helper.make_node("DequantizeLinear", [f"{tensor}.integers", *grid], [f"{tensor}.rounded"]),
    ]


def _watch(node: NodeProto) -> list[NodeProto]:
    """Compute a layer in float beside itself, and what rounding it makes of its output."""
    plain = onnx.NodeProto()
    plain.CopyFrom(node)
    plain.name, plain.output[0] = f"{node.name}.float", f"{node.output[0]}.float"
    difference = f"{node.output[0]}.difference"
    return [
        plain,
        helper.make_node("Sub", [node.output[0], plain.output[0]], [difference]),
        helper.make_node("ReduceSumSquare", [difference], [_ERROR], keepdims=0),
        helper.make_node("ReduceSumSquare", [plain.output[0]], [_POWER], keepdims=0),
    ]
