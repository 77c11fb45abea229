"""How right an engine is on labelled images, and how far it agrees with a reference engine."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_dsc.data import Sample, discover
from edge_dsc.data.split import load_split
from edge_dsc.evaluation.agreement import compare_answers
from edge_dsc.evaluation.metrics import Metrics, classification_metrics
from edge_dsc.loop.folder import Answer, classify_files
from edge_dsc.training.record import SPLIT_FILE
from engines.errors import BadInputError, NotComparableError, UsageError
from engines.packages import load
from engines.runtimes import Progress, Runner, open_engine
from engines.validation import Agreement


@dataclass(frozen=True)
class Evaluation:
    """The result of ``evaluate``.

    Attributes:
        engine: The engine's file name.
        images: Images that were answered.
        skipped: Images that could not be read: (path, reason).
        metrics: Accuracy and the rest.
        agreement: Against the reference engine, where one was given.
    """

    engine: str
    images: int
    skipped: tuple[tuple[str, str], ...]
    metrics: Metrics
    agreement: Agreement | None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "engine": self.engine,
            "images": self.images,
            "skipped": [list(row) for row in self.skipped],
            "metrics": self.metrics.to_dict(),
            "agreement": None if self.agreement is None else self.agreement.to_dict(),
        }


def evaluate(
    engine: Path,
    data: Path,
    *,
    reference: Path | None = None,
    parts: Sequence[str] = (),
    threads: int = 1,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate an engine on a folder of labelled images.

    Args:
        engine: The engine file.
        data: A folder that training would take: ``DIR/class/file`` or the Kaggle layout.
        reference: Another engine of the same classes to compare answers with.
        parts: Parts of the split that stands beside the engine (``evaluation``, ``test``, ...); empty
            takes every image.
        threads: Decoding threads.
        progress: Called with (phase, done, total).

    Raises:
        BadInputError: Class names that the engine does not know, or no readable image.
        NotComparableError: The reference knows other classes or wants other input.
        UsageError: Parts were asked for, but there is no split beside the engine.
    """
    samples = labelled_samples(data, engine.parent / SPLIT_FILE, parts)
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(open_engine(engine))
        other = stack.enter_context(open_engine(reference)) if reference is not None else None
        return evaluate_runner(runner, data, samples, reference=other, threads=threads, progress=progress)


def evaluate_runner(
    runner: Runner,
    data: Path,
    samples: Sequence[Sample],
    *,
    reference: Runner | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a loaded engine on samples of a folder; see :func:`evaluate`."""
    contract = runner.record.contract
    name = runner.record.engine
    _check_classes({sample.label for sample in samples}, contract.labels, name)
    paths = [data / sample.path for sample in samples]
    others = None
    if reference is not None:
        if reference.record.contract.labels != contract.labels:
            raise NotComparableError(
                f"{reference.record.engine} knows {', '.join(reference.record.contract.labels)}, "
                f"{name} knows {', '.join(contract.labels)}",
                remedy="give a reference that was trained on the same classes",
            )
        others = _answers(paths, reference, threads, progress)
    answers = _answers(paths, runner, threads, progress)
    agreement = None
    if reference is not None and others is not None:
        agreement = _agreement(reference.record.engine, samples, answers, others, contract.labels)
    return _summarise(name, samples, answers, contract.labels, agreement)


def labelled_samples(data: Path, split_file: Path, parts: Sequence[str]) -> list[Sample]:
    """Name the labelled images of a folder, or only those of some parts of a split.

    Raises:
        UsageError: Parts were asked for, but there is no split file.
        BadInputError: The folder holds none of the images of these parts.
    """
    found = discover(data)
    if not parts:
        return list(found.samples)
    if not split_file.is_file():
        raise UsageError(
            f"there is no {split_file.name} beside the engine",
            remedy="leave --split out, or keep the engine in its run folder",
        )
    split = load_split(split_file)
    unknown = sorted(set(parts) - set(split.parts))
    if unknown:
        raise UsageError(
            f"there is no part {', '.join(unknown)}", remedy=f"choose of {', '.join(split.parts)}"
        )
    wanted = {sample.sha256 for part in parts for sample in split.samples(part)}
    samples = [sample for sample in found.samples if sample.sha256 in wanted]
    if not samples:
        raise BadInputError(
            f"{data} holds none of the images of {', '.join(parts)} in {split_file}",
            remedy="give the folder that the network was trained on",
        )
    return samples


def _answers(paths: list[Path], runner: Runner, threads: int, progress: Progress | None) -> list[Answer]:
    answers = []
    for answer in classify_files(paths, runner, threads=threads):
        answers.append(answer)
        if progress is not None:
            progress(f"evaluating {runner.record.engine}", len(answers), len(paths))
    return answers


def _check_classes(seen: set[str], labels: Sequence[str], engine: str) -> None:
    unknown = sorted(seen - set(labels))
    if unknown:
        raise BadInputError(
            f"{engine} does not know the class {', '.join(unknown)}",
            remedy=f"name the folders after its classes: {', '.join(labels)}",
        )


def _summarise(
    engine: str,
    samples: Sequence[Sample],
    answers: Sequence[Answer],
    labels: Sequence[str],
    agreement: Agreement | None,
) -> Evaluation:
    numpy = load("numpy")
    good = [(s, a) for s, a in zip(samples, answers, strict=True) if a.probabilities is not None]
    if not good:
        raise BadInputError(
            f"none of the {len(answers)} images could be read", remedy=f"first: {answers[0].error}"
        )
    true = numpy.array([labels.index(sample.label) for sample, _ in good])
    probabilities = numpy.array([answer.probabilities for _, answer in good], numpy.float32)
    skipped = tuple((str(a.path), str(a.error)) for a in answers if a.probabilities is None)
    metrics = classification_metrics(true, probabilities, labels)
    return Evaluation(engine, len(good), skipped, metrics, agreement)


def _agreement(
    reference: str,
    samples: Sequence[Sample],
    answers: Sequence[Answer],
    others: Sequence[Answer],
    labels: Sequence[str],
) -> Agreement | None:
    """Compare the answers of both for the images that both answered; None where there is no such image."""
    both = [
        row
        for row in zip(samples, answers, others, strict=True)
        if row[1].probabilities is not None and row[2].probabilities is not None
    ]
    if not both:
        return None
    numpy = load("numpy")
    return compare_answers(
        numpy.array([labels.index(sample.label) for sample, _, _ in both]),
        numpy.array([other.probabilities for _, _, other in both], numpy.float32),
        numpy.array([answer.probabilities for _, answer, _ in both], numpy.float32),
        paths=[str(answer.path) for _, answer, _ in both],
        patients=[sample.patient for sample, _, _ in both],
        labels=labels,
        name=reference,
    )
