"""What a demo gives: a row for every engine, and the table of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.compare import Ratio
from bench.render import render_text
from bench.tables import Table


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One engine in the demo's table.

    Attributes:
        network: ``dsc`` or ``cnn``.
        precision: ``fp32``, ``fp16`` or ``int8``.
        runtime: What built it.
        features: Trainable parameters of the feature extractor.
        parameters: Trainable parameters in all.
        multiply_adds: For one image, of the deployed graph.
        engine_bytes: Size of the engine file.
        accuracy: On evaluation and test phantoms.
        accuracy_of: ``engine``, or ``graph`` where the engine cannot run here and ONNX Runtime ran its graph.
        median_ms: Median latency, batch 1, one thread; None where the engine cannot run here.
        low_ms: Lower end of its 95 % interval.
        high_ms: Upper end.
    """

    network: str
    precision: str
    runtime: str
    features: int
    parameters: int
    multiply_adds: int
    engine_bytes: int
    accuracy: float
    accuracy_of: str
    median_ms: float | None
    low_ms: float | None
    high_ms: float | None


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo made.

    Attributes:
        rows: One an engine.
        notes: What could not be built here and why, and what the builders noted.
        ratios: Latency ratios to the first engine, DSC in FP32.
        page: The HTML page.
        report: The latency report.
    """

    rows: tuple[DemoRow, ...]
    notes: tuple[str, ...]
    ratios: tuple[Ratio, ...]
    page: Path
    report: Path

    def text(self) -> str:
        """Return the table and where the rest is."""
        table = render_text(demo_table(self.rows, self.notes))
        return f"{table}\n\nlatency report: {self.report}\npage with the pictures: {self.page}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
            "page": str(self.page),
            "report": str(self.report),
        }


def demo_table(rows: tuple[DemoRow, ...], notes: tuple[str, ...]) -> Table:
    """Return the demo's table: DSC against CNN, a row an engine."""
    header = (
        "network",
        "precision",
        "runtime",
        "features",
        "parameters",
        "multiply-adds",
        "file, kB",
        "accuracy",
        "latency, ms",
        "95 % interval",
    )
    remarks = [
        "features: trainable parameters of the feature extractor; latency: median, batch 1, one thread",
        *(["(graph): the engine cannot run here; ONNX Runtime ran its graph"] if _has_graph(rows) else []),
        *notes,
    ]
    return Table(
        title="DSC against CNN on phantoms",
        header=header,
        rows=tuple(map(_cells, rows)),
        notes=tuple(remarks),
    )


def _has_graph(rows: tuple[DemoRow, ...]) -> bool:
    return any(row.accuracy_of == "graph" for row in rows)


def _cells(row: DemoRow) -> tuple[str, ...]:
    latency, interval = "needs a GPU", ""
    if row.median_ms is not None:
        latency = f"{row.median_ms:.3f}"
        interval = f"{row.low_ms:.3f} to {row.high_ms:.3f}"
    mark = " (graph)" if row.accuracy_of == "graph" else ""
    return (
        row.network,
        row.precision,
        row.runtime,
        f"{row.features:,}",
        f"{row.parameters:,}",
        f"{row.multiply_adds / 1e6:.1f} M",
        f"{row.engine_bytes / 1e3:,.0f}",
        f"{row.accuracy:.1%}{mark}",
        latency,
        interval,
    )
