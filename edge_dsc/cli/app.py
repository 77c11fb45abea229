"""The typer application: every command of the table, with its errors reported in one place."""

from __future__ import annotations

import importlib

import typer

from edge_dsc.cli import COMMANDS, DESCRIPTION
from edge_dsc.cli.run import reported

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
