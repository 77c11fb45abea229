"""Every kind of source as one thing: answers in order, and what there is to say about them at the end."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_dsc.loop.answers import Answer, Prepared
from edge_dsc.loop.classify import answer_group, classify
from edge_dsc.loop.folder import classify_files
from edge_dsc.loop.prepare import prepare_video_frame
from edge_dsc.loop.stopping import Stop
from edge_dsc.sinks.resume import skip_written
from edge_dsc.sources import expand_source
from edge_dsc.sources.frames import Frame
from edge_dsc.sources.listing import read_list
from edge_dsc.sources.live import LiveSource
from edge_dsc.sources.uri import SourceKind, SourceSpec
from edge_dsc.sources.video import VideoFile
from engines.errors import UsageError
from engines.runtimes import Runner


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
