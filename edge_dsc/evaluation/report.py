"""An evaluation as a JSON document and as text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench.render import align_rows
from edge_dsc.evaluation.answers import Evaluation
from edge_dsc.evaluation.metrics import Metrics
from engines.errors import ArtefactError
from engines.files import read_document, write_document
from engines.validation import Agreement, Change, Validation

KIND = "edge-dsc/evaluation"
SCHEMA_VERSION = 1
SHOWN_FLIPS = 20


def save_evaluation(path: Path, result: Evaluation) -> None:
    """Write an evaluation as a JSON document."""
    write_document(path, KIND, SCHEMA_VERSION, result.to_dict())


def read_accuracies(paths: Iterable[Path]) -> dict[str, float]:
    """Return engine name, as latency reports name it -> accuracy, 0 to 1, from files that evaluate wrote.

    Raises:
        ArtefactError: A file is damaged or foreign.
    """
    found = {}
    for path in paths:
        body = read_document(path, KIND, SCHEMA_VERSION, renew="edge-dsc evaluate ENGINE DATA --out FILE")
        try:
            found[Path(str(body["engine"])).stem] = float(body["metrics"]["accuracy"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(
                f"{path} holds no accuracy: {error}", remedy="make it anew: edge-dsc evaluate"
            ) from error
    return found


def format_evaluation(result: Evaluation) -> str:
    """Return an evaluation as text: the metrics, the confusion matrix and the agreement."""
    blocks = [
        f"{result.engine}: {result.images} images, {len(result.skipped)} skipped",
        format_metrics(result.metrics),
    ]
    if result.agreement is not None:
        blocks.append(format_agreement(result.agreement, candidate=result.engine))
    return "\n".join(blocks)


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
        f"  {flip.path} is {flip.label}: {flip.reference} -> {flip.candidate}"
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
    """Return metrics as text tables: a row a class, then the confusion matrix."""
    classes = metrics.per_class.items()
    rows = [[name, str(c.support), *_decimals(c.precision, c.recall, c.f1)] for name, c in classes]
    rows.append(["macro", str(metrics.count), *_decimals(metrics.precision, metrics.recall, metrics.f1)])
    confusion = [
        [f"is {name}", *map(str, counts)]
        for name, counts in zip(metrics.labels, metrics.confusion, strict=True)
    ]
    return "\n".join(
        [
            f"accuracy {metrics.accuracy:.2%}, loss {metrics.loss:.4f}",
            align_rows(["class", "images", "precision", "recall", "F1"], rows),
            "",
            align_rows(["", *(f"called {name}" for name in metrics.labels)], confusion),
        ]
    )


def _decimals(*values: float) -> list[str]:
    return [f"{value:.3f}" for value in values]
