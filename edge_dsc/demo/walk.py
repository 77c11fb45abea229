"""``demo``: the whole line on procedural chest phantoms, from drawing them to a page with the comparison."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.plan import choose_plan
from bench.report import Report, save_report
from bench.tables import report_ratios
from edge_dsc.calibration_run import CalibrationRequest, run_calibration
from edge_dsc.data import Sample
from edge_dsc.data.phantoms import CLASSES, write_phantoms
from edge_dsc.demo.engines import DemoEngine, build_engines, measure_accuracy
from edge_dsc.demo.page import save_demo_page
from edge_dsc.demo.rows import DemoResult, DemoRow
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


def run_demo(out: Path, plan: DemoPlan, *, progress: Progress, say: Say) -> DemoResult:
    """Walk the whole line below ``out``; each step is announced with the command that does it alone.

    Raises:
        EdgeDscError: As the steps do.
    """
    _clear(out)
    data = out / "phantoms"
    say(f"1/8 drawing {len(CLASSES) * plan.per_class} chest phantoms: {data}")
    write_phantoms(data, plan.per_class, plan.seed, progress)
    trained: dict[str, TrainResult] = {}
    engines: list[DemoEngine] = []
    notes: list[str] = []
    for arch in ARCHITECTURES:
        run = out / arch
        say(f"2/8 $ edge-dsc train {data} --arch {arch} --recipe {plan.recipe} --out {run}")
        options = TrainOptions(
            data=data,
            out=run,
            architecture=arch,
            recipe=plan.recipe,
            epochs=plan.epochs,
            seed=plan.seed,
            overwrite=True,
        )
        trained[arch] = train(options, progress=step_progress(arch, progress), reading=None)
        say(f"3/8 $ edge-dsc export {run}")
        model = export_run(run).path
        say(f"4/8 $ edge-dsc calibrate {run} --calib-data {data}")
        table = run_calibration(CalibrationRequest(model=model, data=data, seed=plan.seed), progress).path
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
    say(
        f"8/8 $ edge-dsc bench {' '.join(engine.path.name for engine in runnable)} --duration {plan.seconds:g}"
    )
    rounds = choose_plan(seconds=plan.seconds, seed=plan.seed)
    report = measure_engines([engine.path for engine in runnable], rounds, progress=progress)
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
