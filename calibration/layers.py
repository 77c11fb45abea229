"""Which layers of a deployed graph can run in INT8, where its pairs stand, and which tensors need a range for that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.errors import ArtefactError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

WEIGHTED_OPS = ("Conv", "MatMul", "Gemm")
# Ops that hand values on unchanged: a raw pixel stays a raw pixel behind them.
# Add and Pad of constants are how calibration.rewrites shifts them.
_VALUE_KEEPING = ("Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Add", "Pad")
SHIFTED = ".shifted"  # how rewrites name the pixels that they have shifted: any other sum is one of the network's own
# Ops behind which a tensor holds values of the one before, and no others: one range serves both.
_SELECTING = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")
# Activations that a runtime computes with the layer before them, or leaves to the grid behind them.
_ABSORBED = ("Relu", "Clip")
# Below so many channels TensorRT's INT8 convolutions pay only where the sizes suit them; see suits_int8.
_FEW_CHANNELS = 16


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer with weights.

    Attributes:
        name: Name of its node.
        op: ``Conv``, ``MatMul`` or ``Gemm``.
        input: The activation tensor it takes; the one that gets a range.
        weight: Its weight, an initializer.
        shape: The weight's shape.
        axis: The weight's axis of output channels.
        groups: Of a convolution; else 1.
        raw_pixels: Whether its input is the image's pixels, 0..255.
        last: The last one in the graph: the logits, which stay in floating point.
    """

    name: str
    op: str
    input: str
    weight: str
    shape: tuple[int, ...]
    axis: int
    groups: int
    raw_pixels: bool
    last: bool

    @property
    def depthwise(self) -> bool:
        """Whether it is a grouped convolution."""
        return self.groups > 1

    def bits(self, weight_bits: int) -> int:
        """Return the bits of its integer weights, where those whose products are added in 16 bits have ``weight_bits``.

        Kernels that do so add products of neighbouring input channels. A convolution of one channel, and a depthwise
        one with as many outputs as inputs, have no such pairs: OpenVINO's kernels sum them exactly on a processor
        without VNNI. (A depthwise one with more outputs goes through another kernel, which adds neighbouring pixels.)
        """
        alone = self.op == "Conv" and self.shape[1] == 1 and self.groups in (1, self.shape[0])
        return 8 if alone else weight_bits


def find_layers(model: ModelProto) -> tuple[Layer, ...]:
    """List a graph's layers with weights, in the order of the graph.

    Raises:
        ArtefactError: A layer has no name of its own, or the graph has none.
    """
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    nodes = [node for node in model.graph.node if node.op_type in WEIGHTED_OPS and node.input[1] in weights]
    if not nodes or len({node.name for node in nodes} - {""}) != len(nodes):
        raise ArtefactError(
            f"{model.graph.name!r} has {len(nodes)} layers with weights, not all with a name of their own",
            remedy="export it again: edge-dsc export RUN",
        )
    return tuple(
        Layer(
            name=node.name,
            op=node.op_type,
            input=node.input[0],
            weight=node.input[1],
            shape=weights[node.input[1]],
            axis=_output_axis(node),
            groups=_attribute(node, "group", 1),
            raw_pixels=_is_raw(node.input[0], producers),
            last=node is nodes[-1],
        )
        for node in nodes
    )


def is_chain(model: ModelProto) -> bool:
    """Whether one node follows the other: each takes one computed tensor, and each tensor goes to one node."""
    stored = {tensor.name for tensor in model.graph.initializer}
    taken = [[name for name in node.input if name and name not in stored] for node in model.graph.node]
    names = [name for each in taken for name in each]
    return all(len(each) == 1 for each in taken) and len(set(names)) == len(names)


def quantizable_layers(model: ModelProto) -> tuple[Layer, ...]:
    """List the layers that INT8 is meant for: all but the last, whose outputs are the logits.

    Of a graph that is no chain, layers that do not suit INT8 are left out as well: :func:`suits_int8`.
    """
    chain = is_chain(model)
    return tuple(layer for layer in find_layers(model) if not layer.last and (chain or suits_int8(layer)))


def suits_int8(layer: Layer) -> bool:
    """Whether a layer has sizes that TensorRT computes well in INT8.

    With fewer than 16 channels on either side, an ordinary convolution needs a multiple of 8 on one side, 16 on one
    side (the first layer excepted) and a square kernel; a grouped one a multiple of 8 outputs and kernels from 3x3 on.

    Source: NVIDIA Model Optimizer, ``modelopt.onnx.quantization``, ``find_nodes_from_convs_to_exclude``.
    """
    if layer.op != "Conv":
        return True
    outputs, inputs, *kernel = layer.shape
    if min(outputs, inputs) >= _FEW_CHANNELS:
        return True
    if layer.depthwise:
        return outputs % 8 == 0 and min(kernel) >= 3
    even = outputs % 8 == 0 or inputs % 8 == 0
    enough = layer.raw_pixels or max(outputs, inputs) >= _FEW_CHANNELS
    return even and enough and len(set(kernel)) == 1


def tensors_to_calibrate(model: ModelProto) -> tuple[str, ...]:
    """List the tensors that need a range, sorted.

    In a chain the input of every layer with weights. The last layer's is among them: a runtime that fuses
    ``Dense + ReLU + Quantize`` wants its range. Elsewhere every tensor that gets a pair in either kind of graph.
    """
    if is_chain(model):
        return tuple(sorted({layer.input for layer in find_layers(model)}))
    layers = quantizable_layers(model)
    return tuple(sorted({*paired_tensors(model, layers, signed=False), *(layer.input for layer in layers)}))


def paired_tensors(model: ModelProto, layers: Collection[Layer], *, signed: bool) -> tuple[str, ...]:
    """List the activations that get a Q/DQ pair where ``layers`` run in INT8, in the order of the graph.

    The input of each of them, and:

    - of a residual sum whose one input is the output of such a layer, the other input. TensorRT computes that sum
      with the layer, and the type of the other input decides the type that it gives. Where two layers meet, the one
      with the longer way behind it is computed with the sum.
    - in an unsigned graph also the end of each layer (behind its ReLU): ONNX Runtime has integer kernels only for
      layers whose output is quantised. In a chain the input of the next layer ends it, one in float included.

    Args:
        model: The graph.
        layers: The layers that run in INT8.
        signed: Whether the graph is for TensorRT.

    Source: NVIDIA TensorRT documentation, "Working with Quantized Types", Q/DQ placement (residual inputs of sums);
        onnxruntime, ``qdq_selectors.cc`` (ConvNodeGroupSelector).
    """
    if is_chain(model):
        return tuple(layer.input for layer in (layers if signed else find_layers(model)))
    graph = _Wiring(model)
    chosen = {layer.name for layer in layers}
    found = {layer.input for layer in layers}
    found.update(other for name, other in graph.sums() if name in chosen)
    if not signed:
        found.update(graph.end_of(name) for name in chosen)
    return tuple(name for name in graph.depths if name in found)


def share_ranges(
    model: ModelProto, ranges: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Give tensors that hold the same values one range: before and behind a pool, and all that one Concat joins.

    A runtime then moves integers from one to the other without rounding them again. The common range holds each.

    Args:
        model: The graph.
        ranges: ``(lowest, highest)`` of its tensors.
    """
    source = {name: name for name in ranges}

    def root(name: str) -> str:
        while source.setdefault(name, name) != name:
            name = source[name]
        return name

    for node in model.graph.node:
        joined = node.op_type == "Concat" and node.output[0] in ranges
        if joined or node.op_type in _SELECTING:
            for name in node.input if joined else node.input[:1]:
                source[root(name)] = root(node.output[0])
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, bounds in ranges.items():
        groups[root(name)].append(bounds)
    common = {
        key: (min(low for low, _ in each), max(high for _, high in each)) for key, each in groups.items()
    }
    return {name: common[root(name)] for name in ranges}


def followers(model: ModelProto, layers: Sequence[Layer]) -> list[tuple[int, int]]:
    """Return the places of two of ``layers`` each, the second of which takes what the first gives.

    Between them stand nodes without weights alone. In a chain: (0, 1), (1, 2), ...
    """
    places = {layer.name: place for place, layer in enumerate(layers)}
    names = {layer.name for layer in find_layers(model)}
    before: dict[str, frozenset[int]] = {}  # by tensor
    found = []
    for node in model.graph.node:
        givers = frozenset[int]().union(*(before.get(name, frozenset()) for name in node.input))
        if node.name in places:
            found += [(place, places[node.name]) for place in sorted(givers)]
        own = frozenset({places[node.name]} if node.name in places else ())
        before.update(dict.fromkeys(node.output, own if node.name in names else givers))
    return found


def raw_pixel_tensors(model: ModelProto) -> frozenset[str]:
    """Name the tensors that hold the image's pixels 0..255: their range is known, not calibrated."""
    return frozenset(layer.input for layer in find_layers(model) if layer.raw_pixels)


def unclipped_tensors(model: ModelProto) -> frozenset[str]:
    """Name the tensors whose range is never cut: the pixels, and the input of the last layer.

    The last layer runs in floating point; values cut off at its input would move the logits and gain nothing.
    It also has the fewest values: on a trained network onnxruntime's entropy threshold for it fell to 3 % of
    the largest value, and accuracy by 10 points.
    """
    return raw_pixel_tensors(model) | {layer.input for layer in find_layers(model) if layer.last}


class _Wiring:
    """Who makes and who takes each tensor of a graph, and how long the way to it is.

    Attributes:
        depths: Nodes on the longest way from the image to each tensor that is computed, in the order of the graph.
    """

    def __init__(self, model: ModelProto) -> None:
        self._nodes = list(model.graph.node)
        self._layers = {layer.name for layer in find_layers(model)}
        self._producers = {name: node for node in self._nodes for name in node.output}
        self._takers: dict[str, list[NodeProto]] = defaultdict(list)
        self.depths: dict[str, int] = {}
        for node in self._nodes:
            depth = 1 + max((self.depths.get(name, 0) for name in node.input), default=0)
            self.depths.update(dict.fromkeys(node.output, depth))
            for name in node.input:
                self._takers[name].append(node)

    def sums(self) -> Iterator[tuple[str, str]]:
        """Yield the name of each layer that a residual sum is computed with, and the sum's other input."""
        for node in self._nodes:
            if node.op_type != "Add" or not all(name in self.depths for name in node.input):
                continue
            ends = [place for place in (0, 1) if self._ends_in(node.input[place], node)]
            if ends:
                place = max(ends, key=lambda place: self.depths[node.input[place]])
                yield self._producers[node.input[place]].name, node.input[1 - place]

    def end_of(self, layer: str) -> str:
        """Return the tensor at which what a runtime computes with a layer ends: its bias and ReLU included."""
        node = next(node for node in self._nodes if node.name == layer)
        name: str = node.output[0]
        biased = self._only_taker(name) if node.op_type == "MatMul" else None
        if biased is not None and biased.op_type == "Add" and not set(biased.input) <= set(self.depths):
            name = biased.output[0]
        taker = self._only_taker(name)
        return taker.output[0] if taker is not None and taker.op_type in _ABSORBED else name

    def _ends_in(self, tensor: str, node: NodeProto) -> bool:
        return self._producers[tensor].name in self._layers and self._only_taker(tensor) is node

    def _only_taker(self, tensor: str) -> NodeProto | None:
        takers = self._takers[tensor]
        return takers[0] if len(takers) == 1 else None


def _is_raw(tensor: str, producers: dict[str, NodeProto]) -> bool:
    while tensor in producers and producers[tensor].op_type in _VALUE_KEEPING:
        if producers[tensor].op_type == "Add" and not tensor.endswith(SHIFTED):
            return False
        tensor = producers[tensor].input[0]
    return tensor not in producers


def _output_axis(node: NodeProto) -> int:
    if node.op_type == "Conv":
        return 0
    return 0 if _attribute(node, "transB", 0) else 1


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)
