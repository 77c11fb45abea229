"""Facts of an ONNX graph: its parameters, its multiply-adds and the precision of its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from engines import packages
from engines.errors import ArtefactError
from engines.half import cast_to_fp16
from engines.model_file import contract_of, load_model, parse_model

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

__all__ = [
    "cast_to_fp16",
    "contract_of",
    "count_multiply_adds",
    "count_parameters",
    "executed_layer_types",
    "executed_layers",
    "layer_types",
    "load_model",
    "parse_model",
    "weighted_layers",
]

_EXPORT_AGAIN = "export it again: edge-dsc export RUN"

# Position of the weight among the inputs of a layer. The names beyond ONNX's own are what ONNX Runtime's
# optimiser makes of them.
_WEIGHT_INPUT = {
    "Conv": 1,
    "FusedConv": 1,
    "NhwcFusedConv": 1,
    "MatMul": 1,
    "FusedMatMul": 1,
    "Gemm": 1,
    "FusedGemm": 1,
}
_INTEGER_LAYERS = frozenset({"QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger"})
# What does not change the numbers on the way from a stored tensor to the layer that uses it.
_PASS_THROUGH = frozenset({"Cast", "Identity", "Transpose", "Reshape", "QuantizeLinear", "DequantizeLinear"})


def count_parameters(model: ModelProto) -> int:
    """Return how many numbers the graph's layers hold: weights and biases.

    Scales and zero points of a Q/DQ graph, the shapes that Reshape takes and single constants (the one that
    centres the pixels of a signed INT8 graph) do not count, so the FP32, FP16 and INT8 graphs of one network
    give the same number.
    """
    types = packages.load("onnx").TensorProto
    sizes = {}
    for tensor in model.graph.initializer:
        sizes[tensor.name] = (tensor.data_type, _elements(tensor.dims))
    counted: set[str] = set()
    for node in model.graph.node:
        quantisation = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for position, name in enumerate(node.input):
            if name not in sizes or (quantisation and position > 0):
                continue
            if quantisation or sizes[name][0] in (types.FLOAT, types.FLOAT16):
                counted.add(name)
    return sum(sizes[name][1] for name in counted if sizes[name][1] > 1)


def count_multiply_adds(model: ModelProto) -> int:
    """Return the multiply-adds of one image through Conv, MatMul and Gemm; biases are not counted.

    A convolution takes ``output elements x input channels / groups x kernel height x kernel width``, a dense
    layer ``inputs x outputs``.

    Raises:
        ArtefactError: A layer's output shape cannot be inferred.
    """
    onnx = packages.load("onnx")
    single = onnx.ModelProto()
    single.CopyFrom(model)
    for value in [*single.graph.input, *single.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del single.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(single, data_prop=True).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*inferred.value_info, *inferred.output]
    }
    total = 0
    for node, weight in _layers(single):
        shape = shapes.get(node.output[0], [])
        if not shape or 0 in shape:
            raise ArtefactError(
                f"the output shape of {node.name or node.op_type} is not known", remedy=_EXPORT_AGAIN
            )
        total += _elements(shape) * _depth(node, list(weight.dims))
    return total


def weighted_layers(model: ModelProto) -> dict[str, int]:
    """Count the layers with weights (Conv, MatMul, Gemm) by the precision that the graph gives them.

    FP32 and FP16 follow the weight's element type as the layer sees it. INT8 means that the input and the
    weight both come from DequantizeLinear: a runtime that fuses such a group computes it in integers.

    Returns:
        Such as ``{"INT8": 7, "FP32": 2}``, without zeros.
    """
    return _count_layers(model, pairs=True)


def executed_layers(model: ModelProto) -> dict[str, int]:
    """Count the layers with weights of a graph that its runtime has optimised, as they will be computed.

    Here a float layer between DequantizeLinear and QuantizeLinear is one that was not fused: it counts as
    float. INT8 are only ONNX's integer operators.

    Returns:
        Such as ``{"INT8": 7, "FP32": 2}``, without zeros.
    """
    return _count_layers(model, pairs=False)


def layer_types(model: ModelProto) -> dict[str, str]:
    """Name every layer with weights and the precision that the graph gives it, as :func:`weighted_layers` counts.

    Returns:
        Such as ``{"stem": "INT8", "logits": "FP32"}``, in the order of the graph; empty where names are missing
        or used twice.
    """
    found = _typed_layers(model, pairs=True)
    named = dict(found)
    return named if len(named) == len(found) and "" not in named else {}


def executed_layer_types(model: ModelProto, names: Sequence[str]) -> dict[str, str]:
    """Give the layers of an optimised graph, as :func:`executed_layers` counts them, the names of its source's.

    ONNX Runtime renames what it fuses. The networks are chains, in which every layer depends on the one before:
    no optimiser can change their order.

    Args:
        model: The optimised graph.
        names: The layers of the graph that it was made from, in order.

    Returns:
        Precision by name; empty where the optimiser has merged or split layers.
    """
    found = [kind for _, kind in _typed_layers(model, pairs=False)]
    return dict(zip(names, found, strict=True)) if len(found) == len(names) else {}


def _count_layers(model: ModelProto, *, pairs: bool) -> dict[str, int]:
    return dict(Counter(kind for _, kind in _typed_layers(model, pairs=pairs)))


def _typed_layers(model: ModelProto, *, pairs: bool) -> list[tuple[str, str]]:
    """Name and precision of each layer with weights, in the order of the graph."""
    types = packages.load("onnx").TensorProto
    names = {types.FLOAT: "FP32", types.FLOAT16: "FP16"}
    producers = _producers(model)
    weighted = {node.output[0] for node, _ in _layers(model)}
    found: list[tuple[str, str]] = []
    for node in model.graph.node:
        if node.op_type in _INTEGER_LAYERS:
            found.append((node.name, "INT8"))
        elif node.output[0] in weighted:
            weight = node.input[_WEIGHT_INPUT[node.op_type]]
            sources = [producers.get(name) for name in (node.input[0], weight)]
            if pairs and all(
                source is not None and source.op_type == "DequantizeLinear" for source in sources
            ):
                found.append((node.name, "INT8"))
            else:
                kind = _element_type(model, producers, weight)
                found.append((node.name, names.get(kind, types.DataType.Name(kind))))
    return found


def _layers(model: ModelProto) -> list[tuple[NodeProto, TensorProto]]:
    """Every layer with a stored weight, with that weight."""
    producers = _producers(model)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        position = _WEIGHT_INPUT.get(node.op_type)
        if position is None or len(node.input) <= position:
            continue
        name = node.input[position]
        while name not in stored and name in producers and producers[name].op_type in _PASS_THROUGH:
            name = producers[name].input[0]
        if name in stored:
            found.append((node, stored[name]))
    return found


def _element_type(model: ModelProto, producers: dict[str, NodeProto], name: str) -> int:
    """Element type of a stored tensor where a layer takes it, behind the Casts on the way."""
    stored = {tensor.name: int(tensor.data_type) for tensor in model.graph.initializer}
    while name not in stored:
        node = producers[name]
        if node.op_type == "Cast":
            return next(int(attribute.i) for attribute in node.attribute if attribute.name == "to")
        # The scale of a DequantizeLinear has the element type of its output.
        name = node.input[1 if node.op_type == "DequantizeLinear" else 0]
    return stored[name]


def _producers(model: ModelProto) -> dict[str, NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def _depth(node: NodeProto, weight: list[int]) -> int:
    """Multiply-adds for one element of a layer's output."""
    if "Conv" in node.op_type:
        return _elements(weight[1:])
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return weight[1] if transposed else weight[0]


def _elements(shape: Iterable[int]) -> int:
    total = 1
    for size in shape:
        total *= int(size)
    return total
