"""One row per answer: CSV or JSON lines, handed to the operating system line by line; and where a run goes on."""

from __future__ import annotations

import csv
import errno
import functools
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from edge_dsc.infer.classify import Answer
from edge_dsc.infer.source import SourceKind
from edge_dsc.infer.video import Frame
from engines.errors import ArtefactError, EnvironmentProblem, UsageError
from engines.files import output_problem
from engines.text_table import printable

_FRAME_COLUMNS = {
    SourceKind.VIDEO: (("frame", "seconds"), ("latency_ms",)),
    SourceKind.LIVE: (("frame", "captured"), ("latency_ms", "age_ms", "dropped")),
}
_FORMATS = (".csv", ".jsonl")
_REMEDY = "name another --out, or start again without --resume"


@functools.cache
def column_names(labels: tuple[str, ...], kind: SourceKind) -> tuple[str, ...]:
    """Return the names of a row's columns, in their order."""
    before, after = _FRAME_COLUMNS.get(kind, ((), ()))
    return ("path", *before, "label", "probability", *(f"p_{label}" for label in labels), *after, "error")


def row_of(answer: Answer, labels: tuple[str, ...], kind: SourceKind) -> dict[str, Any]:
    """Return an answer as a flat row.

    Returns:
        ``path``, ``label``, ``probability``, ``p_<label>`` for each class, ``error``. A video adds ``frame`` and
        ``seconds`` (its position) and ``latency_ms``; a camera ``frame``, ``captured`` (UTC, ISO 8601),
        ``latency_ms``, ``age_ms`` and ``dropped`` (frames replaced by newer ones so far).
    """
    row: dict[str, Any] = dict.fromkeys(column_names(labels, kind))
    row["path"] = str(answer.path)
    top = answer.top
    if answer.probabilities is not None and top is not None:
        row["label"] = labels[top]
        row["probability"] = round(answer.probabilities[top], 6)
        row.update({f"p_{name}": round(p, 6) for name, p in zip(labels, answer.probabilities, strict=True)})
    if answer.frame is not None:
        row["frame"] = answer.frame.index
        row["latency_ms"] = round(answer.latency_ms, 3)
        if kind is SourceKind.VIDEO:
            row["seconds"] = answer.frame.seconds
        else:
            moment = time.time() - (time.monotonic() - answer.frame.captured)
            captured = datetime.fromtimestamp(moment, timezone.utc)
            row["captured"] = captured.isoformat(timespec="milliseconds")
            row["age_ms"] = round(answer.age_ms or 0.0, 3)
            row["dropped"] = answer.frame.dropped
    row["error"] = answer.error
    return row


def check_rows_path(out: Path) -> None:
    """Refuse a file whose suffix is no format of rows.

    Raises:
        UsageError: Neither ``.csv`` nor ``.jsonl``.
    """
    if out.suffix.lower() not in _FORMATS:
        raise UsageError(f"--out {out} ends in {out.suffix or 'nothing'}", remedy="name it .csv or .jsonl")


class RowSink:
    """Writes one row per answer, each with one call to the operating system.

    After ``kill -9`` a file holds every row but, at worst, the end of the last one.
    """

    def __init__(
        self, out: Path | None, labels: tuple[str, ...], kind: SourceKind, *, append: bool = False
    ) -> None:
        """Open the file, or standard output (CSV) where ``out`` is None.

        Args:
            out: A ``.csv`` or ``.jsonl`` file (see :func:`check_rows_path`); what was there before is replaced.
            labels: Class names.
            kind: The source's kind, which decides the columns.
            append: Go on after the rows that are there; no second header is written.

        Raises:
            EnvironmentProblem: The file cannot be written.
        """
        self._out, self._labels, self._kind = out, labels, kind
        self._file: io.FileIO | None = None
        self._rows = 0
        if out is not None:
            try:
                out.parent.mkdir(parents=True, exist_ok=True)
                self._file = io.FileIO(out, "a" if append else "w")
            except OSError as error:
                raise output_problem(out, error) from error
        self._csv = None
        if out is None or out.suffix.lower() == ".csv":
            # Before Python 3.13 a field is quoted for a line end only where that ends rows: here for "\r", too.
            self._csv = csv.writer(
                _Lines(lambda line: self._put(line.removesuffix("\r\n") + "\n")), lineterminator="\r\n"
            )
            if not append or (self._file is not None and self._file.tell() == 0):
                self._csv.writerow(column_names(labels, kind))

    def write(self, answer: Answer) -> None:
        """Write one row.

        Raises:
            EnvironmentProblem: The disk is full or the place is gone; the rows before this one are whole.
            BrokenPipeError: The reader of standard output went away.
        """
        row = row_of(answer, self._labels, self._kind)
        if self._csv is not None:
            self._csv.writerow(row.values())
        else:
            self._put(json.dumps(row, allow_nan=False) + "\n")
        self._rows += 1

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _put(self, line: str) -> None:
        try:
            if self._file is None:
                # A terminal gets names that cannot command it; a file has them as they are, for --resume.
                sys.stdout.write(printable(line.removesuffix("\n")) + "\n")
                sys.stdout.flush()
                return
            data = line.encode("utf-8", "surrogateescape")
            while data:  # a full disk takes a part of it before it refuses the rest
                data = data[self._file.write(data) or 0 :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._problem(error) from error

    def _problem(self, error: OSError) -> EnvironmentProblem:
        problem = output_problem(self._out or Path("standard output"), error)
        if self._out is not None and self._rows and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return EnvironmentProblem(
                f"{problem.what} after {self._rows} rows", remedy="free some space and go on with --resume"
            )
        return problem


class _Lines(NamedTuple):
    """What ``csv.writer`` writes to: it calls ``write`` once for each row, with the whole line."""

    write: Callable[[str], object]


def written_paths(out: Path, labels: tuple[str, ...]) -> list[str]:
    """Return the paths of the rows that an earlier run wrote, after a half row was cut off.

    Args:
        out: The ``.csv`` or ``.jsonl`` file (see :func:`check_rows_path`); where it is missing or empty there are
            none.
        labels: Class names of the engine that goes on.

    Raises:
        ArtefactError: It is no file of results, or of other classes.
        EnvironmentProblem: It cannot be read or changed.
    """
    if not out.exists():
        return []
    _cut_half_row(out)
    names = list(column_names(labels, SourceKind.FILES))
    try:
        with out.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
            rows = _csv_paths(stream, names) if out.suffix.lower() == ".csv" else _json_paths(stream, names)
            return list(rows)
    except OSError as error:
        raise output_problem(out, error) from error
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ArtefactError(f"{out} does not hold results of this engine: {error}", remedy=_REMEDY) from error


def _cut_half_row(out: Path) -> None:
    """Cut what comes after the last whole row, as ``kill -9`` or a full disk leaves it."""
    whole = position = quotes = 0
    try:
        with out.open("r+b") as stream:
            for line in stream:
                position += len(line)
                # A quoted CSV field may hold a line end; inside one the number of quotes so far is odd.
                quotes += line.count(b'"') if out.suffix.lower() == ".csv" else 0
                if line.endswith(b"\n") and quotes % 2 == 0:
                    whole = position
            stream.truncate(whole)
    except OSError as error:
        raise output_problem(out, error) from error


def _csv_paths(stream: io.TextIOBase, names: list[str]) -> Iterator[str]:
    reader = csv.reader(stream, strict=True)
    header = next(reader, None)
    if header is not None and header != names:
        raise ValueError(f"its columns are {','.join(header)[:200]}")
    for number, row in enumerate(reader, start=1):
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} columns")
        yield row[0]


def _json_paths(stream: io.TextIOBase, names: list[str]) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        row = json.loads(line)
        if not isinstance(row, dict) or list(row) != names:
            raise ValueError(f"row {number} has other fields")
        yield str(row["path"])


def skip_written(paths: Iterator[Path | Frame | None], written: Sequence[str], out: Path) -> None:
    """Take the paths that already have rows off the front of a source.

    Args:
        paths: The source; consumed up to the first path without a row.
        written: Paths of the rows.
        out: Named in errors.

    Raises:
        ArtefactError: The rows are not the beginning of this source.
    """
    for number, row in enumerate(written, start=1):
        path = next((path for path in paths if path is not None), None)
        if path is None:
            raise ArtefactError(
                f"{out} has {len(written)} rows, the source only {number - 1}", remedy=_REMEDY
            )
        if str(path) != row:
            raise ArtefactError(
                f"row {number} of {out} is {row}, the source has {path} there", remedy=_REMEDY
            )
