"""What a layer is predicted to cost in INT8 and in FP16, where its time cannot be measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calibration.layers import find_layers
from engines.errors import ArtefactError
from engines.packages import load

Model = Any  # onnx.ModelProto

# Multiply-adds a cycle of Orin's tensor cores: INT8 twice FP16.
# Source: NVIDIA Jetson AGX Orin Series technical brief, table of dense INT8 and FP16 throughput.
INT8_FACTOR = 0.5
# Depthwise convolutions do not run on tensor cores: INT8 was not faster than FP16 there.
# Source: NVIDIA/TensorRT issues 4529 and 1409.
DEPTHWISE_INT8_FACTOR = 1.0
CHANGE_FACTOR = 1.0  # a converted element counts as a multiply-add


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


def predict_costs(model: Model) -> dict[str, LayerCost]:
    """Predict the cost of every layer from its multiply-adds.

    A multiply-add counts 1 in FP16, 0.5 in INT8, and 1 in INT8 on a depthwise layer; each element of a tensor
    that is converted between two layers counts 1. Launches, memory traffic and fusion are left out: measure where
    you can.

    Raises:
        ArtefactError: The shapes of the graph cannot be inferred.
    """
    onnx = load("onnx")
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
