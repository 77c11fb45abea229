"""One row per answer: CSV or JSON lines, handed to the operating system line by line; and where a run goes on."""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import io
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from edge_dsc.infer.classify import Answer, OperatingPoint
from edge_dsc.infer.source import Frame, SourceKind
from edge_dsc.page.heat import outside_share
from engines.errors import ArtefactError, EnvironmentProblem, UsageError
from engines.files import ROWS, open_special, output_problem, require_kind
from engines.text_table import printable

if sys.platform != "win32":
    import fcntl

_FRAME_COLUMNS = {
    SourceKind.VIDEO: (("frame", "seconds"), ("latency_ms",)),
    SourceKind.LIVE: (("frame", "captured"), ("latency_ms", "age_ms", "dropped")),
}
DECISION = "decision"
OUTSIDE = "outside_chest"  # share of the evidence for the class that is called
_FORMATS = (".csv", ".jsonl")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a cell that begins so is run by spreadsheets, quoted or not
_LARGEST = 1 << 30  # bytes of a file that a run goes on with
_SAMPLE = 4  # written answers that are found again before a run goes on
_SAME = 1e-4  # one engine differs by less from batch to batch; another precision of one network by more
_REMEDY = "name another --out, or start again without --resume"


@functools.cache
def column_names(labels: tuple[str, ...], kind: SourceKind, extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the names of a row's columns, in their order; ``extra`` are those that were asked for."""
    before, after = _FRAME_COLUMNS.get(kind, ((), ()))
    shares = (f"p_{label}" for label in labels)
    return ("path", *before, "label", "probability", *extra, *shares, *after, "error")


def row_of(
    answer: Answer, labels: tuple[str, ...], kind: SourceKind, extra: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return an answer as a flat row.

    Args:
        answer: The answer.
        labels: Class names.
        kind: The source's kind.
        extra: :data:`DECISION` where there is an operating point, :data:`OUTSIDE` where there are maps.

    Returns:
        ``path``, ``label`` (the most probable class), ``probability``, the columns of ``extra``, ``p_<label>`` for
        each class, ``error``. A video adds ``frame`` and ``seconds`` (its position) and ``latency_ms``; a camera
        ``frame``, ``captured`` (UTC, ISO 8601), ``latency_ms``, ``age_ms`` and ``dropped`` (frames replaced by newer
        ones so far).
    """
    row: dict[str, Any] = dict.fromkeys(column_names(labels, kind, extra))
    row["path"] = str(answer.path)
    top = answer.top
    if answer.probabilities is not None and top is not None:
        row["label"] = labels[top]
        row["probability"] = round(answer.probabilities[top], 6)
        row.update({f"p_{name}": round(p, 6) for name, p in zip(labels, answer.probabilities, strict=True)})
        if DECISION in extra:
            row[DECISION] = answer.decision
        evidence = answer.evidence(labels) if OUTSIDE in extra else None
        share = outside_share(evidence) if evidence is not None else None
        if share is not None:
            row[OUTSIDE] = round(share, 4)
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


def csv_cells(row: dict[str, Any]) -> list[Any]:
    """Return a row's cells such that no spreadsheet takes a name for a formula.

    A path gets ``./`` before it, which names the same file; any other text a quote, as spreadsheets mark text.
    """
    return [
        f"{'./' if name == 'path' else chr(39)}{value}"
        if isinstance(value, str) and value.startswith(_FORMULA)
        else value
        for name, value in row.items()
    ]


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
        self,
        out: Path | None,
        labels: tuple[str, ...],
        kind: SourceKind,
        *,
        extra: tuple[str, ...] = (),
        after: WrittenRows | None = None,
    ) -> None:
        """Open the file, or standard output (CSV) where ``out`` is None.

        Args:
            out: A ``.csv`` or ``.jsonl`` file (see :func:`check_rows_path`); the first row replaces what was there.
            labels: Class names.
            kind: The source's kind, which decides the columns.
            extra: More columns, as :func:`row_of` takes them.
            after: Go on after the rows that are there; no second header is written.

        Raises:
            EnvironmentProblem: The file cannot be written, or another run writes to it.
            UsageError: It is a file of another kind, or the list of images on standard input.
        """
        self._out, self._columns = out, (labels, kind, extra)
        self._file: io.FileIO | None = None
        self._rows = 0
        self._bytes: int | None = after.bytes if after is not None else 0  # None once a write failed
        self._begun = bool(self._bytes)
        if out is not None:
            try:
                self._file = _open_rows(out, after)
            except OSError as error:
                raise output_problem(out, error) from error
        self._csv = None
        if out is None or out.suffix.lower() == ".csv":
            # Before Python 3.13 a field is quoted for a line end only where that ends rows: here for "\r", too.
            self._csv = csv.writer(
                _Lines(lambda line: self._put(line.removesuffix("\r\n") + "\n")), lineterminator="\r\n"
            )

    def _begin(self) -> None:
        """Empty the file for the first row: a run without an answer leaves the rows that were there."""
        self._begun = True
        if self._file is not None and stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self._file.truncate(0)
        if self._csv is not None:
            self._csv.writerow(column_names(*self._columns))

    def write(self, answer: Answer) -> None:
        """Write one row.

        Raises:
            EnvironmentProblem: The disk is full or the place is gone; the rows before this one are whole.
            BrokenPipeError: The reader of standard output went away.
        """
        row = row_of(answer, *self._columns)
        if not self._begun:
            self._begin()
        if self._csv is not None:
            self._csv.writerow(csv_cells(row))
        else:
            self._put(json.dumps(row, allow_nan=False) + "\n")
        self._rows += 1

    def close(self) -> None:
        """Close the file and look whether it still holds what was written.

        Raises:
            EnvironmentProblem: It was deleted, replaced or cut meanwhile.
        """
        if self._file is None or self._file.closed or self._out is None:
            return
        if not self._begun and not os.fstat(self._file.fileno()).st_size:
            self._begin()
        found = os.fstat(self._file.fileno())
        self._file.close()
        if not self._begun or self._bytes is None or not stat.S_ISREG(found.st_mode):
            return
        there = None
        with contextlib.suppress(OSError):
            there = self._out.stat()
        if there is None or not os.path.samestat(there, found) or found.st_size != self._bytes:
            raise EnvironmentProblem(
                f"{self._out} was deleted, replaced or changed while its {self._rows} rows were written",
                remedy="write them again, and leave the file alone until the end",
            )

    def _put(self, line: str) -> None:
        try:
            if self._file is None:
                # A terminal gets names that cannot command it; a file has them as they are, for --resume.
                sys.stdout.write(printable(line.removesuffix("\n")) + "\n")
                sys.stdout.flush()
                return
            data = line.encode("utf-8", "surrogateescape")
            while data:  # a full disk takes a part of it before it refuses the rest
                taken = self._file.write(data) or 0
                data = data[taken:]
                self._bytes = None if self._bytes is None else self._bytes + taken
        except BrokenPipeError:
            self._bytes = None
            raise
        except OSError as error:
            self._bytes = None
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


class WrittenRows(NamedTuple):
    """What an earlier run wrote.

    Attributes:
        paths: Those of its whole rows.
        bytes: What these take.
        size: Size of the file; what is more than ``bytes`` is half a row.
        sample: Probabilities of its first answers, by path.
    """

    paths: list[str]
    bytes: int
    size: int
    sample: dict[str, tuple[float, ...]]


def written_rows(
    out: Path, labels: tuple[str, ...], extra: tuple[str, ...] = (), point: OperatingPoint | None = None
) -> WrittenRows:
    """Return the rows that an earlier run wrote, as far as they are whole; the file is not changed.

    Args:
        out: The ``.csv`` or ``.jsonl`` file (see :func:`check_rows_path`); where it is missing or empty there are
            none.
        labels: Class names of the engine that goes on.
        extra: Its further columns.
        point: What it decides by, which must give each row's decision.

    Raises:
        ArtefactError: It is no file of results, or of other classes, columns or decisions.
        EnvironmentProblem: It cannot be read or changed, or another run writes to it.
    """
    names, is_csv = list(column_names(labels, SourceKind.FILES, extra)), out.suffix.lower() == ".csv"
    try:
        if out.exists() and not (out.is_file() or out.is_dir()):
            raise ArtefactError(f"{out} is not a regular file", remedy=_REMEDY)
        with out.open("r+b") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > _LARGEST:
                raise ValueError(f"it has {size} bytes, the limit is {_LARGEST}")
            _lock(stream.fileno(), out)
            data = stream.read()
            whole = data[: _whole_rows(data, is_csv)]
            text = io.StringIO(whole.decode("utf-8", "surrogateescape"), newline="")
            rows = _csv_rows(text, names) if is_csv else _json_rows(text, names)
            paths: list[str] = []
            sample: dict[str, tuple[float, ...]] = {}
            first = names.index("probability") + 1 + len(extra)
            for row in rows:
                paths.append(str(row[0]))
                shares = tuple(map(float, row[first : first + len(labels)])) if row[1] else ()
                if shares and point is not None and row[names.index(DECISION)] != point.decide(shares):
                    raise ValueError(f"row {len(paths)} was decided by other thresholds")
                if shares and len(sample) < _SAMPLE:
                    sample[str(Path(paths[-1]))] = shares
            if not whole and not _may_begin(data, names, is_csv):
                raise ValueError("it has no row, and no beginning of one")
        return WrittenRows(paths, len(whole), size, sample)
    except FileNotFoundError:
        return WrittenRows([], 0, 0, {})
    except OSError as error:
        raise output_problem(out, error) from error
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ArtefactError(f"{out} does not hold results of this engine: {error}", remedy=_REMEDY) from error


def _whole_rows(data: bytes, is_csv: bool) -> int:
    """Return the bytes up to the end of the last whole row: ``kill -9`` or a full disk leaves a part of one more."""
    whole = position = quotes = 0
    for line in io.BytesIO(data):
        position += len(line)
        # A quoted CSV field may hold a line end; inside one the number of quotes so far is odd.
        quotes += line.count(b'"') if is_csv else 0
        if line.endswith(b"\n") and quotes % 2 == 0:
            whole = position
    return whole


def _may_begin(data: bytes, names: list[str], is_csv: bool) -> bool:
    """Say whether a file without a whole row may be the beginning of ours, so that what it has may be cut off."""
    if is_csv:
        header = io.StringIO()
        csv.writer(header, lineterminator="\n").writerow(names)
        return header.getvalue().encode().startswith(data)
    with contextlib.suppress(ValueError):
        return list(json.loads(data)) == names  # whole but for its line end
    first = b'{"path": "'
    return data.startswith(first) or first.startswith(data)


def _open_rows(out: Path, after: WrittenRows | None) -> io.FileIO:
    """Open the file to append to it: what somebody else cuts off meanwhile leaves no hole of zeros."""
    found = require_kind(out, None if after is not None else ROWS)
    if found is None:
        out.parent.mkdir(parents=True, exist_ok=True)
    elif not stat.S_ISREG(found.st_mode):
        return io.FileIO(out, "w", opener=open_special)
    elif _is_standard_input(found):
        raise UsageError(f"--out {out} is also the list that is read", remedy="name another --out")
    file = io.FileIO(out, "a")
    try:
        _lock(file.fileno(), out)
        if after is not None:
            if os.fstat(file.fileno()).st_size != after.size:
                raise EnvironmentProblem(f"{out} changed since its rows were read", remedy="run it again")
            file.truncate(after.bytes)
    except BaseException:
        file.close()
        raise
    return file


def _lock(handle: int, out: Path) -> None:
    """Refuse a file that another run writes to; the lock ends with the handle. A file system may know no locks."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise EnvironmentProblem(
            f"another run writes to {out}", remedy="wait until it ends, or name another --out"
        ) from error
    except OSError:
        return


def _is_standard_input(found: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(0), found)
    except OSError:  # closed
        return False


def _csv_rows(stream: io.TextIOBase, names: list[str]) -> Iterator[list[Any]]:
    reader = csv.reader(stream, strict=True)
    header = next(reader, None)
    if header is not None and header != names:
        raise ValueError(f"its columns are {','.join(header)[:200]}")
    for number, row in enumerate(reader, start=1):
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} columns")
        yield [row[0].removeprefix("./"), *row[1:]]  # of csv_cells; no path of ours begins so


def _json_rows(stream: io.TextIOBase, names: list[str]) -> Iterator[list[Any]]:
    for number, line in enumerate(stream, start=1):
        row = json.loads(line)
        if not isinstance(row, dict) or list(row) != names:
            raise ValueError(f"row {number} has other fields")
        yield list(row.values())


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


def require_same_answers(answers: Iterable[Answer], earlier: WrittenRows, out: Path) -> None:
    """Refuse to go on after rows that another engine wrote: rows carry no engine, so some of them are answered again.

    Args:
        answers: This engine's answers to the pictures of :attr:`WrittenRows.sample`.
        earlier: The rows.
        out: Named in errors.

    Raises:
        ArtefactError: An answer is not the one that was written.
    """
    for answer in answers:
        written, found = earlier.sample[str(answer.path)], answer.probabilities
        if found is None:  # the picture is gone; it has its row
            continue
        if not all(abs(there - here) <= _SAME for there, here in zip(written, found, strict=True)):
            top = written.index(max(written))
            raise ArtefactError(
                f"another engine wrote {out}, or {answer.path} changed since: a probability of {written[top]:.6f} "
                f"is {found[top]:.6f} now",
                remedy=_REMEDY,
            )
