"""What the command line says and where: results on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from engines.text_table import printable

if TYPE_CHECKING:
    from engines.errors import EnvironmentProblem
    from engines.runtimes import Progress


CLOSED_PIPE = 141  # as a shell reports a command whose reader went away


def say(text: str) -> None:
    """Tell the person one line that is not a result; where nobody can hear it the work goes on."""
    try:
        print(printable(text), file=sys.stderr, flush=True)  # noqa: T201
    except (OSError, ValueError):
        _discard(sys.stderr)


def give(text: str) -> None:
    """Print a result, of one line or several.

    Raises:
        BrokenPipeError: Its reader went away.
        EnvironmentProblem: It cannot be written.
    """
    try:
        # Line ends are ours: those in names were made visible where their line was made.
        print("\n".join(map(printable, text.split("\n"))), flush=True)  # noqa: T201
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritable(error) from error


def _unwritable(error: OSError) -> EnvironmentProblem:
    from engines.files import output_problem  # here, for the help does without what it imports

    return output_problem(Path("standard output"), error)


def end_with_streams(program: Callable[[], object]) -> NoReturn:
    """Run a program and end the process, whatever became of its standard streams.

    Args:
        program: Ends by :class:`SystemExit`. Where its results could not be written, an exit code of 0 becomes
            141 when their reader went away, and 3 otherwise.
    """
    _open_closed_streams()
    code: str | int | None = 0
    problem: BaseException | None = None
    try:
        program()
    except SystemExit as ended:
        # Typer, which prints --help itself, makes a lost reader an exit with 1.
        code, problem = ended.code, ended.__context__
    except OSError as error:
        problem = error
    for stream in (sys.stderr, sys.stdout):
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            # Python would flush once more at its end, and complain.
            _discard(stream)
            problem = problem or (error if stream is sys.stdout else None)
    if isinstance(problem, BrokenPipeError):
        code = code if code not in (0, 1) else CLOSED_PIPE
    elif isinstance(problem, OSError) and not code:
        refused = _unwritable(problem)
        say(f"error: {refused}")
        code = refused.exit_code
    sys.exit(code)


def _open_closed_streams() -> None:
    """Give each stream that was closed at the start a place, so that no file of ours takes its number.

    Results without a place are an error, as on a full disk; messages without one are not.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY), True)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal, a name that is no UTF-8


def _discard(stream: TextIO) -> None:
    """Send what is still to come to nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def give_json(kind: str, body: object, *, schema_version: int = 1) -> None:
    """Print the one JSON object of a ``--json`` run.

    Args:
        kind: Its first field.
        body: The others: a mapping, a dataclass or a ``msgspec.Struct``; a path in it becomes its text.
        schema_version: Its second field.
    """
    import msgspec  # here, for the list of commands does not need it

    values = msgspec.to_builtins(body, enc_hook=str)
    text = json.dumps({"kind": kind, "schema_version": schema_version, **values}, indent=1, allow_nan=False)
    give(text.replace("\x7f", "\\u007f"))  # the one control character that JSON leaves as it is


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

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def callback(phase: str, done: int, total: int) -> None:
            # The text after a tab changes while the phase lasts, such as loss and accuracy.
            name, _, detail = phase.partition("\t")
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(
                tasks[name], completed=done, total=total, description=printable(f"{name} {detail}").rstrip()
            )

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
