"""An exported ONNX graph: read and checked, its parameters, multiply-adds and precisions counted, cast to FP16."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from engines.contract import LARGEST_MODEL, ModelContract
from engines.errors import AccuracyGateError, ArtefactError
from engines.files import read_regular, sha256_bytes

SEAL_KEY = "edge_dsc.sha256"
_LARGEST_VALUE = 1 << 28  # numbers of one value for one image; ours have 1.6 million
_MOST_PARTS = 10_000  # nodes, or stored tensors; ours have dozens
LARGEST_HALF = 65504.0  # largest finite float16. Source: IEEE 754-2008, binary16
EXPORT_AGAIN = "export it again: edge-dsc export RUN"

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
# What layers with weights are called, also once ONNX Runtime has optimised a graph.
WEIGHTED_OPERATORS = _INTEGER_LAYERS.union(_WEIGHT_INPUT)
# How ONNX Runtime's optimiser names a layer: with a number or a merged node behind the name, or after the tensor that
# it gives.
_RENAMED = re.compile(r"(?:fused )?(?P<name>.*?)(?:/MatMulAddFusion)?(?P<tensor>_nchwc)?(?:_token_\d+)?")
# What does not change the numbers on the way from a stored tensor to the layer that uses it.
_PASS_THROUGH = frozenset({"Cast", "Identity", "Transpose", "Reshape", "QuantizeLinear", "DequantizeLinear"})

_Value = tuple[str, int, tuple[int, ...]]  # name, element type, shape without the batch


@dataclass(frozen=True)
class OnnxModel:
    """An exported model as one command knows it: read, hashed, parsed and checked once, then handed on.

    Attributes:
        path: Its file.
        sha256: Hash of that file.
        proto: The graph; shared, so copy it before you change it.
        contract: The contract that it carries.
    """

    path: Path
    sha256: str
    proto: ModelProto
    contract: ModelContract


def load_model(path: Path) -> OnnxModel:
    """Read an exported ONNX model and check that it is one of ours, whole and consistent.

    Raises:
        ArtefactError: Missing, too large, not ONNX, damaged, edited since its export, with tensors in other files,
            functions or graphs inside its nodes, without a contract that its own inputs and outputs keep, or a graph
            that a runtime has optimised, which is an engine.
    """
    try:
        data = read_regular(path, LARGEST_MODEL)
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror or error}", remedy=EXPORT_AGAIN) from error
    model = parse_model(data, path)
    if model.contract.dtype != "uint8":
        raise ArtefactError(
            f"{path} is no exported model: it takes {model.contract.dtype} pixels", remedy=EXPORT_AGAIN
        )
    for node in model.proto.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise ArtefactError(
                f"{path} is no exported model: {node.op_type} is an operator of {node.domain}",
                remedy=EXPORT_AGAIN,
            )
    return model


def parse_model(data: bytes, path: Path) -> OnnxModel:
    """Do what :func:`load_model` does for a model that is already in memory.

    Args:
        data: A serialised ``ModelProto``.
        path: The file that it is from or for, named in errors.

    Raises:
        ArtefactError: As :func:`load_model`.
    """
    try:
        proto = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise ArtefactError(f"{path} is not an ONNX model: {error}", remedy=EXPORT_AGAIN) from error
    if not proto.graph.node:
        raise ArtefactError(f"{path} is not an ONNX model: no nodes inside", remedy=EXPORT_AGAIN)
    strange = _take_seal(proto, data) or _foreign_part(proto)
    if strange:
        raise ArtefactError(f"{path} {strange}", remedy=EXPORT_AGAIN)
    contract = contract_of(proto, str(path))
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0]
        raise ArtefactError(f"{path} is not a valid ONNX model: {reason}", remedy=EXPORT_AGAIN) from error
    refuse_large_values(proto, path)
    return OnnxModel(path, sha256_bytes(data), proto, contract)


def seal_model(model: ModelProto) -> bytes:
    """Serialise a model, with the hash of these bytes behind them as one more entry of its metadata."""
    body: bytes = model.SerializeToString(deterministic=True)
    return body + _seal_of(body)


def _seal_of(body: bytes) -> bytes:
    # Serialised messages of one type that follow each other are one message: the entry is the last of the metadata.
    entry = onnx.StringStringEntryProto(key=SEAL_KEY, value=sha256_bytes(body))
    seal: bytes = ModelProto(metadata_props=[entry]).SerializeToString()
    return seal


def _take_seal(model: ModelProto, data: bytes) -> str | None:
    """Take the seal out of a model, so that no graph made of it carries it on, and say whether it is broken.

    Models that were exported by earlier versions have none.
    """
    found = [index for index, entry in enumerate(model.metadata_props) if entry.key == SEAL_KEY]
    for index in reversed(found):
        del model.metadata_props[index]
    length = len(_seal_of(b""))
    body, seal = data[:-length], data[-length:]
    sealed = bool(found) or SEAL_KEY.encode() in seal  # an edit before it may hide it from the parser
    return "was edited after its export" if sealed and seal != _seal_of(body) else None


def _foreign_part(model: ModelProto) -> str | None:
    """Say what in a model no export of ours has: it may read other files, or grow without end, once it is used."""
    graph = model.graph
    if model.functions or model.training_info or graph.sparse_initializer:
        return "has functions, training steps or sparse tensors, a model of ours has none"
    if max(len(graph.node), len(graph.initializer)) > _MOST_PARTS:
        return f"has more than {_MOST_PARTS} nodes or stored tensors"
    stored = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                return f"has a graph inside its node {node.name or node.op_type}, a model of ours has none"
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                return (
                    f"has a sparse tensor in its node {node.name or node.op_type}, a model of ours has none"
                )
            stored += [attribute.t, *attribute.tensors]
    for tensor in stored:
        if tensor.data_type not in TensorProto.DataType.values():
            return f"keeps {tensor.name} in the unknown element type {tensor.data_type}"
    return next(
        (
            f"keeps {tensor.name} in another file"
            for tensor in stored
            if tensor.external_data or tensor.data_location
        ),
        None,
    )


def refuse_large_values(model: ModelProto, path: Path) -> None:
    """Refuse a graph that would fill the memory when it runs, as far as its shapes tell; the batch counts as one.

    Raises:
        ArtefactError: A value of more than 2^28 numbers, or shapes that contradict each other.
    """
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArtefactError(f"{path} is not a valid ONNX model: {reason}", remedy=EXPORT_AGAIN) from error
    for value in graph.value_info:
        size = math.prod(max(1, dim.dim_value) for dim in value.type.tensor_type.shape.dim)
        if size > _LARGEST_VALUE:
            raise ArtefactError(f"{path} computes {value.name} of {size} numbers", remedy=EXPORT_AGAIN)


def contract_of(model: ModelProto, source: str) -> ModelContract:
    """Return the contract that a model carries, checked against its inputs and outputs.

    Raises:
        ArtefactError: No contract, or inputs and outputs that do not keep it.
    """
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    contract = ModelContract.from_metadata(metadata, source=source)
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    seen = (_describe(inputs), _describe(model.graph.output))
    expected = (
        [(contract.input_name, TensorProto.DataType.Value(contract.dtype.upper()), contract.input_shape)],
        [(name, TensorProto.FLOAT, shape) for name, shape in contract.outputs],
    )
    if seen != expected:
        raise ArtefactError(
            f"{source} takes {_words(seen[0])} and gives {_words(seen[1])}; "
            f"its contract says {_words(expected[0])} and {_words(expected[1])}",
            remedy=EXPORT_AGAIN,
        )
    return contract


def replace_contract(model: ModelProto, contract: ModelContract) -> ModelProto:
    """Return a copy of a model with this contract in its metadata."""
    copy = ModelProto()
    copy.CopyFrom(model)
    kept = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(copy, {**kept, **contract.to_metadata()})
    return copy


def _describe(values: Iterable[ValueInfoProto]) -> list[_Value]:
    """Name, element type and shape without the batch (0 where dynamic) of graph inputs or outputs."""
    found = []
    for value in values:
        tensor = value.type.tensor_type
        found.append((value.name, tensor.elem_type, tuple(dim.dim_value for dim in tensor.shape.dim[1:])))
    return found


def _words(values: Sequence[_Value]) -> str:
    element = TensorProto.DataType.Name
    return ", ".join(
        f"{name} {element(kind).lower()} [N, {str(list(shape))[1:]}" for name, kind, shape in values
    )


def count_parameters(model: ModelProto) -> int:
    """Return how many numbers the graph's layers hold: weights and biases.

    Scales and zero points of a Q/DQ graph, the shapes that Reshape takes and single constants (the one that
    centres the pixels of a signed INT8 graph) do not count, so the FP32, FP16 and INT8 graphs of one network
    give the same number.
    """
    stored = _stored(model)
    counted: set[str] = set()
    for node in model.graph.node:
        quantisation = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for position, name in enumerate(node.input):
            if name not in stored or (quantisation and position > 0):
                continue
            if quantisation or stored[name].data_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
                counted.add(name)
    sizes = (math.prod(stored[name].dims) for name in counted)
    return sum(size for size in sizes if size > 1)


def count_multiply_adds(model: ModelProto) -> int:
    """Return the multiply-adds of one image through Conv, MatMul and Gemm; biases are not counted.

    A convolution takes ``output elements x input channels / groups x kernel height x kernel width``, a dense
    layer ``inputs x outputs``.

    Raises:
        ArtefactError: A layer's output shape cannot be inferred.
    """
    single = ModelProto()
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
                f"the output shape of {node.name or node.op_type} is not known", remedy=EXPORT_AGAIN
            )
        total += math.prod(shape) * _depth(node, list(weight.dims))
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


def executed_layer_types(
    model: ModelProto, names: Sequence[str], source: ModelProto | None = None
) -> dict[str, str]:
    """Give the layers of an optimised graph, as :func:`executed_layers` counts them, the names of its source's.

    Args:
        model: The optimised graph.
        names: The layers of the graph that it was made from, in order.
        source: That graph, to find them by what ONNX Runtime calls them. Without it they are taken in order, which is
            right for a chain: there every layer depends on the one before, and no optimiser can change their order.

    Returns:
        Precision by name; empty where the optimiser has merged or split layers, or they cannot be told apart.
    """
    found = _typed_layers(model, pairs=False)
    if source is None:
        return (
            {name: kind for name, (_, kind) in zip(names, found, strict=False)}
            if len(found) == len(names)
            else {}
        )
    owners = source_layers([name for name, _ in found], names, source)
    # What belongs to no layer is a norm, or a factor per channel, that it turned into a convolution.
    types = [(owner, kind) for owner, (_, kind) in zip(owners, found, strict=True) if owner is not None]
    named = dict(types)
    return {name: named[name] for name in names} if len(types) == len(named) == len(names) else {}


def source_layers(executed: Sequence[str], names: Collection[str], source: ModelProto) -> list[str | None]:
    """Return the layer of a graph that each node of what ONNX Runtime made of it stands for.

    Args:
        executed: Names of nodes with weights as ONNX Runtime runs them.
        names: Names of the layers with weights in ``source``.
        source: The graph before optimisation.

    Returns:
        A layer's name for each; None where it cannot be told.
    """
    producers, stored = _producers(source), _stored(source)

    def owner(node: str) -> str | None:
        match = _RENAMED.fullmatch(node)
        assert match is not None, "the pattern takes any text"
        if match["name"] in names:
            return match["name"]
        # Named after the tensor behind it: the way back to the layer, as long as there is but one.
        tensor = match["name"]
        while tensor in producers:
            made = producers[tensor]
            if made.name in names:
                return made.name
            computed = [name for name in made.input if name and name not in stored]
            if len(computed) != 1:
                return None
            tensor = computed[0]
        return None

    return [owner(node) for node in executed]


def _count_layers(model: ModelProto, *, pairs: bool) -> dict[str, int]:
    return dict(Counter(kind for _, kind in _typed_layers(model, pairs=pairs)))


def _typed_layers(model: ModelProto, *, pairs: bool) -> list[tuple[str, str]]:
    """Name and precision of each layer with weights, in the order of the graph."""
    names: dict[int, str] = {TensorProto.FLOAT: "FP32", TensorProto.FLOAT16: "FP16"}
    stored, producers = _stored(model), _producers(model)
    weighted = {node.output[0] for node, _ in _layers(model)}
    found: list[tuple[str, str]] = []
    for node in model.graph.node:
        if node.op_type in _INTEGER_LAYERS:
            found.append((node.name, "INT8"))
        elif node.output[0] in weighted:
            weight = node.input[_WEIGHT_INPUT[node.op_type]]
            sources = [producers.get(name) for name in (node.input[0], weight)]
            if pairs and all(source and source.op_type == "DequantizeLinear" for source in sources):
                found.append((node.name, "INT8"))
            else:
                kind = _element_type(weight, stored, producers)
                found.append((node.name, names.get(kind, TensorProto.DataType.Name(kind))))
    return found


def _layers(model: ModelProto) -> list[tuple[NodeProto, TensorProto]]:
    """Every layer with a stored weight, with that weight."""
    stored, producers = _stored(model), _producers(model)
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


def _element_type(name: str, stored: dict[str, TensorProto], producers: dict[str, NodeProto]) -> int:
    """Element type of a stored tensor where a layer takes it, behind the Casts on the way."""
    while name not in stored:
        node = producers[name]
        if node.op_type == "Cast":
            return next(int(attribute.i) for attribute in node.attribute if attribute.name == "to")
        # The scale of a DequantizeLinear has the element type of its output.
        name = node.input[1 if node.op_type == "DequantizeLinear" else 0]
    return stored[name].data_type


def _stored(model: ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _producers(model: ModelProto) -> dict[str, NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def _depth(node: NodeProto, weight: list[int]) -> int:
    """Multiply-adds for one element of a layer's output."""
    if "Conv" in node.op_type:
        return math.prod(weight[1:])
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return weight[1] if transposed else weight[0]


def cast_to_fp16(model: ModelProto) -> ModelProto:
    """Return the graph with every float32 tensor as float16, between the same input and output types.

    ``uint8`` pixels go to float16 in one Cast (0..255 are exact there) and the probabilities come back to
    ``float32`` in one Cast at the end. Names, metadata and the contract stay.

    The scale 1/255 lives in the first kernel, whose weights are therefore small: around 1e-3, against 6.1e-5
    where float16's normal range ends. Below that the spacing stays 6e-8, so the smallest weights of a kernel
    keep fewer digits, but the error of any one of them, 3e-8, is still below the rounding of its largest (up
    to 2^-11 of it). They are kept as subnormals and not flushed; scaling them up would only move the factor
    to the next layer. A tensor so small that this no longer holds is refused.

    ``onnxruntime.transformers.float16`` would do most of this, but it warns on each weight below 6e-8 and
    replaces it by 6e-8.

    Raises:
        AccuracyGateError: A weight is too large for float16, or a layer's weights too small.
    """
    half = ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    del graph.value_info[:]  # they name the old types; every reader infers them again
    for tensor in graph.initializer:
        _halve_tensor(tensor)
    for node in graph.node:
        _halve_node(node)
    _keep_outputs(graph)
    return half


def take_half_pixels(model: ModelProto, contract: ModelContract) -> ModelProto:
    """Return an FP16 graph whose first layer takes the pixels as float16, with nothing in front.

    Args:
        model: What :func:`cast_to_fp16` made; it is not changed.
        contract: The contract of the engine: :meth:`engines.contract.ModelContract.with_input`.
    """
    made = replace_contract(model, contract)
    graph, image = made.graph, contract.input_name
    name, takers = image, [node for node in graph.node if image in node.input]
    while len(takers) == 1 and takers[0].op_type in ("Cast", "Reshape", "Transpose"):
        name = takers[0].output[0]
        graph.node.remove(takers[0])
        takers = [node for node in graph.node if name in node.input]
    for node in takers:
        node.input[:] = [image if given == name else given for given in node.input]
    ends = onnx.helper.make_tensor_value_info(image, TensorProto.FLOAT16, ("N", *contract.input_shape))
    graph.input[0].CopyFrom(ends)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return made


def _halve_tensor(tensor: TensorProto) -> None:
    if tensor.data_type != TensorProto.FLOAT:
        return
    values = onnx.numpy_helper.to_array(tensor)
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= LARGEST_HALF:
        raise _refuse(tensor.name, f"reaches {largest:g}, float16 ends at {LARGEST_HALF:g}")
    rounded = values.astype(np.float16)
    error = float(np.abs(rounded.astype(np.float32) - values).max(initial=0.0))
    # Half a unit in the last place of the largest weight is 2^-11 of it; a subnormal one loses more.
    if error > largest * 2**-10:
        raise _refuse(tensor.name, f"has no weight above {largest:g}, too small for float16")
    tensor.CopyFrom(onnx.numpy_helper.from_array(rounded, tensor.name))


def _refuse(name: str, why: str) -> AccuracyGateError:
    return AccuracyGateError(f"{name} {why}", remedy="build with --fp32, or train again; nothing was written")


def _halve_node(node: NodeProto) -> None:
    """Turn a node's own float32 constants and its target type into float16."""
    for attribute in node.attribute:
        if attribute.HasField("t"):
            _halve_tensor(attribute.t)
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16


def _keep_outputs(graph: GraphProto) -> None:
    """Give every float32 output of the graph its old type and name back, through one Cast."""
    for output in graph.output:
        if output.type.tensor_type.elem_type != TensorProto.FLOAT:
            continue
        inner = f"{output.name}.fp16"
        for node in graph.node:
            node.input[:] = [inner if name == output.name else name for name in node.input]
            node.output[:] = [inner if name == output.name else name for name in node.output]
        name = f"cast_{output.name}"
        cast = onnx.helper.make_node("Cast", [inner], [output.name], name=name, to=TensorProto.FLOAT)
        graph.node.append(cast)
