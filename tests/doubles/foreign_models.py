"""Classifiers as other exporters write them: PyTorch's layout, naming and habits, made by hand with random weights.

Three of 64 x 64 pixels and three classes:

- ``residual``: RGB, batch fixed to 1, logits; BatchNorm unfolded, a residual Add, a grouped convolution, global
  pooling, ``view(1, -1)`` as Constant and Reshape, Gemm.
- ``mobile``: RGB, any batch, probabilities, the normalisation inside; ReLU6, a depthwise convolution with strides,
  ``view(x.size(0), -1)`` as Shape, Gather, Unsqueeze, Concat, Reshape.
- ``grey``: one channel, any batch, logits; no padding, SiLU, a concatenation, average pooling, height and width
  dynamic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

SIDE = 64
CLASSES = 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Exporter:
    """Nodes under construction, named as PyTorch names them: ``/features/features.0/Conv``."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, name: str, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        spread = (2 / max(1, int(np.prod(shape[1:])))) ** 0.5
        return self.constant(name, (self.rng.standard_normal(shape) * spread).astype(np.float32))

    def add(self, op: str, module: str, *inputs: str, **attributes: Any) -> str:
        name = f"/{module}/{op}"
        output = f"{name}_output_0"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        # PyTorch 2 notes where in its user's files a node comes from.
        self.nodes[-1].doc_string = "/home/somebody/secret/train.py(12): forward"
        return output

    def conv(
        self,
        x: str,
        module: str,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        bias: bool = True,
        **options: Any,
    ) -> str:
        options = {"pads": [kernel // 2] * 4, "strides": [1, 1], "group": 1, **options}
        names = [self.weight(f"{module}.weight", outputs, inputs // options["group"], kernel, kernel)]
        if bias:
            drawn = self.rng.standard_normal(outputs) * 0.1
            names.append(self.constant(f"{module}.bias", drawn.astype(np.float32)))
        return self.add("Conv", module, x, *names, kernel_shape=[kernel] * 2, dilations=[1, 1], **options)

    def batch_norm(self, x: str, module: str, channels: int) -> str:
        draws = {
            "weight": self.rng.uniform(0.5, 1.5, channels),
            "bias": self.rng.standard_normal(channels) * 0.1,
            "running_mean": self.rng.standard_normal(channels) * 0.1,
            "running_var": self.rng.uniform(0.5, 1.5, channels),
        }
        names = [self.constant(f"{module}.{name}", value.astype(np.float32)) for name, value in draws.items()]
        return self.add("BatchNormalization", module, x, *names, epsilon=1e-5)

    def gemm(self, x: str, module: str, inputs: int) -> str:
        names = [self.weight(f"{module}.weight", CLASSES, inputs), f"{module}.bias"]
        self.constant(names[1], (self.rng.standard_normal(CLASSES) * 0.1).astype(np.float32))
        return self.add("Gemm", module, x, *names, alpha=1.0, beta=1.0, transB=1)

    def model(self, x: str, image: list[Any], answers: list[Any], opset: int = 17) -> ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "main_graph",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, image)],
            [helper.make_tensor_value_info(x, TensorProto.FLOAT, answers)],
            self.constants,
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        made.producer_name, made.producer_version = "pytorch", "2.4.0"
        onnx.checker.check_model(made)
        return made


def residual(seed: int = 0) -> ModelProto:
    """See the module."""
    net = Exporter(seed)
    x = net.conv("input", "conv1", 3, 16, 7, bias=False, strides=[2, 2])
    x = net.add("Relu", "relu", net.batch_norm(x, "bn1", 16))
    x = short = net.add(
        "MaxPool", "maxpool", x, kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2], ceil_mode=0
    )
    x = net.add(
        "Relu", "layer1.0", net.batch_norm(net.conv(x, "layer1.0.conv1", 16, 16, 1), "layer1.0.bn1", 16)
    )
    x = net.conv(x, "layer1.0.conv2", 16, 16, 3, bias=False, group=4)
    x = net.batch_norm(x, "layer1.0.bn2", 16)
    x = net.add("Relu", "layer1.0.out", net.add("Add", "layer1.0", x, short))
    x = net.conv(x, "layer2.0", 16, 32, 3, strides=[2, 2])
    x = net.add("GlobalAveragePool", "avgpool", net.add("Relu", "layer2.relu", x))
    shape = net.add("Constant", "view", value=numpy_helper.from_array(np.array([1, -1])))
    x = net.add("Reshape", "view", x, shape)
    return net.model(net.gemm(x, "fc", 32), [1, 3, SIDE, SIDE], [1, CLASSES])


def mobile(seed: int = 0) -> ModelProto:
    """See the module."""
    net = Exporter(seed)

    def relu6(x: str, module: str) -> str:
        ends = [net.constant(f"{module}.{end}", np.float32(value)) for end, value in (("min", 0), ("max", 6))]
        return net.add("Clip", module, x, *ends)

    shape = (1, 3, 1, 1)
    x = net.add("Sub", "normalize", "input", net.constant("mean", np.array(MEAN, np.float32).reshape(shape)))
    x = net.add("Div", "normalize", x, net.constant("std", np.array(STD, np.float32).reshape(shape)))
    x = relu6(net.conv(x, "features.0.0", 3, 8, 3, strides=[2, 2]), "features.0.2")
    x = net.conv(x, "features.1.0", 8, 8, 3, group=8, strides=[2, 2])
    x = net.conv(relu6(x, "features.1.2"), "features.1.3", 8, 24, 1)
    x = net.add("AveragePool", "pool", x, kernel_shape=[4, 4], strides=[4, 4])
    size = net.add("Shape", "shape", x)
    size = net.add("Gather", "gather", size, net.constant("zero", np.array(0)), axis=0)
    size = net.add("Unsqueeze", "unsqueeze", size, net.constant("axes", np.array([0])))
    size = net.add("Concat", "concat", size, net.constant("rest", np.array([-1])), axis=0)
    x = net.gemm(net.add("Reshape", "reshape", x, size), "classifier.1", 24 * 16)
    x = net.add("Softmax", "softmax", x, axis=1)
    return net.model(x, ["batch", 3, SIDE, SIDE], ["batch", CLASSES])


def grey(seed: int = 0) -> ModelProto:
    """See the module."""
    net = Exporter(seed)

    def silu(x: str, module: str) -> str:
        return net.add("Mul", module, x, net.add("Sigmoid", module, x))

    x = silu(net.conv("input", "stem.conv", 1, 8, 3, pads=[0] * 4), "stem.act")
    left = silu(net.conv(x, "left.conv", 8, 8, 3, strides=[2, 2]), "left.act")
    right = net.add("AveragePool", "right", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.conv(net.add("Concat", "cat", left, right, axis=1), "head.conv", 16, 16, 1)
    x = net.add("GlobalAveragePool", "head.pool", x)
    x = net.add("Flatten", "head.flatten", x, axis=1)
    # PaddlePaddle writes -1 for what is open.
    return net.model(net.gemm(x, "head.fc", 16), [-1, 1, "height", "width"], [-1, CLASSES])


MODELS: dict[str, Callable[[], ModelProto]] = {"residual": residual, "mobile": mobile, "grey": grey}
