"""The graph that an engine is built from: the FP32 model brought into a precision, as its runtime wants it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from calibration.layers import find_layers, quantizable_layers
from calibration.table import CalibrationTable
from engines.record import Precision
from engines.runtimes import FLOAT, Runtime

Model = Any  # onnx.ModelProto


def graph_in_precision(
    model: Model,
    precision: Precision,
    table: CalibrationTable | None,
    runtime: Runtime,
    *,
    float_layers: Collection[str] = (),
) -> Model:
    """Return the ONNX graph that holds the precision: as it is, cast to FP16, or with Q/DQ pairs.

    Args:
        model: The FP32 model; it is not changed.
        precision: What the graph shall hold.
        table: The calibration table, for INT8 and mixed.
        runtime: Decides between signed and unsigned activations, and whether FP16 surrounds INT8.
        float_layers: For INT8 and mixed: layers that stay in floating point, beside the last one.

    Raises:
        UsageError: There is no such layer.
    """
    from engines.graph import cast_to_fp16

    if precision is Precision.FP32:
        return model
    if precision is Precision.FP16:
        return cast_to_fp16(model)
    from calibration.half_rest import put_rest_in_half
    from calibration.qdq import quantize

    half = runtime.rest_in_half()
    if not _integer_layers(model, float_layers):
        return cast_to_fp16(model) if runtime.signed_activations else model
    assert table is not None, "an INT8 build has a table: the builder saw to it"
    graph = quantize(
        model, table, signed_activations=runtime.signed_activations, float_layers=tuple(float_layers)
    )
    return put_rest_in_half(graph) if half else graph


def wanted_layers(model: Model, precision: Precision, float_layers: Collection[str] = ()) -> dict[str, str]:
    """Tell what every layer with weights must run in; ``float`` is either of FP32 and FP16.

    Returns:
        Such as ``{"stem": "INT8", "logits": "float"}``. In INT8 every layer but the last and ``float_layers``.
    """
    names = [layer.name for layer in find_layers(model)]
    if precision in (Precision.FP32, Precision.FP16):
        return dict.fromkeys(names, precision.name)
    integer = _integer_layers(model, float_layers)
    return {name: "INT8" if name in integer else FLOAT for name in names}


def graph_precision(precision: Precision, wanted: dict[str, str], runtime: Runtime) -> Precision:
    """Return the precision that a builder must be told: that of the graph, which for mixed is INT8 or none."""
    if precision is not Precision.MIXED:
        return precision
    if "INT8" in wanted.values():
        return Precision.INT8
    return Precision.FP16 if runtime.signed_activations else Precision.FP32


def _integer_layers(model: Model, float_layers: Collection[str]) -> list[str]:
    return [layer.name for layer in quantizable_layers(model) if layer.name not in float_layers]
