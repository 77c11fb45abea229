"""``demo``: the whole line on procedural chest phantoms, from drawing them to a page with the comparison."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from bench.compare import Ratio
from bench.plan import choose_plan
from bench.report import Report, save_report
from bench.tables import report_ratios
from calibration.table import load_table
from edge_dsc.build.calibrate import CalibrationRequest, run_calibration
from edge_dsc.build.engine import BuildRequest, build_engine, graph_in_precision
from edge_dsc.build.export import export_run
from edge_dsc.data import Sample
from edge_dsc.data.phantoms import CLASSES, write_phantoms
from edge_dsc.evaluate.evaluation import evaluate_runner
from edge_dsc.infer.inference import InferRequest, infer_source
from edge_dsc.latency.subjects import measure_engines
from edge_dsc.networks import ARCHITECTURES
from edge_dsc.page.document import Picture, Section, report_sections, save_page
from edge_dsc.training import TrainOptions, TrainResult, train
from edge_dsc.training.train import step_progress
from engines.errors import AccuracyGateError, UsageError
from engines.files import write_text
from engines.graph import count_multiply_adds, load_model
from engines.images import decode_grey, read_bytes, resize_to, usable_processors
from engines.ort import open_reference
from engines.record import BatchRange, EngineRecord, Precision
from engines.runtimes import RUNTIME_NAMES, Progress, get_runtime, open_engine
from engines.text_table import Table, render_text

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
            return evaluate_runner(runner, data, samples, threads=usable_processors()).metrics.accuracy
    with open_reference(_graph(engine), engine.record) as runner:
        return evaluate_runner(runner, data, samples, threads=usable_processors()).metrics.accuracy


def _graph(engine: DemoEngine) -> Any:
    table = load_table(engine.table) if engine.precision is Precision.INT8 else None
    runtime = get_runtime(engine.record.runtime)
    model = load_model(engine.model).proto
    return graph_in_precision(model, engine.precision, table, runtime)


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


_TILES = 4  # phantoms of a class on the contact sheet
_TILE = 180  # pixels a side


def save_demo_page(
    result: DemoResult, report: Report, trained: Mapping[str, TrainResult], data: Path
) -> None:
    """Write the page of a demo run."""
    sections = [
        Section("DSC against CNN", (demo_table(result.rows, result.notes),)),
        Section("The phantoms", (_contact_sheet(trained, data),)),
    ]
    for arch, run in trained.items():
        pictures = tuple(
            Picture(png=(run.run / name).read_bytes(), caption=f"{arch}: {caption}")
            for name, caption in (
                ("curves.png", "loss and accuracy over the epochs"),
                ("confusion.png", "confusion matrix on evaluation and test images"),
            )
        )
        sections.append(Section(f"Training of {arch}", pictures))
    summary = (
        "The whole line of edge-dsc on procedural phantoms: "
        "the figures show the toolkit at work and nothing about X-rays."
    )
    save_page(result.page, "edge-dsc demo", [*sections, *report_sections(report)], summary=summary)


def _contact_sheet(trained: Mapping[str, TrainResult], data: Path) -> Picture:
    split = next(iter(trained.values())).split
    rows = []
    for label in split.labels:
        samples = [sample for sample in split.samples("train") if sample.label == label][:_TILES]
        tiles = [resize_to(decode_grey(read_bytes(data / sample.path)), _TILE, _TILE) for sample in samples]
        rows.append(np.hstack(tiles))
    _, png = cv2.imencode(".png", np.vstack(rows))
    return Picture(
        png=png.tobytes(), caption=f"Training phantoms, one row per class: {', '.join(split.labels)}"
    )


_MARKER = ".edge-dsc-demo"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """How large a demo is.

    Attributes:
        per_class: Phantoms a class; 63 % of three classes are to be the 128 images that a calibration needs.
        recipe: Training recipe.
        epochs: Instead of the recipe's.
        seconds: Measured time an engine.
        seed: Seed of everything.
    """

    per_class: int = 110
    recipe: str = "quick"
    epochs: int | None = None
    seconds: float = 6.0
    seed: int = 0


@dataclass
class _Walk:
    """A demo on its way: where it writes, what it tells, and what it has made."""

    out: Path
    plan: DemoPlan
    progress: Progress
    say: Say
    trained: dict[str, TrainResult] = field(default_factory=dict)
    engines: list[DemoEngine] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def data(self) -> Path:
        return self.out / "phantoms"

    def draw(self) -> None:
        count = len(CLASSES) * self.plan.per_class
        self.say(f"1/8 drawing {count} chest phantoms: {self.data}")
        write_phantoms(self.data, self.plan.per_class, self.plan.seed, self.progress)

    def train(self, arch: str) -> None:
        run, recipe = self.out / arch, self.plan.recipe
        self.say(f"2/8 $ edge-dsc train {self.data} --arch {arch} --recipe {recipe} --out {run}")
        options = TrainOptions(
            data=self.data,
            out=run,
            architecture=arch,
            recipe=recipe,
            epochs=self.plan.epochs,
            seed=self.plan.seed,
        )
        self.trained[arch] = train(options, progress=step_progress(arch, self.progress))

    def build(self, arch: str) -> None:
        run = self.out / arch
        self.say(f"3/8 $ edge-dsc export {run}")
        model = export_run(run).path
        self.say(f"4/8 $ edge-dsc calibrate {run} --calib-data {self.data}")
        request = CalibrationRequest(model=model, data=self.data, seed=self.plan.seed)
        table = run_calibration(request, self.progress).path
        self.say(f"5/8 $ edge-dsc build-engine {run} --fp32|--fp16|--int8 --backend ...")
        engines, notes = build_engines(model, table)
        self.engines += engines
        self.notes += notes

    def classify(self) -> None:
        engine, results = self.runnable[0], self.out / "results.csv"
        self.say(f"6/8 $ edge-dsc infer {engine} {self.data} --out {results}")
        request = InferRequest(engine=engine, source=str(self.data), out=results, threads=usable_processors())
        summary = infer_source(request, progress=self.progress)
        self.say(f"    {summary.line()}")

    def evaluate(self) -> list[float]:
        self.say(f"7/8 $ edge-dsc evaluate ENGINE {self.data} --split evaluation --split test")
        return [_accuracy(engine, self.trained, self.data) for engine in self.engines]

    def measure(self) -> Report:
        names = " ".join(engine.name for engine in self.runnable)
        self.say(f"8/8 $ edge-dsc bench {names} --duration {self.plan.seconds:g}")
        rounds = choose_plan(seconds=self.plan.seconds, seed=self.plan.seed)
        report = measure_engines(self.runnable, rounds, progress=self.progress)
        save_report(self.out / "report.json", report)
        return report

    @property
    def runnable(self) -> list[Path]:
        return [engine.path for engine in self.engines if engine.no_run is None]


def run_demo(out: Path, plan: DemoPlan, *, progress: Progress, say: Say) -> DemoResult:
    """Walk the whole line below ``out``; each step is announced with the command that does it alone.

    Raises:
        EdgeDscError: As the steps do.
    """
    _clear(out)
    walk = _Walk(out, plan, progress, say)
    walk.draw()
    for arch in ARCHITECTURES:
        walk.train(arch)
        walk.build(arch)
    walk.classify()
    accuracies = walk.evaluate()
    report = walk.measure()
    rows = tuple(
        _row(engine, walk.trained[engine.network], accuracy, report)
        for engine, accuracy in zip(walk.engines, accuracies, strict=True)
    )
    result = DemoResult(
        rows=rows,
        notes=tuple(dict.fromkeys(walk.notes)),
        ratios=report_ratios(report)[0],
        page=out / "demo.html",
        report=out / "report.json",
    )
    save_demo_page(result, report, walk.trained, walk.data)
    return result


def _clear(out: Path) -> None:
    """Remove an earlier demo, and nothing else."""
    marker = out / _MARKER
    if out.exists() and not marker.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty and no earlier demo", remedy="choose another folder with --out")
    if out.is_dir():
        shutil.rmtree(out)
    write_text(marker, "edge-dsc demo: the next one replaces this folder\n")


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
        multiply_adds=count_multiply_adds(load_model(engine.model).proto),
        engine_bytes=engine.record.engine_bytes,
        accuracy=accuracy,
        accuracy_of="engine" if engine.no_run is None else "graph",
        median_ms=interval.value / 1e6 if interval else None,
        low_ms=interval.low / 1e6 if interval else None,
        high_ms=interval.high / 1e6 if interval else None,
    )
