from __future__ import annotations

import io
import os
from pathlib import Path

from edge_dsc.loop.stopping import Stop
from edge_dsc.sources.listing import read_list


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


def test_a_stream_that_is_not_text_is_an_error() -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8")
    try:
        list(read_list(stream, Stop()))
    except UnicodeDecodeError:
        return
    raise AssertionError
