"""Which layers of a deployed graph can run in INT8, and which tensors need a range for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.errors import ArtefactError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

WEIGHTED_OPS = ("Conv", "MatMul", "Gemm")
# Ops that hand values on unchanged: a raw pixel stays a raw pixel behind them.
# Add and Pad of constants are how calibration.rewrites shifts them.
_VALUE_KEEPING = ("Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Add", "Pad")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer with weights.

    Attributes:
        name: Name of its node.
        op: ``Conv``, ``MatMul`` or ``Gemm``.
        input: The activation tensor it takes; the one that gets a range.
        weight: Its weight, an initializer.
        shape: The weight's shape.
        axis: The weight's axis of output channels.
        depthwise: A grouped convolution.
        raw_pixels: Whether its input is the image's pixels, 0..255.
        last: The last one in the graph: the logits, which stay in floating point.
    """

    name: str
    op: str
    input: str
    weight: str
    shape: tuple[int, ...]
    axis: int
    depthwise: bool
    raw_pixels: bool
    last: bool


def find_layers(model: ModelProto) -> tuple[Layer, ...]:
    """List a graph's layers with weights, in the order of the graph.

    Raises:
        ArtefactError: A layer has no name of its own, or the graph has none.
    """
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    nodes = [node for node in model.graph.node if node.op_type in WEIGHTED_OPS and node.input[1] in weights]
    if not nodes or len({node.name for node in nodes} - {""}) != len(nodes):
        raise ArtefactError(
            f"{model.graph.name!r} has {len(nodes)} layers with weights, not all with a name of their own",
            remedy="export it again: edge-dsc export RUN",
        )
    return tuple(
        Layer(
            name=node.name,
            op=node.op_type,
            input=node.input[0],
            weight=node.input[1],
            shape=weights[node.input[1]],
            axis=_output_axis(node),
            depthwise=_attribute(node, "group", 1) > 1,
            raw_pixels=_is_raw(node.input[0], producers),
            last=node is nodes[-1],
        )
        for node in nodes
    )


def quantizable_layers(model: ModelProto) -> tuple[Layer, ...]:
    """List the layers that INT8 is meant for: all but the last, whose outputs are the logits."""
    return tuple(layer for layer in find_layers(model) if not layer.last)


def tensors_to_calibrate(model: ModelProto) -> tuple[str, ...]:
    """List the tensors that need a range: the input of every layer with weights, sorted.

    The last layer's input is among them: a runtime that fuses ``Dense + ReLU + Quantize`` wants its range.
    """
    return tuple(sorted({layer.input for layer in find_layers(model)}))


def raw_pixel_tensors(model: ModelProto) -> frozenset[str]:
    """Name the tensors that hold the image's pixels 0..255: their range is known, not calibrated."""
    return frozenset(layer.input for layer in find_layers(model) if layer.raw_pixels)


def unclipped_tensors(model: ModelProto) -> frozenset[str]:
    """Name the tensors whose range is never cut: the pixels, and the input of the last layer.

    The last layer runs in floating point; values cut off at its input would move the logits and gain nothing.
    It also has the fewest values: on a trained network onnxruntime's entropy threshold for it fell to 3 % of
    the largest value, and accuracy by 10 points.
    """
    return raw_pixel_tensors(model) | {layer.input for layer in find_layers(model) if layer.last}


def _is_raw(tensor: str, producers: dict[str, NodeProto]) -> bool:
    while tensor in producers and producers[tensor].op_type in _VALUE_KEEPING:
        tensor = producers[tensor].input[0]
    return tensor not in producers


def _output_axis(node: NodeProto) -> int:
    if node.op_type == "Conv":
        return 0
    return 0 if _attribute(node, "transB", 0) else 1


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)
