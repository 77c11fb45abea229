"""Many image files through one engine: decoded in threads, answered in order, one bad image costs one row."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from edge_dsc.loop.answers import Answer, Prepared
from edge_dsc.loop.classify import classify
from edge_dsc.loop.ordered import ordered_map
from edge_dsc.loop.prepare import prepare_file
from engines.contract import ModelContract
from engines.errors import ImageError
from engines.images import Array
from engines.runtimes import Runner

__all__ = ["Answer", "classify_files", "default_threads", "read_files"]


def classify_files(
    paths: Iterable[Path | None], runner: Runner, *, threads: int, keep_pictures: bool = False
) -> Iterator[Answer]:
    """Classify image files and yield an answer for each, in the order of ``paths``.

    Args:
        paths: The files; None says that no path is at hand just now.
        runner: The engine.
        threads: Decoding threads.
        keep_pictures: Keep the decoded pictures in the answers, to draw on.
    """
    contract = runner.record.contract

    def prepare(path: Path) -> Prepared:
        return prepare_file(path, contract, keep_picture=keep_pictures)

    yield from classify(paths, prepare, runner, threads=threads)


def read_files(
    paths: Iterable[Path], contract: ModelContract, *, threads: int
) -> Iterator[tuple[Path, Array | ImageError]]:
    """Decode and resize image files in threads, and yield each with its input or its error, in order.

    Yields:
        The path, and ``uint8 [height, width, 1]`` or why there is none.
    """

    def read(group: list[Path]) -> list[tuple[Path, Array | ImageError]]:
        return [(path, prepare_file(path, contract).pixels) for path in group]

    for found in ordered_map(read, paths, threads=threads):
        if found is not None:
            yield found


def default_threads() -> int:
    """Return the number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
