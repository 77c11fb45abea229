"""``demo``: the whole line on procedural chest phantoms, from drawing them to a page with the comparison."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.plan import choose_plan
from bench.report import Report, save_report
from bench.tables import report_ratios
from edge_dsc.building.calibration import CalibrationRequest, run_calibration
from edge_dsc.data import Sample
from edge_dsc.data.phantoms import CLASSES, write_phantoms
from edge_dsc.demo.engines import DemoEngine, build_engines, measure_accuracy
from edge_dsc.demo.page import save_demo_page
from edge_dsc.demo.rows import DemoResult, DemoRow
from edge_dsc.export import export_run
from edge_dsc.loop.folder import default_threads
from edge_dsc.loop.inference import InferRequest, infer_source
from edge_dsc.measuring.engines import measure_engines
from edge_dsc.networks import ARCHITECTURES
from edge_dsc.training import TrainOptions, TrainResult, train
from edge_dsc.training.report import step_progress
from engines.errors import UsageError
from engines.files import write_text
from engines.graph import count_multiply_adds, load_model
from engines.runtimes import Progress

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
        request = InferRequest(engine=engine, source=str(self.data), out=results, threads=default_threads())
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
        multiply_adds=count_multiply_adds(load_model(engine.model)),
        engine_bytes=engine.record.engine_bytes,
        accuracy=accuracy,
        accuracy_of="engine" if engine.no_run is None else "graph",
        median_ms=interval.value / 1e6 if interval else None,
        low_ms=interval.low / 1e6 if interval else None,
        high_ms=interval.high / 1e6 if interval else None,
    )
