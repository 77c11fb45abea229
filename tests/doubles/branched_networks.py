"""Small networks that are no chains, written by hand: sums, concatenations, strides, groups, newer activations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.contract import ModelContract

LABELS = ("clear", "focal", "diffuse")
SIZE = 32


class Network:
    """A graph under construction: each call adds a node that is named as it says, and returns its output."""

    def __init__(self, architecture: str, seed: int = 0) -> None:
        self.contract = ModelContract(labels=LABELS, architecture=architecture, height=SIZE, width=SIZE)
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(seed)

    def add(self, op: str, name: str, *inputs: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [f"{name}.out"], name, **attributes))
        return f"{name}.out"

    def store(self, name: str, value: np.ndarray) -> str:
        self.stored.append(numpy_helper.from_array(value, name))
        return name

    def pixels(self) -> str:
        x = self.add("Cast", "cast", self.contract.input_name, to=TensorProto.FLOAT)
        return self.add(
            "Reshape", "planes", x, self.store("planes.shape", np.array([-1, 1, SIZE, SIZE], np.int64))
        )

    def conv(
        self, name: str, x: str, sizes: tuple[int, int], side: int = 3, *, stride: int = 1, group: int = 1,
        bias: bool = True, scale: float = 1.0,
    ) -> str:  # fmt: skip
        inputs, outputs = sizes
        shape = (outputs, inputs // group, side, side)
        drawn = self.rng.standard_normal(shape) * scale * (2 / np.prod(shape[1:])) ** 0.5
        constants = [self.store(f"{name}.weight", drawn.astype(np.float32))]
        if bias:
            drawn = self.rng.standard_normal(outputs) * 0.05
            constants.append(self.store(f"{name}.bias", drawn.astype(np.float32)))
        return self.add(
            "Conv", name, x, *constants, kernel_shape=[side, side], strides=[stride] * 2, group=group,
            pads=[side // 2] * 4,
        )  # fmt: skip

    def norm(self, name: str, x: str, channels: int) -> str:
        """A BatchNormalization with statistics of its own."""
        drawn = [
            self.rng.uniform(low, high, channels)
            for low, high in ((0.8, 1.2), (-0.2, 0.2), (-0.2, 0.2), (0.5, 1.5))
        ]
        stored = [
            self.store(f"{name}.{part}", value.astype(np.float32))
            for part, value in zip(("gamma", "beta", "mean", "variance"), drawn, strict=True)
        ]
        return self.add("BatchNormalization", name, x, *stored, epsilon=1e-3)

    def relu6(self, name: str, x: str) -> str:
        low, high = (
            self.store(f"{name}.{end}", np.array(value, np.float32))
            for end, value in (("low", 0), ("high", 6))
        )
        return self.add("Clip", name, x, low, high)

    def finish(self, x: str, channels: int) -> onnx.ModelProto:
        """Global pooling, a Gemm and softmax."""
        x = self.add("Flatten", "flatten", self.add("GlobalAveragePool", "pool", x))
        weight = (self.rng.standard_normal((len(LABELS), channels)) * (4 / channels) ** 0.5).astype(
            np.float32
        )
        x = self.add("Gemm", "logits", x, self.store("logits.weight", weight),
                     self.store("logits.bias", np.zeros(len(LABELS), np.float32)), transB=1)  # fmt: skip
        answer = self.contract.output_name
        self.nodes.append(helper.make_node("Softmax", [x], [answer], "softmax", axis=1))
        image = helper.make_tensor_value_info(
            self.contract.input_name, TensorProto.UINT8, ["N", *self.contract.input_shape]
        )
        output = helper.make_tensor_value_info(answer, TensorProto.FLOAT, ["N", len(LABELS)])
        graph = helper.make_graph(self.nodes, self.contract.architecture, [image], [output], self.stored)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        helper.set_model_props(model, self.contract.to_metadata())
        onnx.checker.check_model(model, full_check=True)
        return model


def residual() -> onnx.ModelProto:
    """A block that adds its input behind the activation, then one with the norm before it and a shortcut of its own."""
    net = Network("residual", 1)
    x = net.add("Relu", "stem_relu", net.conv("stem", net.pixels(), (1, 32), scale=1 / 100))
    x = net.add("MaxPool", "stem_pool", x, kernel_shape=[2, 2], strides=[2, 2])
    y = net.add("Relu", "one_relu", net.norm("one_norm", net.conv("one_a", x, (32, 32), bias=False), 32))
    y = net.norm("one_last", net.conv("one_b", y, (32, 32), scale=0.5), 32)
    x = net.add("Relu", "one_end", net.add("Add", "one_sum", y, x))
    y = net.conv("two_b", net.add("Relu", "two_relu", net.conv("two_a", x, (32, 32))), (32, 32), scale=0.5)
    x = net.add("Add", "two_sum", x, y)
    before = net.add("Relu", "three_before", net.norm("three_norm", x, 32))
    y = net.conv(
        "three_b", net.add("Relu", "three_relu", net.conv("three_a", before, (32, 64), stride=2)), (64, 64)
    )
    x = net.add("Add", "three_sum", net.conv("three_short", before, (32, 64), 1, stride=2), y)
    y = net.conv("four_a", net.add("Relu", "four_before", net.norm("four_norm", x, 64)), (64, 64), scale=0.5)
    pooled = net.add("MaxPool", "four_short", x, kernel_shape=[1, 1])
    x = net.add("Add", "four_sum", pooled, y)
    return net.finish(net.add("Relu", "end", net.norm("end_norm", x, 64)), 64)


def mobile() -> onnx.ModelProto:
    """Inverted residuals: ReLU6, depthwise with a stride, linear ends; then an ordinary grouped convolution."""
    net = Network("mobile", 2)
    x = net.conv("stem", net.pixels(), (1, 16), stride=2, bias=False, scale=1 / 60)
    x = net.relu6("stem_clip", net.norm("stem_norm", x, 16))
    y = net.relu6("one_clip", net.norm("one_norm", net.conv("one_expand", x, (16, 64), 1, bias=False), 64))
    y = net.relu6("one_clip2", net.conv("one_depthwise", y, (64, 64), group=64))
    x = net.add(
        "Add", "one_sum", x, net.norm("one_end", net.conv("one_project", y, (64, 16), 1, bias=False), 16)
    )
    y = net.relu6("two_clip", net.conv("two_expand", x, (16, 64), 1))
    y = net.relu6("two_clip2", net.conv("two_depthwise", y, (64, 64), stride=2, group=64))
    x = net.conv("two_project", y, (64, 32), 1)
    x = net.add("Relu", "grouped_relu", net.conv("grouped", x, (32, 64), group=2))
    return net.finish(x, 64)


def inception() -> onnx.ModelProto:
    """Branches of several kernels and pools that end in one concatenation, then a dense block."""
    net = Network("inception", 3)
    x = net.add("Relu", "stem_relu", net.conv("stem", net.pixels(), (1, 32), scale=1 / 100))
    a = net.add("Relu", "a_relu", net.conv("a", x, (32, 16), 1))
    b = net.add(
        "Relu", "b_relu", net.conv("b", net.add("Relu", "b1_relu", net.conv("b1", x, (32, 16), 1)), (16, 24))
    )
    pooled = net.add("AveragePool", "c_pool", x, kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1])
    c = net.add("Relu", "c_relu", net.conv("c", pooled, (32, 24), 1))
    x = net.add("Concat", "branches", a, b, c, axis=1)
    d = net.add("Relu", "d_relu", net.conv("d", x, (64, 32), stride=2))
    pooled = net.add("MaxPool", "e_pool", x, kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2])
    x = net.add("Concat", "reduced", d, pooled, axis=1)
    y = net.add("Relu", "f_relu", net.conv("f", x, (96, 32), 1))
    for step in range(2):
        channels = 96 + 32 * step
        before = net.add("Relu", f"g{step}_relu", net.norm(f"g{step}_norm", x, channels))
        grown = net.conv(f"g{step}", before, (channels, 32))
        x = net.add("Concat", f"grown{step}", x, grown, axis=1)
    return net.finish(net.add("Concat", "all", x, y, axis=1), 192)


def swish() -> onnx.ModelProto:
    """SiLU and HardSwish as exporters write them, a squeeze and excitation, and channels too few for INT8."""
    net = Network("swish", 4)

    def silu(name: str, x: str) -> str:
        return net.add("Mul", name, x, net.add("Sigmoid", f"{name}_gate", x))

    x = silu("stem_silu", net.conv("stem", net.pixels(), (1, 32), scale=1 / 100))
    x = net.add("HardSwish", "one_swish", net.conv("one", x, (32, 32), stride=2))
    y = net.conv("two", x, (32, 32))
    y = net.add("Mul", "two_swish", y, net.add("HardSigmoid", "two_gate", y, alpha=1 / 6, beta=0.5))
    s = net.add(
        "Relu", "squeeze_relu", net.conv("squeeze", net.add("GlobalAveragePool", "se_pool", y), (32, 4), 1)
    )
    s = net.add("Sigmoid", "se_gate", net.conv("excite", s, (4, 32), 1))
    x = net.add("Add", "two_sum", net.conv("two_end", net.add("Mul", "se", y, s), (32, 32), 1), x)
    return net.finish(silu("end_silu", net.conv("end", x, (32, 64), 1)), 64)


BRANCHED: dict[str, Callable[[], onnx.ModelProto]] = {
    "residual": residual,
    "mobile": mobile,
    "inception": inception,
    "swish": swish,
}
