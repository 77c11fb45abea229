"""``infer``: a source of any kind through an engine into rows, drawn pictures and a live page."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from edge_dsc.infer.camera import LiveSource
from edge_dsc.infer.classify import (
    Answer,
    Prepared,
    answer_group,
    classify,
    classify_files,
    prepare_video_frame,
)
from edge_dsc.infer.live_page import TimeHistogram
from edge_dsc.infer.rows import RowSink, check_rows_path, row_of, skip_written, written_paths
from edge_dsc.infer.sinks import Outputs, Sink, needs_pictures, open_sinks
from edge_dsc.infer.source import SourceKind, SourceSpec, expand_source, parse_source, read_list
from edge_dsc.infer.stop import Stop, stop_on_signals
from edge_dsc.infer.video import Frame, VideoFile
from engines.errors import BadInputError, UsageError
from engines.images import quiet_decoder
from engines.runtimes import Progress, Runner, open_engine


@dataclass(frozen=True, kw_only=True)
class FeedOptions:
    """How a source is fed to the engine.

    Attributes:
        threads: Threads that decode.
        keep_pictures: Keep the pictures in the answers, to draw on.
        limit: End after so many answers; None for all.
        give_up_s: End when a live source stays away for so long; None tries for ever.
    """

    threads: int = 1
    keep_pictures: bool = False
    limit: int | None = None
    give_up_s: float | None = None


class Feed(Protocol):
    """A source on its way through an engine.

    Attributes:
        total: Pictures in the source, where they can be counted beforehand.
    """

    total: int | None

    def answers(self, runner: Runner, stop: Stop) -> Iterator[Answer]:
        """Yield an answer for each picture, in order, until the source or ``stop`` ends it."""
        ...

    def skip(self, written: Sequence[str], out: Path, stop: Stop) -> None:
        """Leave out what an earlier run answered.

        Raises:
            ArtefactError: The rows are not the beginning of this source.
            UsageError: This source has no second time.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """Return what the summary tells beyond the answers: ``dropped``, ``reconnects``, ``note``."""
        ...

    def close(self) -> None:
        """Close the source."""
        ...


class FilesFeed:
    """Image files, or paths on standard input."""

    def __init__(self, spec: SourceSpec, options: FeedOptions) -> None:
        self._options = options
        self._listed = spec.kind is SourceKind.LIST
        self._paths: Iterator[Path | None] | None = None
        self.total: int | None = None
        if not self._listed:
            found = expand_source(spec.target)
            self.total = len(found)
            self._paths = iter(found)

    def answers(self, runner: Runner, stop: Stop) -> Iterator[Answer]:
        """Yield an answer for each file."""
        paths = _limited(self._open(stop), self._options.limit)
        yield from classify_files(
            paths, runner, threads=self._options.threads, keep_pictures=self._options.keep_pictures
        )

    def skip(self, written: Sequence[str], out: Path, stop: Stop) -> None:
        """Leave out the files that have rows."""
        skip_written(self._open(stop), written, out)

    def facts(self) -> dict[str, Any]:
        """Return nothing more."""
        return {}

    def close(self) -> None:
        """Do nothing: files are closed one by one."""

    def _open(self, stop: Stop) -> Iterator[Path | None]:
        if self._paths is None:
            self._paths = read_list(sys.stdin, stop)
        return self._paths


def _limited(paths: Iterator[Path | None], limit: int | None) -> Iterator[Path | None]:
    taken = 0  # a silence of standard input is no picture and does not count
    while limit is None or taken < limit:
        try:
            path = next(paths)
        except StopIteration:
            return
        taken += path is not None
        yield path


class VideoFeed:
    """Every frame of a video file."""

    def __init__(self, spec: SourceSpec, options: FeedOptions) -> None:
        self._video = VideoFile(Path(spec.target))
        self._name, self._options = spec.name, options
        self.total = self._video.told

    def answers(self, runner: Runner, stop: Stop) -> Iterator[Answer]:
        """Yield an answer for each frame."""
        contract = runner.record.contract

        def prepare(frame: Frame) -> Prepared:
            return prepare_video_frame(frame, self._name, contract, keep_picture=self._options.keep_pictures)

        frames = itertools.islice(self._video.frames(), self._options.limit)
        yield from classify(frames, prepare, runner, threads=self._options.threads)

    def skip(self, written: Sequence[str], out: Path, stop: Stop) -> None:
        """Refuse."""
        raise _not_resumable(self._name)

    def facts(self) -> dict[str, Any]:
        """Return whether frames are missing at the end."""
        note = self._video.missing() if self._options.limit is None else None
        return {"note": note} if note else {}

    def close(self) -> None:
        """Close the file."""
        self._video.close()


class LiveFeed:
    """The newest frame of a camera or stream, each time the engine is free."""

    def __init__(
        self, spec: SourceSpec, options: FeedOptions, say: Callable[[str], None] | None = None
    ) -> None:
        self._source = LiveSource(spec, give_up_s=options.give_up_s, say=say)
        self._name, self._options = spec.name, options
        self.total = options.limit

    def answers(self, runner: Runner, stop: Stop) -> Iterator[Answer]:
        """Yield an answer for each frame that the engine had time for."""
        contract = runner.record.contract
        for frame in itertools.islice(self._source.frames(stop), self._options.limit):
            prepared = prepare_video_frame(
                frame, self._name, contract, keep_picture=self._options.keep_pictures
            )
            yield from answer_group([prepared], runner)

    def skip(self, written: Sequence[str], out: Path, stop: Stop) -> None:
        """Refuse."""
        raise _not_resumable(self._name)

    def facts(self) -> dict[str, Any]:
        """Return how many frames were dropped and how often the source came back."""
        return {"dropped": self._source.dropped, "reconnects": self._source.reconnects}

    def close(self) -> None:
        """Stop reading."""
        self._source.close()


def open_feed(spec: SourceSpec, options: FeedOptions, say: Callable[[str], None] | None = None) -> Feed:
    """Open a source of any kind.

    Args:
        spec: What it is.
        options: How it is fed.
        say: Called with a line when a live source is lost and when it is back.

    Raises:
        BadInputError: Nothing is there, or it cannot be opened.
        EnvironmentProblem: OpenCV lacks what it needs.
    """
    if spec.kind is SourceKind.VIDEO:
        return VideoFeed(spec, options)
    if spec.kind is SourceKind.LIVE:
        return LiveFeed(spec, options, say)
    return FilesFeed(spec, options)


def _not_resumable(name: str) -> UsageError:
    return UsageError(f"--resume cannot go on with {name}", remedy="it goes on with files, folders and globs")


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """What to classify and where the answers go.

    Attributes:
        engine: The engine file.
        source: A source by URI, see :func:`edge_dsc.infer.source.parse_source`.
        out: A ``.csv`` or ``.jsonl`` file, written row by row; None writes CSV to standard output, unless rows are
            kept.
        threads: Decoding threads.
        keep_rows: Keep the rows of files in the summary. Those of videos and cameras would grow without end.
        resume: Go on after the rows that ``out`` has.
        limit: End after so many answers.
        give_up_s: End when a camera or stream stays away for so long; None tries for ever.
        outputs: Where pictures go.
    """

    engine: Path
    source: str
    out: Path | None = None
    threads: int = 1
    keep_rows: bool = False
    resume: bool = False
    limit: int | None = None
    give_up_s: float | None = None
    outputs: Outputs = field(default_factory=Outputs)


@dataclass(frozen=True, kw_only=True)
class InferSummary:
    """What an inference run did.

    Attributes:
        engine: The engine file.
        source: The source as named, without password.
        source_kind: ``files``, ``list``, ``video`` or ``live``.
        images: Images in the source, or frames that a video tells; None where nobody can count them.
        resumed: Images that an earlier run had answered.
        answered: Images that got an answer.
        failed: Images that got an error row.
        seconds: Wall time of the loop, decoding included.
        latency: Decoding, preprocessing and executing one picture: median, p99 and longest, milliseconds.
        age: From a camera's frame to its answer, likewise; None for files and videos.
        dropped: Frames that a camera had given and newer ones replaced.
        reconnects: How often a camera was lost and found again.
        out: The results file, where one was written.
        interrupted: Whether Ctrl-C or SIGTERM ended it early; the rows so far are kept.
        note: What else the reader should know.
        rows: The rows, where they were asked for.
    """

    engine: str
    source: str
    source_kind: str
    images: int | None
    resumed: int
    answered: int
    failed: int
    seconds: float
    latency: dict[str, float | None]
    age: dict[str, float | None] | None
    dropped: int
    reconnects: int
    out: str | None
    interrupted: bool
    note: str | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return vars(self).copy()

    def line(self) -> str:
        """Return one line for the terminal."""
        done = self.answered + self.failed
        frames = self.source_kind in (SourceKind.VIDEO.value, SourceKind.LIVE.value)
        parts = [f"{self.answered} {'frames' if frames else 'images'} classified"]
        if self.failed:
            parts.append(f"{self.failed} could not be read")
        if self.resumed:
            parts.append(f"{self.resumed} were there already")
        if self.seconds > 0:
            parts.append(f"{done / self.seconds:.1f} {'frames' if frames else 'images'}/s")
        if self.age is not None and self.age["median_ms"] is not None:
            parts.append(f"age {self.age['median_ms']:.1f} ms median, {self.age['max_ms']:.1f} ms max")
            parts.append(f"{self.dropped} dropped")
        if self.reconnects:
            parts.append(f"{self.reconnects} times reconnected")
        of = f" of {self.images}" if self.images is not None else ""
        early = f" (interrupted after {done + self.resumed}{of})" if self.interrupted else ""
        where = f" -> {self.out}" if self.out else ""
        return f"{', '.join(parts)}{where}{early}" + (f"; {self.note}" if self.note else "")


def infer_source(
    request: InferRequest,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    stop: Stop | None = None,
) -> InferSummary:
    """Classify every picture of a source and write a row for each, in the source's order.

    Ctrl-C and SIGTERM end it after the picture at hand.

    Args:
        request: What, and where to.
        progress: Called with (phase, done, total) where the source can be counted.
        say: Called with lines for the person: the page's address, a camera lost and found.
        stop: Asked by another thread to end.

    Raises:
        ArtefactError: The engine is stale or foreign, or ``resume`` found other rows.
        BadInputError: No image in the source, or none of them could be read.
        EnvironmentProblem: Something is missing, or the results cannot be written.
        UsageError: The request contradicts itself.
    """
    spec = parse_source(request.source)
    _check(request, spec)
    quiet_decoder()
    stop = stop or Stop()
    with contextlib.ExitStack() as stack:
        feed = open_feed(spec, _feed_options(request), say)
        stack.callback(feed.close)
        runner = stack.enter_context(open_engine(request.engine))
        stack.enter_context(stop_on_signals(stop))
        labels = runner.record.contract.labels
        written = _resume(request, feed, labels, stop)
        sinks: list[Sink] = []
        for sink in open_sinks(request.outputs, runner.record, spec, stop, say):
            stack.callback(sink.close)
            sinks.append(sink)
        if (
            request.out or not request.keep_rows
        ):  # last: an old file of results goes only when all else is ready
            rows = RowSink(request.out, labels, spec.kind, append=request.resume)
            stack.callback(rows.close)
            sinks.insert(0, rows)
        tally = _Tally(labels, spec.kind, keep_rows=request.keep_rows)
        total = feed.total - written if feed.total is not None else None
        if request.limit is not None:
            total = min(request.limit, total) if total is not None else request.limit
        _run(feed, runner, stop, sinks, tally, progress, total)
    if tally.failed and not tally.answered and not stop.asked and not written:
        raise _all_bad(request, tally)
    return _summary(
        request, spec, feed, tally, written, interrupted=tally.interrupted or stop.signal is not None
    )


class _Tally:
    """Counts, times and, where asked for, rows."""

    def __init__(self, labels: Sequence[str], kind: SourceKind, *, keep_rows: bool) -> None:
        self.answered = self.failed = 0
        self.latency, self.age = TimeHistogram(), TimeHistogram()
        self.first_error: str | None = None
        self.interrupted = False
        self.seconds = 0.0
        self.rows: list[dict[str, Any]] = []
        self._labels, self._kind = labels, kind
        self._keep = keep_rows and kind in (SourceKind.FILES, SourceKind.LIST)

    def add(self, answer: Answer) -> None:
        if answer.error is None:
            self.answered += 1
            self.latency.add(answer.latency_ms)
        else:
            self.failed += 1
            self.first_error = self.first_error or answer.error
        if answer.age_ms is not None:
            self.age.add(answer.age_ms)
        if self._keep:
            self.rows.append(row_of(answer, self._labels, self._kind))


def _run(
    feed: Feed,
    runner: Runner,
    stop: Stop,
    sinks: Sequence[Sink],
    tally: _Tally,
    progress: Progress | None,
    total: int | None,
) -> None:
    started = time.perf_counter()
    answers = feed.answers(runner, stop)
    try:
        for answer in answers:
            tally.add(answer)
            for sink in sinks:
                sink.write(answer)
            if progress is not None and total:
                progress("classifying", tally.answered + tally.failed, total)
            if stop.asked:
                break
    except KeyboardInterrupt:
        tally.interrupted = True
    finally:
        close = getattr(answers, "close", None)
        if close is not None:
            close()
        tally.seconds = time.perf_counter() - started


def _check(request: InferRequest, spec: SourceSpec) -> None:
    if request.out is not None:
        check_rows_path(request.out)
    if request.resume and request.out is None:
        raise UsageError("--resume needs the file to go on with", remedy="name it with --out")
    if request.resume and spec.kind not in (SourceKind.FILES, SourceKind.LIST):
        raise UsageError(
            f"--resume cannot go on with {spec.name}", remedy="it goes on with files, folders and globs"
        )


def _feed_options(request: InferRequest) -> FeedOptions:
    return FeedOptions(
        threads=request.threads,
        keep_pictures=needs_pictures(request.outputs),
        limit=request.limit,
        give_up_s=request.give_up_s,
    )


def _resume(request: InferRequest, feed: Feed, labels: Sequence[str], stop: Stop) -> int:
    if not request.resume or request.out is None:
        return 0
    written = written_paths(request.out, labels)
    feed.skip(written, request.out, stop)
    return len(written)


def _all_bad(request: InferRequest, tally: _Tally) -> BadInputError:
    kept = request.out is not None or not request.keep_rows
    return BadInputError(
        f"none of the {tally.failed} images of {request.source!r} could be read",
        remedy="the reason stands in each row" if kept else str(tally.first_error),
    )


def _summary(
    request: InferRequest, spec: SourceSpec, feed: Feed, tally: _Tally, written: int, *, interrupted: bool
) -> InferSummary:
    facts = feed.facts()
    return InferSummary(
        engine=str(request.engine),
        source=spec.name,
        source_kind=spec.kind.value,
        images=feed.total,
        resumed=written,
        answered=tally.answered,
        failed=tally.failed,
        seconds=tally.seconds,
        latency=tally.latency.to_dict(),
        age=tally.age.to_dict() if spec.kind is SourceKind.LIVE else None,
        dropped=facts.get("dropped", 0),
        reconnects=facts.get("reconnects", 0),
        out=str(request.out) if request.out else None,
        interrupted=interrupted,
        note=facts.get("note"),
        rows=tally.rows,
    )
