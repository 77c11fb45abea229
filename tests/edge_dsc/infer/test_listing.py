from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from edge_dsc.infer.source import read_list
from edge_dsc.infer.stop import Stop
from engines.errors import BadInputError


def test_each_line_is_a_path() -> None:
    lines = io.StringIO("a.png\r\n\n b c.png\nlast.png")
    assert [path for path in read_list(lines, Stop()) if path] == [
        Path("a.png"),
        Path(" b c.png"),
        Path("last.png"),
    ]


def test_a_silent_pipe_is_idle_and_can_be_stopped() -> None:
    reading, writing = os.pipe()
    stop = Stop()
    with os.fdopen(reading) as stream:
        paths = read_list(stream, stop)
        assert next(paths) is None
        os.write(writing, b"a.png\n")
        assert next(path for path in paths if path) == Path("a.png")
        stop.ask()
        assert list(paths) == []
        os.close(writing)


def test_a_name_may_be_any_bytes() -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"a\xff.png\n"), encoding="utf-8")
    assert [path for path in read_list(stream, Stop()) if path] == [Path(os.fsdecode(b"a\xff.png"))]


def test_a_stream_that_fails_is_an_error() -> None:
    class Broken(io.StringIO):
        def __next__(self) -> str:
            raise ZeroDivisionError("disk")

    with pytest.raises(ZeroDivisionError, match="disk"):
        list(read_list(Broken(), Stop()))


def test_a_process_without_standard_input_says_so() -> None:
    with pytest.raises(BadInputError, match="standard input is closed"):
        list(read_list(None, Stop()))
