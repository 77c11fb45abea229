"""Which precision the layers with weights have: from the parsed network, and from the built engine."""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.runtimes import EngineLayer
from engines.trt import versions

NETWORK = "parsed network (types of the layers' inputs)"
INSPECTOR = "engine inspector"

_WEIGHTED = re.compile(r"conv|gemm|matrixmultiply|matmul|fullyconnected", re.IGNORECASE)
# "Weights.Type" and formats. "N/A due to dynamic shapes" is none of them: what the inspector answers for tensors
# of a dynamic shape without a context (NvInferRuntime.h 8.6.1 line 3606, 10.3 line 4482, 11.1 line 4914).
_TYPES = (("INT8", r"\bint8\b"), ("FP16", r"\b(fp16|half)\b"), ("FP32", r"\b(fp32|float|tf32)\b"))
# A kernel's name tells its arithmetic, such as sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32.
_KERNELS = (
    ("INT8", r"i8i8|i8f32|i8f16|i8i32|imma|int8"),
    ("FP16", r"f16f16|fp16|hmma"),
    ("FP32", r"f32f32|fp32|sgemm"),
)
# What TensorRT 10 and 11 call a fused layer, and its kernel; its letters tell no arithmetic.
_MYELIN = "__myl_"


def weighted_layers(trt: Any, network: Any) -> list[Any]:
    """Return the convolutions and matrix multiplications of a parsed network."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return [
        layer for layer in layers if layer.type in (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)
    ]


def network_layer_types(trt: Any, network: Any) -> dict[str, str]:
    """Name the convolutions and matrix multiplications of a parsed network, with the type that they compute in.

    INT8 means that both the input and the weight come from a dequantize layer. In a strongly typed network
    the builder keeps these types.

    Returns:
        Type by name, such as ``{"stem": "INT8"}``, in the order of the network.
    """
    names = {trt.DataType.FLOAT: "FP32", trt.DataType.HALF: "FP16", trt.DataType.INT8: "INT8"}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    dequantized = {layer.get_output(0).name for layer in layers if layer.type == trt.LayerType.DEQUANTIZE}
    found: dict[str, str] = {}
    for layer in weighted_layers(trt, network):
        # A convolution has its weight as a second input only where another layer computes it, as in Q/DQ.
        tensors = [layer.get_input(index) for index in range(min(2, layer.num_inputs))]
        if len(tensors) == 2 and all(tensor is not None and tensor.name in dequantized for tensor in tensors):
            found[str(layer.name)] = "INT8"
        else:
            kind = versions.computation_type(layer, tensors[0])
            found[str(layer.name)] = names.get(kind, str(kind))
    return found


def engine_layer_types(report: str, parsed: Mapping[str, str]) -> dict[str, str]:
    """Find the layers of a parsed network in an engine inspector's JSON report, with the type that they run in.

    A fused layer is named after all that went into it, such as ``stem + stem_relu``, or carries the ONNX names in
    its metadata: ``[ONNX Layer: stem]`` (NVIDIA/TensorRT#4397). What proves a type is the type of its weights, then
    the name of its kernel, then the format of its first input. A fused layer of TensorRT 10 and 11 that has neither
    weights nor a kernel of its own may take inputs of several types: its formats confirm the network's type, and
    contradict nothing. A layer that leaves its type in one optimisation profile has left it.

    Args:
        report: Of :func:`inspect_plan`.
        parsed: Type by name in the parsed network.

    Returns:
        Type by name, for the names whose type the report tells.
    """
    entries = _entries(report)
    found = {}
    for name, kind in parsed.items():
        whole = re.compile(rf"(?<![\w./]){re.escape(name)}(?![\w./])")
        listed = re.compile(rf"\[ONNX Layer: {re.escape(name)}( \||\])")
        held = [
            entry
            for entry in entries
            if (_is_weighted(entry) and whole.search(str(entry.get("Name", ""))))
            or listed.search(str(entry.get("Metadata", "")))
        ]
        types: dict[str, set[str]] = defaultdict(set)  # by optimisation profile: each has kernels of its own
        for entry in held:
            if seen := _proven_type(entry):
                types[_profile(entry)].add(seen)
        agreed = {seen for each in types.values() if len(each) == 1 for seen in each}
        if agreed:
            found[name] = next((seen for seen in sorted(agreed) if seen != kind), kind)
        elif not types and any(kind in map(_format, _inputs(entry)) for entry in held):
            found[name] = kind
    return found


def describe_layers(
    report: str | None, profile: int, times: Mapping[str, Sequence[float]]
) -> tuple[EngineLayer, ...]:
    """Join what the engine inspector and the profiler say of the layers of one optimisation profile, by their names.

    Args:
        report: Of :func:`read_report`; None where there is no inspector.
        profile: The optimisation profile that ran: every one has layers of its own.
        times: Milliseconds of every run, by the layer's name.

    Returns:
        The layers in the inspector's order, then those that only the profiler names.
    """
    mark = f"[profile {profile}]" if profile else ""
    entries = _entries(report or "")
    medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
    found = []
    for entry in [entry for entry in entries if _profile(entry) == mark] or entries:
        name = str(entry.get("Name", ""))
        timed = name if name in medians else name.removesuffix(mark).rstrip()
        formats = sorted(set(map(_format, _inputs(entry))) - {""})
        found.append(
            EngineLayer(
                name=name,
                onnx=tuple(re.findall(r"\[ONNX Layer: (.*?)(?: \||\])", str(entry.get("Metadata", "")))),
                kind=str(entry.get("LayerType", "")),
                precision=_proven_type(entry) or "+".join(formats),
                kernel=str(entry.get("TacticName", "")),
                microseconds=medians.pop(timed, None),
            )
        )
    return (*found, *(EngineLayer(name=name, microseconds=value) for name, value in medians.items()))


def _profile(entry: dict[str, Any]) -> str:
    """Return which optimisation profile a layer is of; names of all but the first end so: ``stem [profile 1]``."""
    match = re.search(r"\[profile \d+\]", str([entry.get("Name"), *_inputs(entry)]))
    return match.group() if match else ""


def _entries(report: str) -> list[dict[str, Any]]:
    try:
        entries = json.loads(report).get("Layers", [])
    except (ValueError, AttributeError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]


def _proven_type(entry: dict[str, Any]) -> str:
    """Return what a layer runs in by its weights, its kernel or, where it was not fused, its first input."""
    weights, kernel = entry.get("Weights"), str(entry.get("TacticName", ""))
    stored = _first_match(_TYPES, str(weights.get("Type", ""))) if isinstance(weights, dict) else ""
    computed = "" if kernel.startswith(_MYELIN) else _first_match(_KERNELS, kernel)
    fused = str(entry.get("Name", "")).startswith(_MYELIN) or not _is_weighted(entry)
    first = "" if fused else next(map(_format, _inputs(entry)), "")
    # INT8 weights that meet a floating point input are a way of storing them.
    return (computed or first or stored) if stored == "INT8" else (stored or computed or first)


def _inputs(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [tensor for tensor in entry.get("Inputs") or [] if isinstance(tensor, dict)]


def _format(tensor: dict[str, Any]) -> str:
    text = " ".join(str(tensor.get(key, "")) for key in ("Format/Datatype", "Datatype", "Format"))
    return _first_match(_TYPES, text)


def _first_match(patterns: Iterable[tuple[str, str]], text: str) -> str:
    return next((name for name, pattern in patterns if re.search(pattern, text, re.IGNORECASE)), "")


def _is_weighted(entry: dict[str, Any]) -> bool:
    kind = f"{entry.get('LayerType', '')} {entry.get('ParameterType', '')}"
    weights = entry.get("Weights")
    return bool(_WEIGHTED.search(kind)) or (isinstance(weights, dict) and bool(weights.get("Count")))


@dataclass(frozen=True)
class Inspection:
    """What a serialised engine tells once it is loaded.

    Attributes:
        report: The engine inspector's JSON report.
        memory_bytes: Device memory that one execution context needs, at most.
    """

    report: str
    memory_bytes: int


def inspect_plan(
    trt: Any, logger: Any, plan: Any, shapes: Mapping[str, tuple[int, ...]], *, dla: int | None = None
) -> Inspection | None:
    """Load a serialised engine and ask its inspector; needs a GPU.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.
        logger: TensorRT's logger.
        plan: The serialised engine.
        shapes: A shape for every input by its name: the formats of tensors are known only then.
        dla: The core of the Deep Learning Accelerator that the engine is for.

    Returns:
        What was found, or None where the engine cannot be loaded on this machine.
    """
    runtime = trt.Runtime(logger)
    # A version-compatible engine brings its runtime: it was built just now.
    runtime.engine_host_code_allowed = True
    versions.use_dla(runtime, dla)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    execution = versions.create_execution(trt, engine, None)  # it only holds shapes: it gets no memory
    shaped = execution is not None and all(execution.set_input_shape(*item) for item in shapes.items())
    report = read_report(trt, engine, execution if shaped else None)
    return None if report is None else Inspection(report, versions.memory_limit(engine))


def read_report(trt: Any, engine: Any, execution: Any) -> str | None:
    """Return the engine inspector's JSON report; None where there is no inspector.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.
        engine: The loaded engine.
        execution: A context whose shapes are set, or None: the formats of tensors are known only with one.
    """
    inspector = engine.create_engine_inspector()
    if inspector is None:
        return None
    if execution is not None:
        inspector.execution_context = execution
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
