"""What a study found: the paper's table with the published figures beside ours, figures 5 and 6, and the verdict."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.plan import Plan
from bench.report import Report, load_report, save_report
from bench.statistics import summarise
from edge_dsc import __version__
from edge_dsc.data.purposes import PARTS_FOR, Purpose
from edge_dsc.evaluate.agreement import Estimate
from edge_dsc.evaluate.confidence import (
    Judgement,
    confidence_plots,
    confidence_table,
    measure_confidence,
)
from edge_dsc.evaluate.metrics import classification_metrics
from edge_dsc.latency.subjects import measure_engines
from edge_dsc.networks import default_name
from edge_dsc.page.charts import Plot, difference_plot
from edge_dsc.page.document import Picture, Section, report_sections, save_page
from edge_dsc.page.figures import draw_confusions, draw_trainings
from edge_dsc.study.run_study import Problem
from edge_dsc.study.trainings import (
    REFERENCE,
    Answers,
    Setting,
    Study,
    StudyPlan,
    Training,
    without_variants,
)
from edge_dsc.study.variants import variant_title
from edge_dsc.study.verdict import (
    OPEN,
    YES,
    Difference,
    Judged,
    NonInferiority,
    Quality,
    Spread,
    compare_judged,
    judge_noninferiority,
    measure_quality,
)
from engines.errors import ArtefactError, EdgeDscError, UnstableError
from engines.files import MARKDOWN, ROWS, DocumentKind, write_text
from engines.runtimes import Progress
from engines.text_table import Table, render_markdown, render_text

REPORT_FILE, LATENCY_FILE = "report.json", "latency.json"
CANDIDATE = "dsc"
_SIDES = {"training": ("train",), "validation": ("validation",), "testing": PARTS_FOR[Purpose.JUDGE]}


class Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Figures of the paper's Table 2, percent; of other images, one training of each.

    Attributes:
        model: As the paper calls it.
        accuracy: Accuracy.
        loss: Its loss, of which it does not say what it is a share of.
        precision: Precision.
        recall: Recall.
        f1: F1.
    """

    model: str
    accuracy: float
    loss: float
    precision: float
    recall: float
    f1: float


# Source: Iklima, Kadarina and Priambodo, JEEEMI 4(4), 2022, doi 10.35882/jeeemi.v4i4.255, Table 2.
PUBLISHED = {
    ("cnn", False): Published("Model-1", 72.96, 12.43, 77.67, 74.67, 75.33),
    ("dsc", False): Published("Model-2", 71.07, 11.55, 77.67, 70.00, 70.00),
    ("cnn", True): Published("Model-1 Aug.", 74.55, 11.37, 79.56, 77.67, 78.33),
    ("dsc", True): Published("Model-2 Aug.", 73.97, 10.54, 79.56, 75.67, 78.33),
    ("resnet50v2", False): Published("ResNet50-v2", 63.74, 21.88, 68.67, 63.00, 62.33),
    ("inceptionv3", False): Published("Inception-v3", 54.32, 35.44, 57.00, 54.00, 47.33),
    ("resnet50v2", True): Published("ResNet50-v2 Aug.", 66.64, 22.77, 70.33, 65.00, 66.67),
    ("inceptionv3", True): Published("Inception-v3 Aug.", 56.41, 33.41, 63.00, 57.00, 53.00),
}


class EngineFindings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An engine of a network, over its trainings.

    Attributes:
        runtime: What built it.
        precision: Its precision.
        engine_bytes: Size of the first training's.
        answered_by: ``engine``, or ``graph`` where it cannot run here and ONNX Runtime ran its graph.
        trainings: Seeds or folds that built it.
        accuracy: Of each of them.
        agreement: Share of the images that judge to which it gives the class that FP32 gives, of each.
        median_ms: Median latency of the first training's, batch 1, one thread; None where it was not measured.
    """

    runtime: str
    precision: str
    engine_bytes: int
    answered_by: str
    trainings: tuple[int, ...]
    accuracy: Spread
    agreement: Spread
    median_ms: Estimate | None


class NetworkFindings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A network, with or without augmentation and what was added, over its trainings.

    Attributes:
        network: Its name.
        augmentation: Whether its training images were augmented.
        variant: What was added to the recipe; empty where nothing was.
        trainings: Seeds, or folds, that went to their end.
        quality: How right it is on the images that judge.
        parameters: As its training record counts them.
        multiply_adds: Of one image, in the exported model.
        onnx_bytes: Size of the exported model.
        engines: Of every runtime that builds here.
        confusion: ``[true][predicted]`` counts by side (``training``, ``validation``, ``testing``), the sum over the
            trainings.
        published: What the paper reports of it.
    """

    network: str
    augmentation: bool
    variant: str
    trainings: tuple[int, ...]
    quality: Quality
    parameters: Mapping[str, int]
    multiply_adds: int
    onnx_bytes: int
    engines: tuple[EngineFindings, ...]
    confusion: Mapping[str, tuple[tuple[int, ...], ...]]
    published: Published | None

    @property
    def setting(self) -> Setting:
        """What it is of."""
        return Setting(self.network, self.augmentation, self.variant)


class FailedTraining(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A training that did not go to its end.

    Attributes:
        training: Which.
        exit_code: As its process ended.
        reason: What happened.
    """

    training: str
    exit_code: int
    reason: str


class TrainingFindings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training that went to its end.

    Attributes:
        training: Which.
        run: Its run folder, in the study's.
        rows: Images that judged it.
        accuracy: On these.
        macro_f1: The same.
        epochs: Epochs trained.
        best_epoch: The one whose weights were kept.
        history: Figures of every epoch, by name.
    """

    training: str
    run: str
    rows: int
    accuracy: float
    macro_f1: float
    epochs: int
    best_epoch: int
    history: Mapping[str, tuple[float, ...]]


class StudyReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that a study found; ``report.json``.

    Attributes:
        plan: What the study is.
        networks: One per network, without augmentation and with it, then with each variant, of which a training
            went to its end.
        trainings: One per training that did.
        failed: The others.
        differences: Each network against the reference, and with augmentation or a variant against without.
        verdicts: Whether ``dsc`` is not inferior to ``cnn``, without augmentation and with it.
        notes: What could not be built or measured here, and why.
        created: UTC time, ISO 8601.
        edge_dsc: Version of edge-dsc.
    """

    plan: StudyPlan
    networks: tuple[NetworkFindings, ...]
    trainings: tuple[TrainingFindings, ...]
    failed: tuple[FailedTraining, ...]
    differences: tuple[Difference, ...]
    verdicts: tuple[NonInferiority, ...]
    notes: tuple[str, ...]
    created: str
    edge_dsc: str


def _from_version_1(report: dict[str, Any]) -> dict[str, Any]:
    """Nothing was added to a recipe."""
    networks = [{**network, "variant": ""} for network in report["networks"]]
    return {**report, "plan": without_variants(report["plan"]), "networks": networks}


REPORT = DocumentKind(
    name="edge-dsc/study-report",
    version=2,
    body=StudyReport,
    renew="the study's command goes on and makes it again",
    seal="report_sha256",
    older={1: _from_version_1},
)


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """A study that went to its end.

    Attributes:
        report: What it found.
        latency: How long its engines take; None where that was not measured.
        files: What was written: by kind, such as ``page``.
        problem: Why not every training is in it, as the error that the command ends with.
    """

    report: StudyReport
    latency: Report | None
    files: Mapping[str, Path]
    problem: EdgeDscError | None


def conclude(
    study: Study, problems: Mapping[Training, Problem], *, bench: Plan | None, progress: Progress
) -> StudyResult:
    """Draw all conclusions of a study whose trainings ended, measure its engines and write its files.

    Args:
        study: The study, held by this process.
        problems: The trainings that failed.
        bench: How to measure latency; None leaves it out.
        progress: Called with (phase, done, total).

    Raises:
        EdgeDscError: No training went to its end: the first one's reason.
        EnvironmentProblem: The folder cannot be written.
    """
    answers = finished(study)
    if not answers:
        first, problem = next(iter(problems.items()))
        raise problem.error(f"no training went to its end; {first.title}: {problem.what}")
    latency, notes = _measure_latency(study, answers, bench, progress)
    report = make_report(study, answers, problems, latency, notes)
    return StudyResult(
        report=report,
        latency=latency,
        files=_save(study, answers, report, latency),
        problem=problem_of(problems, len(study.trainings)),
    )


def finished(study: Study) -> dict[Training, Answers]:
    """Return the answers of every training that went to its end."""
    return {one: found for one in study.trainings if (found := study.answers(one)) is not None}


def judged_rows(
    study: Study, setting: Setting, answers: Mapping[Training, Answers], engine: str = REFERENCE
) -> Judged | None:
    """Gather what an engine of a network answered on the images that judge, in all its trainings.

    Args:
        study: The study.
        setting: The network.
        answers: By training.
        engine: Whose answers.

    Returns:
        None where there are none.
    """
    labels = study.plan.labels
    rows = [
        (training.number, image, image.probabilities[engine])
        for training, found in answers.items()
        if training.setting == setting
        for image in found.images
        if image.part in PARTS_FOR[Purpose.JUDGE] and engine in image.probabilities
    ]
    if not rows:
        return None
    return Judged(
        name=setting.title,
        labels=labels,
        trainings=np.array([number for number, _, _ in rows], np.int64),
        images=[image.path for _, image, _ in rows],
        patients=[image.patient for _, image, _ in rows],
        true=np.array([labels.index(image.label) for _, image, _ in rows], np.int64),
        probabilities=np.array([given for _, _, given in rows], np.float64),
    )


def make_report(
    study: Study,
    answers: Mapping[Training, Answers],
    problems: Mapping[Training, Problem],
    latency: Report | None = None,
    notes: Sequence[str] = (),
) -> StudyReport:
    """Draw all conclusions from the answers of trainings.

    Args:
        study: The study.
        answers: Of each training that went to its end, at least one.
        problems: The trainings that failed.
        latency: The measurement of the engines, if any.
        notes: What else the reader should know.
    """
    judged = {
        setting: rows
        for setting in study.settings
        if (rows := judged_rows(study, setting, answers)) is not None
    }
    differences = _differences(study, judged)
    claims = {(Setting("cnn", on).title, Setting(CANDIDATE, on).title) for on in study.plan.augmentation}
    return StudyReport(
        plan=study.plan,
        networks=tuple(
            _network_findings(study, setting, rows, answers, latency) for setting, rows in judged.items()
        ),
        trainings=tuple(_training_findings(study, one, found) for one, found in answers.items()),
        failed=tuple(
            FailedTraining(training=one.title, exit_code=why.exit_code, reason=why.what)
            for one, why in problems.items()
        ),
        differences=differences,
        verdicts=tuple(
            judge_noninferiority(one, study.plan.margin)
            for one in differences
            if (one.reference, one.candidate) in claims
        ),
        notes=tuple(dict.fromkeys([*_unread(study, answers), *_notes(answers), *notes])),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        edge_dsc=__version__,
    )


def _unread(study: Study, answers: Mapping[Training, Answers]) -> list[str]:
    """Say which images no training could read, if any."""
    records = (study.trained(training) for training in answers)
    reasons = dict(image for record in records if record is not None for image in record.skipped)
    if not reasons:
        return []
    first = next(iter(reasons.values()))
    several = f"{len(reasons)} images were left out of the data, the first: {first}"
    return [several if len(reasons) > 1 else f"1 image was left out of the data: {first}"]


def _notes(answers: Mapping[Training, Answers]) -> list[str]:
    """Return what trainings left as notes; what holds for several of a network is said of the network."""
    return [
        note.replace(training.folder, default_name(training.setting.network))
        for training, found in answers.items()
        for note in found.notes
    ]


def _differences(study: Study, judged: Mapping[Setting, Judged]) -> tuple[Difference, ...]:
    """Hold each network against the reference, and each with augmentation or a variant against itself without."""
    wanted = [
        (replace(setting, network=study.reference), setting)
        for setting in judged
        if setting.network != study.reference
    ]
    wanted += [(replace(setting, augmentation=False), setting) for setting in judged if setting.augmentation]
    wanted += [(replace(setting, variant=""), setting) for setting in judged if setting.variant]
    found = [
        compare_judged(judged[first], judged[second])
        for first, second in wanted
        if first in judged and second in judged
    ]
    return tuple(one for one in found if one is not None)


def _network_findings(
    study: Study,
    setting: Setting,
    rows: Judged,
    answers: Mapping[Training, Answers],
    latency: Report | None,
) -> NetworkFindings:
    own = {one: found for one, found in answers.items() if one.setting == setting}
    first, found = next(iter(own.items()))
    record = study.trained(first)
    assert record is not None, "it left answers"
    return NetworkFindings(
        network=setting.network,
        augmentation=setting.augmentation,
        variant=setting.variant,
        trainings=tuple(one.number for one in own),
        quality=measure_quality(rows),
        parameters=dict(record.parameters),
        multiply_adds=found.multiply_adds,
        onnx_bytes=found.onnx_bytes,
        engines=_engine_findings(study, setting, rows, own, latency),
        confusion={side: _confusion(study, own, parts) for side, parts in _SIDES.items()},
        published=None if setting.variant else PUBLISHED.get((setting.network.lower(), setting.augmentation)),
    )


def _engine_findings(
    study: Study,
    setting: Setting,
    reference: Judged,
    own: Mapping[Training, Answers],
    latency: Report | None,
) -> tuple[EngineFindings, ...]:
    measured = {subject.name: subject for subject in latency.measured} if latency else {}
    found = []
    for file in next(iter(own.values())).engines:
        rows = judged_rows(study, setting, own, file.name)
        if rows is None:
            continue
        shares = _shares_by_training(reference, rows)
        subject = measured.get(Path(file.file).stem)
        median = summarise(subject).median_interval if subject else None
        in_ms = [value / 1e6 for value in (median.value, median.low, median.high)] if median else None
        found.append(
            EngineFindings(
                runtime=file.runtime,
                precision=file.precision,
                engine_bytes=file.engine_bytes,
                answered_by=file.answered_by,
                trainings=tuple(shares),
                accuracy=Spread.of([right for right, _ in shares.values()]),
                agreement=Spread.of([same for _, same in shares.values()]),
                median_ms=Estimate(*in_ms) if in_ms else None,
            )
        )
    return tuple(found)


def _shares_by_training(reference: Judged, engine: Judged) -> dict[int, tuple[float, float]]:
    """Return an engine's accuracy and its agreement with the reference in each training that it answered."""
    keys = zip(reference.trainings, reference.images, strict=True)
    first = dict(zip(keys, reference.probabilities.argmax(axis=1), strict=True))
    theirs = np.array([first.get(key, -1) for key in zip(engine.trainings, engine.images, strict=True)])
    top = engine.probabilities.argmax(axis=1)
    return {
        int(engine.trainings[rows[0]]): (
            float((top[rows] == engine.true[rows]).mean()),
            float((top[rows] == theirs[rows]).mean()),
        )
        for rows in engine.rows_by_training()
    }


def _confusion(
    study: Study, own: Mapping[Training, Answers], parts: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    labels = study.plan.labels
    counts = np.zeros((len(labels), len(labels)), np.int64)
    for found in own.values():
        for image in found.images:
            if image.part in parts:
                counts[labels.index(image.label), int(np.argmax(image.probabilities[REFERENCE]))] += 1
    return tuple(tuple(int(value) for value in row) for row in counts)


def _training_findings(study: Study, training: Training, found: Answers) -> TrainingFindings:
    record = study.trained(training)
    rows = judged_rows(study, training.setting, {training: found})
    assert record is not None and rows is not None, "it left answers"
    metrics = classification_metrics(rows.true, rows.probabilities, rows.labels)
    return TrainingFindings(
        training=training.title,
        run=training.folder,
        rows=metrics.count,
        accuracy=metrics.accuracy,
        macro_f1=metrics.f1,
        epochs=len(record.history["loss"]),
        best_epoch=record.best_epoch,
        history={name: tuple(values) for name, values in record.history.items()},
    )


def _measure_latency(
    study: Study, answers: Mapping[Training, Answers], plan: Plan | None, progress: Progress
) -> tuple[Report | None, list[str]]:
    """Measure the engines of each network's first training; augmentation and seed change no engine's work.

    Returns:
        The report, or None; and why there is none.
    """
    engines: dict[Path, str] = {}
    seen = set()
    for training, found in answers.items():
        if training.setting.network not in seen:
            seen.add(training.setting.network)
            run = study.run_folder(training)
            engines |= {run / e.file: e.engine_sha256 for e in found.engines if e.answered_by == "engine"}
    path = study.folder / LATENCY_FILE
    if plan is None:
        return None, ["latency was not measured: bench was left out"]
    if path.is_file():
        try:
            report = load_report(path)
            kept = {subject.description.get("engine_sha256") for subject in report.measured}
            if kept == set(engines.values()):
                return report, []
        except ArtefactError:
            pass  # measured again
    try:
        report = measure_engines(list(engines), plan, progress=progress)
    except EdgeDscError as error:
        return None, [f"latency was not measured: {error.what}"]
    save_report(path, report)
    return report, []


def problem_of(problems: Mapping[Training, Problem], trainings: int) -> EdgeDscError | None:
    """Return the error that a study with failed trainings ends with: that of the first which is no divergence."""
    if not problems:
        return None
    worst = min(problems.values(), key=lambda one: one.exit_code == UnstableError.exit_code)
    which = "; ".join(f"{training.title}: {one.what}" for training, one in problems.items())
    return worst.error(
        f"{len(problems)} of {trainings} trainings failed, the report is of the others: {which}"
    )


def _save(
    study: Study, answers: Mapping[Training, Answers], report: StudyReport, latency: Report | None
) -> dict[str, Path]:
    """Write the report as document, rows, text and page, and its pictures."""
    folder = study.folder
    files = {
        "report": folder / REPORT_FILE,
        "rows": folder / "trainings.csv",
        "markdown": folder / "study.md",
        "page": folder / "study.html",
    }
    REPORT.save(files["report"], report)
    write_text(files["rows"], rows_of(report), ROWS)
    text = "\n\n".join(
        [
            f"# {_title(report)}",
            *map(verdict_words, report.verdicts),
            *map(render_markdown, study_tables(report)),
        ]
    )
    write_text(files["markdown"], f"{text}\n", MARKDOWN)
    curves = folder / "curves.png"
    histories: dict[str, list[Mapping[str, Sequence[float]]]] = {}
    for one in report.trainings:
        histories.setdefault(one.training.rpartition(", ")[0], []).append(one.history)
    draw_trainings(histories, curves)
    pictures = [Picture(png=curves.read_bytes(), caption=_CURVES)]
    for found in report.networks:
        path = folder / f"confusion-{Training(found.setting).folder.rpartition('-')[0]}.png"
        draw_confusions(found.confusion, report.plan.labels, path, title=found.setting.title)
        pictures.append(Picture(png=path.read_bytes(), caption=f"{found.setting.title}: {_CONFUSION}"))
    sections = [*_sections(report, pictures), _confidence_section(study, answers)]
    if latency is not None:
        sections += report_sections(latency)
    save_page(files["page"], _title(report), sections, summary=_summary(report))
    return files


_CURVES = (
    "Accuracy over the epochs, as in the paper's figure 5: one line for each training, solid on training images"
    " (augmented where the network is), dashed on validation images."
)
_CONFUSION = "training, validation and testing, as in the paper's figure 6; sums over its trainings."


def _title(report: StudyReport) -> str:
    plan = report.plan
    over = f"{plan.folds} folds" if plan.folds else f"{plan.seeds} seed{'s' if plan.seeds != 1 else ''}"
    return f"Study of {', '.join(plan.networks)} over {over}, recipe {plan.recipe}"


def _summary(report: StudyReport) -> str:
    plan = report.plan
    return (
        f"{plan.images:,} images of {plan.patients:,} patients, classes {', '.join(plan.labels)}. "
        + ("" if plan.epochs is None else f"--epochs {plan.epochs} instead of the recipe's. ")
        + "Every figure is of images that neither trained nor chose the network that they judge."
    )


def _sections(report: StudyReport, pictures: Sequence[Picture]) -> list[Section]:
    tables = {table.title: table for table in study_tables(report)}
    table_2, *rest = tables.values()
    words = tuple(map(verdict_words, report.verdicts)) or ("There is no verdict: it needs cnn and dsc.",)
    points = {
        _short_name(one): (
            100 * one.accuracy.difference,
            100 * one.accuracy.low,
            100 * one.accuracy.high,
        )
        for one in report.differences
    }
    plot = difference_plot(points, margin=report.plan.margin)
    return [
        Section("Verdict", (*words, plot)),
        Section("The paper's table", (table_2,)),
        Section("In detail", tuple(rest)),
        Section("Training", (pictures[0],)),
        Section("Confusion", tuple(pictures[1:])),
    ]


def _short_name(found: Difference) -> str:
    """Return a difference as a chart has room for it: of a variant, what was added, and to what."""
    network, _, added = found.candidate.partition(" + ")
    return (
        f"+ {added} ({network})"
        if found.reference == network
        else f"{found.candidate} against {found.reference}"
    )


def _confidence_section(study: Study, answers: Mapping[Training, Answers]) -> Section:
    """Return ROC curves and reliability of each network on the images that judge, over its trainings."""
    parts: list[str | Plot | Table] = []
    for setting in study.settings:
        rows = judged_rows(study, setting, answers)
        if rows is None:
            continue
        judged = Judgement(
            labels=rows.labels,
            true=rows.true,
            patients=rows.patients,
            probabilities=rows.probabilities,
            trainings=rows.rows_by_training(),
        )
        found = measure_confidence(judged)
        parts += [setting.title, *confidence_plots(found), confidence_table(found)]
    return Section("What the probabilities mean", tuple(parts))


def verdict_words(found: NonInferiority) -> str:
    """Return a verdict in words: the question, the answer, the interval, and what would decide it."""
    difference = found.difference
    change = difference.accuracy
    answer = {YES: "Yes", OPEN: "Not decided"}.get(found.answer, "No")
    text = (
        f"Is {difference.candidate} not inferior to {difference.reference} by more than {found.margin:g} points? "
        f"{answer}: the difference of accuracy is {100 * change.difference:+.2f} points, 95 % interval "
        f"{100 * change.low:+.2f} to {100 * change.high:+.2f}, over {difference.rows} pairs of answers on "
        f"{difference.images} images of {difference.patients} patients."
    )
    if found.answer == OPEN:
        if found.images_needed is None:
            text += " What was observed is the margin itself: no number of images would decide it."
        else:
            text += (
                f" About {found.images_needed:,} judging images would decide it with a chance of 80 %, "
                f"{found.images_needed / difference.images:.1f} times as many as here, were the difference as observed."
            )
    if found.over_trainings is not None and found.over_trainings != found.answer:
        whole = difference.over_trainings
        assert whole is not None, "it gave that answer"
        text += (
            f" This is of these trainings; with other trainings drawn too the interval is {100 * whole.low:+.2f} to "
            f"{100 * whole.high:+.2f}: {found.over_trainings}."
        )
    elif found.over_trainings is None:
        text += " This is of these trainings: fewer than three do not say how others would come out."
    return text


def render_study(report: StudyReport) -> str:
    """Return a study's report as text: its tables, then the verdicts."""
    return "\n\n".join([*map(render_text, study_tables(report)), *map(verdict_words, report.verdicts)])


def study_tables(report: StudyReport) -> tuple[Table, ...]:
    """Return the tables of a report, the paper's first."""
    tables = [_table_2(report), _class_table(report)]
    if report.differences:
        tables.append(_difference_table(report))
    tables += [_size_table(report), _engine_table(report), _training_table(report)]
    return tuple(tables)


def _table_2(report: StudyReport) -> Table:
    rows = []
    for found in report.networks:
        quality = found.quality
        spreads = (quality.accuracy, quality.loss, quality.precision, quality.recall, quality.f1)
        cells = [_spread(one, 1 if one is quality.loss else 100) for one in spreads]
        cells.insert(1, _interval(quality.pooled_accuracy, 100))
        rows.append((found.setting.title, *cells))
        if found.published is not None:
            told = found.published
            figures = [f"{value:.2f}" for value in (told.accuracy, told.precision, told.recall, told.f1)]
            rows.append((f"  published: {told.model}", figures[0], "", f"({told.loss:.2f} %)", *figures[1:]))
    quality = report.networks[0].quality
    over = "folds" if report.plan.folds else "seeds"
    return Table(
        title="The paper's Table 2",
        header=("network", "accuracy %", "95 % interval", "loss", "precision %", "recall %", "F1 %"),
        rows=tuple(rows),
        notes=(
            f"mean and standard deviation over the {over}; precision, recall and F1 are macro means; loss is "
            "cross-entropy in nats",
            f"interval: accuracy of all {over} together, whole patients drawn ({quality.patients} patients, "
            f"{quality.images} images of evaluation and test)",
            "published: the paper's own images and one training each; not comparable, and its loss is not explained",
        ),
    )


def _class_table(report: StudyReport) -> Table:
    rows = [
        (
            f"{found.setting.title}: {label}",
            str(one.images),
            _percent(one.recall.value),
            _interval(one.recall, 100),
            f"{one.auroc.value:.3f}" if one.auroc else "none",
            _interval(one.auroc, 1, "{:.3f}") if one.auroc else "",
        )
        for found in report.networks
        for label, one in found.quality.per_class.items()
    ]
    return Table(
        title="Each class against the rest",
        header=("network and class", "answers", "recall %", "95 % interval", "AUROC", "95 % interval"),
        rows=tuple(rows),
        notes=("AUROC: mean over the trainings; both intervals draw whole patients",),
    )


def _difference_table(report: StudyReport) -> Table:
    rows = []
    for one in report.differences:
        change, whole = one.accuracy, one.over_trainings
        rows.append(
            (
                f"{one.candidate} against {one.reference}",
                str(one.rows),
                f"{100 * change.difference:+.2f}",
                f"{100 * change.low:+.2f} to {100 * change.high:+.2f}",
                f"{100 * whole.low:+.2f} to {100 * whole.high:+.2f}" if whole else "",
                str(one.lost),
                str(one.won),
                " ".join(f"{100 * value:+.1f}" for value in one.by_training),
            )
        )
    return Table(
        title="Differences of accuracy, points",
        header=(
            "pair",
            "answers",
            "difference",
            "95 %, patients",
            "and trainings",
            "lost",
            "won",
            "each training",
        ),
        rows=tuple(rows),
        notes=(
            "paired: the same image in trainings of the same seed or fold; lost: only the second is right, won: only "
            "the first",
            "and trainings: trainings are drawn as well as patients; needs three",
        ),
    )


def _size_table(report: StudyReport) -> Table:
    rows = {
        found.network: (
            found.network,
            f"{found.parameters['feature_extractor']:,}",
            f"{found.parameters['trainable']:,}",
            f"{found.multiply_adds / 1e6:,.1f} M",
            f"{found.onnx_bytes / 1e3:,.0f}",
        )
        for found in report.networks
    }
    return Table(
        title="Size",
        header=("network", "features", "parameters", "multiply-adds", "ONNX, kB"),
        rows=tuple(rows.values()),
        notes=("features: trainable parameters of the feature extractor; multiply-adds of one image",),
    )


def _engine_table(report: StudyReport) -> Table:
    rows = []
    for found in report.networks:
        for one in found.engines:
            latency = f"{one.median_ms.value:.3f}" if one.median_ms else ""
            mark = " (graph)" if one.answered_by == "graph" else ""
            rows.append(
                (
                    f"{found.setting.title}: {one.runtime} {one.precision}",
                    f"{one.engine_bytes / 1e3:,.0f}",
                    _spread(one.accuracy, 100) + mark,
                    _spread(one.agreement, 100),
                    latency,
                    _interval(one.median_ms, 1, "{:.3f}") if one.median_ms else "",
                )
            )
    notes = ["agreement: images that judge to which it gives the class of FP32 on ONNX Runtime"]
    if any(one.answered_by == "graph" for found in report.networks for one in found.engines):
        notes.append("(graph): the engine cannot run here; ONNX Runtime ran its graph")
    if any(one.median_ms for found in report.networks for one in found.engines):
        notes.append("latency: median, batch 1, one thread, of the network's first training")
    return Table(
        title="Engines",
        header=(
            "network and engine",
            "file, kB",
            "accuracy %",
            "agreement %",
            "latency, ms",
            "95 % interval",
        ),
        rows=tuple(rows),
        notes=(*notes, *report.notes),
    )


def _training_table(report: StudyReport) -> Table:
    rows = [
        (
            one.training,
            str(one.rows),
            _percent(one.accuracy),
            f"{one.macro_f1:.3f}",
            f"{one.epochs}",
            f"{one.best_epoch}",
            one.run,
        )
        for one in report.trainings
    ]
    rows += [
        (one.training, "", "failed", "", "", "", f"exit code {one.exit_code}: {one.reason}")
        for one in report.failed
    ]
    return Table(
        title="Trainings",
        header=("training", "answers", "accuracy %", "macro F1", "epochs", "kept epoch", "run folder"),
        rows=tuple(rows),
    )


def rows_of(report: StudyReport) -> str:
    """Return a report as CSV: one row per training and engine, shares from 0 to 1."""
    rows = [
        {
            "network": found.network,
            "augmentation": int(found.augmentation),
            "variant": variant_title(found.variant) if found.variant else "",
            "training": number,
            "runtime": one.runtime,
            "precision": one.precision,
            "accuracy": f"{accuracy:.6f}",
            "agreement_with_fp32": f"{agreement:.6f}",
            "engine_bytes": one.engine_bytes,
            "parameters": found.parameters["trainable"],
            "multiply_adds": found.multiply_adds,
        }
        for found in report.networks
        for one in found.engines
        for number, accuracy, agreement in zip(
            one.trainings, one.accuracy.values, one.agreement.values, strict=True
        )
    ]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]) if rows else ["network"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _spread(found: Spread, unit: float) -> str:
    form = "{:.2f}" if unit == 100 else "{:.3f}"
    text = form.format(unit * found.mean)
    return text if found.deviation is None else f"{text} ± {form.format(unit * found.deviation)}"


def _interval(found: Estimate, unit: float, form: str = "{:.2f}") -> str:
    return f"{form.format(unit * found.low)} to {form.format(unit * found.high)}"
