"""What the command line says when its streams are closed, full or left, and what it lets strangers say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = "error: cannot write standard output: No space left on device "


def shell(line: str, *, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which ``edge-dsc`` is this program; the code of a pipe is that of its first failure."""
    program = f'edge-dsc() {{ "{sys.executable}" -m edge_dsc "$@"; }}; set -o pipefail; '
    return subprocess.run(
        ["bash", "-c", program + line], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("words", ["", "--help", "infer --help", "--version"])
def test_a_reader_who_went_away_ends_it_silently(words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as lost:
        command = [sys.executable, "-m", "edge_dsc", *words.split()]
        done = subprocess.run(command, stdout=lost, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("words", ["", "--help", "infer --help", "--version"])
def test_a_full_standard_output_is_one_line(words: str) -> None:
    done = shell(f"edge-dsc {words} > /dev/full")
    assert done.returncode == 3
    assert done.stderr.startswith(FULL) and done.stderr.count("\n") == 1
    assert shell(f"edge-dsc {words} > /dev/full 2>&1").returncode == 3


def test_results_without_a_place_are_an_error_and_messages_are_not() -> None:
    done = shell("edge-dsc --version >&-")
    assert (done.returncode, done.stderr.count("error: cannot write standard output")) == (3, 1)
    for place in ("2>&-", "2>/dev/full"):
        assert shell(f"edge-dsc --bogus {place}").returncode == 2
    assert shell("edge-dsc --bogus >&- 2>&- <&-").returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "streams", ["2>&-", "2>/dev/full", ">&-", ">/dev/full", "<&- >&- 2>&-", "2> >(exec 0<&-)"]
)
def test_the_work_is_done_whatever_became_of_the_streams(engine: Path, textures: Path, streams: str) -> None:
    out = engine.parent / "rows.csv"
    done = shell(f'edge-dsc infer "{engine}" "{textures}" --limit 3 --out "{out}" {streams}')
    assert (done.returncode, out.read_bytes().count(b"\n")) == (0, 4)
