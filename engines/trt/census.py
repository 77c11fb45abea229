"""Which precision the layers with weights have: from the parsed network, and from the built engine."""

from __future__ import annotations

import json
import re
from typing import Any

NETWORK = "parsed network (types of the layers' inputs)"
INSPECTOR = "engine inspector"
UNKNOWN = "unknown"  # a type that the inspector does not tell, or that is none of ours

_WEIGHTED = re.compile(r"conv|gemm|matrixmultiply|matmul|fullyconnected", re.IGNORECASE)
_TYPES = (("INT8", r"\bint8\b"), ("FP16", r"\b(fp16|half)\b"), ("FP32", r"\b(fp32|float|tf32)\b"))


def count_network_layers(trt: Any, network: Any) -> dict[str, int]:
    """Count convolutions and matrix multiplications of a parsed network by the type of their inputs.

    INT8 means that both the input and the weight come from a dequantize layer. In a strongly typed network
    the builder keeps these types.
    """
    names = {trt.DataType.FLOAT: "FP32", trt.DataType.HALF: "FP16"}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    dequantized = {layer.get_output(0).name for layer in layers if layer.type == trt.LayerType.DEQUANTIZE}
    found: dict[str, int] = {}
    for layer in layers:
        if layer.type not in (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY):
            continue
        # A convolution has its weight as a second input only where another layer computes it, as in Q/DQ.
        tensors = [layer.get_input(index) for index in range(min(2, layer.num_inputs))]
        if len(tensors) == 2 and all(tensor is not None and tensor.name in dequantized for tensor in tensors):
            name = "INT8"
        else:
            name = names.get(tensors[0].dtype, str(tensors[0].dtype))
        found[name] = found.get(name, 0) + 1
    return found


def count_engine_layers(report: str) -> dict[str, int]:
    """Count the layers with weights in an engine inspector's JSON report by the type of their first input.

    Returns:
        Such as ``{"INT8": 7, "FP32": 2}``; empty where the report names no layers.
    """
    try:
        entries = json.loads(report).get("Layers", [])
    except (ValueError, AttributeError):
        return {}
    found: dict[str, int] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not _is_weighted(entry):
            continue
        inputs = entry.get("Inputs") or [{}]
        text = " ".join(str(inputs[0].get(key, "")) for key in ("Format/Datatype", "Datatype", "Format"))
        name = next((name for name, pattern in _TYPES if re.search(pattern, text, re.IGNORECASE)), UNKNOWN)
        found[name] = found.get(name, 0) + 1
    return found


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
