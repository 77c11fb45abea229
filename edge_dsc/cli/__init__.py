"""The command line: each command parses, makes one call, and prints.

Nothing heavy is imported here, so that ``edge-dsc --help`` answers at once.
"""

from __future__ import annotations

import typer

from edge_dsc.cli import build, look, measure, train, use
from edge_dsc.cli.run import reported

app = typer.Typer(
    name="edge-dsc",
    help="Train, calibrate, build and measure small X-ray classifiers for NVIDIA Jetson. "
    "For research and engineering only: not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

for _command in (
    train.train,
    build.export,
    build.calibrate,
    build.build_engine,
    use.infer,
    use.evaluate,
    measure.bench,
    measure.compare,
    look.inspect,
    look.doctor,
    look.demo,
):
    app.command()(reported(_command))


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    if version:
        from edge_dsc import __version__
        from edge_dsc.console import give

        give(f"edge-dsc {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line."""
    app()
