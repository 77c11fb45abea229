"""``demo``: the whole line on procedural chest phantoms, from drawing them to a page with the comparison."""

from __future__ import annotations

import contextlib
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
from edge_dsc.build.adopt import AdoptRequest, adopt_model
from edge_dsc.build.calibrate import CalibrationRequest, run_calibration
from edge_dsc.build.conform import Normalisation
from edge_dsc.build.engine import BuiltEngine, build_everywhere, open_to_answer
from edge_dsc.build.export import convert_to_onnx, export_run
from edge_dsc.data.discover import Sample
from edge_dsc.data.phantoms import CLASSES, write_phantoms
from edge_dsc.data.split import Split
from edge_dsc.evaluate.evaluation import Evaluation, evaluate_runner
from edge_dsc.infer.classify import classify_files
from edge_dsc.infer.inference import InferRequest, infer_source
from edge_dsc.latency.subjects import measure_engines
from edge_dsc.networks import ARCHITECTURES, load_keras, load_network
from edge_dsc.page.document import Picture, Section, report_sections, save_page
from edge_dsc.study.findings import verdict_words
from edge_dsc.study.verdict import Judged, compare_judged, judge_noninferiority
from edge_dsc.training import TrainOptions, TrainResult, train
from edge_dsc.training.run_folder import MODEL_FILE
from edge_dsc.training.train import step_progress
from edge_dsc.training.twin import TwinOptions, make_twin
from engines.files import ONNX_MODEL, clear_folder, write_bytes
from engines.graph import OnnxModel, count_multiply_adds, load_model
from engines.images import decode_grey, read_bytes, resize_to, usable_processors
from engines.record import BatchRange
from engines.runtimes import Progress
from engines.text_table import Table, render_text

BATCH = BatchRange(1, 8, 32)
_MARKER = ".edge-dsc-demo"
_THEIRS = "theirs"  # the folder of the network that is adopted
_MADE = (
    *("phantoms", "more-phantoms", "dsc", "cnn", "twin", _THEIRS),
    *(f"{_THEIRS}.onnx", "results.csv", "report.json", "demo.html"),
)
_MARGIN = 2.0  # points of accuracy, as a study's default

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
class DemoGuest:
    """An engine of a network that came to the line another way than by its own training.

    Attributes:
        network: ``twin``, the separable twin of ``cnn``, or ``theirs``, the one that was adopted.
        precision: As in :class:`DemoRow`.
        runtime: Likewise.
        accuracy: On evaluation and test phantoms.
        accuracy_of: As in :class:`DemoRow`.
        agreement: Share of these to which it gives the class that the network gives in FP32 on ONNX Runtime.
    """

    network: str
    precision: str
    runtime: str
    accuracy: float
    accuracy_of: str
    agreement: float


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo made.

    Attributes:
        rows: One per engine of the two networks.
        verdict: Whether ``dsc`` is not inferior to ``cnn`` on these phantoms, in words.
        guests: One per engine of the twin and of the network that was adopted.
        origins: How these two came about, a line each.
        notes: What could not be built here and why, and what the builders noted.
        page: The HTML page.
        report: The latency report.
    """

    rows: tuple[DemoRow, ...]
    verdict: str
    guests: tuple[DemoGuest, ...]
    origins: tuple[str, ...]
    notes: tuple[str, ...]
    page: Path
    report: Path

    def text(self) -> str:
        """Return the tables, the verdict, and where the rest is."""
        tables = (
            render_text(demo_table(self.rows, self.notes)),
            render_text(guest_table(self.guests, self.origins)),
        )
        places = f"latency report: {self.report}\npage with the pictures: {self.page}"
        return "\n\n".join([tables[0], self.verdict, tables[1], places])


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


def guest_table(guests: tuple[DemoGuest, ...], origins: tuple[str, ...]) -> Table:
    """Return the table of what came another way: one row per engine."""
    return Table(
        title="Two other ways to an engine",
        header=("network", "precision", "runtime", "accuracy", "agreement"),
        rows=tuple(
            (
                guest.network,
                guest.precision,
                guest.runtime,
                f"{guest.accuracy:.1%}{_mark(guest)}",
                f"{guest.agreement:.1%}",
            )
            for guest in guests
        ),
        notes=(*origins, "agreement: phantoms to which it gives the class of FP32 on ONNX Runtime"),
    )


def _mark(row: DemoRow | DemoGuest) -> str:
    return " (graph)" if row.accuracy_of == "graph" else ""


def _cells(row: DemoRow) -> tuple[str, ...]:
    latency, interval = "needs a GPU", ""
    if row.median_ms is not None:
        latency = f"{row.median_ms:.3f}"
        interval = f"{row.low_ms:.3f} to {row.high_ms:.3f}"
    return (
        row.network,
        row.precision,
        row.runtime,
        f"{row.features:,}",
        f"{row.parameters:,}",
        f"{row.multiply_adds / 1e6:.1f} M",
        f"{row.engine_bytes / 1e3:,.0f}",
        f"{row.accuracy:.1%}{_mark(row)}",
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
        Section("DSC against CNN", (demo_table(result.rows, result.notes), result.verdict)),
        Section("Two other ways to an engine", (guest_table(result.guests, result.origins),)),
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
    """One network on its way through the line: exported or adopted, calibrated, built."""

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
    say(f"1/10 drawing {len(CLASSES) * plan.per_class} chest phantoms: {plan.data}")
    write_phantoms(plan.data, plan.per_class, plan.seed, progress)
    trained, networks = {}, {}
    for architecture in ARCHITECTURES:
        trained[architecture] = _train(architecture, plan, progress, say)
        networks[architecture] = _deploy(plan.out / architecture, plan, plan.data, progress, say)
    split = trained["cnn"].split
    runnable = [one.path for network in networks.values() for one in network.engines if one.runs_here]
    _classify(runnable[0], plan, progress, say)
    say(f"7/10 $ edge-dsc evaluate ENGINE {plan.data} --split evaluation --split test")
    rows = [
        (engine, network, _evaluate(engine, network, split, plan).metrics.accuracy)
        for network in networks.values()
        for engine in network.engines
    ]
    guests = {"twin": _make_twin(plan, progress, say), _THEIRS: _adopt(split, plan, progress, say)}
    report = _measure_latency(runnable, plan, progress, say)
    result = DemoResult(
        rows=tuple(_row(*row, trained[row[0].record.contract.architecture], report) for row in rows),
        verdict=_judge(networks, split, plan),
        guests=tuple(
            row for name, (guest, _) in guests.items() for row in _guest_rows(name, guest, split, plan)
        ),
        origins=tuple(origin for _, origin in guests.values()),
        notes=tuple(
            dict.fromkeys(
                [*(note for run in trained.values() for note in run.notes)]
                + [note for network in networks.values() for note in network.notes]
            )
        ),
        page=plan.out / "demo.html",
        report=plan.out / "report.json",
    )
    save_demo_page(result, report, trained, plan.data)
    return result


def _train(architecture: str, plan: DemoPlan, progress: Progress, say: Say) -> TrainResult:
    run = plan.out / architecture
    say(f"2/10 $ edge-dsc train {plan.data} --arch {architecture} --recipe {plan.recipe} --out {run}")
    options = TrainOptions(
        data=plan.data,
        out=run,
        architecture=architecture,
        recipe=plan.recipe,
        epochs=plan.epochs,
        seed=plan.seed,
    )
    return train(options, progress=step_progress(architecture, progress))


def _deploy(run: Path, plan: DemoPlan, images: Path, progress: Progress, say: Say) -> _Network:
    """Export a trained run, unless its folder holds an adopted model, calibrate it, and build it everywhere."""
    model = run / "model.onnx"
    if not model.exists():
        say(f"3/10 $ edge-dsc export {run}")
        model = export_run(run).path
    say(f"4/10 $ edge-dsc calibrate {run} --calib-data {images} --calib-method {plan.method}")
    request = CalibrationRequest(model=model, data=images, method=plan.method, seed=plan.seed)
    calibrated = run_calibration(request, progress)
    say(f"5/10 $ edge-dsc build-engine {run} --fp32|--fp16|--int8 --backend ...")
    engines, notes = build_everywhere(model, calibrated.path, BATCH)
    return _Network(
        model=load_model(model), table=calibrated.table, engines=tuple(engines), notes=tuple(notes)
    )


def _make_twin(plan: DemoPlan, progress: Progress, say: Say) -> tuple[_Network, str]:
    """Separate the trained ``cnn``, and say what became of it."""
    original, run = plan.out / "cnn", plan.out / "twin"
    say(f"8/10 $ edge-dsc separate {original} --out {run}")
    options = TwinOptions(original=original, out=run, seed=plan.seed)
    made = make_twin(options, progress=step_progress("twin", progress))
    assert made.trained is not None, "a run has images"
    origin = (
        f"twin: cnn, whose {len(made.separation.layers)} convolutions were separated and which then learnt from cnn in "
        f"{made.trained.record.recipe['epochs']} epochs; feature extractor "
        f"{made.trained.record.parameters['feature_extractor']:,} parameters"
    )
    return _deploy(run, plan, plan.data, progress, say), origin


def _adopt(split: Split, plan: DemoPlan, progress: Progress, say: Say) -> tuple[_Network, str]:
    """Adopt ``cnn`` as another framework would hand it over: three channels, channels first, pixels 0 to 1.

    It brings no split, so it is calibrated on phantoms of its own; those that judge it stay unseen.
    """
    folder, images = plan.out / _THEIRS, plan.out / "more-phantoms"
    source = folder.with_suffix(".onnx")
    trained = load_network(plan.out / "cnn" / MODEL_FILE, "cnn", len(split.labels))
    colour = trained.get_layer("colour").output
    foreign = convert_to_onnx(load_keras().Model(colour, trained.output))
    write_bytes(source, foreign.SerializeToString(), ONNX_MODEL)
    write_phantoms(images, plan.per_class, plan.seed + 1, progress)
    labels = ",".join(split.labels)
    say(f"9/10 $ edge-dsc adopt {source} --labels {labels} --scale 1/255 --check-on {images} --out {folder}")
    request = AdoptRequest(
        source=source,
        labels=split.labels,
        normalisation=Normalisation(scale=1 / 255),
        out=folder,
        images=images,
    )
    adopted = adopt_model(request, progress).record
    origin = (
        f"theirs: cnn as float32 NCHW of three channels, adopted; folded to one grey channel it differs by "
        f"{adopted.parity:.1e} on {adopted.images} phantoms"
    )
    return _deploy(folder, plan, images, progress, say), origin


def _classify(engine: Path, plan: DemoPlan, progress: Progress, say: Say) -> None:
    results = plan.out / "results.csv"
    say(f"6/10 $ edge-dsc infer {engine} {plan.data} --out {results}")
    request = InferRequest(engine=engine, source=str(plan.data), out=results, threads=usable_processors())
    say(f"    {infer_source(request, progress=progress).line()}")


def _evaluate(
    engine: BuiltEngine, network: _Network, split: Split, plan: DemoPlan, reference: BuiltEngine | None = None
) -> Evaluation:
    """Evaluate an engine on phantoms that were held back, or its graph where it cannot run here."""
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(open_to_answer(engine, network.model, network.table))
        other = None
        if reference is not None:
            other = stack.enter_context(open_to_answer(reference, network.model, network.table))
        return evaluate_runner(
            runner, plan.data, _held_out(split), reference=other, threads=usable_processors()
        )


def _held_out(split: Split) -> list[Sample]:
    return [*split.samples("evaluation"), *split.samples("test")]


def _guest_rows(name: str, guest: _Network, split: Split, plan: DemoPlan) -> list[DemoGuest]:
    rows = []
    for engine in guest.engines:
        found = _evaluate(engine, guest, split, plan, reference=guest.engines[0])
        assert found.agreement is not None, "both answer phantoms"
        rows.append(
            DemoGuest(
                network=name,
                precision=engine.record.precision.value,
                runtime=engine.record.runtime,
                accuracy=found.metrics.accuracy,
                accuracy_of=_answered_by(engine),
                agreement=found.agreement.same_top1 / found.agreement.images,
            )
        )
    return rows


def _judge(networks: Mapping[str, _Network], split: Split, plan: DemoPlan) -> str:
    """Say whether ``dsc`` is not inferior to ``cnn``, by what both answered in FP32, as a study would."""
    samples = _held_out(split)
    judged = {}
    for name, network in networks.items():
        with open_to_answer(network.engines[0], network.model, network.table) as runner:
            paths = [plan.data / sample.path for sample in samples]
            answers = list(classify_files(paths, runner, threads=usable_processors()))
        judged[name] = Judged(
            name=name,
            labels=split.labels,
            trainings=np.zeros(len(samples), np.int64),
            images=[sample.path for sample in samples],
            patients=[sample.patient for sample in samples],
            true=np.array([split.labels.index(sample.label) for sample in samples], np.int64),
            probabilities=np.array([answer.probabilities for answer in answers], np.float64),
        )
    difference = compare_judged(judged["cnn"], judged["dsc"])
    assert difference is not None, "they share their split"
    return verdict_words(judge_noninferiority(difference, _MARGIN))


def _measure_latency(engines: Sequence[Path], plan: DemoPlan, progress: Progress, say: Say) -> Report:
    names = " ".join(engine.name for engine in engines)
    say(f"10/10 $ edge-dsc bench {names} --duration {plan.latency.seconds:g}")
    report = measure_engines(
        engines, msgspec.structs.replace(plan.latency, seed=plan.seed), progress=progress
    )
    save_report(plan.out / "report.json", report)
    return report


def _answered_by(engine: BuiltEngine) -> str:
    return "engine" if engine.runs_here else "graph"


def _row(
    engine: BuiltEngine, network: _Network, accuracy: float, trained: TrainResult, report: Report
) -> DemoRow:
    measured = {subject.name: subject for subject in report.measured}.get(engine.path.stem)
    interval = summarise(measured).median_interval if measured else None
    parameters = trained.record.parameters
    return DemoRow(
        network=engine.record.contract.architecture,
        precision=engine.record.precision.value,
        runtime=engine.record.runtime,
        features=parameters["feature_extractor"],
        parameters=parameters["trainable"],
        multiply_adds=count_multiply_adds(network.model.proto),
        engine_bytes=engine.record.engine_bytes,
        accuracy=accuracy,
        accuracy_of=_answered_by(engine),
        median_ms=interval.value / 1e6 if interval else None,
        low_ms=interval.low / 1e6 if interval else None,
        high_ms=interval.high / 1e6 if interval else None,
    )
