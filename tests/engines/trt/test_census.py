from __future__ import annotations

import json

import pytest

from engines.trt.census import count_engine_layers


def report(*layers: object) -> str:
    return json.dumps({"Layers": list(layers), "Bindings": ["image", "probabilities"]})


def layer(kind: str, datatype: str, **more: object) -> dict[str, object]:
    return {
        "Name": "a",
        "LayerType": kind,
        "Inputs": [{"Name": "x", "Format/Datatype": datatype}],
        "Outputs": [],
        **more,
    }


@pytest.mark.parametrize(
    ("datatype", "expected"),
    [
        ("Row major linear FP32", "FP32"),
        ("Float", "FP32"),
        ("Channel major FP16 format where channel % 8 == 0", "FP16"),
        ("Half", "FP16"),
        ("Thirty-two wide channel vectorized row major Int8 format", "INT8"),
        ("BF16", "unknown"),
    ],
)
def test_the_type_of_the_first_input_decides(datatype: str, expected: str) -> None:
    assert count_engine_layers(report(layer("CaskConvolution", datatype))) == {expected: 1}


def test_layers_without_weights_do_not_count() -> None:
    text = report(
        layer("CaskConvolution", "Int8"),
        layer("CaskGemmMatrixMultiply", "Int8"),
        layer("Reformat", "Int8"),
        layer("CaskPooling", "FP32"),
        layer("kgen", "FP16", Weights={"Type": "Half", "Count": 288}),
        layer("kgen", "FP16", Weights={"Type": "Half", "Count": 0}),
        layer("NoOp", "FP16", ParameterType="Convolution"),
    )
    assert count_engine_layers(text) == {"INT8": 2, "FP16": 2}


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "{}", report("only a name"), report()])
def test_a_report_without_details_counts_nothing(text: str) -> None:
    assert count_engine_layers(text) == {}


def test_a_layer_without_inputs_is_unknown() -> None:
    assert count_engine_layers(report({"LayerType": "CaskConvolution", "Inputs": []})) == {"unknown": 1}
