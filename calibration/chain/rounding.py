"""What INT8 adds to a layer's output, taken out again: by roundings that are learnt, and by the bias.

Each layer of the signed graph is looked at in turn, from the image on, with all layers before it already as they will
be. Its output in the INT8 graph is held against its output in the float network, at sampled places of the calibration
images. A layer's output is linear in its weights, so that sums over those places say everything: a matrix of products
of its inputs, and one of inputs and outputs. No image is needed while roundings are learnt.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calibration.chain import Floats, Grid, Pixels, chunks, map_in_threads, quantized_chain
from calibration.layers import Layer
from calibration.qdq import grid_floor, prepare, takes_bias, weight_scales
from calibration.table import CalibrationTable, Correction
from engines.runtimes import Progress

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Doubles = NDArray[np.float64]
Bits = NDArray[np.bool_]

SEEN_IMAGES = 96
PLACES = 16384  # of a layer's output, over all images
# A layer with fewer places than this many times its inputs keeps its nearest roundings: those that fit a few places
# best say little of others. It holds for the paper's first Dense, which has 6,272 inputs and one place per image.
LEAST_PLACES = 32
FEW_INPUTS = 10  # of so many weights all 1,024 roundings are tried
# Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020 (arXiv 2004.10568),
# equations 21 to 25; iterations are fewer, because each one sees all places at once.
STRETCH = (-0.1, 1.1)
SHARPNESS = (20.0, 2.0)  # beta, from the first iteration with a regulariser to the last
ITERATIONS = 2000
WARM_UP = 0.2  # the share of the iterations without a regulariser
RATE = 0.01
# Weight of the regulariser, first and last, where rounding one weight at random costs about 1. With a weight that grows
# the error that is left was a third less than with any one weight (64 inputs with 12 degrees of freedom).
PULL = (0.1, 10.0)
_CHUNK = 2


@dataclass(frozen=True)
class Reconstruction:
    """What is known of a layer's output, for each of G groups of channels.

    Attributes:
        products: ``float64 [G, inputs, inputs]``: mean products of the inputs as the INT8 graph has them. It and the
            targets are empty where :data:`LEAST_PLACES` were not seen.
        targets: ``float64 [G, inputs, outputs]``: mean products of those inputs and the float network's outputs.
        rounded_mean: ``float64 [G, inputs]``: mean of the inputs in the INT8 graph.
        target_mean: ``float64 [G, outputs]``: mean of the outputs in float, without the bias.
    """

    products: Doubles
    targets: Doubles
    rounded_mean: Doubles
    target_mean: Doubles

    def centred(self) -> Reconstruction:
        """Return the same of values less their means: what is left to the weights when the bias takes the means."""
        inputs, outputs = self.rounded_mean[:, :, None], self.target_mean[:, None, :]
        return Reconstruction(
            products=self.products - inputs * inputs.transpose(0, 2, 1),
            targets=self.targets - inputs * outputs,
            rounded_mean=np.zeros_like(self.rounded_mean),
            target_mean=np.zeros_like(self.target_mean),
        )

    def mean_error(self, weights: Doubles) -> Doubles:
        """Return the mean of float output less INT8 output, ``[G, outputs]``, with ``[G, inputs, outputs]`` weights."""
        found: Doubles = self.target_mean - np.einsum("gi,gio->go", self.rounded_mean, weights)
        return found


def learn_corrections(
    model: ModelProto,
    table: CalibrationTable,
    pixels: Pixels,
    *,
    rounding: str,
    bias: bool,
    progress: Progress | None = None,
) -> dict[str, Correction]:
    """Learn how each INT8 layer of a chain is rounded, and what its bias takes out.

    Args:
        model: The deployed FP32 graph.
        table: Its ranges; without corrections.
        pixels: ``uint8 [N, height, width, 1]``: the calibration images; :data:`SEEN_IMAGES` of them are used, spread
            evenly.
        rounding: One of :data:`calibration.table.ROUNDINGS`.
        bias: Whether the mean error of each output channel goes into the bias.
        progress: Called with (phase, layers done, layers in all).

    Returns:
        By name of the layer, where there is anything to say; nothing of the last one, which stays in float.
    """
    chain, grids = quantized_chain(model, table, signed=True)
    graph = prepare(model, table)
    nodes = {node.name: node for node in graph.graph.node}
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    seen = pixels[np.unique(np.linspace(0, len(pixels) - 1, min(SEEN_IMAGES, len(pixels))).astype(int))]
    plain = list(map_in_threads(lambda part: chain.start(seen[part]), chunks(len(seen), _CHUNK)))
    rounded = list(plain)
    found: dict[str, Correction] = {}
    for index, (layer, grid) in enumerate(zip(chain.layers[:-1], grids, strict=False)):
        window = _Window.of(nodes[layer.name], layer)
        if window is not None:
            weight = onnx.numpy_helper.to_array(stored[layer.weight])
            known = _look(window, weight, plain, rounded, grid)
            shifted = bias and takes_bias(graph, layer)
            correction = _correct(window, layer, weight, known, adaround=rounding == "adaround", bias=shifted)
            if correction != Correction():
                found[layer.name] = correction
                chain.correct(layer.name, correction)
        plain = list(map_in_threads(lambda part: chain.step(index, part, None, int8=False), plain))  # noqa: B023
        rounded = list(map_in_threads(lambda part: chain.step(index, part, grid, int8=True), rounded))  # noqa: B023
        if progress is not None:
            progress("learning roundings", index + 1, len(chain.layers) - 1)
    return found


def _correct(
    window: _Window, layer: Layer, weight: Floats, known: Reconstruction, *, adaround: bool, bias: bool
) -> Correction:
    scales = weight_scales(weight, layer.axis)
    values = window.columns(weight / scales).astype(np.float64)
    steps = window.columns(np.broadcast_to(scales, weight.shape)).astype(np.float64)[:, 0]
    up = None
    if adaround and known.products.size:
        up = round_layer(values, steps, known.centred() if bias else known)
        integers = grid_floor(values) + up
    else:
        integers = np.clip(np.rint(values), -127, 127)
    shift = known.mean_error(integers * steps[:, None]).reshape(-1) if bias else ()
    return Correction(
        bias=tuple(float(np.float32(value)) for value in shift),
        rounded_up="" if up is None else pack_bits(window.restore(up, weight.shape)),
    )


def pack_bits(up: Bits) -> str:
    """Return one bit for each weight as text: eight to a byte, in base64."""
    return base64.b64encode(np.packbits(up).tobytes()).decode()


def round_layer(values: Doubles, steps: Doubles, known: Reconstruction) -> Bits:
    """Return which weights of a layer are rounded up, so that its output errs least.

    Args:
        values: ``[G, inputs, outputs]``: the weights in steps of their grid.
        steps: ``[G, outputs]``: the steps.
        known: What the output shall be.

    Returns:
        ``bool [G, inputs, outputs]``. Of few inputs, such as a depthwise kernel's nine, the best of all roundings. Of
        more, the better of AdaRound and rounding to nearest for each output, after single roundings have been turned
        over as long as that lessens the error.
    """
    targets, floor = known.targets / steps[:, None], grid_floor(values)
    if values.shape[1] <= FEW_INPUTS:
        return try_all(floor, known.products, targets)
    starts = (values - floor >= 0.5, adaround(values, known.products, targets))
    ends = [turn_over(start, floor, known.products, targets) for start in starts]
    errors = [squared_error(floor + end, known.products, targets) for end in ends]
    return np.where((errors[1] < errors[0])[:, None], ends[1], ends[0])


def try_all(floor: Doubles, products: Doubles, targets: Doubles) -> Bits:
    """Return the best of all roundings of each output, of ``[G, inputs, outputs]`` integers below the weights."""
    inputs = floor.shape[1]
    every = (np.arange(2**inputs)[:, None] >> np.arange(inputs)) & 1  # [roundings, inputs]
    own = ((every @ products) * every).sum(axis=2)[:, :, None]
    best = (own + 2 * every @ (products @ floor - targets)).argmin(axis=1)  # [G, outputs]
    found: Bits = every[best].transpose(0, 2, 1).astype(bool)
    return found


def squared_error(integers: Doubles, products: Doubles, targets: Doubles) -> Doubles:
    """Return the mean squared error of each output in its own steps, up to a constant: ``[G, outputs]``."""
    found: Doubles = (integers * (products @ integers - 2 * targets)).sum(axis=1)
    return found


def adaround(values: Doubles, products: Doubles, targets: Doubles) -> Bits:
    """Return which weights AdaRound rounds up.

    Each rounding is relaxed to h in 0..1, a stretched sigmoid of a variable. The variables follow the gradient of the
    output's squared error by Adam; a term ``1 - |2h - 1|^beta`` pushes h to 0 or 1, the harder the smaller beta gets.

    Args:
        values: ``[G, inputs, outputs]``: the weights in steps.
        products: ``[G, inputs, inputs]``.
        targets: ``[G, inputs, outputs]``: in steps.

    Source: Nagel, Amjad, van Baalen, Louizos and Blankevoort, arXiv 2004.10568, equations 21 to 25; Kingma and Ba,
        arXiv 1412.6980, for Adam.
    """
    low, high = STRETCH
    floor = grid_floor(values)
    share = np.clip((values - floor - low) / (high - low), 1e-3, 1 - 1e-3)
    variables = np.log(share / (1 - share)).astype(np.float32)
    # A weight that is rounded at random errs by a twelfth of a squared step. What is left is small: float32 will do.
    noise = np.maximum(np.diagonal(products, axis1=1, axis2=2).mean(axis=1)[:, None, None] / 12, 1e-12)
    start = (2 * (products @ floor - targets) / noise).astype(np.float32)
    curvature = (2 * products / noise).astype(np.float32)
    first, second = np.zeros_like(variables), np.zeros_like(variables)
    warm = int(WARM_UP * ITERATIONS)
    for step in range(1, ITERATIONS + 1):
        sigmoid = 1 / (1 + np.exp(-variables))
        stretched = sigmoid * (high - low) + low
        soft = np.clip(stretched, 0, 1)
        gradient = start + curvature @ soft
        if step > warm:
            done = (step - warm) / (ITERATIONS - warm)
            beta = SHARPNESS[0] + (SHARPNESS[1] - SHARPNESS[0]) * done
            apart = 2 * soft - 1
            pull = PULL[0] * (PULL[1] / PULL[0]) ** done
            gradient -= pull * 2 * beta * np.sign(apart) * np.abs(apart) ** (beta - 1)
        gradient *= np.where((stretched > 0) & (stretched < 1), sigmoid * (1 - sigmoid) * (high - low), 0)
        first += 0.1 * (gradient - first)
        second += 0.001 * (gradient**2 - second)
        variables -= RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    found: Bits = variables > 0
    return found


def turn_over(up: Bits, floor: Doubles, products: Doubles, targets: Doubles) -> Bits:
    """Turn single roundings over, the best one of each output at a time, as long as the error falls."""
    up = up.copy()
    own = np.diagonal(products, axis1=1, axis2=2)[:, :, None]
    for _ in range(up.shape[1] * 4):
        slope = products @ (floor + up) - targets
        change = own + 2 * np.where(up, -1, 1) * slope
        best = change.argmin(axis=1, keepdims=True)
        falls = np.take_along_axis(change, best, axis=1) < -1e-12 * np.abs(own).max()
        if not falls.any():
            break
        np.put_along_axis(up, best, np.take_along_axis(up, best, axis=1) ^ falls, axis=1)
    return up


@dataclass(frozen=True)
class _Window:
    """How the inputs of one place of a layer's output are taken from its input.

    Attributes:
        groups: Groups of channels that see nothing of each other.
        kernel: Height and width; None for a dense layer.
        strides: Of the places, down and across.
        pads: Zeros around the input: top, left, bottom, right.
        dilations: Of the kernel's taps.
        axis: The weight's axis of outputs.
    """

    groups: int = 1
    kernel: tuple[int, int] | None = None
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    axis: int = 1

    @classmethod
    def of(cls, node: NodeProto, layer: Layer) -> _Window | None:
        """Return a layer's window; None where its padding is not spelled out, or its inputs are no plain rows."""
        given: dict[str, Any] = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        if layer.op != "Conv":
            plain = given.get("alpha", 1.0) == 1.0 and not given.get("transA", 0) and len(layer.shape) == 2
            return cls(axis=layer.axis) if plain else None
        if given.get("auto_pad", b"NOTSET") != b"NOTSET" or len(layer.shape) != 4:
            return None
        return cls(
            groups=given.get("group", 1),
            kernel=(layer.shape[2], layer.shape[3]),
            strides=tuple(given.get("strides", (1, 1))),
            pads=tuple(given.get("pads", (0, 0, 0, 0))),
            dilations=tuple(given.get("dilations", (1, 1))),
            axis=0,
        )

    def columns(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Return a weight as ``[G, inputs, outputs]``."""
        rows = np.moveaxis(weight, self.axis, 0)
        found: NDArray[Any] = rows.reshape(self.groups, len(rows) // self.groups, -1).transpose(0, 2, 1)
        return found

    def restore(self, columns: Bits, shape: Sequence[int]) -> Bits:
        """Return ``[G, inputs, outputs]`` in the shape of the weight."""
        rows = [shape[self.axis], *(size for axis, size in enumerate(shape) if axis != self.axis)]
        return np.moveaxis(columns.transpose(0, 2, 1).reshape(rows), 0, self.axis)

    def taps(self, values: Floats) -> Floats:
        """Return a view of all places' inputs: ``[n, places down, places across, C, height, width]``."""
        assert self.kernel is not None, "asked of convolutions"
        top, left, bottom, right = self.pads
        (down, across), (far, wide) = self.strides, self.dilations
        padded = np.pad(values, ((0, 0), (0, 0), (top, bottom), (left, right)))
        spans = tuple((size - 1) * apart + 1 for size, apart in zip(self.kernel, self.dilations, strict=True))
        every = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=(2, 3))
        found: Floats = every[:, :, ::down, ::across, ::far, ::wide].transpose(0, 2, 3, 1, 4, 5)
        return found

    def rows(self, values: Floats, each: int, seed: int) -> Floats:
        """Return the inputs of up to ``each`` places of every image, ``[G, P, inputs]``; equal seeds, equal places."""
        if self.kernel is None:
            return values.reshape(1, -1, values.shape[-1])
        taps = self.taps(values)
        images, down, across = taps.shape[:3]
        if each >= down * across:
            taken = taps.reshape(images * down * across, self.groups, -1)
        else:
            rng = np.random.default_rng(seed)
            places = rng.integers(0, down * across, (images, each))
            which = np.arange(images)[:, None]
            taken = taps[which, places // across, places % across].reshape(images * each, self.groups, -1)
        found: Floats = taken.transpose(1, 0, 2)
        return found


def _look(
    window: _Window, weight: Floats, plain: Sequence[Floats], rounded: Sequence[Floats], grid: Grid
) -> Reconstruction:
    """Sum up what a layer gets and what it shall give; over chunks of images."""
    each = -(-PLACES // sum(map(len, plain)))
    columns = window.columns(weight)

    def look(place: int) -> tuple[Floats, Floats]:
        inputs = window.rows(plain[place], each, place)
        integers = np.clip(
            np.rint(window.rows(rounded[place], each, place) / np.float32(grid.scale)), -128, 127
        )
        return integers * np.float32(grid.scale), inputs @ columns

    seen = list(map_in_threads(look, range(len(plain))))
    inputs = np.concatenate([each for each, _ in seen], axis=1)
    outputs = np.concatenate([each for _, each in seen], axis=1)
    places, turned = inputs.shape[1], inputs.transpose(0, 2, 1)
    wide = places < LEAST_PLACES * inputs.shape[2]
    empty = np.zeros((len(inputs), 0, 0))
    return Reconstruction(
        products=empty if wide else (turned @ inputs).astype(np.float64) / places,
        targets=empty if wide else (turned @ outputs).astype(np.float64) / places,
        rounded_mean=inputs.mean(axis=1, dtype=np.float64),
        target_mean=outputs.mean(axis=1, dtype=np.float64),
    )
