"""``demo``: the whole line on procedural chest phantoms, from drawing them to a page with the comparison."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.compare import Ratio
from bench.plan import choose_plan
from bench.render import render_text
from bench.report import Report, save_report
from bench.tables import Table, report_ratios
from edge_dsc.calibration_run import CalibrationRequest, run_calibration
from edge_dsc.data import Sample
from edge_dsc.data.phantoms import write_phantoms
from edge_dsc.demo_engines import DemoEngine, build_engines, measure_accuracy
from edge_dsc.export import export_run
from edge_dsc.folder_loop import default_threads
from edge_dsc.inference import InferRequest, infer_source
from edge_dsc.measuring import measure_engines
from edge_dsc.networks import ARCHITECTURES
from edge_dsc.training import TrainOptions, TrainResult, train
from edge_dsc.training_report import step_progress
from engines.errors import UsageError
from engines.files import write_text
from engines.graph import count_multiply_adds, load_model
from engines.runtimes import Progress

PER_CLASS = 110  # 63 % of three such classes are the 128 images and more that a calibration needs
RECIPE = "quick"
SECONDS = 6.0  # measured time an engine

_MARKER = ".edge-dsc-demo"

Say = Callable[[str], None]


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


def run_demo(out: Path, *, seed: int, progress: Progress, say: Say) -> DemoResult:
    """Walk the whole line below ``out``; each step is announced with the command that does it alone.

    Raises:
        EdgeDscError: As the steps do.
    """
    from edge_dsc.demo_page import save_demo_page

    _clear(out)
    data = out / "phantoms"
    say(f"1/8 drawing {3 * PER_CLASS} chest phantoms: {data}")
    write_phantoms(data, PER_CLASS, seed, progress)
    trained: dict[str, TrainResult] = {}
    engines: list[DemoEngine] = []
    notes: list[str] = []
    for arch in ARCHITECTURES:
        run = out / arch
        say(f"2/8 $ edge-dsc train {data} --arch {arch} --recipe {RECIPE} --out {run}")
        options = TrainOptions(
            data=data, out=run, architecture=arch, recipe=RECIPE, seed=seed, overwrite=True
        )
        trained[arch] = train(options, progress=step_progress(arch, progress), reading=None)
        say(f"3/8 $ edge-dsc export {run}")
        model = export_run(run).path
        say(f"4/8 $ edge-dsc calibrate {run} --calib-data {data}")
        table = run_calibration(CalibrationRequest(model=model, data=data, seed=seed), progress).path
        say(f"5/8 $ edge-dsc build-engine {run} --fp32|--fp16|--int8 --backend ...")
        built, remarks = build_engines(model, table)
        engines += built
        notes += remarks
    runnable = [engine for engine in engines if engine.no_run is None]
    first = runnable[0].path
    say(f"6/8 $ edge-dsc infer {first} {data} --out {out / 'results.csv'}")
    request = InferRequest(engine=first, source=str(data), out=out / "results.csv", threads=default_threads())
    summary = infer_source(request, progress=progress)
    say(f"    {summary.line()}")
    say(f"7/8 $ edge-dsc evaluate ENGINE {data} --split evaluation --split test")
    accuracies = [_accuracy(engine, trained, data) for engine in engines]
    say(f"8/8 $ edge-dsc bench {' '.join(engine.path.name for engine in runnable)} --duration {SECONDS:g}")
    plan = choose_plan(seconds=SECONDS, seed=seed)
    report = measure_engines([engine.path for engine in runnable], plan, progress=progress)
    save_report(out / "report.json", report)
    rows = tuple(
        _row(engine, trained[engine.network], accuracy, report)
        for engine, accuracy in zip(engines, accuracies, strict=True)
    )
    result = DemoResult(
        rows=rows,
        notes=tuple(dict.fromkeys(notes)),
        ratios=report_ratios(report)[0],
        page=out / "demo.html",
        report=out / "report.json",
    )
    save_demo_page(result, report, trained, data)
    return result


def _clear(out: Path) -> None:
    """Remove an earlier demo, and nothing else."""
    marker = out / _MARKER
    if out.exists() and not marker.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty and no earlier demo", remedy="choose another folder with --out")
    if out.is_dir():
        shutil.rmtree(out)
    write_text(marker, "edge-dsc demo: the next one replaces this folder\n")


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


def _accuracy(engine: DemoEngine, trained: dict[str, TrainResult], data: Path) -> float:
    split = trained[engine.network].split
    samples: list[Sample] = [*split.samples("evaluation"), *split.samples("test")]
    return measure_accuracy(engine, data, samples)


def _row(engine: DemoEngine, trained: TrainResult, accuracy: float, report: Report) -> DemoRow:
    from bench.statistics import summarise

    measured = {subject.name: subject for subject in report.measured}.get(engine.path.stem)
    interval = summarise(measured).median_interval if measured else None
    return DemoRow(
        network=engine.network,
        precision=engine.precision.value,
        runtime=engine.record.runtime,
        features=trained.record.parameters["feature_extractor"],
        parameters=trained.record.parameters["trainable"],
        multiply_adds=count_multiply_adds(load_model(engine.model)),
        engine_bytes=engine.record.engine_bytes,
        accuracy=accuracy,
        accuracy_of="engine" if engine.no_run is None else "graph",
        median_ms=interval.value / 1e6 if interval else None,
        low_ms=interval.low / 1e6 if interval else None,
        high_ms=interval.high / 1e6 if interval else None,
    )
