"""The deployed graph of both networks, written around their weights.

It depends on no converter: one layer follows the other, named after what it is, and no node is there for its own sake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from edge_dsc.networks import BLOCKS
from engines.contract import ModelContract
from engines.cpu.ort import open_session

OPSET = 18
IR_VERSION = 9
_CHANNELS, _DENSE_UNITS = 32, 64
_RIDGE = 1e-2  # penalty on the weights of the fitted layer, of features that spread by 1
_SHARPNESS = 8.0  # of the fitted logits: the network is to be sure of most answers, as a trained one is


def chain_of(architecture: str) -> list[tuple[str, str]]:
    """Return (name, op) of the compute nodes of a deployed network, from stem to softmax."""
    chain = [("stem", "Conv"), ("stem_relu", "Relu")]
    for block in range(1, BLOCKS + 1):
        convolutions = ("depthwise", "pointwise") if architecture == "dsc" else ("conv",)
        chain.append((f"block{block}_pool", "MaxPool"))
        chain += [(f"block{block}_{name}", "Conv") for name in convolutions]
        chain.append((f"block{block}_relu", "Relu"))
    chain += [("pool", "MaxPool"), ("dense", "MatMul"), ("dense_relu", "Relu"), ("logits", "MatMul")]
    return [*chain, ("probabilities", "Softmax")]


def assemble_network(
    contract: ModelContract, weights: Sequence[Sequence[NDArray[np.float32]]], metadata: dict[str, str]
) -> ModelProto:
    """Write the deployed graph.

    Args:
        contract: Becomes the graph's input and output, and its metadata; its architecture says which network it is.
        weights: Kernel and bias of every node of :func:`chain_of`, none for those that have none. Convolutions
            ``[outputs, inputs per group, side, side]``; the first dense layer as Keras flattens, ``[H, W, C]``.
        metadata: More metadata properties.

    Returns:
        A checked model: ``uint8 [N, 224, 224, 1]`` in, ``float32 [N, classes]`` out, Cast first (TensorRT takes a
        uint8 input only so), static Reshapes, no Transpose.
    """
    graph = _Graph(contract.input_name)
    graph.add("Cast", "pixels", to=onnx.TensorProto.FLOAT)
    graph.add("Reshape", "planes", ("shape", np.array([-1, 1, contract.height, contract.width], np.int64)))
    channels = 1
    for (name, op), found in zip(chain_of(contract.architecture), weights, strict=True):
        if op == "Conv":
            channels = int(found[0].shape[0])
            _add_convolution(graph, name, found)
        elif op == "MaxPool":
            graph.add("MaxPool", name, kernel_shape=[2, 2], strides=[2, 2])
        elif op == "MatMul":
            _add_dense(graph, name, found, channels)
        elif op == "Relu":
            graph.add("Relu", name)
        else:
            graph.add("Softmax", contract.output_name, axis=1)
    return _finish_model(graph, contract, metadata)


@dataclass
class _Graph:
    """A chain of nodes under construction; every node has one data output, named after it."""

    tensor: str
    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)

    def add(self, op: str, name: str, *constants: tuple[str, NDArray[Any]], **attributes: Any) -> None:
        inputs = [self.tensor]
        for suffix, value in constants:
            self.constants.append(onnx.numpy_helper.from_array(value, f"{name}.{suffix}"))
            inputs.append(f"{name}.{suffix}")
        self.nodes.append(onnx.helper.make_node(op, inputs, [name], name=name, **attributes))
        self.tensor = name


def _add_convolution(graph: _Graph, name: str, weights: Sequence[NDArray[np.float32]]) -> None:
    kernel = weights[0]
    outputs, per_group, side = kernel.shape[0], kernel.shape[1], kernel.shape[2]
    grouped = name.endswith("depthwise")
    constants = [("weight", kernel)]
    if not grouped:
        constants.append(
            ("bias", weights[1].reshape(-1) if len(weights) > 1 else np.zeros(outputs, np.float32))
        )
    graph.add(
        "Conv",
        name,
        *constants,
        group=outputs // per_group if grouped else 1,
        pads=[side // 2] * 4,
        kernel_shape=[side, side],
    )


def _add_dense(graph: _Graph, name: str, weights: Sequence[NDArray[np.float32]], channels: int) -> None:
    kernel = weights[0]
    bias = weights[1] if len(weights) > 1 else np.zeros(kernel.shape[1], np.float32)
    if name == "dense":
        # Keras flattened [H, W, C]; these rows follow [C, H, W], so that no Transpose is needed.
        side = round((kernel.shape[0] / channels) ** 0.5)
        units = kernel.shape[1]
        kernel = kernel.reshape(side, side, channels, units).transpose(2, 0, 1, 3).reshape(-1, units)
        graph.add("Reshape", "flatten", ("shape", np.array([-1, kernel.shape[0]], np.int64)))
    graph.add("MatMul", name, ("weight", np.ascontiguousarray(kernel)))
    graph.add("Add", f"{name}_bias", ("value", bias.reshape(-1)))


def _finish_model(graph: _Graph, contract: ModelContract, metadata: dict[str, str]) -> ModelProto:
    helper = onnx.helper
    image = helper.make_tensor_value_info(
        contract.input_name, onnx.TensorProto.UINT8, ["N", *contract.input_shape]
    )
    answer = helper.make_tensor_value_info(
        contract.output_name, onnx.TensorProto.FLOAT, ["N", len(contract.labels)]
    )
    body = helper.make_graph(graph.nodes, contract.architecture, [image], [answer], graph.constants)
    model = helper.make_model(
        body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="edge-dsc"
    )
    helper.set_model_props(model, {**contract.to_metadata(), **metadata})
    onnx.checker.check_model(model, full_check=True)
    return model


def fit_on_the_spot(
    contract: ModelContract, pixels: NDArray[np.uint8], answers: NDArray[np.int64], *, seed: int
) -> ModelProto:
    """Make a network that answers sensibly in seconds and without TensorFlow: random features, a fitted last layer.

    All layers but the last are drawn (He initialisation); the last one is found by ridge regression. What it is good
    for is trying the rest of the toolkit where nothing can be trained.

    Args:
        contract: Of the network.
        pixels: ``uint8 [N, height, width, 1]``.
        answers: Class of each, ``int64 [N]``.
        seed: Seed of the weights.

    Source:
        Rahimi and Recht, Weighted Sums of Random Kitchen Sinks (NIPS 2008); He and others, Delving Deep into
        Rectifiers (ICCV 2015).
    """
    weights = _draw_weights(contract, np.random.default_rng(seed))
    drawn = assemble_network(contract, weights, {})
    drawn.graph.output.append(
        onnx.helper.make_tensor_value_info("dense_relu", TensorProto.FLOAT, ["N", _DENSE_UNITS])
    )
    model = drawn.SerializeToString()
    session = open_session(model, "a network of random weights", threads=1, remedy="see doctor")
    runs = [session.run(["dense_relu"], {contract.input_name: image[None]})[0] for image in pixels]
    features = np.concatenate(runs).astype(np.float64)
    spread = features.std() or 1.0
    design = np.column_stack([features / spread, np.ones(len(features))])
    wanted = np.eye(len(contract.labels))[answers] - 1 / len(contract.labels)
    penalty = _RIDGE * len(design) * np.eye(design.shape[1])
    found = np.linalg.solve(design.T @ design + penalty, design.T @ wanted) * _SHARPNESS
    weights[-2] = [(found[:-1] / spread).astype(np.float32), found[-1].astype(np.float32)]
    return assemble_network(contract, weights, {})


def _draw_weights(contract: ModelContract, rng: np.random.Generator) -> list[list[NDArray[np.float32]]]:
    def he(*shape: int, fan_in: int, scale: float = 1.0) -> NDArray[np.float32]:
        drawn: NDArray[np.float64] = rng.standard_normal(shape)
        scaled: NDArray[np.float32] = (drawn * scale * (2 / fan_in) ** 0.5).astype(np.float32)
        return scaled

    flat = (contract.height >> (BLOCKS + 1)) ** 2 * _CHANNELS
    weights: list[list[NDArray[np.float32]]] = []
    for name, op in chain_of(contract.architecture):
        if name == "stem":
            kernel = he(_CHANNELS, 1, 3, 3, fan_in=9, scale=1 / 255)
            weights.append([kernel, np.zeros(_CHANNELS, np.float32)])
        elif op == "Conv" and name.endswith("depthwise"):
            weights.append([he(_CHANNELS, 1, 3, 3, fan_in=9)])
        elif op == "Conv":
            side = 1 if name.endswith("pointwise") else 3
            kernel = he(_CHANNELS, _CHANNELS, side, side, fan_in=_CHANNELS * side * side)
            weights.append([kernel, np.zeros(_CHANNELS, np.float32)])
        elif name == "dense":
            weights.append([he(flat, _DENSE_UNITS, fan_in=flat), np.zeros(_DENSE_UNITS, np.float32)])
        elif name == "logits":
            classes = len(contract.labels)
            weights.append([he(_DENSE_UNITS, classes, fan_in=_DENSE_UNITS), np.zeros(classes, np.float32)])
        else:
            weights.append([])
    return weights
