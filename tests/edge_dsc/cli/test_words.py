"""What the command line says when its streams are closed, full or left, and what it lets strangers say."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from edge_dsc.cli.app import reported

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


@pytest.mark.parametrize(
    "words", ["inspect {}", "infer {} x", "evaluate {} x", "bench {}", "build-engine {}"]
)
def test_a_name_that_no_file_can_have_is_refused(edge_dsc: Any, words: str) -> None:
    for name in ("x" * 300, "/".join(["y" * 200] * 25)):
        done = edge_dsc(*words.format(name).split())
        assert done.code in (4, 9)
        assert done.err.startswith("error: ") and done.err.count("\n") == 1
        assert "unexpected" not in done.err


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x\n"),
            9,
            "cannot use x: File name too long (check",
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "x"),
            3,
            "this machine refuses: [Errno 24] Too many open",
        ),
        (MemoryError(), 3, "this machine refuses: not enough memory"),
        (ValueError("embedded null byte"), 9, "a path holds a NUL character (no file"),
        (ZeroDivisionError("zero\nlines"), 1, "unexpected ZeroDivisionError: zero lines (EDGE_DSC_DEBUG=1"),
    ],
)
def test_the_machine_s_own_answers_are_no_defect(
    raised: Exception, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @reported
    def command() -> None:
        raise raised

    with pytest.raises(typer.Exit) as ended:
        command()
    said = capsys.readouterr().err
    assert (ended.value.exit_code, said.count("\n")) == (code, 1)
    assert said.startswith(f"error: {words}")


def test_a_hostile_name_stays_one_line(edge_dsc: Any, tmp_path: Path) -> None:
    name = "no\x1b[31m\nerror: fake\r.json"
    (tmp_path / name).write_text("{")
    for path in (tmp_path / name, Path(name)):
        done = edge_dsc("inspect", path)
        assert (done.code, done.err.count("\n")) == (9, 1)
        assert r"no\x1b[31m\nerror: fake\r.json" in done.err
    done = edge_dsc("inspect", tmp_path)
    assert done.code == 0 and r"no\x1b[31m\nerror: fake\r.json" in done.out
    assert done.out.replace("\n", "").isprintable()
