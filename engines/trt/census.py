"""Which precision the layers with weights have: from the parsed network, and from the built engine."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

NETWORK = "parsed network (types of the layers' inputs)"
INSPECTOR = "engine inspector"
UNKNOWN = "unknown"  # a type that the inspector does not name, or that is none of ours

_WEIGHTED = re.compile(r"conv|gemm|matrixmultiply|matmul|fullyconnected", re.IGNORECASE)
_TYPES = (("INT8", r"\bint8\b"), ("FP16", r"\b(fp16|half)\b"), ("FP32", r"\b(fp32|float|tf32)\b"))


def network_layer_types(trt: Any, network: Any) -> list[tuple[str, str]]:
    """Name the convolutions and matrix multiplications of a parsed network, with the type of their inputs.

    INT8 means that both the input and the weight come from a dequantize layer. In a strongly typed network
    the builder keeps these types.

    Returns:
        Name and type of each, such as ``("stem", "INT8")``, in the order of the network.
    """
    names = {trt.DataType.FLOAT: "FP32", trt.DataType.HALF: "FP16"}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    dequantized = {layer.get_output(0).name for layer in layers if layer.type == trt.LayerType.DEQUANTIZE}
    found: list[tuple[str, str]] = []
    for layer in layers:
        if layer.type not in (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY):
            continue
        # A convolution has its weight as a second input only where another layer computes it, as in Q/DQ.
        tensors = [layer.get_input(index) for index in range(min(2, layer.num_inputs))]
        if len(tensors) == 2 and all(tensor is not None and tensor.name in dequantized for tensor in tensors):
            kind = "INT8"
        else:
            kind = names.get(tensors[0].dtype, str(tensors[0].dtype))
        found.append((str(layer.name), kind))
    return found


def count_types(layers: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Count layers by their type: such as ``{"INT8": 7, "FP32": 2}``."""
    return dict(Counter(kind for _, kind in layers))


def engine_layer_types(report: str, names: Iterable[str]) -> dict[str, str]:
    """Find layers by name in an engine inspector's JSON report, with the type of their first input.

    A fused layer is named after all that went into it, such as ``stem + stem_relu``.

    Returns:
        Type by name, for those names that stand in exactly one layer with weights.
    """
    entries = _weighted_entries(report)
    found = {}
    for name in names:
        whole = re.compile(rf"(?<![\w./]){re.escape(name)}(?![\w./])")
        held = [entry for entry in entries if whole.search(str(entry.get("Name", "")))]
        if len(held) == 1:
            found[name] = _entry_type(held[0])
    return found


def count_engine_layers(report: str) -> dict[str, int]:
    """Count the layers with weights in an engine inspector's JSON report by the type of their first input.

    Returns:
        Such as ``{"INT8": 7, "FP32": 2}``; empty where the report names no layers.
    """
    return dict(Counter(map(_entry_type, _weighted_entries(report))))


def _weighted_entries(report: str) -> list[dict[str, Any]]:
    try:
        entries = json.loads(report).get("Layers", [])
    except (ValueError, AttributeError):
        return []
    return [entry for entry in entries if isinstance(entry, dict) and _is_weighted(entry)]


def _entry_type(entry: dict[str, Any]) -> str:
    inputs = entry.get("Inputs") or [{}]
    text = " ".join(str(inputs[0].get(key, "")) for key in ("Format/Datatype", "Datatype", "Format"))
    return next((name for name, pattern in _TYPES if re.search(pattern, text, re.IGNORECASE)), UNKNOWN)


def _is_weighted(entry: dict[str, Any]) -> bool:
    kind = f"{entry.get('LayerType', '')} {entry.get('ParameterType', '')}"
    weights = entry.get("Weights")
    return bool(_WEIGHTED.search(kind)) or (isinstance(weights, dict) and bool(weights.get("Count")))


def inspect_plan(trt: Any, logger: Any, plan: Any) -> str | None:
    """Return the engine inspector's JSON report of a serialised engine; needs a GPU.

    Returns:
        The report, or None where the engine cannot be loaded on this machine.
    """
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    inspector = engine.create_engine_inspector()
    if inspector is None:
        return None
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
