"""The command line: each command parses, makes one call, and prints.

The table here is all that the list of commands, its completion and its spelling suggestions need; a command's module
is imported when the command runs or shows its help.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from types import FrameType
from typing import NamedTuple, NoReturn

# As a shell reports a process that Ctrl-C, or SIGTERM, ended.
INTERRUPTED = 130
TERMINATED = 143


class Command(NamedTuple):
    """Where a command lives and what it is for.

    Attributes:
        function: ``module:function`` in this folder; its docstring follows the summary in the command's help.
        summary: Its line in the list of commands, and the first paragraph of its help.
        parts: Where it is a group of commands, these by their names; it has then no function of its own.
        bare: Options that may stand without a value, what they then mean, and the pattern of a value: typer knows flags
            and options with a value, and nothing between.
    """

    function: str
    summary: str
    parts: Mapping[str, Command] = {}
    bare: Mapping[str, tuple[str, str]] = {}


COMMANDS = {
    "train": Command("making:train", "Train a network on a folder of X-rays"),
    "separate": Command("making:separate", "Make the separable twin of a network, from its trained weights"),
    "synthesize": Command("making:synthesize", "Make synthetic X-rays of one class, to train with"),
    "export": Command("making:export", "Export a trained network as ONNX, proven equal to Keras"),
    "adopt": Command("making:adopt", "Bring in a classifier that was trained elsewhere"),
    "calibrate": Command("making:calibrate", "Find the activation ranges for INT8 over real images"),
    "build-engine": Command(
        "making:build_engine", "Build an FP32, FP16, INT8 or mixed engine, held to a budget of accuracy"
    ),
    "debug": Command("making:debug", "Find the layer that INT8 spoils"),
    "infer": Command(
        "using:infer",
        "Classify images, a folder, a video or a camera",
        bare={"--ray": ("local", r"auto|local|(ray://)?[^/\s]+:[0-9]+")},
    ),
    "evaluate": Command("using:evaluate", "Measure accuracy, and agreement with another engine"),
    "bench": Command("measuring:bench", "Measure the latency of engines against each other"),
    "compare": Command("measuring:compare", "Compare latency reports"),
    "import-times": Command("measuring:import_times", "Turn trtexec's --exportTimes file into a report"),
    "networks": Command("looking:networks", "List the networks that have names, and what they cost"),
    "deploy": Command(
        "",
        "Hand engines over to a server, a fleet or DeepStream",
        {
            "triton": Command("deploying:triton", "Write a model repository for Triton"),
            "bundle": Command(
                "deploying:bundle", "Pack a model for devices, signed, with what installs it there"
            ),
            "verify": Command("deploying:verify", "Check a bundle's signature and content, and unpack it"),
            "deepstream": Command("deploying:deepstream", "Write nvinfer's configuration for DeepStream"),
        },
    ),
    "inspect": Command("looking:inspect", "Say what a file of edge-dsc is"),
    "doctor": Command("looking:doctor", "Say what is installed and which runtimes work here"),
    "selftest": Command(
        "looking:selftest", "Try everything on this machine, and keep what was seen in one folder"
    ),
    "demo": Command("looking:demo", "Walk the whole line on procedural chest phantoms"),
    "study": Command(
        "looking:study", "Compare networks over many trainings, as the paper does, and end in a verdict"
    ),
}
DESCRIPTION = """\
Train, calibrate, build and measure small X-ray classifiers for NVIDIA Jetson.

For research and engineering only: not a medical device."""


def main() -> NoReturn:
    """Run the command line and end the process."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        from edge_dsc.cli.app import app
        from edge_dsc.cli.console import end_with_streams

        end_with_streams(lambda: app(prog_name="edge-dsc"))
    except KeyboardInterrupt:  # before the command began
        sys.exit(INTERRUPTED)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """End as any program does, instead of at once: what is half written goes."""
    sys.exit(TERMINATED)
