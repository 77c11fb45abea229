"""An ONNX graph on ONNX Runtime as it is: the stand-in for an engine that cannot run on this machine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from engines.ort import OrtRunner, open_session
from engines.record import EngineRecord
from engines.runtimes import Runner

if TYPE_CHECKING:
    from onnx import ModelProto


def open_reference(graph: ModelProto, record: EngineRecord, *, threads: int = 1) -> Runner:
    """Run the graph that an engine was built from, whatever precision its layers get here.

    The answers are those of the graph's own roundings (FP16 casts, Q/DQ pairs), computed by ONNX Runtime: what
    they say of accuracy holds for the engine up to its runtime's arithmetic. Their time says nothing of it.

    Args:
        graph: The ``onnx.ModelProto`` in the engine's precision.
        record: The engine's record.
        threads: CPU threads for one run.

    Raises:
        ArtefactError: ONNX Runtime cannot read the graph.
        EnvironmentProblem: ``onnxruntime`` is missing.
    """
    name = f"graph of {record.engine}"
    session, failures = open_session(
        graph.SerializeToString(), name, threads=threads, remedy=f"rebuild it: {record.build_command}"
    )
    return OrtRunner(session, replace(record, engine=name), failures)
