"""What an engine inspector's report tells of the layers with weights, in the words of several releases."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engines.runtimes import EngineLayer
from engines.trt.census import describe_layers, engine_layer_types

DYNAMIC = "N/A due to dynamic shapes"


def report(*layers: object) -> str:
    return json.dumps({"Layers": list(layers), "Bindings": ["image", "probabilities"]})


def layer(kind: str, datatype: str = DYNAMIC, *others: str, **more: object) -> dict[str, object]:
    inputs = [{"Name": "x", "Format/Datatype": each} for each in (datatype, *others)]
    return {"Name": "stem + stem_relu", "LayerType": kind, "Inputs": inputs, "Outputs": [], **more}


def type_of(entry: dict[str, Any], parsed: str = "INT8") -> str | None:
    return engine_layer_types(report(entry), {"stem": parsed}).get("stem")


@pytest.mark.parametrize(
    ("datatype", "expected"),
    [
        ("Row major linear FP32", "FP32"),
        ("Float", "FP32"),
        ("Channel major FP16 format where channel % 8 == 0", "FP16"),
        ("Half", "FP16"),
        ("Thirty-two wide channel vectorized row major Int8 format", "INT8"),
        ("BF16", None),
        (DYNAMIC, None),
    ],
)
def test_the_format_of_the_first_input(datatype: str, expected: str | None) -> None:
    assert type_of(layer("CaskConvolution", datatype)) == expected


@pytest.mark.parametrize(("weights", "expected"), [("Int8", "INT8"), ("Half", "FP16"), ("Float", "FP32")])
def test_the_type_of_the_weights_where_shapes_are_dynamic(weights: str, expected: str) -> None:
    # what TensorRT 8.6 answers without a context
    entry = layer(
        "CaskConvolution", Weights={"Type": weights, "Count": 288}, Bias={"Type": "Float", "Count": 32}
    )
    assert type_of(entry) == expected


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs", "INT8"),
        ("sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_n", "INT8"),
        ("ampere_int8_i8816cudnn_int8_256x128_ldg16_relu_singleBuffer_medium_nt_v1", "INT8"),
        ("sm86_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", "FP16"),
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n", "FP32"),
        ("0x0000000000000000", None),
    ],
)
def test_the_name_of_the_kernel(kernel: str, expected: str | None) -> None:
    assert type_of(layer("CaskGemmMatrixMultiply", TacticName=kernel)) == expected


def test_integer_weights_that_meet_floating_point_are_storage() -> None:
    weights = {"Type": "Int8", "Count": 288}
    assert type_of(layer("CaskConvolution", "Half", Weights=weights)) == "FP16"
    assert (
        type_of(layer("CaskConvolution", Weights=weights, TacticName="sm80_xmma_gemm_f16f16_f16f16"))
        == "FP16"
    )


def fused(*formats: str, **more: object) -> dict[str, object]:
    """A layer as TensorRT 10 and 11 fuse it (NVIDIA/TensorRT#4397)."""
    names = "[ONNX Layer: cast]\x1f[ONNX Layer: stem | block (Function)]\x1f[ONNX Layer: stem_relu]"
    kernel = {"TacticName": "__myl_CastMulInt8ConvMaxRe_0x7ad83d0a9d0c93c5"}
    name = {"Name": "__myl_CastMulInt8ConvMaxRe_myl0_3"}
    return {**layer("kgen", *(formats or (DYNAMIC,))), **name, "Metadata": names, **kernel, **more}


def test_a_fused_layer_is_found_by_its_metadata_and_confirms() -> None:
    assert type_of(fused("Float", "Int8")) == "INT8"
    assert type_of(fused("Float", "Int8"), "FP32") == "FP32"
    assert type_of(fused("Float", "Half")) is None  # it quantizes inside: no proof against
    assert type_of(fused()) is None


def test_a_fused_layer_whose_kernel_has_a_name_of_its_own_proves() -> None:
    assert type_of(fused("Float", TacticName="sm80_xmma_gemm_i8f32_i8i32_f32_tn_n")) == "INT8"
    assert type_of(fused(TacticName="sm80_xmma_gemm_f16f16_f16f16_f16_tn_n")) == "FP16"


def test_names_are_whole() -> None:
    entry = layer("CaskConvolution", "Int8")
    assert engine_layer_types(report(entry), {"stem_relu": "INT8", "ste": "INT8", "a/stem": "INT8"}) == {
        "stem_relu": "INT8"
    }
    assert engine_layer_types(report(fused("Int8")), {"ste": "INT8", "stem_relu": "INT8"}) == {
        "stem_relu": "INT8"
    }


def test_what_copies_and_pools_does_not_count() -> None:
    copies = layer("Reformat", "Float", Name="Reformatting CopyNode for Input Tensor 0 to stem + stem_relu")
    text = report(copies, layer("CaskPooling", "Float"), layer("CaskConvolution", "Int8"))
    assert engine_layer_types(text, {"stem": "INT8"}) == {"stem": "INT8"}


@pytest.mark.parametrize(("second", "expected"), [("Int8", "INT8"), ("Half", "FP16"), ("BF16", "INT8")])
def test_a_layer_is_in_its_type_in_every_profile(second: str, expected: str) -> None:
    other = layer("CaskConvolution", second, Name="stem + stem_relu [profile 1]")
    assert engine_layer_types(report(layer("CaskConvolution", "Int8"), other), {"stem": "INT8"}) == {
        "stem": expected
    }


def test_two_layers_that_disagree_prove_nothing() -> None:
    text = report(layer("CaskConvolution", "Int8"), layer("CaskConvolution", "Half"))
    assert engine_layer_types(text, {"stem": "INT8"}) == {}


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "{}", report("only a name"), report()])
def test_a_report_without_details_tells_nothing(text: str) -> None:
    assert engine_layer_types(text, {"stem": "INT8"}) == {}


def test_a_layer_without_inputs_tells_nothing() -> None:
    assert type_of({"Name": "stem", "LayerType": "CaskConvolution", "Inputs": []}) is None


def test_layers_are_described_in_the_inspectors_order_and_timed_by_the_profiler() -> None:
    kernel = "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw"
    text = report(
        layer("Reformat", "Float", Name="copy"),
        layer(
            "CaskConvolution", "Int8", TacticName=kernel, Metadata="[ONNX Layer: stem]\x1f[ONNX Layer: relu]"
        ),
        fused("Float", "Half"),
        layer("CaskConvolution", "Half", Name="stem + stem_relu [profile 1]"),
    )
    times = {"stem + stem_relu": [0.5, 0.25, 0.125], "copy": [0.001, 0.002], "of its own": [1.0]}
    assert describe_layers(text, 0, times) == (
        EngineLayer(name="copy", kind="Reformat", precision="FP32", microseconds=1.5),
        EngineLayer(
            name="stem + stem_relu",
            onnx=("stem", "relu"),
            kind="CaskConvolution",
            precision="INT8",
            kernel=kernel,
            microseconds=250.0,
        ),
        EngineLayer(
            name="__myl_CastMulInt8ConvMaxRe_myl0_3",
            onnx=("cast", "stem", "stem_relu"),
            kind="kgen",
            precision="FP16+FP32",
            kernel="__myl_CastMulInt8ConvMaxRe_0x7ad83d0a9d0c93c5",
        ),
        EngineLayer(name="of its own", microseconds=1000.0),
    )


@pytest.mark.parametrize("timed", ["stem + stem_relu", "stem + stem_relu [profile 1]"])
def test_layers_of_another_profile_are_left_out(timed: str) -> None:
    name = "stem + stem_relu [profile 1]"
    text = report(layer("CaskConvolution", "Int8"), layer("CaskConvolution", "Half", Name=name))
    expected = EngineLayer(name=name, kind="CaskConvolution", precision="FP16", microseconds=500.0)
    assert describe_layers(text, 1, {timed: [0.5]}) == (expected,)


def test_without_an_inspector_the_profiler_names_the_layers() -> None:
    assert describe_layers(None, 1, {"stem": [0.5]}) == (EngineLayer(name="stem", microseconds=500.0),)
    assert describe_layers(report("only a name"), 0, {}) == ()
