"""Many image files through one engine: decoded in threads, answered in order, one bad image costs one row."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from engines.contract import ModelContract
from engines.errors import ImageError
from engines.images import Array, read_input
from engines.packages import load
from engines.runtimes import Runner

_AHEAD = 4  # images decoded ahead of the slowest answer, for each thread
_T = TypeVar("_T")


@dataclass(frozen=True)
class Answer:
    """What an engine said about one image.

    Attributes:
        path: The image, as the source named it.
        probabilities: One a class, in the order of the contract's labels; None where the image is bad.
        error: Why there is no answer; None where there is one.
    """

    path: Path
    probabilities: tuple[float, ...] | None
    error: str | None = None

    @property
    def top(self) -> int | None:
        """Index of the most probable class, or None where there is no answer."""
        if self.probabilities is None:
            return None
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)


def classify_files(paths: Iterable[Path], runner: Runner, *, threads: int) -> Iterator[Answer]:
    """Classify image files and yield an answer for each, in the order of ``paths``.

    A thread-safe runner runs batches of one in the decoding threads: for small networks on a CPU that is
    faster than collecting batches, and every core decodes. Any other runner runs in the calling thread,
    which owns it, in batches of the size that the engine was built for.
    """
    batch = runner.record.batch
    if runner.thread_safe and batch.smallest == 1:
        yield from _classify_in_threads(paths, runner, threads)
    else:
        yield from _classify_in_batches(paths, runner, threads)


def _classify_in_threads(paths: Iterable[Path], runner: Runner, threads: int) -> Iterator[Answer]:
    contract = runner.record.contract

    def classify(path: Path) -> Answer:
        try:
            pixels = read_input(path, contract)
        except ImageError as error:
            return Answer(path, None, str(error))
        return Answer(path, tuple(runner.run(pixels[None])[0].tolist()))

    yield from _ordered_map(classify, paths, threads)


def _classify_in_batches(paths: Iterable[Path], runner: Runner, threads: int) -> Iterator[Answer]:
    decoded = read_files(paths, runner.record.contract, threads=threads)
    while group := list(itertools.islice(decoded, runner.record.batch.best)):
        yield from _answer_group(group, runner)


def read_files(
    paths: Iterable[Path], contract: ModelContract, *, threads: int
) -> Iterator[tuple[Path, Array | ImageError]]:
    """Decode and resize image files in threads, and yield each with its input or its error, in order.

    Yields:
        The path, and ``uint8 [height, width, 1]`` or why there is none.
    """

    def read(path: Path) -> tuple[Path, Array | ImageError]:
        try:
            return path, read_input(path, contract)
        except ImageError as error:
            return path, error

    yield from _ordered_map(read, paths, threads)


def _answer_group(group: Sequence[tuple[Path, Array | ImageError]], runner: Runner) -> Iterator[Answer]:
    numpy = load("numpy")
    good = [pixels for _, pixels in group if not isinstance(pixels, ImageError)]
    answers: Iterator[Any] = iter(())
    if good:
        # An engine whose profile begins above one image gets the last image repeated; those answers are dropped.
        missing = max(0, runner.record.batch.smallest - len(good))
        answers = iter(runner.run(numpy.stack(good + good[-1:] * missing)).tolist())
    for path, pixels in group:
        if isinstance(pixels, ImageError):
            yield Answer(path, None, str(pixels))
        else:
            yield Answer(path, tuple(next(answers)))


def _ordered_map(function: Callable[[Path], _T], paths: Iterable[Path], threads: int) -> Iterator[_T]:
    """Map in threads, in order, with a bounded number of results waiting: memory does not grow with the folder."""
    waiting: deque[Future[_T]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for path in paths:
                waiting.append(pool.submit(function, path))
                if len(waiting) >= threads * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def default_threads() -> int:
    """Return the number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
