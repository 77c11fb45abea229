"""What the doubled parser sees in an ONNX graph: tensors, layers with weights, and their element types."""

from __future__ import annotations

from collections.abc import Collection
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
_INSPECTED = {"FLOAT": "Float", "HALF": "Half", "INT8": "Int8"}
# How kernels are called. Source: names in public dumps of engines
_KERNELS = {
    "Float": "sm80_xmma_fprop_implicit_gemm_f32f32_f32f32_f32_nhwckrsc_nhwc",
    "Half": "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f16_nhwckrsc_nhwc",
    "Int8": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32",
}
# NvInferRuntime.h 8.6.1 line 3606, 10.3 line 4482, 11.1 line 4914: without an execution context
_NO_FORMAT = "N/A due to dynamic shapes"


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
    # NvInferRuntime.h, DataType: kUINT8 must be cast before any other layer; kINT8 is quantised, and what computes in
    # floating point takes it from a dequantize layer.
    wanted = {TensorProto.UINT8: {"Cast"}, TensorProto.INT8: {"DequantizeLinear"}}
    kind = graph.input[0].type.tensor_type.elem_type
    if takers != wanted.get(kind, takers):
        raise ValueError(f"a {_TYPES[kind]} input is taken by {takers}, not by {wanted[kind]}")

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
        layers.append(Layer(trt, kind, title, [tensor(name) for name in names], tensor(node.output[0])))
        layers[-1]._op = node.op_type
    ends = (*graph.input, *graph.output)
    return SimpleNamespace(
        model=model,
        layers=layers,
        names=[end.name for end in ends],
        types=[_TYPES[end.type.tensor_type.elem_type] for end in ends],
        shapes=[[dim.dim_value or -1 for dim in end.type.tensor_type.shape.dim] for end in ends],
    )


class Layer:
    """A parsed layer; ``precision`` is there until 10.16 (by the surface) and binds with OBEY_PRECISION_CONSTRAINTS."""

    def __init__(self, trt: Any, kind: str, name: str, inputs: list[Any], output: Any) -> None:
        self.name = name
        self.metadata = (
            f"[ONNX Layer: {name}]"  # as the ONNX parser writes it: onnxOpImporters, processMetadata
        )
        self.type = getattr(trt.LayerType, kind)
        self.num_inputs = len(inputs)
        self.get_input = lambda index: inputs[index]
        self.get_output = lambda index: output
        self._kind, self._inputs, self._output = kind, inputs, output
        if trt._has("ILayer", "precision"):
            self.precision, self.precision_is_set = trt.DataType.FLOAT, False
        self._known = True

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and getattr(self, "_known", False):
            if not hasattr(self, name):
                raise AttributeError(f"this release's ILayer has no {name!r}")
            if name == "precision":
                object.__setattr__(self, "precision_is_set", True)
        object.__setattr__(self, name, value)


def runs_on_dla(layer: Layer, flags: set[str], *, strong: bool) -> bool:
    """Whether the Deep Learning Accelerator runs a layer: in FP16 or INT8 alone, no Q/DQ, no Cast, no matrix product.

    Source: TensorRT documentation, "DLA Supported Layers and Restrictions"; that DLA takes no explicit quantisation:
    NVIDIA/TensorRT#2222. By types from 11.4.1 on, by the builder's flags before.
    """
    low = layer._output._kind == "HALF" if strong else bool(flags & {"FP16", "INT8"})
    return low and layer._op in ("Conv", "Relu", "MaxPool", "Add")


def describe_layers(
    network: SimpleNamespace, flags: set[str], *, strong: bool, ranged: Collection[str] = ()
) -> list[tuple[str, str, str]]:
    """Return (kind, name, element type) of the layers with weights, as the builder would choose them.

    kFP16 allows FP32: the first layer is faster so here. Only a layer that is bound to its precision, where
    constraints are obeyed, stays (NvInfer.h 8.6.1 line 8772). kINT8 allows as much, for layers whose input is in
    ``ranged``: a calibrator gave it a range.
    """
    dequantized = {layer._output.name for layer in network.layers if layer._kind == "DEQUANTIZE"}
    found: list[tuple[str, str, str]] = []
    for layer in network.layers:
        if layer._kind not in ("CONVOLUTION", "MATRIX_MULTIPLY"):
            continue
        quantized = len(layer._inputs) >= 2 and all(t.name in dequantized for t in layer._inputs[:2])
        element = _INSPECTED[layer._inputs[0]._kind]
        if quantized and (strong or "INT8" in flags):
            element = "Int8"
        elif not strong:
            bound = "OBEY_PRECISION_CONSTRAINTS" in flags and getattr(layer, "precision_is_set", False)
            free = bound or found
            element = "Half" if "FP16" in flags and free else "Float"
            asked = not bound or layer.precision.name == "INT8"
            if "INT8" in flags and free and asked and layer._inputs[0].name in ranged:
                element = "Int8"
        found.append((layer._kind, layer.name, element))
    return found


def inspect_layer(
    kind: str, name: str, element: str, *, index: int, fused: bool, silent: bool, shaped: bool, profile: int
) -> dict[str, Any]:
    """Return a layer as the engine inspector describes it in JSON.

    Args:
        kind: The parsed layer's kind.
        name: Its name.
        element: What it runs in.
        index: Its place.
        fused: By Myelin, as in TensorRT 10 and 11: the ONNX names stand in the metadata alone, separated by the
            ASCII unit separator, and there are no weights (NVIDIA/TensorRT#4397).
        silent: Say nothing of the precision.
        shaped: Whether the inspector has a context of its profile whose shapes are set.
        profile: The optimisation profile: every one has layers of its own.
    """
    entry: dict[str, Any] = {
        "Name": f"{name} + {name}_relu",
        "LayerType": "CaskConvolution" if kind == "CONVOLUTION" else "CaskGemmMatrixMultiply",
        "Inputs": [{"Name": "x", "Location": "Device", "Format/Datatype": element if shaped else _NO_FORMAT}],
        "Metadata": f"[ONNX Layer: {name}]\x1f[ONNX Layer: {name}_relu]",
        "TacticName": "" if silent else _KERNELS[element],
    }
    if fused:
        entry |= {"Name": f"__myl_CastMulConvMaxRe_myl0_{index}", "LayerType": "kgen"}
        entry["TacticName"] = "__myl_CastMulConvMaxRe_0x7ad83d0a9d0c93c5"
        entry["Inputs"].insert(0, {"Name": "y", "Format/Datatype": "Float" if shaped else _NO_FORMAT})
    elif kind == "CONVOLUTION" and not silent:
        entry["Weights"] = {"Type": element, "Count": 288}
    if profile:
        entry["Name"] += f" [profile {profile}]"
    return entry
