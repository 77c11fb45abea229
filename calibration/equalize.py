"""Bring the channels of a tensor to one range before it gets one INT8 scale for all, without changing the network.

ReLU, pooling and flattening commute with a positive factor a channel. So the layer before may give each channel
multiplied by a factor and the layer behind divide its weights by it: the same function, other roundings. For a
depthwise layer this is free, because all weights on both sides have a scale a channel; for others it moves
the difficulty from the activations to the weights, and how far is best to go is searched.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
section 4.1; Xiao et al., "SmoothQuant", ICML 2023, equation 4, for the exponent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calibration.layers import Layer, find_layers
from engines.errors import ArtefactError
from engines.packages import load

Model = Any  # onnx.ModelProto
Array = Any

# Ops between two layers that a positive factor a channel passes through.
_HOMOGENEOUS = (
    "Relu",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Reshape",
    "Flatten",
    "Identity",
    "Add",
)


def can_scale(model: Model, layer: Layer) -> bool:
    """Whether the channels of a layer's input can be scaled by the layer before it."""
    return _producer(model, layer) is not None


def channel_count(model: Model, layer: Layer) -> int:
    """Return the channels of a layer's input: those of the layer before, even where they were flattened."""
    producer = _producer(model, layer)
    assert producer is not None, "asked of a layer whose input can be scaled"
    return producer.shape[producer.axis]


def scale_channels(model: Model, factors: Mapping[str, Sequence[float]]) -> Model:
    """Return the same network with some tensors' channels multiplied by factors.

    Args:
        model: The deployed FP32 graph; it is not changed.
        factors: For the input tensor of a layer, one positive factor a channel.

    Raises:
        ArtefactError: A tensor that is no layer's input, whose channels cannot be scaled, or another number
            of factors than it has channels.
    """
    onnx = load("onnx")
    numpy = load("numpy")
    scaled = onnx.ModelProto()
    scaled.CopyFrom(model)
    layers = {layer.input: layer for layer in find_layers(scaled)}
    stored = {tensor.name: tensor for tensor in scaled.graph.initializer}

    def multiply(name: str, values: Array) -> None:
        old = onnx.numpy_helper.to_array(stored[name])
        stored[name].CopyFrom(onnx.numpy_helper.from_array((old * values).astype(numpy.float32), name))

    for tensor, values in factors.items():
        layer = layers.get(tensor)
        producer = None if layer is None else _producer(scaled, layer)
        if layer is None or producer is None or len(values) != producer.shape[producer.axis]:
            raise ArtefactError(
                f"{tensor} has no {len(values)} channels to scale", remedy="calibrate this model anew"
            )
        factor = numpy.asarray(values, numpy.float64)
        multiply(producer.weight, _along(factor, producer.axis, len(producer.shape)))
        for bias in _biases(scaled, producer, layer.input):
            multiply(bias, factor.reshape(_bias_shape(stored[bias].dims)))
        multiply(layer.weight, divisors(layer, factor))
    return scaled


def divisors(layer: Layer, factor: Array) -> Array:
    """Return what a layer's weight is multiplied by when its input's channels were multiplied by ``factor``.

    Args:
        layer: The layer.
        factor: float64 [channels of the layer before].

    Returns:
        Broadcastable to the weight.
    """
    numpy = load("numpy")
    inverse = 1 / numpy.asarray(factor, numpy.float64)
    if layer.op == "Conv":
        # A depthwise weight is [channels, 1, height, width]: its input channel is its output channel.
        return _along(inverse, 0 if layer.depthwise else 1, len(layer.shape))
    axis = 1 - layer.axis
    return _along(numpy.repeat(inverse, layer.shape[axis] // len(inverse)), axis, len(layer.shape))


def _along(values: Array, axis: int, dimensions: int) -> Array:
    shape = [1] * dimensions
    shape[axis] = -1
    return values.reshape(shape)


def _bias_shape(dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(-1 if size != 1 else 1 for size in dims) or (-1,)


def _producer(model: Model, layer: Layer) -> Layer | None:
    """Return the layer before, if only what a factor passes through lies between; else None."""
    by_output = {name: node for node in model.graph.node for name in node.output}
    layers = {found.name: found for found in find_layers(model)}
    stored = {tensor.name for tensor in model.graph.initializer}
    name = layer.input
    while name in by_output:
        node = by_output[name]
        if node.name in layers:
            found = layers[node.name]
            # A flattened tensor repeats each channel for every place: weights must divide evenly.
            depth = layer.shape[1 - layer.axis] if layer.op != "Conv" else found.shape[found.axis]
            multiplier = layer.depthwise and layer.shape[0] != found.shape[found.axis]
            return None if depth % found.shape[found.axis] or multiplier else found
        if node.op_type not in _HOMOGENEOUS:
            return None
        if node.op_type == "Add" and not (set(node.input) & stored):
            return None
        name = next(value for value in node.input if value not in stored)
    return None


def _biases(model: Model, producer: Layer, end: str) -> list[str]:
    """Name the stored biases added between a layer and ``end``."""
    by_output = {name: node for node in model.graph.node for name in node.output}
    stored = {tensor.name for tensor in model.graph.initializer}
    found = []
    name = end
    while by_output[name].name != producer.name:
        node = by_output[name]
        if node.op_type == "Add":
            found += [value for value in node.input if value in stored]
        name = next(value for value in node.input if value not in stored)
    found += [value for value in by_output[name].input[2:] if value in stored]
    return found
