"""Decode, prepare, batch, run, answer: pictures through an engine, answered in the order of their source."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_dsc.infer.source import Frame
from edge_dsc.page.heat import evidence_for
from engines.contract import ModelContract
from engines.errors import ImageError, UnansweredError, UsageError
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
ABSTAIN = "abstain"  # what an operating point answers where it calls no class
_DIGITS = 6  # of a probability in a row: what is decided follows from the row
SMALLEST = float(np.finfo(np.float32).tiny)  # a softmax in float32 rounds what is less likely to 0
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
        probabilities: One for each class, in the order of the contract's labels, as
            :func:`calibrate_probabilities` gives them; None where the image is bad.
        error: Why there is no answer; None where there is one.
        unanswered: Whether the picture is good and a server gave no answer.
        latency_ms: Decoding, preprocessing and executing this picture, without waiting.
        age_ms: From the moment a camera's frame was there to the answer; None for files and videos.
        frame: The frame that it was, for videos and cameras.
        picture: The picture to draw on, ``uint8 [H, W]`` or ``uint8 [H, W, 3]`` BGR, where somebody will.
        levels: Grey levels of the network's input, ``int64 [LEVEL_BINS]``, where somebody watches them.
        decision: What an operating point makes of it: the name of a class, or :data:`ABSTAIN`; None without one.
        maps: Class activation maps, ``float32 [classes, height, width]``, where they were asked for.
    """

    path: Path | str
    probabilities: tuple[float, ...] | None
    error: str | None = None
    unanswered: bool = False
    latency_ms: float = field(default=0.0, compare=False)
    age_ms: float | None = field(default=None, compare=False)
    frame: Frame | None = None
    picture: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    levels: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)
    decision: str | None = None
    maps: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)

    @property
    def top(self) -> int | None:
        """Index of the most probable class, or None where there is no answer."""
        if self.probabilities is None:
            return None
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)

    def called(self, labels: Sequence[str]) -> tuple[str, float] | None:
        """Return what is called and its probability: a class, or :data:`ABSTAIN` and that of the most probable one.

        Args:
            labels: Class names.

        Returns:
            None where there is no answer.
        """
        if self.probabilities is None or self.top is None:
            return None
        if self.decision is None or self.decision == ABSTAIN:
            return self.decision or labels[self.top], self.probabilities[self.top]
        return self.decision, self.probabilities[labels.index(self.decision)]

    def evidence(self, labels: Sequence[str]) -> NDArray[np.float32] | None:
        """Return what speaks for the class that is called, or else for the most probable one, by place.

        Args:
            labels: Class names.

        Returns:
            As :func:`edge_dsc.page.heat.evidence_for`; None without maps.
        """
        if self.maps is None or self.top is None:
            return None
        undecided = self.decision is None or self.decision == ABSTAIN
        return evidence_for(self.maps, self.top if undecided else labels.index(str(self.decision)))


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """When a class is called.

    A class with a threshold is called where its probability reaches that, however probable another is; of several the
    one that lies furthest above its own, as a ratio. Elsewhere the most probable of the other classes is called, where
    it reaches ``abstain``. Else none is.

    Attributes:
        labels: Class names, in the order of the probabilities.
        thresholds: By class.
        abstain: Least probability for a class without a threshold; 0 always calls one where there is one.

    Raises:
        UsageError: A class that there is not, or that is called as an abstention is, or a threshold that is no
            probability above 0.
    """

    labels: tuple[str, ...]
    thresholds: Mapping[str, float] = field(default_factory=dict)
    abstain: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        unknown = [name for name in self.thresholds if name not in self.labels]
        if unknown:
            raise UsageError(
                f"there is no class {unknown[0]!r} to set a threshold for",
                remedy=f"name one of {', '.join(self.labels)}",
            )
        wrong = [value for value in self.thresholds.values() if not 0 < value <= 1]
        if wrong or not 0 <= self.abstain <= 1:
            raise UsageError(
                f"{(wrong or [self.abstain])[0]:g} is no probability to decide by",
                remedy="such as --threshold CLASS=0.3, or --abstain 0.6",
            )
        if ABSTAIN in self.labels:
            raise UsageError(
                f"a class is called {ABSTAIN!r}, as answers are that call none",
                remedy="decide without --threshold and --abstain, or give the class another name",
            )

    @classmethod
    def asked(
        cls, labels: tuple[str, ...], thresholds: Mapping[str, float], abstain: float | None
    ) -> OperatingPoint | None:
        """Return the point that was asked for; None where the most probable class is the answer."""
        if not thresholds and abstain is None:
            return None
        return cls(labels=labels, thresholds=thresholds, abstain=abstain or 0.0)

    def decide(self, probabilities: Sequence[float]) -> str:
        """Return the class that is called, or :data:`ABSTAIN`; of probabilities as a row shows them, to six digits."""
        shown = {
            name: round(float(value), _DIGITS) for name, value in zip(self.labels, probabilities, strict=True)
        }
        above = {name: shown[name] / least for name, least in self.thresholds.items() if shown[name] >= least}
        if above:
            return max(above, key=above.__getitem__)
        others = [name for name in self.labels if name not in self.thresholds]
        best = max(others, key=shown.__getitem__, default=None)
        return ABSTAIN if best is None or shown[best] < self.abstain else best


def decide_each(
    answers: Generator[Answer, None, None], point: OperatingPoint | None
) -> Generator[Answer, None, None]:
    """Yield each answer with its decision, where there is a point to decide by."""
    with contextlib.closing(answers):
        for answer in answers:
            if point is None or answer.probabilities is None:
                yield answer
            else:
                yield replace(answer, decision=point.decide(answer.probabilities))


def calibrate_probabilities(probabilities: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """Return the probabilities of the same logits divided by a temperature; the most probable class stays so.

    A softmax forgets only what all logits have in common, which the next softmax forgets again: the logarithm of a
    probability serves as the logit.

    Args:
        probabilities: ``[N, classes]``, of a softmax.
        temperature: Above 1 lowers the confidence, below 1 raises it; 1 returns what came in.

    Source:
        Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017, section 4.2.
    """
    if temperature == 1.0:
        return probabilities
    logits = np.log(np.maximum(probabilities.astype(np.float64), SMALLEST)) / temperature
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    calibrated: NDArray[np.float32] = (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)
    return calibrated


def classify(
    items: Iterable[_Item | None],
    prepare: Callable[[_Item], Prepared],
    runner: Runner,
    *,
    threads: int,
    cam: bool = False,
) -> Generator[Answer, None, None]:
    """Prepare items in threads and yield an answer for each, in their order.

    A thread-safe runner runs in the preparing threads, so that every core decodes, in batches as large as it says
    (``together``): of one on a CPU, which for small networks is faster than collecting batches; of several where a
    server runs them. Any other runner runs in the calling thread, which owns it, in batches of the size that the
    engine was built for, as many in flight as it has slots: while the device works on one batch, the next is decoded
    and copied in.

    Args:
        items: What ``prepare`` takes; None says that no item is at hand just now: a batch that is not full runs then.
        prepare: Makes one item ready, such as :func:`prepare_picture` for a contract; runs in threads.
        runner: The engine.
        threads: Preparing threads. 0 prepares and runs each item in the calling thread before the next one is taken:
            for a camera, whose next frame is the newer the later it is taken.
        cam: Answer with class activation maps; a device then has one batch in flight.
    """

    def prepare_each(group: list[_Item]) -> list[Prepared]:
        return [prepare(item) for item in group]

    def answer_each(group: list[_Item]) -> list[Answer]:
        prepared, size = prepare_each(group), runner.together
        parts = (prepared[first : first + size] for first in range(0, len(prepared), size))
        return [answer for part in parts for answer in answer_group(part, runner, cam=cam)]

    if threads == 0:
        for item in items:
            if item is not None:
                yield from answer_group([prepare(item)], runner, cam=cam)
    elif runner.thread_safe and runner.record.batch.smallest == 1:
        size = max(TOGETHER, runner.together)
        for answer in ordered_map(answer_each, items, threads=threads, together=size):
            if answer is not None:
                yield answer
    else:
        prepared = ordered_map(prepare_each, items, threads=threads)
        yield from _answer_in_batches(prepared, runner, cam=cam)


def classify_files(
    paths: Iterable[Path], runner: Runner, *, threads: int, cam: bool = False
) -> Generator[Answer, None, None]:
    """Classify image files and yield an answer for each, in the order of ``paths``; see :func:`classify`."""
    prepare = functools.partial(prepare_picture, contract=runner.record.contract)
    return classify(paths, prepare, runner, threads=threads, cam=cam)


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
    function: Callable[[list[_Item]], list[_Result]],
    items: Iterable[_Item | None],
    *,
    threads: int,
    together: int = TOGETHER,
) -> Iterator[_Result | None]:
    """Map in threads, in order, with a bounded number of results waiting: memory does not grow with the source.

    Args:
        function: Called in a thread with some items; returns a result for each.
        items: What it is called with; taken in the calling thread. None says that no item is at hand just
            now: what waits is yielded instead of waiting for more.
        threads: How many at once.
        together: Most items of a call.

    Yields:
        A result; or None for a None among ``items``, after the results of all items before it.
    """
    waiting: deque[Future[list[_Result]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for group in _in_groups(items, together):
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


def answer_group(group: Sequence[Prepared], runner: Runner, *, cam: bool = False) -> list[Answer]:
    """Run one batch and return an answer for each of its pictures, bad ones and unanswered ones included."""
    started = time.perf_counter()
    batch = _stack(group, runner.record.batch.smallest)
    rows: NDArray[np.float32] | UnansweredError | None = None
    maps = None
    try:
        if batch is not None and cam:
            rows, maps = runner.explain(batch)
        elif batch is not None:
            rows = runner.run(batch)
    except UnansweredError as error:
        rows = error
    answers = _answers_of(group, rows, time.perf_counter() - started, runner)
    if maps is None:
        return answers
    each = iter(maps)
    return [answer if answer.error else replace(answer, maps=next(each)) for answer in answers]


def _answer_in_batches(prepared: Iterable[Prepared | None], runner: Runner, *, cam: bool) -> Iterator[Answer]:
    smallest, best = runner.record.batch.smallest, runner.record.batch.best
    if cam:
        for group in _in_groups(prepared, best):
            yield from answer_group(group, runner, cam=True)
        return
    groups = ((group, time.perf_counter(), _stack(group, smallest)) for group in _in_groups(prepared, best))
    for runs, some in itertools.groupby(groups, key=lambda each: each[2] is not None):
        # Nothing to run: these wait for what is in flight, so that the order holds. An empty group, of a source that
        # is silent, lets what is in flight come out.
        if not runs:
            for group, _, _ in some:
                yield from _answers_of(group, None, 0.0, runner)
            continue
        resumed = time.perf_counter()
        batches = (((group, started), batch) for group, started, batch in some if batch is not None)
        for (group, started), rows in answer_batches(runner, batches):
            # The time that the caller took, and that of the batch before, is not this batch's.
            yield from _answers_of(group, rows, time.perf_counter() - max(started, resumed), runner)
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


def _answers_of(
    group: Sequence[Prepared],
    rows: NDArray[np.float32] | UnansweredError | None,
    seconds: float,
    runner: Runner,
) -> list[Answer]:
    """Return the answers of a batch: its error to each bad picture, the next row or why there is none to a good one."""
    lost = str(rows) if isinstance(rows, UnansweredError) else None
    temperature = runner.record.contract.temperature
    good = rows if isinstance(rows, np.ndarray) else None
    given = iter(() if good is None else calibrate_probabilities(good, temperature).tolist())
    answers = []
    for picture in group:
        frame = picture.frame
        bad = str(picture.pixels) if isinstance(picture.pixels, ImageError) else None
        error = bad or lost
        live = frame is not None and frame.seconds is None
        answers.append(
            Answer(
                picture.path,
                tuple(next(given)) if error is None else None,
                error,
                unanswered=bad is None and lost is not None,
                latency_ms=(picture.seconds + (seconds if bad is None else 0.0)) * 1e3,
                age_ms=(time.monotonic() - frame.captured) * 1e3 if frame is not None and live else None,
                frame=frame,
                picture=picture.picture,
                levels=picture.levels,
            )
        )
    return answers
