"""The FP16 form of an ONNX graph, for runtimes that take the precision from the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engines import packages
from engines.errors import AccuracyGateError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

LARGEST_HALF = 65504.0  # largest finite float16. Source: IEEE 754-2008, binary16


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
    onnx = packages.load("onnx")
    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    del graph.value_info[:]  # they name the old types; every reader infers them anew
    for tensor in graph.initializer:
        _halve_tensor(tensor)
    for node in graph.node:
        _halve_node(node)
    _keep_outputs(graph)
    return half


def _halve_tensor(tensor: TensorProto) -> None:
    onnx = packages.load("onnx")
    if tensor.data_type != onnx.TensorProto.FLOAT:
        return
    numpy = packages.load("numpy")
    values = onnx.numpy_helper.to_array(tensor)
    largest = float(numpy.abs(values).max(initial=0.0))
    if not largest <= LARGEST_HALF:
        raise _refuse(tensor.name, f"reaches {largest:g}, float16 ends at {LARGEST_HALF:g}")
    rounded = values.astype(numpy.float16)
    error = float(numpy.abs(rounded.astype(numpy.float32) - values).max(initial=0.0))
    # Half a unit in the last place of the largest weight is 2^-11 of it; a subnormal one loses more.
    if error > largest * 2**-10:
        raise _refuse(tensor.name, f"has no weight above {largest:g}, too small for float16")
    tensor.CopyFrom(onnx.numpy_helper.from_array(rounded, tensor.name))


def _refuse(name: str, why: str) -> AccuracyGateError:
    return AccuracyGateError(f"{name} {why}", remedy="build with --fp32, or train anew; nothing was written")


def _halve_node(node: NodeProto) -> None:
    """Turn a node's own float32 constants and its target type into float16."""
    types = packages.load("onnx").TensorProto
    for attribute in node.attribute:
        if attribute.HasField("t"):
            _halve_tensor(attribute.t)
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == types.FLOAT:
            attribute.i = types.FLOAT16


def _keep_outputs(graph: GraphProto) -> None:
    """Give every float32 output of the graph its old type and name back, through one Cast."""
    onnx = packages.load("onnx")
    for output in graph.output:
        if output.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
            continue
        inner = f"{output.name}.fp16"
        for node in graph.node:
            node.input[:] = [inner if name == output.name else name for name in node.input]
            node.output[:] = [inner if name == output.name else name for name in node.output]
        name = f"cast_{output.name}"
        cast = onnx.helper.make_node("Cast", [inner], [output.name], name=name, to=onnx.TensorProto.FLOAT)
        graph.node.append(cast)
