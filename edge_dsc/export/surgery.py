"""From tf2onnx's graph to the deployed graph: uint8 input, static shapes, no Transpose, readable names.

tf2onnx gives the chain of compute nodes with layout and shape arithmetic around it. The chain is checked
against the network's, and written down anew with nothing around it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edge_dsc.export.conversion import OPSET
from edge_dsc.networks import BLOCKS
from engines.contract import ModelContract
from engines.errors import EdgeDscError
from engines.packages import load

IR_VERSION = 9
_GLUE = frozenset(
    {"Cast", "Concat", "Gather", "Reshape", "Shape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)

Array = Any
Proto = Any


@dataclass
class _Graph:
    """A chain of nodes under construction; every node has one data output, named after it."""

    onnx: Any
    tensor: str
    nodes: list[Proto] = field(default_factory=list)
    constants: list[Proto] = field(default_factory=list)

    def add(self, op: str, name: str, *constants: tuple[str, Array], **attributes: Any) -> None:
        inputs = [self.tensor]
        for suffix, value in constants:
            self.constants.append(self.onnx.numpy_helper.from_array(value, f"{name}.{suffix}"))
            inputs.append(f"{name}.{suffix}")
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [name], name=name, **attributes))
        self.tensor = name


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


def deploy_graph(converted: Proto, contract: ModelContract, metadata: dict[str, str]) -> Proto:
    """Write the deployed graph.

    Args:
        converted: What tf2onnx made of a folded network.
        contract: Becomes the graph's input and output, and its metadata.
        metadata: More metadata properties.

    Returns:
        A checked ``onnx.ModelProto``: ``uint8 [N, 224, 224, 1]`` in, ``float32 [N, classes]`` out, Cast first
        (TensorRT takes a uint8 input only so), static Reshapes, no Transpose.

    Raises:
        EdgeDscError: tf2onnx gave another chain of nodes than the network has.
    """
    onnx = load("onnx")
    numpy = load("numpy")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in converted.graph.initializer}
    names = chain_of(contract.architecture)
    steps = _match_chain(converted, names)
    graph = _Graph(onnx, contract.input_name)
    graph.add("Cast", "pixels", to=onnx.TensorProto.FLOAT)
    graph.add(
        "Reshape", "planes", ("shape", numpy.array([-1, 1, contract.height, contract.width], numpy.int64))
    )
    channels = 1
    for (name, op), (node, add) in zip(names, steps, strict=True):
        weights = [
            stored[tensor] for tensor in [*node.input, *(add.input if add else ())] if tensor in stored
        ]
        if op == "Conv":
            channels = int(weights[0].shape[0])
            _add_convolution(graph, name, weights)
        elif op == "MaxPool":
            graph.add("MaxPool", name, kernel_shape=[2, 2], strides=[2, 2])
        elif op == "MatMul":
            _add_dense(graph, name, weights, channels)
        elif op == "Relu":
            graph.add("Relu", name)
        else:
            graph.add("Softmax", contract.output_name, axis=1)
    return _finished_model(graph, contract, metadata)


def _match_chain(converted: Proto, names: list[tuple[str, str]]) -> list[tuple[Proto, Proto | None]]:
    """Pair every node of the chain with the Add of its bias; a bias of zeros has been optimised away."""
    steps: list[tuple[Proto, Proto | None]] = []
    for node in converted.graph.node:
        if node.op_type == "Add" and steps:
            steps[-1] = (steps[-1][0], node)
        elif node.op_type not in _GLUE:
            steps.append((node, None))
    found = [node.op_type for node, _ in steps]
    if found != [op for _, op in names]:
        raise EdgeDscError(
            f"tf2onnx gave an unexpected graph: {' '.join(found)}",
            remedy="install the tested versions: pip install -c constraints.txt 'edge-dsc[train]'",
        )
    return steps


def _add_convolution(graph: _Graph, name: str, weights: list[Array]) -> None:
    numpy = load("numpy")
    kernel = weights[0]
    outputs, per_group, side = kernel.shape[0], kernel.shape[1], kernel.shape[2]
    grouped = name.endswith("depthwise")
    constants = [("weight", kernel)]
    if not grouped:
        constants.append(
            ("bias", weights[1].reshape(-1) if len(weights) > 1 else numpy.zeros(outputs, numpy.float32))
        )
    graph.add(
        "Conv",
        name,
        *constants,
        group=outputs // per_group if grouped else 1,
        pads=[side // 2] * 4,
        kernel_shape=[side, side],
    )


def _add_dense(graph: _Graph, name: str, weights: list[Array], channels: int) -> None:
    numpy = load("numpy")
    kernel = weights[0]
    bias = weights[1] if len(weights) > 1 else numpy.zeros(kernel.shape[1], numpy.float32)
    if name == "dense":
        # Keras flattened [H, W, C]; these rows follow [C, H, W], so that no Transpose is needed.
        side = round((kernel.shape[0] / channels) ** 0.5)
        units = kernel.shape[1]
        kernel = kernel.reshape(side, side, channels, units).transpose(2, 0, 1, 3).reshape(-1, units)
        graph.add("Reshape", "flatten", ("shape", numpy.array([-1, kernel.shape[0]], numpy.int64)))
    graph.add("MatMul", name, ("weight", numpy.ascontiguousarray(kernel)))
    graph.add("Add", f"{name}_bias", ("value", bias.reshape(-1)))


def _finished_model(graph: _Graph, contract: ModelContract, metadata: dict[str, str]) -> Proto:
    onnx = graph.onnx
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
