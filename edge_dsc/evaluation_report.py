"""An evaluation as a JSON document and as text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench.render import align_rows
from edge_dsc.evaluation import Evaluation
from edge_dsc.metrics import Metrics
from engines.errors import ArtefactError
from engines.files import read_document, write_document

KIND = "edge-dsc/evaluation"
SCHEMA_VERSION = 1


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
        found = result.agreement
        blocks.append(
            f"against {found.reference}: same class for {found.same_top1} of {found.images} images"
            f" ({found.same_top1 / found.images:.2%}), largest difference of a probability"
            f" {found.largest_difference:.2g}"
        )
        blocks += [f"  {path}: {before} -> {after}" for path, before, after in found.flipped]
    return "\n".join(blocks)


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
