"""``infer``: a source of any kind through an engine into rows, drawn pictures and a live page."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from edge_dsc.infer.camera import LiveSource, Patience
from edge_dsc.infer.classify import (
    ABSTAIN,
    Answer,
    OperatingPoint,
    classify,
    classify_files,
    decide_each,
    prepare_picture,
)
from edge_dsc.infer.live_page import LOOPBACK, TimeHistogram
from edge_dsc.infer.rows import (
    DECISION,
    OUTSIDE,
    RowSink,
    WrittenRows,
    check_rows_path,
    require_same_answers,
    row_of,
    skip_written,
    written_rows,
)
from edge_dsc.infer.served import ServedModel, open_model
from edge_dsc.infer.sinks import Outputs, Sink, open_sinks
from edge_dsc.infer.source import (
    Frame,
    ImageFiles,
    ListedFiles,
    Source,
    SourceKind,
    SourceSpec,
    VideoFile,
    parse_source,
)
from edge_dsc.infer.stop import Stop, stop_on_signals
from engines.errors import BadInputError, EdgeDscError, UnansweredError, UsageError
from engines.images import quiet_decoder, require_decoder
from engines.runtimes import DEFAULT_OPTIONS, Progress, Runner, RunnerOptions, require_cam

_IMAGE_KINDS = (SourceKind.FILES, SourceKind.LIST)
_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """What to classify and where the answers go.

    Attributes:
        engine: The engine file, or a model on a server.
        source: A source by URI, see :func:`edge_dsc.infer.source.parse_source`.
        out: A ``.csv`` or ``.jsonl`` file, written row by row; None writes CSV to standard output, unless rows are
            kept.
        threads: Decoding threads.
        keep_rows: Keep the rows of files in the summary. Those of videos and cameras would grow without end.
        resume: Go on after the rows that ``out`` has.
        limit: End after so many answers.
        give_up_s: End when a camera or stream stays away for so long; None tries for ever.
        outputs: Where pictures go.
        running: How an engine of a GPU runs.
        thresholds: By class, as :class:`edge_dsc.infer.classify.OperatingPoint` takes them.
        abstain: Likewise; with neither, rows have no column for a decision.
        cam: Whether pictures get the evidence drawn over them, and rows its share outside the central chest.
    """

    engine: Path | ServedModel
    source: str
    out: Path | None = None
    threads: int = 1
    keep_rows: bool = False
    resume: bool = False
    limit: int | None = None
    give_up_s: float | None = None
    outputs: Outputs = field(default_factory=Outputs)
    running: RunnerOptions = DEFAULT_OPTIONS
    thresholds: Mapping[str, float] = field(default_factory=dict)
    abstain: float | None = None
    cam: bool = False


@dataclass(frozen=True, kw_only=True)
class InferSummary:
    """What an inference run did.

    Attributes:
        engine: The engine file, or the address of a model on a server.
        source: The source as named, without password.
        source_kind: ``files``, ``list``, ``video`` or ``live``.
        images: Images in the source, or frames that a video states; None where nobody can count them.
        resumed: Images that an earlier run had answered.
        answered: Images that got an answer.
        abstained: Answered images for which the operating point called no class; None without one.
        failed: Images that got an error row.
        unanswered: How many of these are good, and a server gave no answer.
        seconds: Wall time of the loop, decoding included.
        latency: Decoding, preprocessing and executing one picture: median, p99 and longest, milliseconds.
        age: From a camera's frame to its answer, likewise; None for files and videos.
        dropped: Frames of a camera that newer ones replaced before the engine was free.
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
    abstained: int | None
    failed: int
    unanswered: int
    seconds: float
    latency: dict[str, float | None]
    age: dict[str, float | None] | None
    dropped: int
    reconnects: int
    out: str | None
    interrupted: bool
    note: str | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def line(self) -> str:
        """Return one line for the terminal."""
        done = self.answered + self.failed
        frames = self.source_kind in (SourceKind.VIDEO.value, SourceKind.LIVE.value)
        parts = [f"{self.answered} {'frames' if frames else 'images'} classified"]
        if self.abstained is not None:
            parts.append(f"{self.abstained} of them left undecided")
        if self.failed > self.unanswered:
            parts.append(f"{self.failed - self.unanswered} could not be read")
        if self.unanswered:
            parts.append(f"{self.unanswered} got no answer from the server")
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
        EnvironmentProblem: Something is missing, the results cannot be written, or a server answered nothing.
        UsageError: The request contradicts itself.
    """
    spec = parse_source(request.source)
    _check(request, spec)
    quiet_decoder()
    stop = stop or Stop()
    with contextlib.ExitStack() as stack:
        source = _open_source(spec, request, say)
        stack.callback(source.close)
        options = request.running
        if spec.kind is SourceKind.LIVE:  # a frame is answered before the next is taken
            options = replace(options, slots=options.slots or 1, batch=1)
        runner = stack.enter_context(open_model(request.engine, options=options))
        _say_who_sees(request.engine, say)
        require_decoder(runner.record.contract)
        stack.enter_context(stop_on_signals(stop))
        contract = runner.record.contract
        if spec.scheme == "csi" and contract.channels == 3:
            raise UsageError(
                f"{spec.name} gives grey pictures, and {request.engine} takes colour",
                remedy="use another kind of camera, or adopt the network with --colour grey",
            )
        point = OperatingPoint.asked(contract.labels, request.thresholds, request.abstain)
        if request.cam:
            require_cam(runner.record)
        extra = (*((DECISION,) if point else ()), *((OUTSIDE,) if request.cam else ()))
        items = source.items(stop)
        earlier = _earlier_rows(request, items, runner, extra, point)
        written = earlier.paths if earlier is not None else []
        if request.limit is not None:
            items = _limited(items, request.limit)
        sinks: list[Sink] = []
        for sink in open_sinks(request.outputs, runner.record, spec, stop, say, model=request.engine):
            stack.callback(sink.close)
            sinks.append(sink)
        if request.out or not request.keep_rows:
            # Opened last: an old file of results goes only when all else is ready.
            rows = RowSink(request.out, contract.labels, spec.kind, extra=extra, after=earlier)
            stack.callback(rows.close)
            sinks.insert(0, rows)
        prepare = functools.partial(
            prepare_picture,
            contract=contract,
            source=spec.name,
            keep_picture=request.outputs.need_pictures,
            keep_levels=request.outputs.serve is not None,
        )
        # The next frame of a camera is the newer the later it is taken: none is prepared ahead.
        threads = 0 if spec.kind is SourceKind.LIVE else request.threads
        answers = decide_each(classify(items, prepare, runner, threads=threads, cam=request.cam), point)
        left = None if source.total is None else source.total - len(written)
        total = min((count for count in (left, request.limit) if count is not None), default=None)
        keep_rows = request.keep_rows and spec.kind in _IMAGE_KINDS
        tally = _Tally((contract.labels, spec.kind, extra), keep_rows, resumed=len(written), total=total)
        _run(answers, sinks, tally, stop, progress)
    if spec.kind is SourceKind.LIST and not (tally.answered or tally.failed or stop.asked or written):
        raise BadInputError("no path came on standard input", remedy="pipe a list of paths into it")
    if tally.failed and not tally.answered and not stop.asked and not written:
        raise _nothing_answered(request, spec, tally)
    tally.interrupted |= stop.signal is not None
    return _summary(request, spec, source, tally)


def _say_who_sees(model: Path | ServedModel, say: Callable[[str], None] | None) -> None:
    host = model.host.strip("[]") if isinstance(model, ServedModel) else "localhost"
    if say is not None and host not in LOOPBACK:
        say(f"note: pictures go to {host} as they are, without encryption")


def _check(request: InferRequest, spec: SourceSpec) -> None:
    if request.out is not None:
        check_rows_path(request.out)
    if request.resume and request.out is None:
        raise UsageError("--resume needs the file to go on with", remedy="name it with --out")
    if request.resume and spec.kind not in _IMAGE_KINDS:
        raise UsageError(
            f"--resume cannot go on with {spec.name}", remedy="it goes on with files, folders and globs"
        )


def _nothing_answered(request: InferRequest, spec: SourceSpec, tally: _Tally) -> EdgeDscError:
    in_rows = request.out is not None or not request.keep_rows
    remedy = "the reason stands in each row" if in_rows else str(tally.first_error)
    if tally.unanswered:
        return UnansweredError(f"{request.engine} answered none of {tally.failed} images", remedy=remedy)
    return BadInputError(f"none of the {tally.failed} images of {spec.name!r} could be read", remedy=remedy)


def _earlier_rows(
    request: InferRequest,
    items: Iterator[Path | Frame | None],
    runner: Runner,
    extra: tuple[str, ...],
    point: OperatingPoint | None,
) -> WrittenRows | None:
    """Return the rows to go on after, once they are known as those of this source and of this engine."""
    if not request.resume or request.out is None:
        return None
    earlier = written_rows(request.out, runner.record.contract.labels, extra, point)
    skip_written(items, earlier.paths, request.out)
    answers = classify_files(map(Path, earlier.sample), runner, threads=1)
    require_same_answers(answers, earlier, request.out)
    return earlier


def _open_source(spec: SourceSpec, request: InferRequest, say: Callable[[str], None] | None) -> Source:
    if spec.kind is SourceKind.FILES:
        return ImageFiles(spec.target)
    if spec.kind is SourceKind.LIST:
        return ListedFiles(sys.stdin)
    if spec.kind is SourceKind.VIDEO:
        return VideoFile(Path(spec.target))
    return LiveSource(spec, patience=Patience(give_up_s=request.give_up_s), say=say)


def _limited(items: Iterator[_Item | None], limit: int) -> Iterator[_Item | None]:
    taken = 0  # a silence of standard input is no picture and does not count
    while taken < limit:
        try:
            item = next(items)
        except StopIteration:
            return
        taken += item is not None
        yield item


@dataclass
class _Tally:
    """What a run did so far: counts, times and, where asked for, the rows; of how many pictures in all."""

    columns: tuple[tuple[str, ...], SourceKind, tuple[str, ...]]  # as row_of takes them
    keep_rows: bool
    resumed: int = 0
    total: int | None = None
    answered: int = 0
    abstained: int = 0
    failed: int = 0
    unanswered: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    first_error: str | None = None
    latency: TimeHistogram = field(default_factory=TimeHistogram)
    age: TimeHistogram = field(default_factory=TimeHistogram)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        if answer.error is None:
            self.answered += 1
            self.abstained += answer.decision == ABSTAIN
            self.latency.add(answer.latency_ms)
        else:
            self.failed += 1
            self.unanswered += answer.unanswered
            self.first_error = self.first_error or answer.error
        if answer.age_ms is not None:
            self.age.add(answer.age_ms)
        if self.keep_rows:
            self.rows.append(row_of(answer, *self.columns))


def _run(
    answers: Generator[Answer, None, None],
    sinks: Sequence[Sink],
    tally: _Tally,
    stop: Stop,
    progress: Progress | None,
) -> None:
    started = time.perf_counter()
    try:
        for answer in answers:
            tally.add(answer)
            for sink in sinks:
                sink.write(answer)
            if progress is not None and tally.total:
                progress("classifying", tally.answered + tally.failed, tally.total)
            if stop.asked:
                break
    except KeyboardInterrupt:
        tally.interrupted = True
    finally:
        answers.close()
        tally.seconds = time.perf_counter() - started


def _summary(request: InferRequest, spec: SourceSpec, source: Source, tally: _Tally) -> InferSummary:
    live = spec.kind is SourceKind.LIVE
    return InferSummary(
        engine=str(request.engine),
        source=spec.name,
        source_kind=spec.kind.value,
        images=request.limit if live else source.total,
        resumed=tally.resumed,
        answered=tally.answered,
        abstained=tally.abstained if DECISION in tally.columns[2] else None,
        failed=tally.failed,
        unanswered=tally.unanswered,
        seconds=tally.seconds,
        latency=tally.latency.to_dict(),
        age=tally.age.to_dict() if live else None,
        dropped=source.dropped,
        reconnects=source.reconnects,
        out=str(request.out) if request.out else None,
        interrupted=tally.interrupted,
        # What was left unread by intent is not missing.
        note=source.note if request.limit is None and not tally.interrupted else None,
        rows=tally.rows,
    )
