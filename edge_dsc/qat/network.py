"""The deployed network with every rounding of its INT8 graph in it, trainable.

What is rounded, and how, is what :func:`calibration.qdq.quantize` writes for signed activations: the input of every
layer with weights per tensor, symmetric; its weights per output channel, symmetric; no bias. Pixels are whole numbers
that both kinds of graph hold exactly. The last Dense computes in floating point; its input is rounded all the same,
because the unsigned graph does so.

Rounding has no gradient, so the gradient passes it as if it were not there; what is cut off gives its gradient to the
range. Source: Bengio, Leonard and Courville, arXiv 1308.3432 (2013), for the straight-through estimator; Esser et al.,
Learned Step Size Quantization, ICLR 2020, for the range's gradient.
"""

from __future__ import annotations

from typing import Any

from edge_dsc.networks import load_keras
from engines.packages import load

Array = Any
Model = Any
Layer = Any

PIXELS = 255.0
MIDDLE = 128 / PIXELS  # of the stem's input, which is scaled
LEVELS = 127.0  # positive levels of int8; a scale is the largest magnitude over this
_SMALLEST = 1e-12  # scale of a channel of zeros
# Adam moves every variable by about its learning rate a step, and a range must move by percents, not by 1e-4.
_RANGE_SPEED = 10.0
_RANGE_PERCENTILE = 99.99
_BATCH = 16


def quantized_network(deployed: Model, images: Array) -> Model:
    """Build the trainable INT8 form of a deployed network, with its weights.

    Args:
        deployed: From :func:`edge_dsc.export.folding.fold_network`.
        images: ``uint8 [N, 224, 224, 1]``, a few dozen of all classes, on which the ranges start.

    Returns:
        A ``keras.Model`` of the same input and output: float32 raw grey in, probabilities out. Layers with weights
        keep their names; the layer that rounds the input of ``X`` is ``X_range``, and the stem has none.
    """
    keras = load_keras()
    rounding, weighted = rounding_layer(keras), rounded_weights_layer(keras)
    starts = _starting_ranges(deployed, images)
    x = image = keras.layers.Input(deployed.input_shape[1:], name="image")
    for layer in deployed.layers[1:]:
        if layer.name not in starts:
            x = type(layer).from_config(layer.get_config())(x)
            continue
        first, last = layer is deployed.layers[1], layer is deployed.layers[-1]
        if not first:
            x = rounding(start=starts[layer.name], name=f"{layer.name}_range")(x)
        else:
            # The stem's kernel holds the scale 1/255; at that size no learning rate would fit it and the others.
            x = keras.layers.Rescaling(1 / PIXELS, name="scale")(x)
        new = (
            type(layer).from_config(layer.get_config())
            if last
            else weighted(layer, middle=MIDDLE if first else 0.0, name=layer.name)
        )
        x = new(x)
        values = layer.get_weights()
        new.set_weights([values[0] * PIXELS, *values[1:]] if first else values)
    return keras.Model(image, x, name=deployed.name)


def deployed_weights(quantized: Model, deployed: Model) -> None:
    """Write the weights of the trained INT8 form back into the deployed network, in place, not rounded."""
    for layer in weighted_layers(deployed):
        values = quantized.get_layer(layer.name).get_weights()
        if layer is deployed.layers[1]:
            values = [(values[0].astype("float64") / PIXELS).astype("float32"), *values[1:]]
        layer.set_weights(values)


def learnt_ranges(quantized: Model, deployed: Model) -> dict[str, tuple[float, float]]:
    """Return the range of the input of every layer with weights, by the layer's name, in the network's order.

    A tensor that ReLU left without negative values has 0 as its lowest: an unsigned graph spends all levels on it.
    """
    found = {deployed.layers[1].name: (0.0, PIXELS)}
    negative = False
    for layer in weighted_layers(deployed)[1:]:
        highest = float(quantized.get_layer(f"{layer.name}_range").current())
        found[layer.name] = (-highest if negative else 0.0, highest)
        negative = layer.activation.__name__ == "linear"
    return found


def weighted_layers(deployed: Model) -> list[Layer]:
    """List the layers with weights, in the network's order."""
    return [layer for layer in deployed.layers if layer.weights]


def _starting_ranges(deployed: Model, images: Array) -> dict[str, float]:
    """The 99.99th percentile of the magnitudes at every layer's input; all of the pixels' and the last one's."""
    keras, numpy = load_keras(), load("numpy")
    layers = weighted_layers(deployed)
    inputs = keras.Model(deployed.input, [layer.input for layer in layers[1:]])
    seen: list[list[float]] = []
    for start in range(0, len(images), _BATCH):
        values = inputs(images[start : start + _BATCH].astype("float32"), training=False)
        shares = [_RANGE_PERCENTILE] * (len(values) - 1) + [100.0]
        seen.append([float(numpy.percentile(numpy.abs(v), q)) for v, q in zip(values, shares, strict=True)])
    highest = numpy.mean(seen, axis=0)
    highest[-1] = numpy.max(seen, axis=0)[-1]
    starts = [max(float(value), _SMALLEST) for value in highest]
    return dict(zip([layer.name for layer in layers], [PIXELS, *starts], strict=True))


def _rounded(ops: Any, values: Any) -> Any:
    """Round to whole numbers; the gradient passes as if nothing were rounded."""
    return values + ops.stop_gradient(ops.round(values) - values)


def rounding_layer(keras: Any) -> Any:
    """Make the layer class that rounds a tensor."""
    ops = keras.ops
    base: Any = keras.layers.Layer

    class Rounding(base):  # type: ignore[misc]
        """Round a tensor to 256 levels, symmetric about zero, over a range that is learnt."""

        def __init__(self, *, start: float, name: str) -> None:
            super().__init__(name=name)
            self._start = start

        def build(self, shape: Any) -> None:
            """Make the range's variable: the logarithm of its size against the start."""
            self.moved = self.add_weight(shape=(), initializer="zeros", name="moved")

        def current(self) -> Any:
            """Return the range's upper end."""
            return self._start * ops.exp(_RANGE_SPEED * self.moved)

        def call(self, inputs: Any) -> Any:
            """Round."""
            scale = self.current() / LEVELS
            return _rounded(ops, ops.clip(inputs / scale, -LEVELS - 1, LEVELS)) * scale

    return Rounding


def rounded_weights_layer(keras: Any) -> Any:
    """Make the layer class that rounds its own weights."""
    ops = keras.ops
    base: Any = keras.layers.Layer

    class RoundedWeights(base):  # type: ignore[misc]
        """A convolution or dense layer that computes with its weights rounded per output channel."""

        def __init__(self, layer: Layer, *, middle: float, name: str) -> None:
            super().__init__(name=name)
            self._middle = middle
            self._kind = type(layer).__name__
            self._shapes = [tuple(weight.shape) for weight in layer.weights]
            self._activation = layer.activation
            # A depthwise kernel is [h, w, channels, 1], any other [..., outputs].
            self._within = (
                (0, 1) if self._kind == "DepthwiseConv2D" else tuple(range(len(self._shapes[0]) - 1))
            )

        def build(self, shape: Any) -> None:
            """Make kernel and bias."""
            self.kernel = self.add_weight(shape=self._shapes[0], name="kernel")
            self.bias = self.add_weight(shape=self._shapes[1], name="bias") if len(self._shapes) > 1 else None

        def call(self, inputs: Any) -> Any:
            """Compute with rounded weights; the scale follows the largest weight and takes no gradient."""
            largest = ops.max(ops.abs(self.kernel), axis=self._within, keepdims=True)
            scale = ops.stop_gradient(ops.maximum(largest / LEVELS, _SMALLEST))
            kernel = _rounded(ops, self.kernel / scale) * scale
            if self._kind == "Dense":
                outputs = ops.matmul(inputs, kernel)
            elif self._kind == "DepthwiseConv2D":
                outputs = ops.depthwise_conv(inputs, kernel, padding="same")
            else:
                outputs = ops.conv(inputs, kernel, padding="same")
                # calibration.centering: the INT8 graph subtracts the middle from the pixels and gives it back
                # through the bias with float kernels, and so without their rounding.
                outputs = outputs + self._middle * ops.sum(self.kernel - kernel, axis=self._within)
            return self._activation(outputs if self.bias is None else outputs + self.bias)

    return RoundedWeights
