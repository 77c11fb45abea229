"""Paths on standard input, one a line, as ``find`` and ``inotifywait`` print them."""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from edge_dsc.loop.stopping import Stop
from engines.errors import BadInputError

_LINES_AHEAD = 1024
_IDLE_S = 0.05


def read_list(stream: TextIO | None, stop: Stop) -> Iterator[Path | None]:
    """Yield the paths of a stream as they come; empty lines are skipped.

    A thread reads, because reading a pipe that is open and silent cannot be interrupted.

    Args:
        stream: Text, a path a line; None where the process has no standard input.
        stop: Ends it while it waits.

    Yields:
        A path, or None while no line is at hand.

    Raises:
        BadInputError: There is no stream.
    """
    if stream is None:
        raise BadInputError("standard input is closed", remedy="pipe a list of paths into it")
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="surrogateescape")  # a file's name may be any bytes
    lines: queue.Queue[str | BaseException | None] = queue.Queue(_LINES_AHEAD)

    def read() -> None:
        try:
            for line in stream:
                lines.put(line)
            lines.put(None)
        except Exception as error:  # noqa: BLE001 - handed to the thread that takes the paths
            lines.put(error)

    threading.Thread(target=read, name="paths", daemon=True).start()
    while not stop.asked:
        try:
            line = lines.get(timeout=_IDLE_S)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        if isinstance(line, BaseException):
            raise line
        if name := line.rstrip("\r\n"):
            yield Path(name)
