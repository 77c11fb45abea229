"""Every INT8 graph that is made for TensorRT, held to the rules for Q/DQ graphs, and built by TensorRT for RTX.

Source of the rules: NVIDIA TensorRT documentation, "Working with Quantized Types", Q/DQ placement: inputs of
weighted layers and not their outputs, symmetric, zero point 0, weights per output channel, no pair on a bias; of a sum
that is computed with a layer the other input.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from branched_networks import BRANCHED
from msgspec import structs
from onnx import numpy_helper

from calibration.layers import find_layers, quantizable_layers
from calibration.qdq import put_rest_in_half, quantize
from calibration.table import CalibrationTable
from engines.graph import layer_types, weighted_layers
from engines.record import Precision
from engines.runtimes import BuildOptions, get_runtime

LAYERS = {"dsc": 9, "cnn": 6}
WEIGHTED = ("Conv", "MatMul", "Gemm")
CHOICES = ("all", "depthwise float", "every second float", "channels scaled")
Tables = dict[str, CalibrationTable]
Paths = dict[str, Path]


def int8_graph(
    paths: Paths, tables: Tables, architecture: str, choice: str, rest: str
) -> tuple[onnx.ModelProto, set[str]]:
    model = onnx.load(paths[architecture])
    layers = quantizable_layers(model)
    left_out: set[str] = set()
    if choice == "depthwise float":
        left_out = {layer.name for layer in layers if layer.depthwise}
    elif choice == "every second float":
        left_out = {layer.name for layer in layers[::2]}
    table = tables[architecture]
    if choice == "channels scaled":  # as the method mse does
        factors = tuple(2.0 ** (channel % 5) for channel in range(32))
        scaled = {layer.input: factors for layer in layers if not layer.raw_pixels}
        table = structs.replace(table, channel_factors=scaled)
    made = quantize(model, table, signed_activations=True, float_layers=left_out)
    return (put_rest_in_half(made) if rest == "FP16" else made), left_out


def broken_rules(model: onnx.ModelProto, float_type: int, *, chain: bool = True) -> list[str]:
    """Name every rule that a graph for TensorRT breaks; one that is no chain may have pairs for more than layers."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    takers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            takers.setdefault(name, []).append(node.op_type)
    broken = []
    opset = model.opset_import[0].version
    if opset > 20 or (float_type == onnx.TensorProto.FLOAT16 and opset < 19):
        broken.append(f"opset {opset}")
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = (stored[name] for name in node.input[1:])
            if zero.data_type != onnx.TensorProto.INT8 or numpy_helper.to_array(zero).any():
                broken.append(f"{node.name}: zero point")
            if scale.data_type != float_type or not (numpy_helper.to_array(scale) > 0).all():
                broken.append(f"{node.name}: scale")
        if node.op_type == "QuantizeLinear" and takers[node.output[0]] != ["DequantizeLinear"]:
            broken.append(f"{node.name}: no DequantizeLinear behind it")
        if node.op_type == "DequantizeLinear":
            if node.input[0] not in producers:
                broken.append(f"{node.name}: no QuantizeLinear before it")
            elif producers[node.input[0]].input[1:] != node.input[1:]:
                broken.append(f"{node.name}: another scale than its QuantizeLinear")
            if chain and any(kind not in WEIGHTED for kind in takers[node.output[0]]):
                broken.append(f"{node.name}: feeds {takers[node.output[0]]}, not a layer")
        if node.op_type in WEIGHTED:
            sources = [producers[name].op_type if name in producers else "" for name in node.input]
            pairs = [source == "DequantizeLinear" for source in sources]
            # A tensor with a pair goes rounded to all that take it, a layer in float among others.
            if any(pairs[2:]) or (pairs[0] != pairs[1] and (chain or pairs[1])):
                broken.append(f"{node.name}: pairs at {pairs}")
            if pairs[1]:
                broken += _weight_rules(node, producers, stored)
            ends = (["Relu"], ["Add"], ["Conv"], ["QuantizeLinear"])
            if chain and takers.get(node.output[0]) not in ends:
                broken.append(f"{node.name}: its output goes to {takers.get(node.output[0])}")
        # What lies between the pairs has the float type, down to the one Cast that gives the answer.
        if types.get(node.output[0]) in (1, 10) and types[node.output[0]] != float_type:
            broken.append(f"{node.name}: gives {types[node.output[0]]}")
    return broken if chain else broken + misplaced_pairs(graph)


def misplaced_pairs(graph: onnx.GraphProto) -> list[str]:
    """Name the pairs that serve no INT8 layer and no sum that is computed with one, and those that such a sum lacks."""
    stored = {tensor.name for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    takers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            takers.setdefault(name, []).append(node)

    def is_pair(name: str) -> bool:
        return name in producers and producers[name].op_type == "DequantizeLinear"

    def is_integer(name: str) -> bool:
        """Whether a tensor is the output of an INT8 layer that one node alone takes."""
        node = producers.get(name)
        return (
            node is not None
            and node.op_type in WEIGHTED
            and is_pair(node.input[1])
            and len(takers[name]) == 1
        )

    def is_bare(name: str) -> bool:
        """Whether a tensor has no pair, and is not what a layer in float gives."""
        node = producers[name]
        return not is_pair(name) and not (node.op_type in WEIGHTED and not is_pair(node.input[1]))

    broken = []
    for node in graph.node:
        if node.op_type == "Add" and not set(node.input) & stored:
            fused = [place for place in (0, 1) if is_integer(node.input[place])]
            if len(fused) == 2 or (fused and is_bare(node.input[1 - fused[0]])):
                broken.append(f"{node.name}: the sum has no pair at its other input")
        if node.op_type == "DequantizeLinear" and producers[node.input[0]].input[0] not in stored:
            served = [
                taker
                for taker in takers.get(node.output[0], [])
                if (taker.op_type in WEIGHTED and is_pair(taker.input[1]))
                or (taker.op_type == "Add" and any(map(is_integer, taker.input)))
            ]
            if not served:
                broken.append(f"{node.name}: serves no INT8 layer")
    return broken


def _weight_rules(
    node: onnx.NodeProto, producers: dict[str, onnx.NodeProto], stored: dict[str, onnx.TensorProto]
) -> list[str]:
    pair = producers.get(producers[node.input[1]].input[0])
    if pair is None:
        return [f"{node.name}: weights stored as integers"]
    weight = numpy_helper.to_array(stored[pair.input[0]]).astype(np.float32)
    scale = numpy_helper.to_array(stored[pair.input[1]]).astype(np.float32)
    axis = {attribute.name: attribute.i for attribute in pair.attribute}["axis"]
    broken = []
    if axis != (0 if node.op_type == "Conv" else 1) or scale.shape != (weight.shape[axis],):
        broken.append(f"{node.name}: weights not per output channel")
    largest = np.abs(weight).max(axis=tuple(index for index in range(weight.ndim) if index != axis))
    # float16 weights are themselves rounded by up to 2^-11 before they meet their scale.
    if (np.rint(largest / scale * (1 - 2**-11)) > 127).any():
        broken.append(f"{node.name}: weights cut off")
    return broken


FLOAT_TYPES = {"FP32": onnx.TensorProto.FLOAT, "FP16": onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize("rest", FLOAT_TYPES)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("architecture", LAYERS)
def test_every_graph_for_tensorrt_keeps_the_rules(
    deployed_models: Paths, network_tables: Tables, architecture: str, choice: str, rest: str
) -> None:
    model, left_out = int8_graph(deployed_models, network_tables, architecture, choice, rest)
    assert broken_rules(model, FLOAT_TYPES[rest]) == []
    count = LAYERS[architecture] - 1 - len(left_out)
    assert weighted_layers(model) == {"INT8": count, rest: 1 + len(left_out)}


@pytest.mark.parametrize("rest", FLOAT_TYPES)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("architecture", LAYERS)
def test_every_graph_for_tensorrt_is_built_by_rtx(
    deployed_models: Paths,
    network_tables: Tables,
    tmp_path: Path,
    architecture: str,
    choice: str,
    rest: str,
) -> None:
    pytest.importorskip("tensorrt_rtx")
    model, left_out = int8_graph(deployed_models, network_tables, architecture, choice, rest)
    count = LAYERS[architecture] - 1 - len(left_out)
    options = BuildOptions(precision=Precision.INT8, required_layers=count)
    result = get_runtime("tensorrt-rtx").build(model.SerializeToString(), tmp_path / "a.engine", options)
    assert result.layers == {"INT8": count, rest: 1 + len(left_out)}


def branched_graph(
    paths: Paths, tables: Tables, architecture: str, choice: str, rest: str
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Return the graph, and what each of its layers is to run in."""
    model = onnx.load(paths[architecture])
    layers = quantizable_layers(model)
    left_out = {layer.name for layer in (layers[::2] if choice == "every second float" else ())}
    made = quantize(model, tables[architecture], signed_activations=True, float_layers=left_out)
    integer = {layer.name for layer in layers} - left_out
    wanted = {layer.name: "INT8" if layer.name in integer else rest for layer in find_layers(model)}
    return (put_rest_in_half(made) if rest == "FP16" else made), wanted


@pytest.mark.parametrize("rest", FLOAT_TYPES)
@pytest.mark.parametrize("choice", ["all", "every second float"])
@pytest.mark.parametrize("architecture", BRANCHED)
def test_every_branched_graph_keeps_the_rules_and_is_built_by_rtx(
    branched_models: Paths,
    branched_tables: Tables,
    tmp_path: Path,
    architecture: str,
    choice: str,
    rest: str,
) -> None:
    model, wanted = branched_graph(branched_models, branched_tables, architecture, choice, rest)
    assert broken_rules(model, FLOAT_TYPES[rest], chain=False) == []
    assert layer_types(model) == wanted
    pytest.importorskip("tensorrt_rtx")
    options = BuildOptions(precision=Precision.INT8)
    result = get_runtime("tensorrt-rtx").build(model.SerializeToString(), tmp_path / "a.engine", options)
    assert result.layer_types == wanted


@pytest.mark.parametrize("choice", ["all", "every second float"])
@pytest.mark.parametrize("architecture", BRANCHED)
def test_every_branched_graph_runs_in_integers_on_onnxruntime(
    branched_models: Paths, branched_tables: Tables, tmp_path: Path, architecture: str, choice: str
) -> None:
    source = onnx.load(branched_models[architecture])
    layers = quantizable_layers(source)
    left_out = {layer.name for layer in (layers[::2] if choice == "every second float" else ())}
    model = quantize(source, branched_tables[architecture], signed_activations=False, float_layers=left_out)
    options = BuildOptions(precision=Precision.INT8)
    result = get_runtime("onnxruntime").build(model.SerializeToString(), tmp_path / "a.engine", options)
    integer = {layer.name for layer in layers} - left_out
    assert result.layer_types == {
        layer.name: "INT8" if layer.name in integer else "FP32" for layer in find_layers(source)
    }


def test_the_rules_see_a_sum_without_its_pair(branched_models: Paths, branched_tables: Tables) -> None:
    model, _ = branched_graph(branched_models, branched_tables, "residual", "all", "FP32")
    total = next(node for node in model.graph.node if node.name == "three_sum")
    total.input[0] = "three_short.out"
    found = broken_rules(model, FLOAT_TYPES["FP32"], chain=False)
    assert "three_sum: the sum has no pair at its other input" in found


def test_the_rules_see_what_breaks_them(deployed_models: Paths, network_tables: Tables) -> None:
    model, _ = int8_graph(deployed_models, network_tables, "dsc", "all", "FP16")
    pair = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    zero = next(tensor for tensor in model.graph.initializer if tensor.name == pair.input[2])
    zero.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), zero.name))
    assert f"{pair.name}: zero point" in broken_rules(model, FLOAT_TYPES["FP16"])
    unsigned = quantize(onnx.load(deployed_models["dsc"]), network_tables["dsc"], signed_activations=False)
    assert len(broken_rules(unsigned, FLOAT_TYPES["FP32"])) > 10
