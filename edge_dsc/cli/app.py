"""The typer application: commands loaded when they are asked for, and every error reported in one place."""

from __future__ import annotations

import errno
import functools
import importlib
import inspect
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, cast

import typer
from typer.core import TyperCommand, TyperGroup

from edge_dsc import __version__
from edge_dsc.cli import COMMANDS, DESCRIPTION, INTERRUPTED, Command
from edge_dsc.cli.console import CLOSED_PIPE, give, say
from engines.errors import BadInputError, EdgeDscError, EnvironmentProblem
from engines.packages import import_problem

# As stat() and open() refuse a name that no file can have, or not this one.
_WRONG_PATH = (errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL)
Function = TypeVar("Function", bound=Callable[..., None])


def reported(command: Function) -> Function:
    """Wrap a command so that every way to fail ends in one line and the right exit code.

    ``EDGE_DSC_DEBUG=1`` in the environment shows the traceback instead.
    """

    @functools.wraps(command)
    def wrapper(*args: object, **options: object) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt:
            say("interrupted: files are whole, the old one or the new one")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise typer.Exit(CLOSED_PIPE) from None
        except typer.Exit:
            raise
        except Exception as error:
            if os.environ.get("EDGE_DSC_DEBUG"):
                raise
            known = _known(error)
            for line in known.details.splitlines():
                say(line)
            say(f"error: {known}")
            raise typer.Exit(known.exit_code) from None

    return cast(Function, wrapper)


def _known(error: Exception) -> EdgeDscError:
    """Return what an exception means to the person: the operating system's own answers are no defect of ours."""
    if isinstance(error, EdgeDscError):
        return error
    if isinstance(error, ImportError):
        return import_problem(error)
    if isinstance(error, OSError) and error.filename is not None and error.errno in _WRONG_PATH:
        path = _one_line(os.fsdecode(error.filename))
        return BadInputError(f"cannot use {path}: {error.strerror}", remedy="check the path")
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return BadInputError("a path holds a NUL character", remedy="no file can have such a name")
    if isinstance(error, (OSError, MemoryError)):
        what = _one_line(error) or "not enough memory"
        return EnvironmentProblem(f"this machine refuses: {what}", remedy="EDGE_DSC_DEBUG=1 shows where")
    kind = type(error).__name__
    return EdgeDscError(f"unexpected {kind}: {_one_line(error)}", remedy="EDGE_DSC_DEBUG=1 shows where")


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:500]


class BareOptionsCommand(TyperCommand):
    """A command of which some options may stand without a value, as its line in the table says.

    Attributes:
        bare: See :class:`edge_dsc.cli.Command`.
    """

    bare: Mapping[str, tuple[str, str]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give such an option its value where the next word is none, then parse as any command."""
        filled: list[str] = []
        for word, after in itertools.zip_longest(args, args[1:], fillvalue=""):
            filled.append(word)
            value, pattern = self.bare.get(word, ("", ""))
            if value and not re.fullmatch(pattern, after):
                filled.append(value)
        return super().parse_args(ctx, filled)


class CommandGroup(TyperGroup):
    """The commands of a table, each loaded when it runs or shows its help.

    Typer holds a stand-in with the summary for each, from which it lists, completes and suggests.

    Attributes:
        table: The commands by their names.
    """

    table = COMMANDS

    # Typer has no public name for the type of a context here; it is typer.Context.
    def resolve_command(
        self, ctx: Any, args: list[str]
    ) -> tuple[str | None, TyperCommand | TyperGroup | None, list[str]]:
        """Replace the stand-in that typer found by the command itself."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, self.load_command(name) if found and name else None, rest

    def load_command(self, name: str) -> TyperCommand | TyperGroup:
        """Import a command's module and return the command, with its options and its whole help.

        A group of commands is returned without importing any of them.
        """
        wanted = self.table[name]
        if wanted.parts:
            group = type("PartGroup", (CommandGroup,), {"table": wanted.parts})
            several = _group(
                wanted.parts, name=name, cls=group, callback=reported(_start_part), help=wanted.summary
            )
            command = typer.main.get_command(several)
        else:
            module, _, function_name = wanted.function.partition(":")
            function = getattr(importlib.import_module(f"edge_dsc.cli.{module}"), function_name)
            alone = _typer()
            help_text = f"{wanted.summary}\n\n{inspect.cleandoc(function.__doc__)}"
            alone.command(name, cls=BareOptionsCommand, help=help_text)(reported(function))
            command = typer.main.get_command(alone)
            assert isinstance(command, BareOptionsCommand)
            command.bare = wanted.bare
        assert isinstance(command, (TyperCommand, TyperGroup))
        command.params += [parameter for parameter in self.params if parameter.name == "version"]
        return command

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run as any group of typer does, but give a usage error the one line that every other error has."""
        try:
            result = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.TyperException as error:
            if not standalone_mode:
                raise
            context = getattr(error, "ctx", None)
            where = context.command_path if context else "edge-dsc"
            say(f"error: {_one_line(error.format_message()).rstrip('.')} (see {where} --help)")
            sys.exit(error.exit_code)
        if not standalone_mode:
            return result
        sys.exit(result or 0)


def _typer(**options: Any) -> typer.Typer:
    # Help without rich: importing it takes longer than all the rest of --help.
    return typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, **options)


def _show_version(asked: bool) -> None:
    if asked:
        give(f"edge-dsc {__version__}")
        raise typer.Exit


def _start(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the version and exit.",
            callback=reported(_show_version),
            is_eager=True,
            expose_value=False,
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        give(context.get_help())
        raise typer.Exit(2)


def _start_part(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        give(context.get_help())
        raise typer.Exit(2)


def _group(table: Mapping[str, Command], **options: Any) -> typer.Typer:
    group = _typer(
        invoke_without_command=True,
        context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
        **options,
    )
    for name, command in table.items():
        group.command(name, short_help=command.summary)(lambda: None)
    return group


app = _group(COMMANDS, name="edge-dsc", cls=CommandGroup, callback=reported(_start), help=DESCRIPTION)
