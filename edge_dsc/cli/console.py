"""What the command line says and where: results on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.runtimes import Progress


def say(text: str) -> None:
    """Tell the person something that is not a result."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def give(text: str) -> None:
    """Print a result."""
    print(text, flush=True)  # noqa: T201


def give_json(kind: str, body: object, *, schema_version: int = 1) -> None:
    """Print the one JSON object of a ``--json`` run.

    Args:
        kind: Its first field.
        body: The others: a mapping, a dataclass or a ``msgspec.Struct``; a path in it becomes its text.
        schema_version: Its second field.
    """
    import msgspec  # here, for the list of commands does not need it

    values = msgspec.to_builtins(body, enc_hook=str)
    give(json.dumps({"kind": kind, "schema_version": schema_version, **values}, indent=1, allow_nan=False))


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """Give a progress callback: a bar with the time left on a terminal, a line a phase elsewhere."""
    if sys.stderr.isatty():
        with _terminal_bar() as callback:
            yield callback
    else:
        yield _PlainProgress()


@contextlib.contextmanager
def _terminal_bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def callback(phase: str, done: int, total: int) -> None:
            # The text after a tab changes while the phase lasts, such as loss and accuracy.
            name, _, detail = phase.partition("\t")
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done, total=total, description=f"{name} {detail}".rstrip())

        yield callback


class _PlainProgress:
    """A line when a phase begins to last, and one when it ends: readable in a log file."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        name, _, detail = phase.partition("\t")
        now = time.monotonic()
        self._started.setdefault(name, now)
        finished = done >= total
        if not finished and now - self._said.get(name, self._started[name]) < 10:
            return
        if finished and self._said.get(name) == float("inf"):
            return
        self._said[name] = float("inf") if finished else now
        seconds = now - self._started[name]
        say(f"{name}: {done}/{total} {detail}".rstrip() + f" ({seconds:.1f} s)")
