"""The demo's engines: every precision on every runtime that can build it here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.table import load_table
from edge_dsc.building.engine import BuildRequest, build_engine
from edge_dsc.building.graph import graph_in_precision
from edge_dsc.data import Sample
from edge_dsc.evaluation.answers import evaluate_runner
from edge_dsc.loop.folder import default_threads
from engines.errors import AccuracyGateError
from engines.graph import load_model
from engines.record import BatchRange, EngineRecord, Precision
from engines.reference import open_reference
from engines.runtimes import RUNTIME_NAMES, get_runtime, open_engine

BATCH = BatchRange(1, 8, 32)
PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8)


@dataclass(frozen=True, kw_only=True)
class DemoEngine:
    """An engine that the demo built.

    Attributes:
        path: The engine file.
        model: The FP32 ONNX model.
        table: Its calibration table.
        record: Its record.
        no_run: Why it cannot run here, or None where it can.
    """

    path: Path
    model: Path
    table: Path
    record: EngineRecord
    no_run: str | None

    @property
    def network(self) -> str:
        """Name of the network."""
        return self.record.contract.architecture

    @property
    def precision(self) -> Precision:
        """Its precision."""
        return self.record.precision


def build_engines(model: Path, table: Path) -> tuple[list[DemoEngine], list[str]]:
    """Build a model in every precision on every runtime that builds here.

    Returns:
        The engines, and a note for each runtime or precision that was left out, with its reason.
    """
    engines: list[DemoEngine] = []
    notes: list[str] = []
    for name in RUNTIME_NAMES:
        found = get_runtime(name).availability()
        if found.no_build is not None:
            notes.append(f"{name} left out: {found.no_build}")
            continue
        for precision in PRECISIONS:
            calibration = table if precision is Precision.INT8 else None
            request = BuildRequest(
                model=model, precision=precision, runtime=name, batch=BATCH, calibration=calibration
            )
            try:
                built = build_engine(request)
            except AccuracyGateError as error:
                notes.append(f"{name} in {precision.value} left out of {model.parent.name}: {error.what}")
                continue
            notes += [f"{built.path.stem}: {note}" for note in built.record.notes]
            engines.append(
                DemoEngine(
                    path=built.path, model=model, table=table, record=built.record, no_run=found.no_run
                )
            )
    return engines, notes


def measure_accuracy(engine: DemoEngine, data: Path, samples: list[Sample]) -> float:
    """Return the accuracy of an engine on samples, or of its graph on ONNX Runtime where it cannot run here."""
    if engine.no_run is None:
        with open_engine(engine.path) as runner:
            return evaluate_runner(runner, data, samples, threads=default_threads()).metrics.accuracy
    with open_reference(_graph(engine), engine.record) as runner:
        return evaluate_runner(runner, data, samples, threads=default_threads()).metrics.accuracy


def _graph(engine: DemoEngine) -> Any:
    table = load_table(engine.table) if engine.precision is Precision.INT8 else None
    runtime = get_runtime(engine.record.runtime)
    model = load_model(engine.model)
    return graph_in_precision(model, engine.precision, table, runtime)
