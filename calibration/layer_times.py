"""The time of each layer on this CPU, from ONNX Runtime's own profile."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.errors import EnvironmentProblem
from engines.packages import load

Model = Any  # onnx.ModelProto
Array = Any

RUNS = 30
_WEIGHTED = frozenset(
    {"Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
    | {"QGemm", "QLinearMatMul", "MatMulInteger", "ConvInteger"}
)


def time_layers(model: Model, layers: Sequence[str], pixels: Array) -> dict[str, float]:
    """Return the median time of each layer for one image on one thread, ms.

    ONNX Runtime renames what it fuses, but runs a chain in its order: the n-th node with weights of a run is
    the n-th layer. A layer's time holds what was fused into it, and not what stays beside it.

    Args:
        model: A graph in FP32, or unsigned INT8.
        layers: Names of all its layers with weights, in order.
        pixels: ``uint8 [N, height, width, 1]``; its first image is run :data:`RUNS` times.

    Returns:
        ``{layer: ms}``; empty where ONNX Runtime fused layers with one another, so that they cannot be told apart.

    Raises:
        EnvironmentProblem: No place for the profile.
    """
    ort = load("onnxruntime")
    try:
        with tempfile.TemporaryDirectory() as folder:
            options = ort.SessionOptions()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            session = ort.InferenceSession(
                model.SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
                # It would turn float layers between two pairs back into INT8.
                disabled_optimizers=["WeightBiasQuantization"],
            )
            for _ in range(RUNS + 1):
                session.run(None, {model.graph.input[0].name: pixels[:1]})
            events = json.loads(Path(session.end_profiling()).read_text())
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot write a profile: {error}", remedy="set TMPDIR to a place with some space"
        ) from error
    return _by_layer(events, layers)


def _by_layer(events: list[dict[str, Any]], layers: Sequence[str]) -> dict[str, float]:
    kernels = [
        event
        for event in events
        if event.get("cat") == "Node"
        and event["name"].endswith("_kernel_time")
        and event["args"].get("op_name") in _WEIGHTED
    ]
    kernels.sort(key=lambda event: event["ts"])
    count = len(layers)
    if len(kernels) != count * (RUNS + 1):
        return {}
    warm = kernels[count:]
    return {
        name: statistics.median(event["dur"] for event in warm[index::count]) / 1000
        for index, name in enumerate(layers)
    }
