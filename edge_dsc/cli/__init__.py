"""The command line: each command parses, makes one call, and prints.

The list of commands is answered from the table here; typer, which takes eight times as long to import as Python
takes to start, is loaded for everything else, and nothing heavy before a command needs it.
"""

from __future__ import annotations

import sys
from typing import NamedTuple


class Command(NamedTuple):
    """Where a command lives and what it is for."""

    module: str
    function: str
    summary: str


COMMANDS = {
    "train": Command("making", "train", "Train a network on a folder of X-rays"),
    "export": Command("making", "export", "Export a trained network as ONNX, proven equal to Keras"),
    "calibrate": Command("making", "calibrate", "Find the activation ranges for INT8 over real images"),
    "build-engine": Command(
        "making", "build_engine", "Build an FP32, FP16, INT8 or mixed engine, held to a budget of accuracy"
    ),
    "debug": Command("making", "debug", "Find the layer that INT8 spoils"),
    "infer": Command("using", "infer", "Classify images, a folder, a video or a camera"),
    "evaluate": Command("using", "evaluate", "Measure accuracy, and agreement with another engine"),
    "bench": Command("measuring", "bench", "Measure the latency of engines against each other"),
    "compare": Command("measuring", "compare", "Compare latency reports"),
    "import-times": Command("measuring", "import_times", "Turn trtexec's --exportTimes file into a report"),
    "inspect": Command("looking", "inspect", "Say what a file of edge-dsc is"),
    "doctor": Command("looking", "doctor", "Say what is installed and which runtimes work here"),
    "demo": Command("looking", "demo", "Walk the whole line on procedural chest phantoms"),
}
DESCRIPTION = """\
Train, calibrate, build and measure small X-ray classifiers for NVIDIA Jetson.
For research and engineering only: not a medical device."""


def main() -> None:
    """Run the command line."""
    if sys.argv[1:] in ([], ["--help"], ["-h"]):
        print(overview())  # noqa: T201
        sys.exit(0 if sys.argv[1:] else 2)
    if sys.argv[1:] == ["--version"]:
        from edge_dsc import __version__

        print(f"edge-dsc {__version__}")  # noqa: T201
        sys.exit(0)
    from edge_dsc.cli.app import app

    app(prog_name="edge-dsc")


def overview() -> str:
    """Return the text of ``edge-dsc --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {command.summary}" for name, command in COMMANDS.items()]
    usage = "Usage: edge-dsc COMMAND [OPTIONS]      (edge-dsc COMMAND --help tells its options)"
    return "\n".join([usage, "", DESCRIPTION, "", "Commands:", *lines])
