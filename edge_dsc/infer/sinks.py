"""Where answers go: what was asked for, and the sinks that do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_dsc.infer.classify import Answer
from edge_dsc.infer.live_page import LOOPBACK, Board, Page
from edge_dsc.infer.live_page.monitoring import (
    DEFAULT_UNSURE,
    Monitor,
    describe_engine,
    reference_levels,
)
from edge_dsc.infer.pictures import UnsureFolder, Window, annotated_sink
from edge_dsc.infer.served import ServedModel
from edge_dsc.infer.source import SourceSpec
from edge_dsc.infer.stop import Stop
from engines.errors import UsageError
from engines.files import ANNOTATED_VIDEO, require_writable
from engines.record import EngineRecord


class Sink(Protocol):
    """Takes every answer in order; called by the loop's thread alone."""

    def write(self, answer: Answer) -> None:
        """Take one answer.

        Raises:
            EnvironmentProblem: The disk is full, or the place cannot be written.
        """
        ...

    def close(self) -> None:
        """Finish what is open."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where pictures go.

    Attributes:
        annotate: A folder, or a video file, for annotated pictures.
        unsure: A threshold (0 to 1) and a folder for pictures whose best class stays under it.
        show: Show a window.
        serve: Port of the live page; 0 takes a free one; None serves nothing.
        host: Address that the page listens on.
    """

    annotate: Path | None = None
    unsure: tuple[float, Path] | None = None
    show: bool = False
    serve: int | None = None
    host: str = "127.0.0.1"

    @property
    def need_pictures(self) -> bool:
        """Whether answers must carry their decoded pictures."""
        return bool(self.annotate or self.unsure or self.show) or self.serve is not None


def open_sinks(
    outputs: Outputs,
    record: EngineRecord,
    spec: SourceSpec,
    stop: Stop,
    say: Callable[[str], None] | None = None,
    *,
    model: Path | ServedModel | None = None,
) -> Iterator[Sink]:
    """Open what was asked for, one after the other, so that the caller can close what is open when one fails.

    Args:
        outputs: What was asked for.
        record: The engine's record.
        spec: The source.
        stop: Asked by the window to end.
        say: Called with the page's address.
        model: What answers: the calibration table that the metrics need lies beside an engine.

    Raises:
        UsageError: A place inside the source, or one that does not fit it.
        EnvironmentProblem: No screen, or the port is taken.
    """
    labels = record.contract.labels
    folder = Path(spec.target) if spec.scheme == "file" and Path(spec.target).is_dir() else None
    if outputs.annotate is not None:
        if outputs.annotate.is_file():
            require_writable(outputs.annotate, ANNOTATED_VIDEO)
            if Path(spec.target).is_file() and outputs.annotate.samefile(spec.target):
                raise UsageError(f"--annotate {outputs.annotate} is the source", remedy="name another video")
        yield annotated_sink(outputs.annotate, labels, spec.kind, folder)
    if outputs.unsure is not None:
        threshold, place = outputs.unsure
        yield UnsureFolder(place, threshold, folder)
    if outputs.show:
        yield Window(labels, stop)
    if outputs.serve is not None:
        reference, origin = None, "no engine file is at hand"
        if isinstance(model, Path):
            reference, origin = reference_levels(model, record)
        unsure_below = outputs.unsure[0] if outputs.unsure is not None else DEFAULT_UNSURE
        monitor = Monitor(labels, describe_engine(record), reference=reference, unsure_below=unsure_below)
        page = Page(Board(record.engine, spec.name, labels), monitor, outputs.host, outputs.serve)
        if say is not None:
            say(f"live page: {page.address}, metrics: {page.address}metrics")
            if reference is None:
                say(f"note: the metrics hold no drift of the input: {origin}")
            if outputs.host not in LOOPBACK:
                say(f"note: everybody who reaches {outputs.host} sees the pictures; there is no password")
        yield page
