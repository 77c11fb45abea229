"""``demo``: the whole line on procedural chest phantoms, from drawing them to a page with the comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import msgspec
import numpy as np

from bench.plan import Plan, choose_plan
from bench.report import Report, save_report
from bench.statistics import summarise
from calibration.table import DEFAULT_METHOD, CalibrationTable
from edge_dsc.build.calibrate import CalibrationRequest, run_calibration
from edge_dsc.build.engine import BuiltEngine, build_everywhere, open_to_answer
from edge_dsc.build.export import export_run
from edge_dsc.data.phantoms import CLASSES, write_phantoms
from edge_dsc.evaluate.evaluation import evaluate_runner
from edge_dsc.infer.inference import InferRequest, infer_source
from edge_dsc.latency.subjects import measure_engines
from edge_dsc.networks import ARCHITECTURES
from edge_dsc.page.document import Picture, Section, report_sections, save_page
from edge_dsc.training import TrainOptions, TrainResult, train
from edge_dsc.training.train import step_progress
from engines.files import clear_folder
from engines.graph import OnnxModel, count_multiply_adds, load_model
from engines.images import decode_grey, read_bytes, resize_to, usable_processors
from engines.record import BatchRange
from engines.runtimes import Progress
from engines.text_table import Table, render_text

BATCH = BatchRange(1, 8, 32)
_MARKER = ".edge-dsc-demo"
_MADE = ("phantoms", "dsc", "cnn", "results.csv", "report.json", "demo.html")

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """Where a demo goes and how large it is.

    Attributes:
        out: The folder of everything that it makes.
        per_class: Phantoms of each class; 63 % of three classes are to be the 128 images that a calibration needs.
        recipe: Training recipe.
        epochs: Instead of the recipe's.
        method: How the ranges for INT8 are chosen.
        latency: How long the engines are measured.
        seed: Seed of everything.
    """

    out: Path
    per_class: int = 110
    recipe: str = "quick"
    epochs: int | None = None
    method: str = DEFAULT_METHOD
    latency: Plan = choose_plan(seconds=6.0)  # noqa: RUF009  it is frozen
    seed: int = 0

    @property
    def data(self) -> Path:
        """The folder of the phantoms."""
        return self.out / "phantoms"


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
        rows: One per engine.
        notes: What could not be built here and why, and what the builders noted.
        page: The HTML page.
        report: The latency report.
    """

    rows: tuple[DemoRow, ...]
    notes: tuple[str, ...]
    page: Path
    report: Path

    def text(self) -> str:
        """Return the table and where the rest is."""
        table = render_text(demo_table(self.rows, self.notes))
        return f"{table}\n\nlatency report: {self.report}\npage with the pictures: {self.page}"


def demo_table(rows: tuple[DemoRow, ...], notes: tuple[str, ...]) -> Table:
    """Return the demo's table: DSC against CNN, one row per engine."""
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
        *notes,
    ]
    if any(row.accuracy_of == "graph" for row in rows):
        remarks.insert(1, "(graph): the engine cannot run here; ONNX Runtime ran its graph")
    return Table(
        title="DSC against CNN on phantoms",
        header=header,
        rows=tuple(map(_cells, rows)),
        notes=tuple(remarks),
    )


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


@dataclass(frozen=True, kw_only=True)
class _Network:
    """One network on its way through the line: trained, exported, calibrated, built."""

    trained: TrainResult
    model: OnnxModel
    table: CalibrationTable
    engines: tuple[BuiltEngine, ...]
    notes: tuple[str, ...]


def run_demo(plan: DemoPlan, *, progress: Progress, say: Say) -> DemoResult:
    """Walk the whole line; each step is announced with the command that does it alone.

    Raises:
        EdgeDscError: As the steps do.
    """
    clear_folder(plan.out, _MARKER, _MADE, "demo")
    say(f"1/8 drawing {len(CLASSES) * plan.per_class} chest phantoms: {plan.data}")
    write_phantoms(plan.data, plan.per_class, plan.seed, progress)
    networks = [_make_network(architecture, plan, progress, say) for architecture in ARCHITECTURES]
    runnable = [engine.path for network in networks for engine in network.engines if engine.runs_here]
    _classify(runnable[0], plan, progress, say)
    say(f"7/8 $ edge-dsc evaluate ENGINE {plan.data} --split evaluation --split test")
    accuracies = {
        engine.path: _measure_accuracy(engine, network, plan)
        for network in networks
        for engine in network.engines
    }
    report = _measure_latency(runnable, plan, progress, say)
    result = DemoResult(
        rows=tuple(
            _row(engine, network, accuracies[engine.path], report)
            for network in networks
            for engine in network.engines
        ),
        notes=tuple(dict.fromkeys(note for network in networks for note in network.notes)),
        page=plan.out / "demo.html",
        report=plan.out / "report.json",
    )
    trained = {network.model.contract.architecture: network.trained for network in networks}
    save_demo_page(result, report, trained, plan.data)
    return result


def _make_network(architecture: str, plan: DemoPlan, progress: Progress, say: Say) -> _Network:
    run = plan.out / architecture
    say(f"2/8 $ edge-dsc train {plan.data} --arch {architecture} --recipe {plan.recipe} --out {run}")
    options = TrainOptions(
        data=plan.data,
        out=run,
        architecture=architecture,
        recipe=plan.recipe,
        epochs=plan.epochs,
        seed=plan.seed,
    )
    trained = train(options, progress=step_progress(architecture, progress))
    say(f"3/8 $ edge-dsc export {run}")
    model = export_run(run).path
    say(f"4/8 $ edge-dsc calibrate {run} --calib-data {plan.data} --calib-method {plan.method}")
    request = CalibrationRequest(model=model, data=plan.data, method=plan.method, seed=plan.seed)
    calibrated = run_calibration(request, progress)
    say(f"5/8 $ edge-dsc build-engine {run} --fp32|--fp16|--int8 --backend ...")
    engines, notes = build_everywhere(model, calibrated.path, BATCH)
    return _Network(
        trained=trained,
        model=load_model(model),
        table=calibrated.table,
        engines=tuple(engines),
        notes=(*trained.notes, *notes),
    )


def _classify(engine: Path, plan: DemoPlan, progress: Progress, say: Say) -> None:
    results = plan.out / "results.csv"
    say(f"6/8 $ edge-dsc infer {engine} {plan.data} --out {results}")
    request = InferRequest(engine=engine, source=str(plan.data), out=results, threads=usable_processors())
    say(f"    {infer_source(request, progress=progress).line()}")


def _measure_accuracy(engine: BuiltEngine, network: _Network, plan: DemoPlan) -> float:
    """Return the accuracy of an engine on phantoms that were held back, or of its graph where it cannot run here."""
    split = network.trained.split
    runner = open_to_answer(engine, network.model, network.table)
    samples = [*split.samples("evaluation"), *split.samples("test")]
    with runner:
        found = evaluate_runner(runner, plan.data, samples, threads=usable_processors())
    return found.metrics.accuracy


def _measure_latency(engines: Sequence[Path], plan: DemoPlan, progress: Progress, say: Say) -> Report:
    names = " ".join(engine.name for engine in engines)
    say(f"8/8 $ edge-dsc bench {names} --duration {plan.latency.seconds:g}")
    report = measure_engines(
        engines, msgspec.structs.replace(plan.latency, seed=plan.seed), progress=progress
    )
    save_report(plan.out / "report.json", report)
    return report


def _row(engine: BuiltEngine, network: _Network, accuracy: float, report: Report) -> DemoRow:
    measured = {subject.name: subject for subject in report.measured}.get(engine.path.stem)
    interval = summarise(measured).median_interval if measured else None
    parameters = network.trained.record.parameters
    return DemoRow(
        network=engine.record.contract.architecture,
        precision=engine.record.precision.value,
        runtime=engine.record.runtime,
        features=parameters["feature_extractor"],
        parameters=parameters["trainable"],
        multiply_adds=count_multiply_adds(network.model.proto),
        engine_bytes=engine.record.engine_bytes,
        accuracy=accuracy,
        accuracy_of="engine" if engine.runs_here else "graph",
        median_ms=interval.value / 1e6 if interval else None,
        low_ms=interval.low / 1e6 if interval else None,
        high_ms=interval.high / 1e6 if interval else None,
    )
