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
    from rich.console import Console, RenderableType

    from edge_dsc.study.run_study import Board, Standing, Watch
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


_BOARD_S = 60.0  # between two lines on how a study stands, where no terminal shows its table


@contextlib.contextmanager
def study_board() -> Iterator[Watch]:
    """Give what shows where a study's trainings stand: one live table on a terminal, lines elsewhere."""
    if not sys.stderr.isatty():
        yield _PlainBoard()
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    with Live(console=console, refresh_per_second=4) as live:
        yield lambda board: live.update(board_table(board, console))


def board_table(board: Board, console: Console) -> RenderableType:
    """Draw the trainings, or only those at work and those that failed where the terminal has no room for all.

    Args:
        board: Where they stand.
        console: The terminal.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=_summary(board), caption_justify="left", box=None, pad_edge=False, expand=True)
    for number, name in enumerate(("training", "", "epoch", "training", "validation")):
        table.add_column(name, justify="left" if number < 2 else "right", no_wrap=True)
    shown = board.standings
    if len(shown) > console.height - 5:
        shown = tuple(one for one in shown if one.state in ("running", "failed"))[
            : max(1, console.height - 5)
        ]
    for one in shown:
        cells = (
            one.training.title,
            one.phase or one.state,
            f"{one.done}/{one.epochs}",
            "" if one.accuracy is None else f"{one.accuracy:.1%}",
            "" if one.validation is None else f"{one.validation:.1%}",
        )
        style = {"failed": "red", "done": "green", "waiting": "dim"}.get(one.state, "")
        table.add_row(*(Text(printable(cell), style=style) for cell in cells))
    return table


def _summary(board: Board) -> str:
    failed = board.count("failed")
    words = f"{board.count('done')} of {len(board.standings)} trainings done"
    words += f", {failed} failed" if failed else ""
    return words if not board.seconds_left else f"{words}, about {clock(board.seconds_left)} of training left"


class _PlainBoard:
    """A line when a training begins and when it ends, and one a minute: readable in a log file."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}
        self._said = time.monotonic()

    def __call__(self, board: Board) -> None:
        for one in board.standings:
            before = self._states.get(one.training.title)
            self._states[one.training.title] = one.state
            if one.state != before and (before is not None or one.state == "running"):
                self._tell(one, board)
        if time.monotonic() - self._said >= _BOARD_S:
            at_work = [
                f"{one.training.title}: {one.phase or one.state}, {one.done}/{one.epochs} epochs"
                for one in board.standings
                if one.state == "running"
            ]
            say("; ".join([_summary(board), *at_work]))
            self._said = time.monotonic()

    def _tell(self, one: Standing, board: Board) -> None:
        words = {
            "running": f"from epoch {one.done + 1} of {one.epochs}",
            "failed": one.problem.what if one.problem else "",
        }.get(one.state, _summary(board))
        say(f"{one.training.title} {one.state}: {words}")
        self._said = time.monotonic()


def clock(seconds: float) -> str:
    """Return a time as hours, minutes and seconds: ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
