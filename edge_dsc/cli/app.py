"""The typer application: every command of the table, with its errors reported in one place."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import TypeVar, cast

import typer

from edge_dsc.cli import COMMANDS, DESCRIPTION
from edge_dsc.cli.console import say
from engines.errors import EdgeDscError
from engines.packages import import_problem

INTERRUPTED = 130  # as a shell reports a command that Ctrl-C ended
CLOSED_PIPE = 141  # likewise for one whose reader went away

Command = TypeVar("Command", bound=Callable[..., None])


def reported(command: Command) -> Command:
    """Wrap a command so that every way to fail ends in one line and the right exit code.

    ``EDGE_DSC_DEBUG=1`` in the environment shows the traceback instead.
    """

    @functools.wraps(command)
    def wrapper(*args: object, **options: object) -> None:
        try:
            command(*args, **options)
        except (EdgeDscError, ImportError) as error:
            _debug()
            known = import_problem(error) if isinstance(error, ImportError) else error
            if known.details:
                say(known.details)
            say(f"error: {known}")
            raise typer.Exit(known.exit_code) from None
        except KeyboardInterrupt:
            say("interrupted: files are whole, the old one or the new one")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Python would complain once more while it flushes standard output at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(CLOSED_PIPE) from None
        except typer.Exit:
            raise
        except Exception as error:  # noqa: BLE001 - the last line of defence of a command-line program
            _debug()
            say(
                f"error: unexpected {type(error).__name__}: {_one_line(error)} (EDGE_DSC_DEBUG=1 shows where)"
            )
            raise typer.Exit(1) from None

    return cast(Command, wrapper)


def _debug() -> None:
    if os.environ.get("EDGE_DSC_DEBUG"):
        raise  # the error that the caller is handling


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


app = typer.Typer(
    name="edge-dsc",
    help=DESCRIPTION,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

for _name, _command in COMMANDS.items():
    _module = importlib.import_module(f"edge_dsc.cli.{_command.module}")
    app.command(_name)(reported(getattr(_module, _command.function)))
