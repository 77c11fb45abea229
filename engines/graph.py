"""Facts of an ONNX graph: the contract inside it, parameters, multiply-adds, the precision of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines import packages
from engines.contract import ModelContract
from engines.errors import ArtefactError
from engines.half import cast_to_fp16

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

__all__ = [
    "cast_to_fp16",
    "contract_of",
    "count_multiply_adds",
    "count_parameters",
    "load_model",
    "parse_model",
    "weighted_layers",
]

LARGEST_MODEL = 512 << 20  # bytes; ours have a few MB, and protobuf itself ends at 2 GiB

_Value = tuple[str, int, tuple[int, ...]]  # name, element type, shape without the batch
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


def load_model(path: Path) -> ModelProto:
    """Read an exported ONNX model and check that it is one of ours, whole and consistent.

    Raises:
        ArtefactError: Missing, too large, not ONNX, damaged, with tensors in other files, or without a
            contract that its own inputs and outputs keep.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_MODEL:
            raise ArtefactError(
                f"{path} has {size} bytes, a model of ours at most {LARGEST_MODEL}", remedy=_EXPORT_AGAIN
            )
        data = path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror or error}", remedy=_EXPORT_AGAIN) from error
    return parse_model(data, str(path))


def parse_model(data: bytes, source: str) -> ModelProto:
    """Do what :func:`load_model` does for a model that is already in memory.

    Args:
        data: A serialised ``ModelProto``.
        source: Name of the file, for the error text.

    Raises:
        ArtefactError: As :func:`load_model`.
    """
    onnx = packages.load("onnx")
    decode_error = packages.load("google.protobuf.message").DecodeError
    try:
        model = onnx.load_model_from_string(data)
    except decode_error as error:
        raise ArtefactError(f"{source} is not an ONNX model: {error}", remedy=_EXPORT_AGAIN) from error
    if not model.graph.node:
        raise ArtefactError(f"{source} is not an ONNX model: no nodes inside", remedy=_EXPORT_AGAIN)
    for tensor in model.graph.initializer:
        if tensor.external_data or tensor.data_location:
            raise ArtefactError(f"{source} keeps {tensor.name} in another file", remedy=_EXPORT_AGAIN)
    contract_of(model, source)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0]
        raise ArtefactError(f"{source} is not a valid ONNX model: {reason}", remedy=_EXPORT_AGAIN) from error
    return model


def contract_of(model: ModelProto, source: str) -> ModelContract:
    """Return the contract that a model carries, checked against its inputs and outputs.

    Raises:
        ArtefactError: No contract, or inputs and outputs that do not keep it.
    """
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    contract = ModelContract.from_metadata(metadata, source=source)
    types = packages.load("onnx").TensorProto
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    seen = (_describe(inputs), _describe(model.graph.output))
    expected = (
        [(contract.input_name, types.UINT8, contract.input_shape)],
        [(contract.output_name, types.FLOAT, (len(contract.labels),))],
    )
    if seen != expected:
        raise ArtefactError(
            f"{source} takes {_words(seen[0])} and gives {_words(seen[1])}; "
            f"its contract says {_words(expected[0])} and {_words(expected[1])}",
            remedy=_EXPORT_AGAIN,
        )
    return contract


def _describe(values: Iterable[ValueInfoProto]) -> list[_Value]:
    """Name, element type and shape without the batch (0 where dynamic) of graph inputs or outputs."""
    found = []
    for value in values:
        tensor = value.type.tensor_type
        found.append((value.name, tensor.elem_type, tuple(dim.dim_value for dim in tensor.shape.dim[1:])))
    return found


def _words(values: Sequence[_Value]) -> str:
    element = packages.load("onnx").TensorProto.DataType.Name
    return ", ".join(
        f"{name} {element(kind).lower()} [N, {str(list(shape))[1:]}" for name, kind, shape in values
    )


def count_parameters(model: ModelProto) -> int:
    """Return how many numbers the graph's layers hold: weights and biases.

    Scales and zero points of a Q/DQ graph, and the shapes that Reshape takes, do not count, so the FP32, FP16
    and INT8 graphs of one network give the same number.
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
    return sum(sizes[name][1] for name in counted)


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
    """Count the layers with weights (Conv, MatMul, Gemm and their fused forms) by precision.

    FP32 and FP16 follow the weight's element type as the layer sees it. INT8 means that the input and the
    weight both come from DequantizeLinear, or that the layer is one of ONNX's integer operators.

    Returns:
        Such as ``{"INT8": 7, "FP32": 2}``, without zeros.
    """
    types = packages.load("onnx").TensorProto
    names = {types.FLOAT: "FP32", types.FLOAT16: "FP16"}
    producers = _producers(model)
    found: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type in _INTEGER_LAYERS:
            found["INT8"] = found.get("INT8", 0) + 1
    for node, _ in _layers(model):
        weight = node.input[_WEIGHT_INPUT[node.op_type]]
        sources = [producers.get(name) for name in (node.input[0], weight)]
        if all(source is not None and source.op_type == "DequantizeLinear" for source in sources):
            name = "INT8"
        else:
            kind = _element_type(model, producers, weight)
            name = names.get(kind, types.DataType.Name(kind))
        found[name] = found.get(name, 0) + 1
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
