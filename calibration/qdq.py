"""From an FP32 graph and its calibration table to the INT8 graph with Q/DQ pairs, its rest in FP16 where wanted."""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calibration.layers import WEIGHTED_OPS, Layer, find_layers, paired_tensors, quantizable_layers
from calibration.rewrites import (
    SUFFIX,
    Bounds,
    center_pixels,
    drop_unused_constants,
    fold_norms,
    pixel_range,
    scale_channels,
)
from calibration.table import CalibrationTable, Correction, calibrate_command
from engines.errors import ArtefactError, UsageError
from engines.graph import cast_to_fp16
from engines.packages import load

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# Per-channel Q/DQ came with opset 13; from 21 on the operators take more types than TensorRT's parser knows.
MINIMUM_OPSET = 13
MAXIMUM_OPSET = 20
# The first opset whose QuantizeLinear and DequantizeLinear take float16 scales.
# Source: ONNX operators, QuantizeLinear-19: T1 and y_scale may be float16.
HALF_OPSET = 19
_PAIR = ("QuantizeLinear", "DequantizeLinear")


def quantize(
    model: ModelProto,
    table: CalibrationTable,
    *,
    signed_activations: bool,
    float_layers: Collection[str] = (),
    weight_bits: int = 8,
) -> ModelProto:
    """Make the INT8 (Q/DQ) graph of an FP32 one.

    Args:
        model: The deployed FP32 graph (``onnx.ModelProto``); it is not changed. That the table is of this
            model is checked by :func:`calibration.table.check_table`, which has the file.
        table: Ranges of the tensors of :func:`calibration.layers.tensors_to_calibrate`.
        signed_activations: True for TensorRT, False for onnxruntime on a CPU.
        float_layers: Names of layers that stay in floating point, beside the last one.
        weight_bits: 8: weights of -127..127; 7: of -64..64 in layers that sum over channels
            (:meth:`calibration.layers.Layer.bits`), for a processor that adds two products of an unsigned activation
            and a weight in 16 bits: 2 * 255 * 64 fits there, 2 * 255 * 127 does not.

    Returns:
        A new graph with the same metadata, inputs and outputs, in which every layer of
        :func:`calibration.layers.quantizable_layers` but ``float_layers`` takes its input and its weight
        from DequantizeLinear.

    Raises:
        ArtefactError: A tensor has no range in the table, or the graph's opset is outside 13..20.
        UsageError: ``float_layers`` names a layer that there is not, or nothing is left to quantise.
    """
    _check_opset(model)
    graph = prepare(model, table)
    layers = _chosen_layers(graph, float_layers)
    steps: dict[str, NDArray[np.float32]] = {}
    if signed_activations:
        for layer in layers:
            steps.update(correct_layer(graph, layer, table.corrections.get(layer.name)))
        drop_unused_constants(graph)
        layers = _chosen_layers(graph, float_layers)  # whose weights have other names now
    else:
        _merge_dense_bias(graph)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    pairs = paired_tensors(graph, layers, signed=signed_activations)
    ranges = activation_ranges(graph, table, signed=signed_activations, pairs=pairs)
    quantizer = _quantizer(graph, layers, ranges, signed=signed_activations, weight_bits=weight_bits)
    inputs = {layer.input for layer in layers}
    for tensor in pairs:
        # The quantiser itself puts a pair at the input of each layer.
        if not signed_activations or tensor not in inputs:
            quantizer.quantize_activation_tensor(tensor)
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantized: ModelProto = quantizer.model.model
    _keep_grids(quantized, steps)
    onnx.helper.set_model_props(quantized, metadata)
    del quantized.graph.value_info[:]
    _check_quantized(quantized, layers)
    onnx.checker.check_model(quantized)
    return quantized


def prepare(model: ModelProto, table: CalibrationTable) -> ModelProto:
    """Return the same network in the form that is quantised: norms folded, channels scaled, pixels centred.

    Raises:
        ArtefactError: The table's channel factors are of another network.
    """
    return center_pixels(scale_channels(fold_norms(model), table.channel_factors))


def activation_ranges(
    model: ModelProto, table: CalibrationTable, *, signed: bool, pairs: Collection[str] | None = None
) -> dict[str, Bounds]:
    """Return the range of every tensor with a pair; the image's pixels, centred or not, have that of their grid.

    Args:
        model: The graph as :func:`prepare` gives it.
        table: Its calibration table.
        signed: Which kind of INT8 graph.
        pairs: Tensors as :func:`calibration.layers.paired_tensors` names them; None takes every layer's input.

    Raises:
        ArtefactError: The table has none for a tensor.
        UsageError: Its ranges are TensorRT's own.
    """
    if table.implicit:
        raise UsageError(
            f"ranges by {table.method} are for TensorRT's own INT8, no Q/DQ graph is made of them",
            remedy="calibrate with another --calib-method",
        )
    takers = {layer.input: layer for layer in reversed(find_layers(model))}
    ranges: dict[str, Bounds] = {}
    for name in pairs if pairs is not None else [layer.input for layer in find_layers(model)]:
        layer = takers.get(name)
        if name not in table.ranges and not name.endswith(SUFFIX):
            where = f", the input of {layer.name}" if layer is not None else ""
            raise ArtefactError(
                f"the calibration table has no range for {name}{where}",
                remedy=f"calibrate this model: {calibrate_command(method=table.method)}",
            )
        raw = layer is not None and layer.raw_pixels
        ranges[name] = pixel_range(name, signed=signed) if raw else table.ranges[name]
    return ranges


def weight_scales(weight: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Return the steps of the grid that roundings are learnt on: one per output channel, all other axes kept as 1.

    They are float16 values, so that the graph with FP16 around INT8 has the same integers.
    """
    others = tuple(place for place in range(weight.ndim) if place != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    scales = round_up_to_half(largest / np.float32(127)).astype(np.float32)
    return np.where(scales > 0, scales, np.float32(1))


def grid_floor(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return the integer below each weight, given in steps, to which 0 or 1 is added: -127..126."""
    floor: NDArray[np.float64] = np.clip(np.floor(values), -127, 126).astype(np.float64)
    return floor


def takes_bias(model: ModelProto, layer: Layer) -> bool:
    """Whether a layer has a place for a bias: a stored one, or a Conv or Gemm without any."""
    return _bias_place(model, layer) is not None


def correct_layer(
    model: ModelProto, layer: Layer, correction: Correction | None
) -> dict[str, NDArray[np.float32]]:
    """Put a table's correction of a layer into a graph, in place: its weight as it is rounded, and its bias.

    The weight becomes integers times the steps of :func:`weight_scales`, in float: what a pair of that grid gives back.

    Args:
        model: The graph as :func:`prepare` gives it, or the piece of it that holds the layer.
        layer: The layer.
        correction: What the table says of it; None changes nothing.

    Returns:
        The steps by name of the new weight, ``float32 [outputs]``; empty where roundings are to the nearest.

    Raises:
        ArtefactError: It is of a layer of other sizes.
    """
    if correction is None:
        return {}
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    if correction.bias:
        _shift_bias(model, layer, np.array(correction.bias, np.float32), stored)
    if not correction.rounded_up:
        return {}
    weight = stored[layer.weight]
    scales = weight_scales(weight, layer.axis)
    up = _unpack_bits(correction.rounded_up, layer)
    integers = (grid_floor(weight / scales) + up).astype(np.float32)
    (node,) = (node for node in model.graph.node if node.name == layer.name)
    node.input[1] = _store(model, f"{layer.name}.rounded_weight", integers * scales)
    return {node.input[1]: scales.reshape(-1)}


def _shift_bias(
    model: ModelProto, layer: Layer, shift: NDArray[np.float32], stored: Mapping[str, NDArray[Any]]
) -> None:
    place = _bias_place(model, layer)
    if place is None or len(shift) != layer.shape[layer.axis]:
        raise _other_layer(layer, f"{len(shift)} biases")
    node, index = place
    old = stored[node.input[index]] if len(node.input) > index else np.float32(0)
    name = _store(model, f"{layer.name}.corrected_bias", old + shift)
    if len(node.input) > index:
        node.input[index] = name
    else:
        node.input.append(name)


def _unpack_bits(packed: str, layer: Layer) -> NDArray[np.uint8]:
    try:
        octets = np.frombuffer(base64.b64decode(packed, validate=True), np.uint8)
    except ValueError as error:
        raise _other_layer(layer, "roundings that cannot be read") from error
    count = math.prod(layer.shape)
    if len(octets) != -(-count // 8):
        raise _other_layer(layer, f"{8 * len(octets)} roundings")
    return np.unpackbits(octets, count=count).reshape(layer.shape)


def _bias_place(model: ModelProto, layer: Layer) -> tuple[NodeProto, int] | None:
    """Return the node and the number of its input that a layer's bias is, or would be; None where it has no place."""
    stored = {tensor.name for tensor in model.graph.initializer}
    (node,) = (node for node in model.graph.node if node.name == layer.name)
    if node.op_type == "MatMul":
        takers = [other for other in model.graph.node if node.output[0] in other.input]
        if len(takers) != 1 or takers[0].op_type != "Add" or not set(takers[0].input) & stored:
            return None
        return takers[0], next(place for place, name in enumerate(takers[0].input) if name in stored)
    factors = {each.name: each.f for each in node.attribute if each.name in ("alpha", "beta")}
    plain = set(factors.values()) <= {1.0} and all(name in stored for name in node.input[2:])
    return (node, 2) if plain else None


def _store(model: ModelProto, name: str, values: NDArray[np.float32]) -> str:
    model.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    return name


def _other_layer(layer: Layer, held: str) -> ArtefactError:
    return ArtefactError(
        f"the calibration table holds {held} for {layer.name}, whose weight is {list(layer.shape)}",
        remedy=f"calibrate this model again: {calibrate_command()}",
    )


def _keep_grids(model: ModelProto, steps: Mapping[str, NDArray[np.float32]]) -> None:
    """Give weights that are rounded already the grid they are on: their largest integer need not be 127."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in steps:
            name = node.input[1]
            stored[name].CopyFrom(onnx.numpy_helper.from_array(steps[node.input[0]], name))


def put_rest_in_half(model: ModelProto) -> ModelProto:
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


def round_up_to_half(scales: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
    """Return the smallest float16 values that are not below positive ``scales``; any shape."""
    half = scales.astype(np.float16)
    higher = np.nextafter(half, np.float16(np.inf))
    return np.where(half.astype(scales.dtype) < scales, higher, half).astype(np.float16)


def _check_opset(model: ModelProto) -> None:
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if not MINIMUM_OPSET <= opset <= MAXIMUM_OPSET:
        raise ArtefactError(
            f"the graph has opset {opset}, INT8 graphs are made for {MINIMUM_OPSET} to {MAXIMUM_OPSET}",
            remedy="export it again: edge-dsc export RUN",
        )


def _chosen_layers(model: ModelProto, float_layers: Collection[str]) -> tuple[Layer, ...]:
    candidates = quantizable_layers(model)
    unknown = sorted(set(float_layers) - {layer.name for layer in candidates})
    if unknown:
        raise UsageError(
            f"there is no layer {unknown[0]!r} to leave in floating point",
            remedy=f"choose among {', '.join(layer.name for layer in candidates)}",
        )
    chosen = tuple(layer for layer in candidates if layer.name not in float_layers)
    if not chosen:
        raise UsageError("no layer is left to run in INT8", remedy="leave fewer layers in floating point")
    return chosen


def _quantizer(
    model: ModelProto,
    layers: tuple[Layer, ...],
    ranges: dict[str, Bounds],
    *,
    signed: bool,
    weight_bits: int,
) -> Any:
    """Set up onnxruntime's quantiser for chosen layers of ``model``, which it will change."""
    tensor_data = load("onnxruntime.quantization.calibrate").TensorData
    types = load("onnxruntime.quantization.quant_utils").QuantType
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    # The mark by which onnxruntime knows that shapes were inferred; else it goes through a file on disk.
    onnx.helper.set_model_props(inferred, {"onnx.infer": "onnxruntime.quant"})
    options = {
        "ActivationSymmetric": signed,
        "WeightSymmetric": True,
        "AddQDQPairToWeight": signed,
        "QuantizeBias": not signed,
        "DedicatedQDQPair": False,
        "OpTypesToExcludeOutputQuantization": list(WEIGHTED_OPS),
        # Weight scales are not to follow a bias that is not quantised.
        "QDQDisableWeightAdjustForInt32Bias": signed,
        "TensorQuantOverrides": {
            layer.weight: [{"axis": layer.axis, "reduce_range": True}]
            for layer in layers
            if layer.bits(weight_bits) == 7
        },
    }
    return load("onnxruntime.quantization.qdq_quantizer").QDQQuantizer(
        model=inferred,
        per_channel=True,
        reduce_range=False,
        weight_qType=types.QInt8,
        activation_qType=types.QInt8 if signed else types.QUInt8,
        tensors_range={
            name: tensor_data(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
            for name, (low, high) in sorted(ranges.items())
        },
        nodes_to_quantize=[layer.name for layer in layers],
        nodes_to_exclude=[],
        op_types_to_quantize=list(WEIGHTED_OPS),
        extra_options=options,
    )


def _merge_dense_bias(model: ModelProto) -> None:
    """Turn MatMul + Add of a stored bias into Gemm, in place: only that has an integer kernel."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = list(model.graph.node)
    outputs = {value.name for value in model.graph.output}
    for matmul in [node for node in nodes if node.op_type == "MatMul" and node.input[1] in stored]:
        takers = [node for node in nodes if matmul.output[0] in node.input]
        if len(takers) != 1 or takers[0].op_type != "Add" or matmul.output[0] in outputs:
            continue
        (add,) = takers
        bias = next((name for name in add.input if name in stored), None)
        if bias is None or len(stored[bias].dims) != 1 or len(stored[matmul.input[1]].dims) != 2:
            continue
        gemm = onnx.helper.make_node("Gemm", [*matmul.input, bias], [add.output[0]], name=matmul.name)
        nodes[nodes.index(matmul)] = gemm
        nodes.remove(add)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _check_quantized(model: ModelProto, layers: tuple[Layer, ...]) -> None:
    """Prove that every chosen layer takes input and weight from DequantizeLinear."""
    producers = {output: node.op_type for node in model.graph.node for output in node.output}
    nodes = {node.name: node for node in model.graph.node}
    for layer in layers:
        inputs = nodes[layer.name].input[:2] if layer.name in nodes else []
        if [producers.get(name) for name in inputs] != ["DequantizeLinear"] * 2:
            raise ArtefactError(
                f"the layer {layer.name} ({layer.op}) was left in floating point by onnxruntime's quantiser",
                remedy="export the model again: edge-dsc export RUN",
            )
