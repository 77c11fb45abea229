"""Passes of their own beside the latencies: power, memory, and how near an engine comes to the machine's limits."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper

from bench.measure import Subject
from bench.power import Power, Rail, measure_power
from bench.report import Report
from edge_dsc import IMPORTED_FROM
from engines.cpu.ort import open_session
from engines.graph import count_multiply_adds, load_model
from engines.record import EngineRecord, Precision

_ELEMENT_BYTES = {Precision.FP32: 4, Precision.FP16: 2, Precision.BF16: 2, Precision.INT8: 1}
_SIDE = 768  # of the square matrices
_COPY_BYTES = 64 << 20  # beyond the last cache of most machines
_LAYERS = ("Conv", "MatMul", "Gemm")
_REPEATS = 7
_OPSET, _IR = 18, 9


@dataclass(frozen=True)
class Ceilings:
    """What this machine's processor can do at best, measured.

    Attributes:
        multiply_adds_per_s: Of an FP32 matrix product by ONNX Runtime with the engines' number of threads.
        bytes_per_s: Read and written by one thread that copies 64 MiB.
    """

    multiply_adds_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Work:
    """What one request asks of a machine.

    Attributes:
        multiply_adds: Of all layers with weights.
        bytes: What these layers read and write: input, output and weights of each, as if no cache kept anything
            from one layer to the next.
    """

    multiply_adds: int
    bytes: int


def measure_ceilings(threads: int) -> Ceilings:
    """Measure the machine's ceilings: the best of several tries of each, a second or two in all.

    Source:
        Williams, Waterman and Patterson, Roofline: An Insightful Visual Performance Model (CACM 52(4), 2009).
    """
    session = open_session(_product_model(), "a matrix product", threads=threads, remedy="see doctor")
    matrix = np.random.default_rng(0).random((_SIDE, _SIDE), dtype=np.float32)
    product = _best_seconds(lambda: session.run(None, {"a": matrix, "b": matrix}))
    source = np.ones(_COPY_BYTES // 8)
    target = np.empty_like(source)
    copy = _best_seconds(lambda: np.copyto(target, source))
    return Ceilings(_SIDE**3 / product, 2 * _COPY_BYTES / copy)


def count_work(model: Path, precision: Precision, batch: int) -> Work:
    """Count what one request of a network asks for, from its FP32 graph.

    Raises:
        ArtefactError: The graph's shapes cannot be inferred.
    """
    proto = load_model(model).proto
    adds = count_multiply_adds(proto)
    for value in [*proto.graph.input, *proto.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del proto.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    sizes = {tensor.name: prod(tensor.dims) for tensor in graph.initializer}
    weights = set(sizes)
    for value in [*graph.value_info, *graph.input, *graph.output]:
        sizes[value.name] = prod(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    moved = [name for node in graph.node if node.op_type in _LAYERS for name in (*node.input, *node.output)]
    elements = sum(sizes[name] * (1 if name in weights else batch) for name in moved)
    return Work(adds * batch, elements * _ELEMENT_BYTES[precision])


def limits_pass(
    engine: Path, record: EngineRecord, ceilings: Ceilings, *, batch: int
) -> dict[str, float] | None:
    """Return an engine's work and the ceilings it stands below, as JSON values; None without its ONNX model."""
    model = engine.parent / record.onnx
    if not model.is_file():
        return None
    work = count_work(model, record.precision, batch)
    return {**vars(work), **vars(ceilings)}


def _best_seconds(action: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - start)
    return best


def _product_model() -> bytes:
    a, b, c = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [_SIDE, _SIDE]) for name in "abc")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", [a, b], [c])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    return bytes(model.SerializeToString())


def add_pass(report: Report, name: str, found: Mapping[str, Any]) -> Report:
    """Return the report with what a pass found, by the subject's name."""
    replace = msgspec.structs.replace
    subjects = tuple(
        replace(subject, passes={**subject.passes, name: found[subject.name]})
        if subject.name in found
        else subject
        for subject in report.subjects
    )
    return replace(report, subjects=subjects)


def power_pass(
    subjects: Sequence[Subject], rails: Sequence[Rail], *, seconds: float
) -> dict[str, list[dict[str, Any]]]:
    """Measure the power of each subject, one after the other.

    Returns:
        Subject's name -> one entry per rail: its name, watts idle and busy, joules of a request, calls and seconds.
    """
    return {
        subject.name: [{**vars(power), "joules": power.joules} for power in _power(subject, rails, seconds)]
        for subject in subjects
    }


def _power(subject: Subject, rails: Sequence[Rail], seconds: float) -> Sequence[Power]:
    with ExitStack() as stack:
        return measure_power(subject.open(stack).call, rails, seconds=seconds)


def memory_pass(engine: Path, *, batch: int, threads: int, device: int = 0) -> dict[str, Any]:
    """Return the memory of a process that only runs this engine, bytes.

    Returns:
        ``host_peak_bytes``; ``host_before_bytes``: Python and the packages before the engine was opened; and
        ``device_bytes``: what opening and running it added to the used memory of the GPU, as NVML knows it,
        which holds what other processes do meanwhile; None without one. A Jetson's GPU uses the host's memory.
        Where the process failed, ``error`` alone: why.
    """
    arguments = [str(engine.absolute()), str(batch), str(threads), str(device)]
    done = subprocess.run(
        [sys.executable, "-m", "edge_dsc.latency.memory_probe", *arguments],
        cwd=IMPORTED_FROM,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {"error": _reason(done)}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Say why a process failed: its signal, else the last line that it wrote."""
    if done.returncode < 0:
        return f"the process was killed by signal {-done.returncode}"
    lines = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
    return lines[-1]


def memory_problems(report: Report) -> tuple[str, ...]:
    """Say of which engines the memory pass of a report has no figures, and why."""
    found = {
        subject.name: subject.passes["memory"] for subject in report.subjects if "memory" in subject.passes
    }
    if not found:
        return ("single requests are measured, not piles",)
    return tuple(f"{name}: {memory['error']}" for name, memory in found.items() if "error" in memory)
