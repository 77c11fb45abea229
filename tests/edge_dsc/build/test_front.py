"""What a graph does to the pixels goes into its first convolution: with the same answers, the border's too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_dsc.build.front import fold_front

HEIGHT, WIDTH, OUTPUTS = 20, 24, 5
IMAGENET = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
Step = tuple[
    str, dict[str, Any], Sequence[Any]
]  # operator, attributes, constants after (or before) the pixels
RNG = np.random.default_rng
PIXELS = object()  # where they stand among the inputs of a node; first without one


def graph_of(
    steps: Sequence[Step], *, channels: int = 1, weight: tuple[int, ...] = (OUTPUTS, 3, 3, 3), **conv: Any
) -> onnx.ModelProto:
    """``uint8 [N, H, W, C]``, Cast, the steps one after the other, and a convolution."""
    constants = [numpy_helper.from_array(RNG(0).standard_normal(weight).astype(np.float32), "weight")]
    constants.append(numpy_helper.from_array(RNG(1).standard_normal(weight[0]).astype(np.float32), "bias"))
    nodes = [helper.make_node("Cast", ["image"], ["t0"], to=TensorProto.FLOAT)]
    for number, (op, attributes, more) in enumerate(steps):
        names = []
        for place, value in enumerate(more):
            if value is PIXELS:
                names.append(f"t{number}")
                continue
            names.append(f"c{number}_{place}")
            constants.append(numpy_helper.from_array(np.asarray(value), names[-1]))
        first = [] if any(value is PIXELS for value in more) else [f"t{number}"]
        nodes.append(helper.make_node(op, first + names, [f"t{number + 1}"], **attributes))
    nodes.append(helper.make_node("Conv", [f"t{len(steps)}", "weight", "bias"], ["out"], name="stem", **conv))
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", HEIGHT, WIDTH, channels])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", weight[0], "H", "W"])
    graph = helper.make_graph(nodes, "g", [image], [out], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(model: onnx.ModelProto, channels: int = 1) -> np.ndarray:
    pixels = RNG(2).integers(0, 256, (2, HEIGHT, WIDTH, channels), dtype=np.uint8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": pixels})[0]


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


PLANES: Step = ("Reshape", {}, [np.array([-1, 1, HEIGHT, WIDTH])])
THREE: Step = ("Concat", {"axis": 1}, [PIXELS, PIXELS, PIXELS])
KERAS: list[Step] = [("Mul", {}, [np.float32(1 / 127.5)]), ("Add", {}, [np.float32(-1)])]
TORCH: list[Step] = [
    ("Mul", {}, [np.float32(1 / 255)]),
    ("Sub", {}, [IMAGENET[0].astype(np.float32).reshape(3, 1, 1)]),
    ("Div", {}, [IMAGENET[1].astype(np.float32).reshape(1, 3, 1, 1)]),
]
PADS = {"pads": [1, 2, 3, 1]}


@pytest.mark.parametrize(
    ("steps", "conv", "front", "border"),
    [
        pytest.param([PLANES, THREE, *TORCH], {}, [], (), id="no padding"),
        pytest.param([PLANES, *KERAS, THREE], PADS, ["Pad"], ("padded with grey 127.5",), id="equal means"),
        pytest.param(
            [PLANES, THREE, *TORCH], PADS, ["Pad"], ("a constant plane",), id="means of each channel"
        ),
        pytest.param([PLANES, THREE, ("Mul", {}, [np.float32(1 / 255)])], PADS, [], (), id="no offset"),
        pytest.param(
            [PLANES, THREE, *TORCH, ("Pad", {}, [np.array([0, 0, 3, 3, 0, 0, 3, 3])])],
            {"strides": [2, 2]},
            ["Pad"],
            ("a constant plane",),
            id="a Pad of zeros",
        ),
        pytest.param(
            [PLANES, THREE, *TORCH, ("Pad", {}, [np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.float32(0.5)])],
            {},
            ["Pad"],
            ("a constant plane",),
            id="a Pad of another value",
        ),
        pytest.param(
            [
                ("Pad", {}, [np.array([0, 1, 1, 0, 0, 1, 1, 0])]),
                *KERAS,
                ("Transpose", {"perm": [0, 3, 1, 2]}, []),
                THREE,
            ],
            {},
            [],
            (),
            id="black padded before the normalisation",
        ),
        pytest.param(
            [PLANES, *KERAS, THREE],
            {"auto_pad": "SAME_UPPER", "strides": [2, 3]},
            ["Pad"],
            ("padded with grey 127.5",),
            id="same upper",
        ),
        pytest.param(
            [PLANES, *KERAS, THREE],
            {"auto_pad": "SAME_LOWER", "strides": [3, 2]},
            ["Pad"],
            ("padded with grey 127.5",),
            id="same lower",
        ),
        pytest.param(
            [
                ("Sub", {}, [np.float32(255), PIXELS]),
                ("Concat", {"axis": 3}, [PIXELS, PIXELS, PIXELS]),
                ("Mul", {}, [f32(0.1, 0.2, 0.3), PIXELS]),
                ("Transpose", {"perm": [0, 3, 1, 2]}, []),
                (
                    "BatchNormalization",
                    {"epsilon": 0.01},
                    [f32(1, 2, 3), f32(4, 5, 6), f32(7, 8, 9), f32(10, 11, 12)],
                ),
            ],
            PADS,
            ["Pad"],
            ("a constant plane",),
            id="negative, channels last, BatchNorm",
        ),
        pytest.param(
            [
                ("Sub", {}, [f32(103.939, 116.779, 123.68)]),
                ("Transpose", {"perm": [0, 3, 1, 2]}, []),
                ("Slice", {}, [np.array([-1]), np.array([-(2**31)]), np.array([1]), np.array([-1])]),
            ],
            PADS,
            ["Pad"],
            ("a constant plane",),
            id="one channel becomes three by broadcasting",
        ),
        pytest.param(
            [
                PLANES,
                THREE,
                *TORCH,
                ("Gather", {"axis": 1}, [np.array(1)]),
                ("Unsqueeze", {}, [np.array([1])]),
                THREE,
            ],
            PADS,
            ["Pad"],
            (),
            id="one channel taken out",
        ),
    ],
)
def test_the_front_goes_into_the_kernel(
    steps: list[Step], conv: dict[str, Any], front: list[str], border: tuple[str, ...]
) -> None:
    model = graph_of(steps, **conv)
    before = model.SerializeToString()
    folded, found = fold_front(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(folded)
    assert ops(folded) == ["Cast", "Reshape", *front, "Conv"]
    assert found.kept is None
    if border:
        assert found.border == border
    np.testing.assert_allclose(run(folded), run(model), rtol=0, atol=2e-5 * np.abs(run(model)).max())


SWAP: Step = ("Slice", {}, [np.array([-1]), np.array([-(2**31)]), np.array([1]), np.array([-1])])
FIRST: Step = ("Transpose", {"perm": [0, 3, 1, 2]}, [])


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([FIRST, SWAP, *TORCH], id="swapped"),
        pytest.param([FIRST, ("Gather", {"axis": 1}, [np.array([2, 1, 0])]), *TORCH], id="gathered"),
        pytest.param([*KERAS, FIRST], id="equal means"),
    ],
)
def test_colours_stay_colours(steps: list[Step]) -> None:
    model = graph_of(steps, channels=3, **PADS)
    folded, found = fold_front(model)
    assert ops(folded) == ["Cast", "Transpose", "Pad", "Conv"]
    assert found.folded[0] in ("Transpose", "Mul")
    np.testing.assert_allclose(run(folded, 3), run(model, 3), rtol=0, atol=2e-5 * np.abs(run(model, 3)).max())


def test_a_convolution_of_groups_becomes_one_of_grey() -> None:
    model = graph_of([PLANES, THREE, *TORCH], weight=(6, 1, 3, 3), group=3, **PADS)
    folded, found = fold_front(model)
    (weight, _) = (
        numpy_helper.to_array(tensor) for tensor in folded.graph.initializer if "folded" in tensor.name
    )
    assert weight.shape == (6, 2, 3, 3)
    assert str(found) == (
        "folded into the first convolution: Reshape, Concat, Mul, Sub, Div; its border: a constant plane"
    )
    np.testing.assert_allclose(run(folded), run(model), rtol=0, atol=2e-5 * np.abs(run(model)).max())


def test_every_convolution_that_takes_the_pixels_is_folded() -> None:
    model = graph_of([PLANES, THREE, *TORCH], **PADS)
    second = helper.make_node("Conv", ["t5", "weight"], ["out2"], name="branch", strides=[2, 2])
    model.graph.node.append(second)
    model.graph.output.append(
        helper.make_tensor_value_info("out2", TensorProto.FLOAT, ["N", OUTPUTS, "H2", "W2"])
    )
    folded, _ = fold_front(model)
    assert ops(folded) == ["Cast", "Reshape", "Pad", "Conv", "Conv"]
    pixels = RNG(2).integers(0, 256, (2, HEIGHT, WIDTH, 1), dtype=np.uint8)
    answers = [
        onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"image": pixels}
        )
        for graph in (model, folded)
    ]
    for expected, found in zip(*answers, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("steps", "conv", "why"),
    [
        pytest.param([PLANES, THREE, *TORCH, ("Relu", {}, [])], {}, "Relu takes it", id="not affine"),
        pytest.param(
            [PLANES, THREE, ("Mul", {}, [np.ones((1, 1, HEIGHT, WIDTH), np.float32)])],
            {},
            "Mul takes it",
            id="another factor at every place",
        ),
        pytest.param(
            [PLANES, ("Mul", {}, [np.ones((1, 1, 1, WIDTH), np.float32)]), THREE],
            {},
            "Mul takes it",
            id="another factor in every column of one channel",
        ),
        pytest.param(
            [PLANES, THREE, *TORCH, ("Pad", {}, [np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.float32(0.5)])],
            PADS,
            "it pads the picture twice, with different values",
            id="two borders",
        ),
        pytest.param(
            [PLANES, THREE, ("Pad", {"mode": "reflect"}, [np.array([0, 0, 1, 1, 0, 0, 1, 1])])],
            {},
            "Pad takes it",
            id="a border of the picture itself",
        ),
    ],
)
def test_what_cannot_be_folded_stays_and_is_named(steps: list[Step], conv: dict[str, Any], why: str) -> None:
    model = graph_of(steps, **conv)
    folded, found = fold_front(model)
    assert folded == model
    assert found.kept == why
    assert str(found) == f"what prepares the pixels stays in the graph: {why}"
