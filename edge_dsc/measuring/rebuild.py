"""Build an engine again, as its record says, beside the first one."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from engines.errors import ArtefactError, EnvironmentProblem
from engines.record import load_record

_MAIN = "from edge_dsc.cli import main; main()"


def rebuild_engine(engine: Path, folder: Path) -> Path:
    """Run the engine's build command once more, in a process of its own, into another folder.

    Args:
        engine: The engine; its record holds the command.
        folder: Where the new engine goes, under the same name.

    Returns:
        The new engine file.

    Raises:
        ArtefactError: The record's command is none of ours.
        EnvironmentProblem: The command fails; it must be run from the folder that the first build ran in.
    """
    record = load_record(engine)
    words = shlex.split(record.build_command)
    if words[:2] != ["edge-dsc", "build-engine"] or "--out" not in words[:-1]:
        raise ArtefactError(
            f"the record of {engine} has no build command: {record.build_command!r}",
            remedy="build the engine again: edge-dsc build-engine",
        )
    out = folder / engine.name
    words[words.index("--out") + 1] = str(out)
    command = [sys.executable, "-c", _MAIN, *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise EnvironmentProblem(
            f"cannot build {engine.name} again: {last}",
            remedy=f"run it where it was first built: {record.build_command}",
        )
    return out
