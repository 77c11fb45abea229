"""What the doubled parser sees in an ONNX graph: tensors, layers with weights, and their element types."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import onnx
from onnx import TensorProto

_LAYERS = {
    "Conv": "CONVOLUTION",
    "MatMul": "MATRIX_MULTIPLY",
    "Gemm": "MATRIX_MULTIPLY",
    "DequantizeLinear": "DEQUANTIZE",
    "QuantizeLinear": "QUANTIZE",
}
_TYPES = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.UINT8: "UINT8",
    TensorProto.INT8: "INT8",
    TensorProto.INT64: "INT64",
    TensorProto.INT32: "INT32",
    TensorProto.BOOL: "BOOL",
}
_INSPECTED = {"FLOAT": "FP32", "HALF": "FP16", "INT8": "Int8"}


def read_network(trt: Any, model: bytes) -> SimpleNamespace:
    """Parse a graph.

    Raises:
        ValueError: No ONNX graph, or one that TensorRT refuses.
    """
    try:
        proto = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model))
    except Exception as error:
        raise ValueError(f"failed to parse the ONNX model: {error}") from error
    graph = proto.graph
    constants = {tensor.name for tensor in graph.initializer}
    element = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        element[value.name] = value.type.tensor_type.elem_type
    takers = {node.op_type for node in graph.node if graph.input[0].name in node.input}
    if takers != {"Cast"}:
        raise ValueError("a UINT8 input must be cast first")

    def tensor(name: str) -> SimpleNamespace:
        kind = _TYPES.get(element.get(name, 0), "FLOAT")
        kind = kind if hasattr(trt.DataType, kind) else "INT32"  # what 8.6 makes of INT64
        return SimpleNamespace(name=name, dtype=getattr(trt.DataType, kind), _kind=kind)

    layers = []
    for node in graph.node:
        names = list(node.input)
        if node.op_type == "Conv":  # constant weights belong to the layer
            names = [name for name in names[:2] if name not in constants]
        kind = _LAYERS.get(node.op_type, "SHUFFLE")
        title = node.name or node.output[0]
        layers.append(_layer(trt, kind, title, [tensor(name) for name in names], tensor(node.output[0])))
    ends = (graph.input[0], graph.output[0])
    return SimpleNamespace(
        model=model,
        layers=layers,
        names=[end.name for end in (*graph.input, *graph.output)],
        types=[_TYPES[end.type.tensor_type.elem_type] for end in (*graph.input, *graph.output)],
        shapes=[[dim.dim_value or -1 for dim in end.type.tensor_type.shape.dim] for end in ends],
    )


def _layer(trt: Any, kind: str, name: str, inputs: list[Any], output: Any) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        type=getattr(trt.LayerType, kind),
        num_inputs=len(inputs),
        get_input=lambda index: inputs[index],
        get_output=lambda index: output,
        _kind=kind,
        _inputs=inputs,
        _output=output,
    )


def describe_layers(
    network: SimpleNamespace, precisions: set[str], *, strong: bool
) -> list[tuple[str, str, str]]:
    """Return (kind, name, element type) of the layers with weights, as the builder would choose them."""
    dequantized = {layer._output.name for layer in network.layers if layer._kind == "DEQUANTIZE"}
    found = []
    for layer in network.layers:
        if layer._kind not in ("CONVOLUTION", "MATRIX_MULTIPLY"):
            continue
        quantized = len(layer._inputs) >= 2 and all(t.name in dequantized for t in layer._inputs[:2])
        element = _INSPECTED[layer._inputs[0]._kind]
        if quantized and (strong or "INT8" in precisions):
            element = "Int8"
        elif not strong and "FP16" in precisions:
            element = "FP16"
        found.append((layer._kind.replace("_", "").title(), layer.name, element))
    return found
