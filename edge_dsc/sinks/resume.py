"""Where an earlier run stopped: its whole rows, held against the source."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from edge_dsc.sinks.rows import check_rows_path, column_names
from edge_dsc.sources.uri import SourceKind
from engines.errors import ArtefactError
from engines.files import output_problem

_REMEDY = "name another --out, or start again without --resume"


def cut_half_row(out: Path) -> int:
    """Cut what comes after the last whole row, as ``kill -9`` or a full disk leaves it.

    Returns:
        Bytes that were cut.

    Raises:
        EnvironmentProblem: The file cannot be changed.
    """
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
    return position - whole


def written_paths(out: Path, labels: Sequence[str]) -> list[str]:
    """Return the paths of the rows that an earlier run wrote, after a half row was cut off.

    Args:
        out: The ``.csv`` or ``.jsonl`` file; where it is missing or empty there are none.
        labels: Class names of the engine that goes on.

    Raises:
        UsageError: Another suffix.
        ArtefactError: It is no file of results, or of other classes.
        EnvironmentProblem: It cannot be read or changed.
    """
    check_rows_path(out)
    if not out.exists():
        return []
    cut_half_row(out)
    names = column_names(labels, SourceKind.FILES)
    try:
        with out.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
            rows = _csv_paths(stream, names) if out.suffix.lower() == ".csv" else _json_paths(stream, names)
            return list(rows)
    except OSError as error:
        raise output_problem(out, error) from error
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ArtefactError(f"{out} does not hold results of this engine: {error}", remedy=_REMEDY) from error


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


def skip_written(paths: Iterator[Path | None], written: Sequence[str], out: Path) -> None:
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
