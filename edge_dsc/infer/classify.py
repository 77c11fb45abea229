"""Decode, prepare, batch, run, answer: pictures through an engine, answered in the order of their source."""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_dsc.infer.source import Frame
from engines.contract import ModelContract
from engines.errors import ImageError
from engines.images import (
    InputPixels,
    convert_frame,
    count_levels,
    decode_image,
    prepare_pixels,
    read_bytes,
)
from engines.runtimes import Runner, answer_batches

# A thread takes a few items at once: all are decoded, then all run, so that the network's weights stay in the
# processor's cache and the calling thread wakes less often: 0.92 instead of 0.88 of the rate of decoding alone.
TOGETHER = 4
_AHEAD = 2  # groups waiting for the slowest one, for each thread
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Prepared:
    """A picture made ready for the engine, or why that failed.

    Attributes:
        path: The file, or the name of the video or camera.
        pixels: The network's input, as the contract wants it; or the error.
        seconds: What decoding and resizing took.
        picture: The picture to draw on, ``uint8 [H, W]`` or ``uint8 [H, W, 3]`` BGR, where somebody will.
        frame: The frame that it was, for videos and cameras.
        levels: Its grey levels (:func:`engines.images.count_levels`), where somebody watches them.
    """

    path: Path | str
    pixels: InputPixels | ImageError
    seconds: float
    picture: NDArray[np.uint8] | None = None
    frame: Frame | None = None
    levels: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Answer:
    """What an engine said about one picture.

    Attributes:
        path: The image as the source named it, or the name of the video or camera.
        probabilities: One for each class, in the order of the contract's labels; None where the image is bad.
        error: Why there is no answer; None where there is one.
        latency_ms: Decoding, preprocessing and executing this picture, without waiting.
        age_ms: From the moment a camera's frame was there to the answer; None for files and videos.
        frame: The frame that it was, for videos and cameras.
        picture: The picture to draw on, ``uint8 [H, W]`` or ``uint8 [H, W, 3]`` BGR, where somebody will.
        levels: Grey levels of the network's input, ``int64 [LEVEL_BINS]``, where somebody watches them.
    """

    path: Path | str
    probabilities: tuple[float, ...] | None
    error: str | None = None
    latency_ms: float = field(default=0.0, compare=False)
    age_ms: float | None = field(default=None, compare=False)
    frame: Frame | None = None
    picture: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    levels: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)

    @property
    def top(self) -> int | None:
        """Index of the most probable class, or None where there is no answer."""
        if self.probabilities is None:
            return None
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)


def classify(
    items: Iterable[_Item | None], prepare: Callable[[_Item], Prepared], runner: Runner, *, threads: int
) -> Generator[Answer, None, None]:
    """Prepare items in threads and yield an answer for each, in their order.

    A thread-safe runner runs batches of one in the preparing threads: for small networks on a CPU that is
    faster than collecting batches, and every core decodes. Any other runner runs in the calling thread,
    which owns it, in batches of the size that the engine was built for, as many in flight as it has slots: while
    the device works on one batch, the next is decoded and copied in.

    Args:
        items: What ``prepare`` takes; None says that no item is at hand just now: a batch that is not full runs then.
        prepare: Makes one item ready, such as :func:`prepare_picture` for a contract; runs in threads.
        runner: The engine.
        threads: Preparing threads. 0 prepares and runs each item in the calling thread before the next one is taken:
            for a camera, whose next frame is the newer the later it is taken.
    """

    def prepare_each(group: list[_Item]) -> list[Prepared]:
        return [prepare(item) for item in group]

    def answer_each(group: list[_Item]) -> list[Answer]:
        prepared = [prepare(item) for item in group]
        return [answer_group([picture], runner)[0] for picture in prepared]

    if threads == 0:
        for item in items:
            if item is not None:
                yield from answer_group([prepare(item)], runner)
    elif runner.thread_safe and runner.record.batch.smallest == 1:
        for answer in ordered_map(answer_each, items, threads=threads):
            if answer is not None:
                yield answer
    else:
        prepared = ordered_map(prepare_each, items, threads=threads)
        yield from _answer_in_batches(prepared, runner)


def classify_files(paths: Iterable[Path], runner: Runner, *, threads: int) -> Generator[Answer, None, None]:
    """Classify image files and yield an answer for each, in the order of ``paths``; see :func:`classify`."""
    prepare = functools.partial(prepare_picture, contract=runner.record.contract)
    return classify(paths, prepare, runner, threads=threads)


def prepare_picture(
    item: Path | Frame,
    contract: ModelContract,
    *,
    source: str = "",
    keep_picture: bool = False,
    keep_levels: bool = False,
) -> Prepared:
    """Decode and resize an image file or a frame; a bad one becomes its error.

    Args:
        item: The file or the frame.
        contract: The model's contract.
        source: Name of the video or camera, for frames.
        keep_picture: Keep the picture to draw on.
        keep_levels: Count the grey levels of the network's input.
    """
    started = time.perf_counter()
    path: Path | str
    if isinstance(item, Path):
        path, frame, name = item, None, str(item)
    else:
        # An answer that waits must not hold a picture that nobody draws.
        path, frame, name = source, replace(item, pixels=b""), f"frame {item.index} of {source}"
    try:
        data = read_bytes(item) if isinstance(item, Path) else item.pixels
        if isinstance(data, bytes):
            picture = decoded = decode_image(data, contract, name=name)
        else:
            picture, decoded = data, convert_frame(data, contract, name=name)
        pixels = prepare_pixels(decoded, contract, name=name)
    except ImageError as error:
        return Prepared(path, error, time.perf_counter() - started, frame=frame)
    seconds = time.perf_counter() - started
    levels = count_levels(pixels, contract) if keep_levels else None
    return Prepared(path, pixels, seconds, picture if keep_picture else None, frame, levels)


def ordered_map(
    function: Callable[[list[_Item]], list[_Result]], items: Iterable[_Item | None], *, threads: int
) -> Iterator[_Result | None]:
    """Map in threads, in order, with a bounded number of results waiting: memory does not grow with the source.

    Args:
        function: Called in a thread with up to four items; returns a result for each.
        items: What it is called with; taken in the calling thread. None says that no item is at hand just
            now: what waits is yielded instead of waiting for more.
        threads: How many at once.

    Yields:
        A result; or None for a None among ``items``, after the results of all items before it.
    """
    waiting: deque[Future[list[_Result]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for group in _in_groups(items, TOGETHER):
                if group:
                    waiting.append(pool.submit(function, group))
                    if len(waiting) >= threads * _AHEAD:
                        yield from waiting.popleft().result()
                    continue
                while waiting:
                    yield from waiting.popleft().result()
                yield None
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _in_groups(items: Iterable[_Item | None], size: int) -> Iterator[list[_Item]]:
    """Collect items into groups of ``size``; None ends a group early, and an empty group then says so."""
    group: list[_Item] = []
    for item in items:
        if item is not None:
            group.append(item)
        if group and (item is None or len(group) == size):
            yield group
            group = []
        if item is None:
            yield []
    if group:
        yield group


def answer_group(group: Sequence[Prepared], runner: Runner) -> list[Answer]:
    """Run one batch and return an answer for each of its pictures, bad ones included."""
    started = time.perf_counter()
    batch = _stack(group, runner.record.batch.smallest)
    rows = runner.run(batch) if batch is not None else None
    return _answers_of(group, rows, time.perf_counter() - started)


def _answer_in_batches(prepared: Iterable[Prepared | None], runner: Runner) -> Iterator[Answer]:
    smallest, best = runner.record.batch.smallest, runner.record.batch.best
    groups = ((group, time.perf_counter(), _stack(group, smallest)) for group in _in_groups(prepared, best))
    for runs, some in itertools.groupby(groups, key=lambda each: each[2] is not None):
        # Nothing to run: these wait for what is in flight, so that the order holds. An empty group, of a source that
        # is silent, lets what is in flight come out.
        if not runs:
            for group, _, _ in some:
                yield from _answers_of(group, None, 0.0)
            continue
        resumed = time.perf_counter()
        batches = (((group, started), batch) for group, started, batch in some if batch is not None)
        for (group, started), rows in answer_batches(runner, batches):
            # The time that the caller took, and that of the batch before, is not this batch's.
            yield from _answers_of(group, rows, time.perf_counter() - max(started, resumed))
            resumed = time.perf_counter()


def _stack(group: Sequence[Prepared], smallest: int) -> InputPixels | None:
    """Return the good pictures as one batch, ``[N, *contract.input_shape]``; None where all are bad."""
    good = [picture.pixels for picture in group if not isinstance(picture.pixels, ImageError)]
    if len(good) == smallest == 1:
        return good[0][None]
    if not good:
        return None
    # An engine whose profile begins above one image gets the last image repeated; those answers are dropped.
    return np.stack(good + good[-1:] * max(0, smallest - len(good)))


def _answers_of(group: Sequence[Prepared], rows: NDArray[np.float32] | None, seconds: float) -> list[Answer]:
    """Return the answers of a batch: the next row to each good picture, its error to each bad one."""
    given = iter(() if rows is None else rows.tolist())
    answers = []
    for picture in group:
        frame = picture.frame
        error = str(picture.pixels) if isinstance(picture.pixels, ImageError) else None
        live = frame is not None and frame.seconds is None
        answers.append(
            Answer(
                picture.path,
                tuple(next(given)) if error is None else None,
                error,
                latency_ms=(picture.seconds + (seconds if error is None else 0.0)) * 1e3,
                age_ms=(time.monotonic() - frame.captured) * 1e3 if frame is not None and live else None,
                frame=frame,
                picture=picture.picture,
                levels=picture.levels,
            )
        )
    return answers
