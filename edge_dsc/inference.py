"""``infer``: a source through an engine into CSV or JSON lines."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from edge_dsc.folder_loop import Answer, classify_files
from edge_dsc.sources import expand_source
from engines.errors import BadInputError, UsageError
from engines.files import atomic_path
from engines.runtimes import Progress, open_engine

Write = Callable[[Answer], None]


@dataclass(frozen=True)
class InferSummary:
    """What an inference run did.

    Attributes:
        engine: The engine file.
        source: The source as named.
        images: Images in the source.
        answered: Images that got an answer.
        failed: Images that got an error row.
        seconds: Wall time of the loop, decoding included.
        out: The results file, where one was written.
        interrupted: Whether Ctrl-C ended it early; the rows so far are kept.
        rows: The rows, where they were asked for.
    """

    engine: str
    source: str
    images: int
    answered: int
    failed: int
    seconds: float
    out: str | None
    interrupted: bool
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return vars(self).copy()

    def line(self) -> str:
        """Return one line for the terminal."""
        done = self.answered + self.failed
        rate = f", {done / self.seconds:.1f} images/s" if self.seconds > 0 else ""
        bad = f", {self.failed} could not be read" if self.failed else ""
        where = f" -> {self.out}" if self.out else ""
        early = f" (interrupted after {done} of {self.images})" if self.interrupted else ""
        return f"{self.answered} images classified{bad}{rate}{where}{early}"


def infer_source(
    engine: Path,
    source: str,
    *,
    out: Path | None,
    threads: int,
    keep_rows: bool,
    progress: Progress | None,
) -> InferSummary:
    """Classify every image of a source and write a row for each, in the source's order.

    Args:
        engine: The engine file.
        source: A file, folder or glob.
        out: A ``.csv`` or ``.jsonl`` file; None writes CSV to standard output, unless rows are kept.
        threads: Decoding threads.
        keep_rows: Keep the rows in the summary too.
        progress: Called with (phase, done, total).

    Raises:
        BadInputError: No image in the source, or none of them could be read.
    """
    paths = expand_source(source)
    rows: list[dict[str, Any]] = []
    answered = failed = 0
    interrupted = False
    with open_engine(engine) as runner, contextlib.ExitStack() as stack:
        labels = runner.record.contract.labels
        write = stack.enter_context(open_rows(out, labels)) if out or not keep_rows else None
        started = time.perf_counter()
        try:
            for answer in classify_files(paths, runner, threads=threads):
                answered += answer.error is None
                failed += answer.error is not None
                if write is not None:
                    write(answer)
                if keep_rows:
                    rows.append(row_of(answer, labels))
                if progress is not None:
                    progress("classifying", answered + failed, len(paths))
        except KeyboardInterrupt:
            interrupted = True
        seconds = time.perf_counter() - started
    if failed and not answered and not interrupted:
        raise BadInputError(
            f"none of the {failed} images of {source!r} could be read",
            remedy="the reason stands in each row" if out or not keep_rows else str(rows[0]["error"]),
        )
    place = str(out) if out else None
    return InferSummary(str(engine), source, len(paths), answered, failed, seconds, place, interrupted, rows)


def row_of(answer: Answer, labels: Sequence[str]) -> dict[str, Any]:
    """Return an answer as a flat row: path, label, probability, one column a class, error."""
    row: dict[str, Any] = {"path": str(answer.path), "label": None, "probability": None}
    row.update({f"p_{label}": None for label in labels})
    if answer.probabilities is not None and answer.top is not None:
        row["label"] = labels[answer.top]
        row["probability"] = round(answer.probabilities[answer.top], 6)
        row.update({f"p_{name}": round(p, 6) for name, p in zip(labels, answer.probabilities, strict=True)})
    row["error"] = answer.error
    return row


@contextlib.contextmanager
def open_rows(out: Path | None, labels: Sequence[str]) -> Iterator[Write]:
    """Open a sink for rows and give the function that writes one.

    Args:
        out: A ``.csv`` or ``.jsonl`` file, which appears whole at the end, or None for CSV on standard output.
        labels: Class names.

    Raises:
        UsageError: Another suffix.
        EnvironmentProblem: The file cannot be written.
    """
    if out is None:
        yield _csv_writer(sys.stdout, labels)
        return
    writers = {".csv": _csv_writer, ".jsonl": _json_lines_writer}
    if out.suffix.lower() not in writers:
        raise UsageError(f"--out {out} ends in {out.suffix or 'nothing'}", remedy="name it .csv or .jsonl")
    with atomic_path(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        yield writers[out.suffix.lower()](stream, labels)


def _csv_writer(stream: TextIO, labels: Sequence[str]) -> Write:
    names = ["path", "label", "probability", *(f"p_{label}" for label in labels), "error"]
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()

    def write(answer: Answer) -> None:
        writer.writerow(row_of(answer, labels))

    return write


def _json_lines_writer(stream: TextIO, labels: Sequence[str]) -> Write:
    def write(answer: Answer) -> None:
        stream.write(json.dumps(row_of(answer, labels), allow_nan=False) + "\n")

    return write
