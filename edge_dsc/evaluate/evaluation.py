"""``evaluate``: how right an engine is on labelled images, how far it agrees with another, as document and text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_dsc.data import Sample, discover
from edge_dsc.data.purposes import images_as_asked
from edge_dsc.data.split import SPLIT_FILE, load_split
from edge_dsc.evaluate.agreement import LabelledImages, compare_answers
from edge_dsc.evaluate.confidence import (
    AtPoint,
    Confidence,
    Judgement,
    confidence_plots,
    confidence_table,
    measure_confidence,
    measure_point,
    point_table,
)
from edge_dsc.evaluate.evidence import Evidence, ExplainedImages, evidence_table, measure_evidence
from edge_dsc.evaluate.metrics import Metrics, classification_metrics
from edge_dsc.infer.classify import Answer, OperatingPoint, classify_files
from edge_dsc.page.document import Section, save_page
from engines.errors import BadInputError, NotComparableError, UsageError
from engines.files import DocumentKind
from engines.images import require_decoder
from engines.record import Agreement, Change, Validation, peek_record
from engines.runtimes import (
    DEFAULT_OPTIONS,
    Progress,
    Runner,
    RunnerOptions,
    open_engine,
    require_cam,
)
from engines.text_table import Table, align_rows, printable, render_text

SHOWN_FLIPS = 20


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What ``evaluate`` is asked for.

    Attributes:
        engine: The engine file.
        data: A folder that training would take: ``DIR/class/file`` or the Kaggle layout.
        reference: Another engine of the same classes to compare answers with.
        parts: Parts of the split that stands beside the engine (``evaluation``, ``test``, ...); empty
            takes every image.
        threads: Decoding threads.
        running: How engines of a GPU run, both of them.
        thresholds: By class, as :class:`edge_dsc.infer.classify.OperatingPoint` takes them.
        abstain: Likewise.
        cam: Whether it is told where the evidence lies, for an engine with class activation maps.
    """

    engine: Path
    data: Path
    reference: Path | None = None
    parts: Sequence[str] = ()
    threads: int = 1
    running: RunnerOptions = DEFAULT_OPTIONS
    thresholds: Mapping[str, float] = field(default_factory=dict)
    abstain: float | None = None
    cam: bool = False


@dataclass(frozen=True, kw_only=True)
class Looks:
    """What is looked at beside right and wrong.

    Attributes:
        confidence: Whether the probabilities are measured: ROC curves and reliability.
        point: When a class is called; None calls the most probable one.
        cam: Whether the class activation maps are.
    """

    confidence: bool = False
    point: OperatingPoint | None = None
    cam: bool = False


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of ``evaluate``.

    Attributes:
        engine: The engine's file name.
        images: Images that were answered.
        skipped: Images that could not be read: (path, reason).
        metrics: Accuracy and the rest.
        agreement: With the reference engine, where one was given and both answered an image.
        confidence: What its probabilities mean, where that was measured.
        at_point: What an operating point makes of its answers, where one was given.
        evidence: Where the evidence for its answers lies, where that was measured.
    """

    engine: str
    images: int
    skipped: tuple[tuple[str, str], ...]
    metrics: Metrics
    agreement: Agreement | None
    confidence: Confidence | None = None
    at_point: AtPoint | None = None
    evidence: Evidence | None = None


def evaluate(request: EvaluationRequest, progress: Progress | None = None) -> Evaluation:
    """Evaluate an engine on a folder of labelled images.

    Args:
        request: What to do.
        progress: Called with (phase, done, total).

    Raises:
        BadInputError: Class names that the engine does not know, or no readable image.
        NotComparableError: The reference knows other classes or wants other input.
        UsageError: Parts were asked for, but there is no split beside the engine.
    """
    labels = peek_record(request.engine).contract.labels
    samples = labelled_samples(request.data, request.engine.parent / SPLIT_FILE, request.parts, labels=labels)
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(open_engine(request.engine, options=request.running))
        other = None
        if request.reference is not None:
            other = stack.enter_context(open_engine(request.reference, options=request.running))
        if request.cam:
            require_cam(runner.record)
        point = OperatingPoint.asked(runner.record.contract.labels, request.thresholds, request.abstain)
        return evaluate_runner(
            runner,
            request.data,
            samples,
            reference=other,
            threads=request.threads,
            progress=progress,
            looks=Looks(confidence=True, point=point, cam=request.cam),
        )


def evaluate_runner(
    runner: Runner,
    data: Path,
    samples: Sequence[Sample],
    *,
    reference: Runner | None = None,
    threads: int = 1,
    progress: Progress | None = None,
    looks: Looks = Looks(),
) -> Evaluation:
    """Evaluate a loaded engine on samples of a folder; see :func:`evaluate`."""
    labels = _common_classes(runner, reference, samples)
    for each in (runner, reference):
        if each is not None:
            require_decoder(each.record.contract)
    paths = [data / sample.path for sample in samples]
    others = None if reference is None else _answer_all(paths, reference, threads, progress)
    maps: list[NDArray[np.float32]] | None = [] if looks.cam else None
    answers = _answer_all(paths, runner, threads, progress, maps)
    good = [place for place, answer in enumerate(answers) if answer.probabilities is not None]
    if not good:
        raise BadInputError(
            f"none of the {len(answers)} images could be read", remedy=f"first: {answers[0].error}"
        )
    true = np.array([labels.index(sample.label) for sample in samples], np.int64)
    agreement = None
    if reference is not None and others is not None:
        both = [place for place in good if others[place].probabilities is not None]
        if both:
            images = LabelledImages(
                true=true[both],
                labels=labels,
                paths=[str(paths[place]) for place in both],
                patients=[samples[place].patient for place in both],
            )
            agreement = compare_answers(
                images,
                _probabilities(others, both),
                _probabilities(answers, both),
                name=reference.record.engine,
            )
    probabilities = _probabilities(answers, good)
    judged = Judgement(
        labels=labels,
        true=true[good],
        patients=[samples[place].patient for place in good],
        probabilities=probabilities.astype(np.float64),
    )
    temperature = runner.record.contract.temperature
    explained = None
    if maps is not None:
        explained = ExplainedImages(
            paths=[paths[place] for place in good],
            patients=judged.patients,
            top=probabilities.argmax(axis=1),
            evidence=np.stack(maps),
        )
    return Evaluation(
        engine=runner.record.engine,
        images=len(good),
        skipped=tuple((str(a.path), str(a.error)) for a in answers if a.probabilities is None),
        metrics=classification_metrics(true[good], probabilities, labels),
        agreement=agreement,
        confidence=measure_confidence(judged, temperature) if looks.confidence else None,
        at_point=measure_point(judged, looks.point) if looks.point is not None else None,
        evidence=measure_evidence(explained, runner) if explained is not None else None,
    )


def _common_classes(runner: Runner, reference: Runner | None, samples: Sequence[Sample]) -> tuple[str, ...]:
    """Return the classes of the engine, which must be those of the reference and know all of the samples'."""
    name, labels = runner.record.engine, runner.record.contract.labels
    unknown = sorted({sample.label for sample in samples} - set(labels))
    if unknown:
        raise BadInputError(
            f"{name} does not know the class {', '.join(unknown)}",
            remedy=f"name the folders after its classes: {', '.join(labels)}",
        )
    if reference is not None and reference.record.contract.labels != labels:
        raise NotComparableError(
            f"{reference.record.engine} knows {', '.join(reference.record.contract.labels)}, "
            f"{name} knows {', '.join(labels)}",
            remedy="give a reference that was trained on the same classes",
        )
    return labels


def _answer_all(
    paths: list[Path],
    runner: Runner,
    threads: int,
    progress: Progress | None,
    evidence: list[NDArray[np.float32]] | None = None,
) -> list[Answer]:
    """Answer every image; where there is a list for it, keep the evidence for the class of each good one."""
    answers = []
    for answer in classify_files(paths, runner, threads=threads, cam=evidence is not None):
        found = answer.evidence(runner.record.contract.labels)
        if evidence is not None and found is not None:
            evidence.append(found)
        answers.append(replace(answer, maps=None))  # those of all classes would fill the memory
        if progress is not None:
            progress(f"evaluating {runner.record.engine}", len(answers), len(paths))
    return answers


def _probabilities(answers: Sequence[Answer], places: Sequence[int]) -> NDArray[np.float32]:
    return np.array([answers[place].probabilities for place in places], np.float32)


def _from_version_1(body: dict[str, Any]) -> dict[str, Any]:
    """Leave out an agreement of the first releases: version 1 gained its paired statistics under its own number."""
    agreement = body["agreement"]
    return {**body, "agreement": agreement if agreement and "accuracy" in agreement else None}


def _from_version_2(body: dict[str, Any]) -> dict[str, Any]:
    """Version 2 knew right and wrong alone."""
    return {**body, "confidence": None, "at_point": None, "evidence": None}


EVALUATION = DocumentKind(
    name="edge-dsc/evaluation",
    version=3,
    body=Evaluation,
    renew="edge-dsc evaluate ENGINE DATA --out FILE",
    older={1: _from_version_1, 2: _from_version_2},
)


def read_accuracies(paths: Iterable[Path]) -> dict[str, float]:
    """Return engine name, as latency reports name it -> accuracy, 0 to 1, from files that ``evaluate`` wrote.

    Raises:
        ArtefactError: A file is damaged or foreign.
    """
    evaluations = map(EVALUATION.load, paths)
    return {Path(found.engine).stem: found.metrics.accuracy for found in evaluations}


def format_evaluation(result: Evaluation) -> str:
    """Return an evaluation as text: the metrics, the confusion matrix and the agreement."""
    blocks = [
        f"{printable(result.engine)}: {result.images} images, {len(result.skipped)} skipped",
        format_metrics(result.metrics),
    ]
    if result.confidence is not None:
        blocks += ["", render_text(confidence_table(result.confidence))]
    if result.at_point is not None:
        blocks += ["", render_text(point_table(result.at_point))]
    if result.evidence is not None:
        blocks += ["", render_text(evidence_table(result.evidence))]
    if result.agreement is not None:
        blocks.append(format_agreement(result.agreement, candidate=result.engine))
    return "\n".join(blocks)


def save_evaluation_page(path: Path, result: Evaluation) -> None:
    """Write an evaluation as a page: its text, ROC curves and the reliability picture.

    Raises:
        EnvironmentProblem: matplotlib is missing, or the place cannot be written.
    """
    sections = [Section("Right and wrong", metrics_tables(result.metrics))]
    if result.confidence is not None:
        found = result.confidence
        sections.append(
            Section("What the probabilities mean", (*confidence_plots(found), confidence_table(found)))
        )
    if result.at_point is not None:
        sections.append(Section("Operating point", (point_table(result.at_point),)))
    if result.evidence is not None:
        sections.append(Section("Where the evidence lies", (evidence_table(result.evidence),)))
    summary = f"{result.images:,} images, {len(result.skipped)} skipped."
    save_page(path, f"Evaluation of {result.engine}", sections, summary=summary)


def format_agreement(found: Agreement, *, candidate: str) -> str:
    """Return how an engine differs from its reference as text: figures, the paired test, the flipped images.

    Args:
        found: The comparison.
        candidate: Name of the engine.
    """
    rows = [
        ["accuracy", *_change(found.accuracy, 100, "{:.2f} %", "points")],
        ["macro F1", *_change(found.macro_f1, 1, "{:.4f}", "")],
        [
            "calibration error",
            f"{found.reference_calibration_error:.4f}",
            f"{found.candidate_calibration_error:.4f}",
            "",
            "",
        ],
    ]
    header = [f"{found.images} images", found.reference, candidate, "difference", "95 % interval"]
    lines = [
        align_rows(header, rows),
        f"same class for {found.same_top1} of {found.images} images ({found.same_top1 / found.images:.2%}),"
        f" largest difference of a probability {found.largest_difference:.2g}",
        f"{found.lost} lost, {found.won} won: McNemar's exact p = {found.mcnemar_p:.3g}",
    ]
    if not found.lost + found.won:
        # Source: Hanley and Lippman-Hand, JAMA 249 (1983): no event in n trials excludes a rate of 3/n at 95 %.
        lines.append(
            f"no image changed between right and wrong: a rate below {3 / found.images:.2%} is not excluded"
        )
    lines += [
        printable(f"  {flip.path} is {flip.label}: {flip.reference} -> {flip.candidate}")
        for flip in found.flipped[:SHOWN_FLIPS]
    ]
    if len(found.flipped) > SHOWN_FLIPS:
        lines.append(f"  ... {len(found.flipped) - SHOWN_FLIPS} more images changed their class")
    return "\n".join(lines)


def format_validation(found: Validation, *, precision: str) -> str:
    """Return an accuracy gate's finding as text."""
    verdict = "within" if found.passed else "BEYOND"
    lines = [
        f"accuracy gate: {abs(found.drop):.2f} points {'gained' if found.drop < 0 else 'lost'}, "
        f"{verdict} the budget of {found.max_drop:g}",
        f"images: {found.images}" + (f", {found.skipped} unreadable" if found.skipped else ""),
        f"answered by: {found.answered_by}",
        format_agreement(found.agreement, candidate=precision.upper()),
    ]
    step = 100 / found.agreement.images
    if step > found.max_drop > 0:
        lines.append(
            f"one image is {step:.2f} points: with so few images the budget allows no net loss at all"
        )
    worst = -100 * found.agreement.accuracy.low
    if found.passed and worst > found.max_drop:
        lines.append(f"these images do not exclude a drop of {worst:.2f} points: more images would narrow it")
    return "\n".join(lines)


def _change(change: Change, unit: float, form: str, word: str) -> list[str]:
    before, after = (form.format(unit * value) for value in (change.reference, change.candidate))
    sign = "{:+.2f}" if unit == 100 else "{:+.4f}"
    moved, low, high = (sign.format(unit * v) for v in (change.difference, change.low, change.high))
    return [before, after, moved, f"{low} to {high} {word}".rstrip()]


def format_metrics(metrics: Metrics) -> str:
    """Return metrics as text tables: one row per class, then the confusion matrix."""
    classes, confusion = metrics_tables(metrics)
    return "\n".join(
        [
            classes.title,
            align_rows(classes.header, classes.rows),
            "",
            align_rows(confusion.header, confusion.rows),
        ]
    )


def metrics_tables(metrics: Metrics) -> tuple[Table, Table]:
    """Return metrics as tables: one row per class, and the confusion matrix."""
    classes = metrics.per_class.items()
    rows = [(name, str(c.support), *_decimals(c.precision, c.recall, c.f1)) for name, c in classes]
    rows.append(("macro", str(metrics.count), *_decimals(metrics.precision, metrics.recall, metrics.f1)))
    confusion = [
        (f"is {name}", *map(str, counts))
        for name, counts in zip(metrics.labels, metrics.confusion, strict=True)
    ]
    return (
        Table(
            title=f"accuracy {metrics.accuracy:.2%}, loss {metrics.loss:.4f}",
            header=("class", "images", "precision", "recall", "F1"),
            rows=tuple(rows),
        ),
        Table(
            title="confusion",
            header=("", *(f"called {name}" for name in metrics.labels)),
            rows=tuple(confusion),
        ),
    )


def _decimals(*values: float) -> list[str]:
    return [f"{value:.3f}" for value in values]


def labelled_samples(
    data: Path, split_file: Path, parts: Sequence[str], *, labels: Sequence[str] | None = None
) -> list[Sample]:
    """Name the labelled images of a folder, or only those of some parts of a split.

    Args:
        data: The folder.
        split_file: The split.
        parts: Its parts; none for all images of the folder.
        labels: As :func:`edge_dsc.data.discover` takes them.

    Raises:
        UsageError: Parts were asked for, but there is no split file.
        BadInputError: The folder holds none of the images of these parts.
    """
    found = discover(data, labels=labels)
    if not parts:
        return list(found.samples)
    if not split_file.is_file():
        raise UsageError(
            f"there is no {split_file.name} beside the engine",
            remedy="leave --split out, or keep the engine in its run folder",
        )
    samples = list(images_as_asked(found, load_split(split_file), parts))
    if not samples:
        raise BadInputError(
            f"{data} holds none of the images of {', '.join(parts)} in {split_file}",
            remedy="give the folder that the network was trained on",
        )
    return samples
