"""The INT8 graph of a strongly typed TensorRT: integer layers in INT8, everything else in FP16."""

from __future__ import annotations

from typing import Any

from engines.errors import ArtefactError
from engines.half import cast_to_fp16
from engines.packages import load

Model = Any  # onnx.ModelProto
Array = Any

# The first opset whose QuantizeLinear and DequantizeLinear take float16 scales.
# Source: ONNX operators, QuantizeLinear-19: T1 and y_scale may be float16.
HALF_OPSET = 19
_PAIR = ("QuantizeLinear", "DequantizeLinear")


def put_rest_in_half(model: Model) -> Model:
    """Turn everything that a signed Q/DQ graph computes in FP32 into FP16, the scales of its pairs too.

    A strongly typed builder (TensorRT 10, 11, RTX) takes the types as they stand: with FP32 around the pairs,
    ReLU, pooling, the last Dense and every layer left out of INT8 would run in FP32. TensorRT 8.6 wants the
    graph as :func:`calibration.qdq.quantize` gives it, and the builder's flags FP16 and INT8.

    A scale is rounded up to the next float16, so that no value of its range is cut off; the grid of the layer
    gets coarser by less than 0.1 % where the scale is a normal float16, and by up to one step of 6e-8 below
    6.1e-5 (a first kernel that holds the scale 1/255).

    Args:
        model: A Q/DQ graph (``onnx.ModelProto``) of opset 13 to 20; it is not changed.

    Returns:
        A graph of opset 19 or 20 between the same input and output, with the same metadata.

    Raises:
        AccuracyGateError: A weight does not fit into float16.
        ArtefactError: The graph has no pairs.
    """
    onnx = load("onnx")
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    scales = {node.input[1] for node in graph.graph.node if node.op_type in _PAIR}
    if not scales:
        raise ArtefactError(
            f"{graph.graph.name!r} has no QuantizeLinear", remedy="quantise it first, or cast it to FP16"
        )
    for tensor in graph.graph.initializer:
        if tensor.name in scales:
            values = round_up_to_half(onnx.numpy_helper.to_array(tensor))
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    half = cast_to_fp16(graph)
    for entry in half.opset_import:
        # Of the operators in use, 19 only lets Cast, Reshape, Identity and the pairs take more types.
        if entry.domain in ("", "ai.onnx"):
            entry.version = max(entry.version, HALF_OPSET)
    onnx.checker.check_model(half)
    return half


def round_up_to_half(scales: Array) -> Array:
    """Return the smallest float16 values that are not below positive ``scales``; any shape."""
    numpy = load("numpy")
    half = scales.astype(numpy.float16)
    higher = numpy.nextafter(half, numpy.float16(numpy.inf))
    return numpy.where(half.astype(scales.dtype) < scales, higher, half).astype(numpy.float16)
