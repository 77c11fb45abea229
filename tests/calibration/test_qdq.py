from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from msgspec import structs
from onnx import numpy_helper

from calibration.layers import quantizable_layers
from calibration.qdq import put_rest_in_half, quantize, round_up_to_half
from calibration.table import CalibrationTable
from engines.cpu.ort import EXACT_SUMS
from engines.errors import ArtefactError, UsageError
from engines.graph import weighted_layers

ARCHITECTURES = ("dsc", "cnn")
INT8_LAYERS = {"dsc": 8, "cnn": 5}
Tables = dict[str, CalibrationTable]
Paths = dict[str, Path]


class Graph:
    """A Q/DQ graph to ask questions of."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.producers = {output: node for node in self.nodes for output in node.output}

    def of_type(self, *kinds: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type in kinds]

    def pair(self, tensor: str) -> tuple[onnx.NodeProto, onnx.NodeProto]:
        """The QuantizeLinear and DequantizeLinear that give a tensor."""
        dequantize = self.producers[tensor]
        return self.producers[dequantize.input[0]], dequantize


def quantized(paths: Paths, tables: Tables, architecture: str, *, signed: bool) -> onnx.ModelProto:
    return quantize(onnx.load(paths[architecture]), tables[architecture], signed_activations=signed)


def outputs(model: onnx.ModelProto, optimised: Path | None = None) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry(*EXACT_SUMS)
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    coarse = np.random.default_rng(3).integers(0, 256, (4, 7, 7, 1), dtype=np.uint8)
    images = coarse.repeat(32, axis=1).repeat(32, axis=2)  # noise of single pixels lies beyond the ranges
    return np.asarray(session.run(None, {"image": images})[0])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_but_the_last_takes_input_and_weight_from_dequantize(
    deployed_models: Paths, network_tables: Tables, architecture: str, signed: bool
) -> None:
    model = quantized(deployed_models, network_tables, architecture, signed=signed)
    assert weighted_layers(model) == {"INT8": INT8_LAYERS[architecture], "FP32": 1}
    graph = Graph(model)
    layers = graph.of_type("Conv", "MatMul", "Gemm")
    for node in layers[:-1]:
        assert [graph.producers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
    assert layers[-1].input[1] in graph.stored
    assert graph.of_type("Softmax")[0].input[0] not in {
        d.output[0] for d in graph.of_type("DequantizeLinear")
    }


def test_weights_of_7_bits_end_at_64_in_layers_that_sum_over_channels_and_activations_stay_as_they_are(
    deployed_models: Paths, network_tables: Tables
) -> None:
    model = onnx.load(deployed_models["dsc"])
    graphs = {
        bits: Graph(quantize(model, network_tables["dsc"], signed_activations=False, weight_bits=bits))
        for bits in (8, 7)
    }
    stored = {bits: graph.stored for bits, graph in graphs.items()}
    layers = quantizable_layers(model)
    # The stem takes one channel, a depthwise convolution one at a time: they add no products of two channels.
    assert [layer.bits(7) for layer in layers] == [8, 8, 7, 8, 7, 8, 7, 7]
    for layer in layers:
        name, most = layer.weight, {8: 127, 7: 127 if layer.bits(7) == 8 else 64}
        assert {
            bits: int(np.abs(stored[bits][f"{name}_quantized"].astype(int)).max()) for bits in stored
        } == most
        ratio = stored[7][f"{name}_scale"] / stored[8][f"{name}_scale"]
        np.testing.assert_allclose(ratio, 127 / most[7], rtol=1e-6)
    taken = {node.input[1] for node in graphs[8].of_type("QuantizeLinear")}
    assert taken == {node.input[1] for node in graphs[7].of_type("QuantizeLinear")}
    assert all(stored[7][name] == stored[8][name] for name in taken)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_signed_graph_keeps_tensorrts_rules(
    deployed_models: Paths, network_tables: Tables, architecture: str
) -> None:
    graph = Graph(quantized(deployed_models, network_tables, architecture, signed=True))
    count = INT8_LAYERS[architecture]
    # One pair an input and one a weight, nothing else: no bias, no output.
    assert len(graph.of_type("QuantizeLinear")) == len(graph.of_type("DequantizeLinear")) == 2 * count
    for node in graph.of_type("QuantizeLinear", "DequantizeLinear"):
        zero_point = graph.stored[node.input[2]]
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
        assert (graph.stored[node.input[1]] > 0).all()
    for node in graph.of_type("Conv", "MatMul")[:-1]:
        for name in node.input[2:]:
            assert graph.stored[name].dtype == np.float32  # the bias
        for quantize_node, dequantize_node in (graph.pair(name) for name in node.input[:2]):
            assert quantize_node.op_type == "QuantizeLinear"
            assert list(quantize_node.input[1:]) == list(dequantize_node.input[1:])
        weight_q, _ = graph.pair(node.input[1])
        weight = graph.stored[weight_q.input[0]]
        axis = {attribute.name: attribute.i for attribute in weight_q.attribute}["axis"]
        assert axis == (0 if node.op_type == "Conv" else 1)
        others = tuple(index for index in range(weight.ndim) if index != axis)
        # -127..127 for -max..max: symmetric, so -128 is never used.
        expected = np.abs(weight).max(axis=others) * 2 / 254
        np.testing.assert_allclose(graph.stored[weight_q.input[1]], expected, rtol=1e-6)
    # The graph in front of a layer: pooling, not its quantised output.
    assert {graph.producers[node.input[0]].op_type for node in graph.of_type("Relu")} <= {"Conv", "Add"}
    assert {graph.producers[node.input[0]].op_type for node in graph.of_type("MaxPool")} == {"Relu"}


@pytest.mark.parametrize("signed", [True, False])
def test_the_activation_scales_are_those_of_the_table(
    deployed_models: Paths, network_tables: Tables, signed: bool
) -> None:
    graph = Graph(quantized(deployed_models, network_tables, "dsc", signed=signed))
    ranges = network_tables["dsc"].ranges
    checked = 0
    for node in graph.of_type("QuantizeLinear"):
        if node.input[0] not in ranges:
            continue
        low, high = ranges[node.input[0]]
        scale, zero_point = (graph.stored[name] for name in node.input[1:])
        if signed:
            assert scale == pytest.approx(max(-low, high) * 2 / 254, rel=1e-6)
        else:
            assert scale == pytest.approx((max(high, 0) - min(low, 0)) / 255, rel=1e-6)
            assert zero_point == round(-min(low, 0) / float(scale))
        checked += 1
    assert checked == (7 if signed else 8)  # all but the pixels; the unsigned one also before the last layer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_centred_pixels_have_their_middle_as_zero_for_a_cpu(
    deployed_models: Paths, network_tables: Tables, architecture: str
) -> None:
    graph = Graph(quantized(deployed_models, network_tables, architecture, signed=False))
    stem = graph.of_type("Conv")[0]
    pixels, _ = graph.pair(stem.input[0])
    assert (graph.stored[pixels.input[1]], graph.stored[pixels.input[2]]) == (1.0, 128)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_unsigned_graph_stores_integers(
    deployed_models: Paths, network_tables: Tables, architecture: str
) -> None:
    graph = Graph(quantized(deployed_models, network_tables, architecture, signed=False))
    for node in graph.of_type("Conv", "Gemm")[:-1]:
        weight, *biases = (graph.producers[name] for name in node.input[1:])
        assert graph.stored[weight.input[0]].dtype == np.int8
        # onnxruntime from some release on quantises a float bias itself; older ones would not fuse.
        assert all(graph.stored[bias.input[0]].dtype == np.int32 for bias in biases)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_onnxruntime_runs_the_unsigned_graph_in_integers(
    deployed_models: Paths, network_tables: Tables, architecture: str, tmp_path: Path
) -> None:
    path = tmp_path / "optimised.onnx"
    outputs(quantized(deployed_models, network_tables, architecture, signed=False), path)
    kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert kinds["QLinearConv"] == INT8_LAYERS[architecture] - 1
    assert kinds["QGemm"] == 1
    assert kinds["Conv"] + kinds["FusedConv"] == 0
    assert kinds["QuantizeLinear"] == 1  # the pixels
    assert kinds["DequantizeLinear"] == 1  # the input of the last Dense
    assert kinds["Gemm"] + kinds["FusedGemm"] == 1


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_int8_graph_computes_nearly_the_same(
    deployed_models: Paths, network_tables: Tables, architecture: str, signed: bool
) -> None:
    before = outputs(onnx.load(deployed_models[architecture]))
    after = outputs(quantized(deployed_models, network_tables, architecture, signed=signed))
    np.testing.assert_allclose(after.sum(axis=1), 1, rtol=1e-5)
    assert np.abs(after - before).max() < 0.05


@pytest.mark.parametrize("signed", [True, False])
def test_quantizing_is_reproducible_and_leaves_its_input_alone(
    deployed_models: Paths, network_tables: Tables, signed: bool
) -> None:
    model = onnx.load(deployed_models["dsc"])
    before = model.SerializeToString(deterministic=True)
    graphs = [quantize(model, network_tables["dsc"], signed_activations=signed) for _ in range(2)]
    assert graphs[0].SerializeToString(deterministic=True) == graphs[1].SerializeToString(deterministic=True)
    assert model.SerializeToString(deterministic=True) == before
    assert {e.key: e.value for e in graphs[0].metadata_props} == {
        e.key: e.value for e in model.metadata_props
    }
    assert graphs[0].graph.input == model.graph.input
    assert graphs[0].graph.output == model.graph.output
    assert graphs[0].opset_import == model.opset_import


@pytest.mark.parametrize("signed", [True, False])
def test_a_layer_may_stay_in_floating_point(
    deployed_models: Paths, network_tables: Tables, signed: bool
) -> None:
    model = onnx.load(deployed_models["dsc"])
    depthwise = {layer.name for layer in quantizable_layers(model) if layer.depthwise}
    mixed = quantize(model, network_tables["dsc"], signed_activations=signed, float_layers=depthwise)
    assert weighted_layers(mixed) == {"INT8": 5, "FP32": 4}
    graph = Graph(mixed)
    assert {node.name for node in graph.of_type("Conv") if node.input[1] in graph.stored} == depthwise
    for node in graph.of_type("Conv"):
        assert signed is False or (node.name in depthwise) == (
            node.input[0] not in graph.producers
            or graph.producers[node.input[0]].op_type != "DequantizeLinear"
        )


def test_unknown_or_all_float_layers_are_refused(deployed_models: Paths, network_tables: Tables) -> None:
    model = onnx.load(deployed_models["cnn"])
    with pytest.raises(UsageError, match="no layer 'nowhere'") as caught:
        quantize(model, network_tables["cnn"], signed_activations=True, float_layers=["nowhere"])
    assert caught.value.remedy == "choose among Conv_2, Conv_5, Conv_8, Conv_11, MatMul_15"
    with pytest.raises(UsageError, match="no layer is left"):
        names = [layer.name for layer in quantizable_layers(model)]
        quantize(model, network_tables["cnn"], signed_activations=True, float_layers=names)


@pytest.mark.parametrize("signed", [True, False])
def test_a_tensor_without_a_range_is_refused(
    deployed_models: Paths, network_tables: Tables, signed: bool
) -> None:
    table = network_tables["dsc"]
    ranges = {name: bounds for name, bounds in table.ranges.items() if name != "Conv_5"}
    with pytest.raises(ArtefactError, match="no range for Conv_5, the input of Conv_6") as caught:
        quantize(
            onnx.load(deployed_models["dsc"]),
            structs.replace(table, ranges=ranges),
            signed_activations=signed,
        )
    assert caught.value.remedy == (
        "calibrate this model: edge-dsc calibrate MODEL --calib-data DIR --calib-method minmax --out TABLE"
    )


@pytest.mark.parametrize("opset", [12, 21])
def test_an_opset_outside_the_rules_is_refused(
    deployed_models: Paths, network_tables: Tables, opset: int
) -> None:
    model = onnx.load(deployed_models["dsc"])
    model.opset_import[0].version = opset
    with pytest.raises(ArtefactError, match=f"has opset {opset}, INT8 graphs are made for 13 to 20"):
        quantize(model, network_tables["dsc"], signed_activations=True)


def test_a_dense_bias_is_merged_only_where_that_is_exact(
    small_model: Path, small_table: CalibrationTable
) -> None:
    model = onnx.load(small_model)
    graph = Graph(quantize(model, small_table, signed_activations=False))
    assert [node.op_type for node in graph.nodes if node.name in ("dense", "logits")] == ["Gemm", "MatMul"]
    assert [node.name for node in graph.of_type("Add")] == ["stem.centre"]


@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_the_half_graph_answers_as_the_float_one(
    deployed_models: dict[str, Path], network_tables: dict[str, CalibrationTable], architecture: str
) -> None:
    model = onnx.load(deployed_models[architecture])
    made = quantize(model, network_tables[architecture], signed_activations=True)
    before = made.SerializeToString(deterministic=True)
    half = put_rest_in_half(made)
    assert made.SerializeToString(deterministic=True) == before
    assert half.opset_import[0].version == 19
    assert half.graph.input == model.graph.input
    assert half.graph.output == model.graph.output
    assert {e.key: e.value for e in half.metadata_props} == {e.key: e.value for e in model.metadata_props}
    assert outputs(half).dtype == np.float32
    np.testing.assert_allclose(outputs(half), outputs(made), atol=0.02)


def test_scales_are_rounded_up_to_the_next_half() -> None:
    scales = np.array([1.0, 1.0001, 2.0078740, 3.14e-6, 1e-9], np.float32)
    half = round_up_to_half(scales)
    assert half.dtype == np.float16
    assert (half.astype(np.float32) >= scales).all()
    assert half.tolist() == [1.0, 1.0009765625, 2.0078125 + 2**-9, 53 * 2.0**-24, 2.0**-24]


def test_a_graph_without_pairs_is_refused(deployed_models: dict[str, Path]) -> None:
    with pytest.raises(ArtefactError, match="'dsc' has no QuantizeLinear"):
        put_rest_in_half(onnx.load(deployed_models["dsc"]))
