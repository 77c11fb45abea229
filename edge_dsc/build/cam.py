"""``build-engine --cam``: class activation maps as a second output of the engine.

From the last feature map on, the networks consist of pooling, dense layers and ReLU. At one input ReLU and max-pooling
are a fixed selection, so the score of a class (its logit) is a linear function of the values that were pooled:

    logit of a class = sum over channels and places of (value x effective weight) + a constant of this input

The effective weight is the product of the dense layers' weights with the rows of the units that ReLU has set to 0 left
out. The map holds these products, summed over the channels, one number for each place: the evidence for the class that
lies there. Nothing is estimated; with one dense layer after a global average it is the classic class activation map.

The nodes are added after the graph has its precision, so that they see the very weights that the engine computes with.

The first dense layer's weights are the largest of the network, and reading them is what they cost. In a graph in FP32
they are read once: the layer is computed place by place, and its output and the map are both made of these parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx.reference
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from edge_dsc.build.front import fresh_name, store_constant
from engines.contract import CAM_OUTPUT, ModelContract
from engines.errors import UsageError
from engines.graph import replace_contract

_SAME_VALUES = frozenset({"Cast", "DequantizeLinear", "Dropout", "Identity", "QuantizeLinear"})
_SHAPING = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_AVERAGES = frozenset({"GlobalAveragePool", "ReduceMean"})
_NHWC = [0, 2, 3, 1]


@dataclass(frozen=True, kw_only=True)
class _Dense:
    """A dense layer of the head.

    Attributes:
        node: Its node.
        weight: ``[inputs, outputs]``, as the engine computes with it.
        input: The tensor that it takes, ``[N, inputs]``.
        gate: The output of the ReLU before it; None without one.
    """

    node: NodeProto
    weight: NDArray[np.floating[Any]]
    input: str
    gate: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Features:
    """What the head begins with.

    Attributes:
        tensor: The values, ``[N, channels, height, width]`` or flattened.
        channels: Channels.
        height: Height of the map.
        width: Width of the map.
        last: Whether the channels are the last axis, not the second.
        averaged: Whether the first dense layer takes their average over the map.
    """

    tensor: str
    channels: int
    height: int
    width: int
    last: bool
    averaged: bool

    @property
    def shape(self) -> list[int]:
        """Shape of one image's values with its channels where they are."""
        sides = [self.height, self.width]
        return [*sides, self.channels] if self.last else [self.channels, *sides]


def add_cam(graph: ModelProto, contract: ModelContract) -> tuple[ModelProto, ModelContract]:
    """Return a graph that gives class activation maps too, and its contract.

    Args:
        graph: A deployed graph in any precision; it is not changed.
        contract: Its contract, without maps.

    Returns:
        A graph with the second output :data:`engines.contract.CAM_OUTPUT`, ``float32 [N, classes, height, width]``.
        One of its places is one place of the last pooling, or of the map that is averaged.

    Raises:
        UsageError: The network does not end in pooling, dense layers, ReLU and softmax alone.

    Source:
        Zhou, Khosla, Lapedriza, Oliva and Torralba, Learning Deep Features for Discriminative Localization, CVPR 2016,
        for one dense layer; for ReLU between them the gradient times the input of Shrikumar, Greenside, Shcherbina and
        Kundaje, Not Just a Black Box, arXiv 1605.01713, which for piecewise linear layers is exact up to the constant.
    """
    if any(CAM_OUTPUT in node.output for node in graph.graph.node):
        raise UsageError(f"a tensor of the network is called {CAM_OUTPUT!r}", remedy="build without --cam")
    head = _Head(graph, contract.output_name)
    layers = head.dense_layers()
    features = head.features(layers[0].input)
    made = msgspec.structs.replace(contract, cam=(features.height, features.width))
    writer = _Writer(replace_contract(graph, made), head.element_type(features.tensor))
    behind, classes = writer.weights_behind(layers), len(contract.labels)
    if writer.can_split(layers[0], features):
        evidence = writer.split(layers[0], features, behind, classes)
    else:
        evidence = writer.evidence(features, writer.effective_weights(layers[0], behind), classes)
    writer.give(evidence, [classes, features.height, features.width])
    onnx.checker.check_model(writer.model)
    return writer.model, made


class _Head:
    """Reads a graph backwards from its probabilities to its last feature map."""

    def __init__(self, model: ModelProto, output: str) -> None:
        self._output = output
        self._producers = {name: node for node in model.graph.node for name in node.output}
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self._types = {
            value.name: value.type.tensor_type
            for value in (*inferred.value_info, *inferred.output, *inferred.input)
        }

    def dense_layers(self) -> list[_Dense]:
        """Return the dense layers, the first one first.

        Raises:
            UsageError: Something else stands between them.
        """
        softmax = self._producer(self._same(self._output))
        if softmax is None or softmax.op_type != "Softmax":
            raise _no_cam(f"it ends in {_words(softmax)}, not in Softmax")
        found: list[_Dense] = []
        tensor = softmax.input[0]
        while True:
            tensor = self._same(tensor)
            node = self._producer(tensor)
            computed = [name for name in node.input if self._constant(name) is None] if node else []
            if node is not None and node.op_type in ("MatMul", "Gemm"):
                found.insert(0, _Dense(node=node, weight=self._weight(node), input=node.input[0]))
            elif node is not None and node.op_type == "Relu" and found:
                found[0] = replace(found[0], gate=tensor)
            elif found and (node is None or node.op_type in _SHAPING | _AVERAGES):
                return found
            elif node is None or node.op_type != "Add" or len(computed) != 1:
                raise _no_cam(f"its head holds {_words(node)}")
            tensor = computed[0]

    def features(self, taken: str) -> _Features:
        """Return what the first dense layer's input is made of.

        Raises:
            UsageError: It is no feature map.
        """
        tensor, turned = self._same(taken), False
        while (node := self._producer(tensor)) is not None:
            if node.op_type in _AVERAGES:
                return self._averaged(node)
            if node.op_type == "Transpose":
                if turned or list(_attribute(node, "perm", [])) != _NHWC:
                    raise _no_cam(f"{_words(node)} moves the axes of its features")
                turned = True
            elif node.op_type not in _SHAPING or len(self._shape(tensor)) == 4:
                break
            tensor = self._same(node.input[0])
        shape = self._shape(tensor)
        if len(shape) != 4 or 0 in shape[1:]:
            raise _no_cam("its dense layers take no feature map of a known size")
        channels, height, width = shape[1:]
        return _Features(
            tensor=taken, channels=channels, height=height, width=width, last=turned, averaged=False
        )

    def element_type(self, tensor: str) -> int:
        """Return the element type of a tensor; float32 where it is not known."""
        found = self._types.get(tensor)
        return int(found.elem_type) if found is not None and found.elem_type else TensorProto.FLOAT

    def _averaged(self, node: NodeProto) -> _Features:
        """Return the map that a global average is of."""
        shape = self._shape(node.input[0])
        axes = [2, 3]
        if node.op_type == "ReduceMean":
            given = self._constant(node.input[1]) if len(node.input) > 1 else None
            named = _attribute(node, "axes", []) if given is None else given.tolist()
            axes = sorted(axis % 4 for axis in named)
        if len(shape) != 4 or 0 in shape[1:] or axes not in ([1, 2], [2, 3]):
            raise _no_cam(f"{_words(node)} is no average over a feature map of a known size")
        last = axes == [1, 2]
        (channels,) = (shape[axis] for axis in (1, 2, 3) if axis not in axes)
        height, width = (shape[axis] for axis in axes)
        return _Features(
            tensor=node.input[0], channels=channels, height=height, width=width, last=last, averaged=True
        )

    def _weight(self, node: NodeProto) -> NDArray[np.floating[Any]]:
        weight = self._constant(node.input[1])
        plain = _attribute(node, "alpha", 1.0) == 1.0 and not _attribute(node, "transA", 0)
        if weight is None or weight.ndim != 2 or not plain:
            raise _no_cam(f"{_words(node)} is no dense layer with weights of its own")
        found: NDArray[np.floating[Any]] = weight.T if _attribute(node, "transB", 0) else weight
        return found

    def _constant(self, name: str) -> NDArray[Any] | None:
        """Return a stored tensor, also where it is rounded or moved on its way; None of what is computed."""
        if name in self._stored:
            return onnx.numpy_helper.to_array(self._stored[name])
        node = self._producer(name)
        if (
            node is None
            or node.op_type not in _SAME_VALUES | _SHAPING
            or self._constant(node.input[0]) is None
        ):
            return None
        feed = {one: self._constant(one) for one in node.input if one}
        (found,) = onnx.reference.ReferenceEvaluator(node).run(None, feed)
        return np.asarray(found)

    def _same(self, tensor: str) -> str:
        """Go up past what changes at most the type of the values."""
        while (node := self._producer(tensor)) is not None and node.op_type in _SAME_VALUES:
            tensor = node.input[0]
        return tensor

    def _producer(self, tensor: str) -> NodeProto | None:
        return self._producers.get(tensor)

    def _shape(self, tensor: str) -> list[int]:
        found = self._types.get(tensor)
        return [int(dim.dim_value) for dim in found.shape.dim] if found is not None else []


@dataclass
class _Writer:
    """Adds nodes to a graph, in the element type of its features.

    Attributes:
        model: The graph, changed in place.
        kind: The element type.
    """

    model: ModelProto
    kind: int
    _dtype: Any = field(init=False)

    def __post_init__(self) -> None:
        """Note numpy's name of the type."""
        self._dtype = onnx.helper.tensor_dtype_to_np_dtype(self.kind)

    def weights_behind(self, layers: Sequence[_Dense]) -> str | None:
        """Return the product of the weights behind the first dense layer that this input selects.

        Returns:
            ``[classes, units]``, or ``[N, classes, units]`` where ReLU selects; None with one dense layer.
        """
        product: str | None = None
        for layer in reversed(layers[1:]):
            weights = self._store("weights", layer.weight.T)
            product = weights if product is None else self._add("MatMul", "effective", product, weights)
            if layer.gate is not None:
                gate = self._add("Unsqueeze", "on", self._add("Sign", "units", layer.gate), self._axes(1))
                product = self._add("Mul", "selected", product, gate)
        return product

    def effective_weights(self, first: _Dense, behind: str | None) -> str:
        """Return ``[classes, inputs of the head]``, or ``[N, classes, inputs]`` where ReLU selects."""
        weights = self._store("weights", first.weight.T)
        return weights if behind is None else self._add("MatMul", "effective", behind, weights)

    def can_split(self, first: _Dense, features: _Features) -> bool:
        """Whether the first dense layer can be computed place by place: in FP32, with weights that are not rounded.

        In FP16 the parts would be rounded before they are summed up, and an INT8 layer is left to its integer kernel.
        """
        stored = {tensor.name for tensor in self.model.graph.initializer}
        plain = _attribute(first.node, "beta", 1.0) == 1.0 and first.node.input[1] in stored
        return self.kind == TensorProto.FLOAT and plain and not features.averaged

    def split(self, first: _Dense, features: _Features, behind: str | None, classes: int) -> str:
        """Compute the first dense layer as a sum over places, and the evidence of what is summed up.

        Returns:
            ``[N, classes, height, width]``.
        """
        places, channels = features.height * features.width, features.channels
        flat = [places, channels] if features.last else [channels, places]
        weights = first.weight.reshape(*flat, -1)
        nodes = self.model.graph.node
        place, count = list(nodes).index(first.node), len(nodes)
        values = self._reshape("values", first.input, [-1, *flat])
        values = self._add("Transpose", "places", values, perm=[1, 0, 2] if features.last else [2, 0, 1])
        kernel = self._store("kernel", weights if features.last else weights.transpose(1, 0, 2))
        parts = self._add("MatMul", "parts", values, kernel)  # [places, N, units]
        nodes[-1].name = first.node.name  # it is that layer
        total = self._add("ReduceSum", "total", parts, self._axes(0), keepdims=0)
        if len(first.node.input) > 2:
            self._add("Add", "biased", total, first.node.input[2])
        nodes[-1].output[:] = first.node.output
        made = list(nodes)[count:]
        del nodes[count:]
        del nodes[place]
        for offset, node in enumerate(made):
            nodes.insert(place + offset, node)
        self._drop(first.node.input[1])
        parts = self._add("Transpose", "units_first", parts, perm=[1, 2, 0])
        evidence = parts if behind is None else self._add("MatMul", "products", behind, parts)
        return self._reshape("evidence", evidence, [-1, classes, features.height, features.width])

    def evidence(self, features: _Features, weights: str, classes: int) -> str:
        """Return value x effective weight, summed over the channels: ``[N, classes, height, width]``."""
        places = features.height * features.width
        if not features.averaged:
            values = self._reshape("values", features.tensor, [-1, 1, *features.shape])
            planes = self._reshape("planes", weights, [-1, classes, *features.shape])
            product = self._add("Mul", "products", values, planes)
            return self._add(
                "ReduceSum", "evidence", product, self._axes(4 if features.last else 2), keepdims=0
            )
        flat = [places, features.channels] if features.last else [features.channels, places]
        values = self._reshape("values", features.tensor, [-1, *flat])
        if features.last:
            values = self._add("Transpose", "planes", values, perm=[0, 2, 1])
        share = self._store("share", np.array(1 / places))
        product = self._add("MatMul", "products", self._add("Mul", "average", weights, share), values)
        return self._reshape("evidence", product, [-1, classes, features.height, features.width])

    def give(self, evidence: str, shape: Sequence[int]) -> None:
        """Make a tensor the graph's second output, in float32."""
        node = onnx.helper.make_node("Cast", [evidence], [CAM_OUTPUT], name=CAM_OUTPUT, to=TensorProto.FLOAT)
        if self.kind == TensorProto.FLOAT:
            node = self.model.graph.node[-1]
            node.output[:] = [CAM_OUTPUT]
        else:
            self.model.graph.node.append(node)
        batch = self.model.graph.output[0].type.tensor_type.shape.dim[0].dim_param or "N"
        self.model.graph.output.append(
            onnx.helper.make_tensor_value_info(CAM_OUTPUT, TensorProto.FLOAT, [batch, *shape])
        )

    def _add(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        made = fresh_name(self.model, f"{CAM_OUTPUT}_{name}")
        self.model.graph.node.append(onnx.helper.make_node(op, inputs, [made], name=made, **attributes))
        return made

    def _reshape(self, name: str, tensor: str, shape: Sequence[int]) -> str:
        wanted = store_constant(self.model, f"{CAM_OUTPUT}_{name}.shape", np.array(shape, np.int64))
        return self._add("Reshape", name, tensor, wanted)

    def _drop(self, constant: str) -> None:
        """Remove a constant that no node takes any more."""
        if any(constant in node.input for node in self.model.graph.node):
            return
        stored = self.model.graph.initializer
        stored.remove(next(tensor for tensor in stored if tensor.name == constant))

    def _store(self, name: str, value: NDArray[np.floating[Any]]) -> str:
        return store_constant(self.model, f"{CAM_OUTPUT}_{name}.value", value.astype(self._dtype))

    def _axes(self, axis: int) -> str:
        return store_constant(self.model, f"{CAM_OUTPUT}_axis", np.array([axis], np.int64))


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    found = next((one for one in node.attribute if one.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def _words(node: NodeProto | None) -> str:
    return "no computed tensor" if node is None else f"{node.name or 'a node'} ({node.op_type})"


def _no_cam(why: str) -> UsageError:
    return UsageError(
        f"no class activation maps of this network: {why}",
        remedy="maps need an end of pooling, dense layers with ReLU, and softmax; build without --cam",
    )
