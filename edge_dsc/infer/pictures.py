"""Pictures with their answers: drawn, in a window, in a folder or a video, and unsure ones kept for labelling."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_dsc.infer.classify import Answer
from edge_dsc.infer.source import VIDEO_SUFFIXES, SourceKind
from edge_dsc.infer.stop import Stop
from edge_dsc.page.heat import draw_heat
from engines.dicom import is_dicom
from engines.errors import EnvironmentProblem, ImageError, UsageError
from engines.files import ANNOTATED, ANNOTATED_MARK, VIDEO_MARK, kind_of_file, output_problem, write_bytes
from engines.images import read_bytes

_SMALLEST_WIDTH = 320  # below it the text would not be readable
_BAND = 0.075  # height of the band of text, of the width
_TITLE = "edge-dsc"
_KEYS = (ord("q"), 27)  # 27: Escape
_VIDEO_FPS = 25.0
_LIVE_PAUSE_S = 1.0
_CODECS = {".avi": "MJPG", ".mp4": "mp4v", ".mkv": "mp4v", ".mov": "mp4v"}
# What each container calls empty, and every player skips: a chunk JUNK, an element Void, a box free.
_BOX = (8 + len(VIDEO_MARK)).to_bytes(4, "big") + b"free" + VIDEO_MARK
_EMPTY = {
    ".avi": b"JUNK" + len(VIDEO_MARK).to_bytes(4, "little") + VIDEO_MARK,
    ".mkv": bytes([0xEC, 0x80 | len(VIDEO_MARK)]) + VIDEO_MARK,
    ".mp4": _BOX,
    ".mov": _BOX,
}


def caption_of(answer: Answer, labels: Sequence[str]) -> str:
    """Return the text under a picture: ``focal 98.2 %   0.9 ms``, or the error."""
    called = answer.called(labels)
    if called is None:
        return str(answer.error)
    text = f"{called[0]} {called[1]:.1%}   {answer.latency_ms:.1f} ms"
    return text if answer.age_ms is None else f"{text}   age {answer.age_ms:.0f} ms"


def draw_answer(picture: NDArray[np.uint8], answer: Answer, labels: Sequence[str]) -> NDArray[np.uint8]:
    """Draw the caption in a band below a picture, and over it the evidence where the answer has class activation maps.

    Without maps the picture itself stays as the engine saw it.

    Args:
        picture: ``uint8 [H, W]`` grey or ``uint8 [H, W, 3]`` BGR; not changed.
        answer: What is written.
        labels: Class names; characters outside ASCII become ``?``, OpenCV's fonts have no others.

    Returns:
        ``uint8 [H', W', 3]`` BGR, at least 320 pixels wide, both sides even (video encoders want that).
    """
    colour = cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR) if picture.ndim == 2 else picture
    evidence = answer.evidence(labels)
    if evidence is not None:
        colour = draw_heat(cast("NDArray[np.uint8]", colour), evidence)
    if colour.shape[1] < _SMALLEST_WIDTH:
        height = round(colour.shape[0] * _SMALLEST_WIDTH / colour.shape[1])
        colour = cv2.resize(colour, (_SMALLEST_WIDTH, height), interpolation=cv2.INTER_LINEAR)
    height, width = colour.shape[:2]
    band = max(24, round(width * _BAND))
    bottom = band + (height + band) % 2
    drawn = cv2.copyMakeBorder(colour, 0, bottom, 0, width % 2, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    text = caption_of(answer, labels).encode("ascii", "replace").decode()
    scale, thickness = band / 34, max(1, round(band / 24))
    wide = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)[0][0]
    scale *= min(1.0, (width - band) / max(wide, 1))
    at = (band // 4, height + round(band * 0.68))
    cv2.putText(drawn, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), thickness, cv2.LINE_AA)
    return cast("NDArray[np.uint8]", drawn)


class Window:
    """Shows each annotated picture; q or Escape ends the run."""

    def __init__(self, labels: Sequence[str], stop: Stop) -> None:
        """Open it.

        Raises:
            EnvironmentProblem: No screen, or an OpenCV without windows.
        """
        remedy = "use --serve PORT and a browser, or JetPack's OpenCV on a desktop"
        # Qt would end the process where it finds no screen: it is looked for before.
        if sys.platform.startswith("linux") and not (
            os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        ):
            raise EnvironmentProblem("--show needs a screen, and DISPLAY is not set", remedy=remedy)
        try:
            cv2.namedWindow(_TITLE, cv2.WINDOW_NORMAL)
        except (cv2.error, AttributeError) as error:
            raise EnvironmentProblem(
                f"OpenCV {cv2.__version__} here has no windows", remedy=remedy
            ) from error
        self._labels, self._stop = labels, stop

    def write(self, answer: Answer) -> None:
        """Show one picture."""
        if answer.picture is not None:
            cv2.imshow(_TITLE, draw_answer(answer.picture, answer, self._labels))
        if cv2.waitKey(1) & 0xFF in _KEYS:
            self._stop.ask()

    def close(self) -> None:
        """Close the window."""
        cv2.destroyWindow(_TITLE)


class AnnotatedFolder:
    """One annotated JPEG for each picture, under the source's own folders and names; no other file is replaced."""

    def __init__(self, folder: Path, labels: Sequence[str], source: Path | None) -> None:
        """Prepare it.

        Args:
            folder: Where they go.
            labels: Class names.
            source: The folder that paths are made relative to, where the source is one.

        Raises:
            UsageError: The folder lies in the source: the next run would classify annotated pictures.
        """
        refuse_inside(folder, source, "--annotate")
        self._folder, self._labels, self._source = folder, labels, source
        self._taken: dict[Path, str] = {}  # of a list, in which ../a/x.png and a/x.png go by one name

    def write(self, answer: Answer) -> None:
        """Write one; a picture that could not be decoded has none.

        Raises:
            EnvironmentProblem: The disk is full, or the place cannot be written.
        """
        if answer.picture is not None:
            data = encode(draw_answer(answer.picture, answer, self._labels), ".jpg")
            marked = data[:2] + ANNOTATED_MARK + data[2:]
            target = self._folder / picture_name(answer, self._source, ".jpg")
            path = str(answer.path)
            place = _free_name(
                target, lambda there: self._taken.get(there, path) == path and _is_annotated(there)
            )
            if self._source is None and answer.frame is None:
                self._taken[place] = path
            write_bytes(place, marked, ANNOTATED)

    def close(self) -> None:
        """Do nothing: each picture is whole."""


class AnnotatedVideo:
    """An annotated video; its first frame decides the size, and a mark at its end says that it is ours."""

    def __init__(self, path: Path, labels: Sequence[str], kind: SourceKind) -> None:
        """Prepare it.

        Raises:
            UsageError: The source has pictures of many sizes, or the suffix is one that cannot be written.
        """
        if kind in (SourceKind.FILES, SourceKind.LIST):
            raise UsageError(f"--annotate {path}: images are annotated into a folder", remedy="name a folder")
        if path.suffix.lower() not in _CODECS:
            raise UsageError(
                f"--annotate cannot write {path.suffix}", remedy=f"name it {' or '.join(_CODECS)}"
            )
        self._path, self._labels = path, labels
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)
        self._frames = 0

    def write(self, answer: Answer) -> None:
        """Write one frame.

        Raises:
            EnvironmentProblem: The video cannot be opened for writing.
        """
        if answer.picture is None:
            return
        drawn = draw_answer(answer.picture, answer, self._labels)
        if self._writer is None:
            self._writer = self._open(drawn)
        if (drawn.shape[1], drawn.shape[0]) != self._size:  # a camera came back in another mode
            drawn = cast("NDArray[np.uint8]", cv2.resize(drawn, self._size))
        self._writer.write(drawn)
        self._frames += 1

    def close(self) -> None:
        """Finish the file, look for its last frame (OpenCV says nothing of a full disk), and mark it.

        Raises:
            EnvironmentProblem: The file does not hold every frame.
        """
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        written = cv2.VideoCapture(str(self._path))
        # A cut .avi, .mp4 or .mov states another number; a cut .mkv states this one and does not have the frame.
        stated = int(written.get(cv2.CAP_PROP_FRAME_COUNT))
        written.set(cv2.CAP_PROP_POS_FRAMES, self._frames - 1)
        whole = stated == self._frames and written.grab()
        written.release()
        if not whole:
            raise EnvironmentProblem(
                f"{self._path} does not hold all of its {self._frames} frames",
                remedy="free some space or choose another place with --annotate",
            )
        try:
            with self._path.open("ab") as stream:
                stream.write(_EMPTY[self._path.suffix.lower()])
        except OSError as error:
            raise output_problem(self._path, error) from error

    def _open(self, drawn: NDArray[np.uint8]) -> cv2.VideoWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._size = (drawn.shape[1], drawn.shape[0])
        codec = cv2.VideoWriter.fourcc(*_CODECS[self._path.suffix.lower()])
        writer = cv2.VideoWriter(str(self._path), codec, _VIDEO_FPS, self._size)
        if not writer.isOpened():
            raise EnvironmentProblem(f"cannot write {self._path}", remedy="name an .avi in a writable folder")
        return writer


class UnsureFolder:
    """Keeps pictures whose best class stays under a threshold, unannotated, for labelling.

    What lies there stays: a picture that is there already is not written again, another of its name gets a number.
    Image files are copied as they are; frames, and DICOM files, whose headers name the patient, are kept as the
    grey or colour picture, PNG. Of a camera at most one frame a second is kept: the next one shows the same.
    """

    def __init__(self, folder: Path, threshold: float, source: Path | None) -> None:
        """Prepare it.

        Raises:
            UsageError: The threshold is no probability, or the folder lies in the source.
        """
        if not 0 < threshold <= 1:
            raise UsageError(
                f"--save-unsure {threshold:g} is no probability", remedy="such as --save-unsure 0.6 DIR"
            )
        refuse_inside(folder, source, "--save-unsure")
        self._folder, self._threshold, self._source = folder, threshold, source
        self._next = float("-inf")

    def write(self, answer: Answer) -> None:
        """Keep one picture if its answer is unsure.

        Raises:
            EnvironmentProblem: The disk is full, or the place cannot be written.
        """
        if answer.probabilities is None or max(answer.probabilities) >= self._threshold:
            return
        if answer.frame is not None and answer.frame.seconds is None:
            if answer.frame.captured < self._next:
                return
            self._next = answer.frame.captured + _LIVE_PAUSE_S
        data, suffix = _original(answer), ""
        if data is None and answer.picture is not None:
            data, suffix = encode(answer.picture, ".png"), ".png"
        if data is None:
            return
        target = self._folder / picture_name(answer, self._source, suffix)
        target = _free_name(target, lambda there: _holds(there, data))
        if not target.exists():
            write_bytes(target, data)

    def close(self) -> None:
        """Do nothing: each picture is whole."""


def annotated_sink(
    path: Path, labels: Sequence[str], kind: SourceKind, source: Path | None
) -> AnnotatedFolder | AnnotatedVideo:
    """Return the sink for ``--annotate``: a video by its suffix, else a folder."""
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return AnnotatedVideo(path, labels, kind)
    return AnnotatedFolder(path, labels, source)


def picture_name(answer: Answer, source: Path | None, suffix: str) -> PurePath:
    """Return where a picture goes below its folder; different pictures have different names."""
    if answer.frame is not None:
        stem = Path(answer.path).stem if answer.frame.seconds is not None else "frame"
        return PurePath(f"{stem}-{answer.frame.index:08}{suffix}")
    path = Path(answer.path)
    if source is not None and path.is_relative_to(source):
        path = path.relative_to(source)
    parts = [part for part in path.parts if part not in (path.anchor, "..", ".")]
    return PurePath(*parts[:-1], parts[-1] + suffix)


def _free_name(target: Path, ours: Callable[[Path], bool]) -> Path:
    """Return a picture's place, or ``name-2.png`` and so on where a file lies that is not the same or not ours."""
    names = (target.with_name(f"{target.stem}-{number}{target.suffix}") for number in itertools.count(2))
    for place in itertools.chain([target], names):
        if not place.exists() or (place.is_file() and ours(place)):
            return place
    raise AssertionError  # the names never end


def _holds(place: Path, data: bytes) -> bool:
    return place.stat().st_size == len(data) and place.read_bytes() == data


def _is_annotated(place: Path) -> bool:
    return kind_of_file(place) == ANNOTATED


def encode(picture: NDArray[np.uint8], suffix: str) -> bytes:
    """Encode pixels as JPEG or PNG.

    Raises:
        EnvironmentProblem: OpenCV cannot.
    """
    good, data = cv2.imencode(suffix, picture)
    if not good:
        raise EnvironmentProblem(f"OpenCV cannot encode {suffix}", remedy="free some memory")
    return bytes(data)


def refuse_inside(folder: Path, source: Path | None, option: str) -> None:
    """Refuse to write pictures into the folder that is being read.

    Raises:
        UsageError: ``folder`` lies in ``source``.
    """
    if source is not None and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(source)):
        raise UsageError(
            f"{option} {folder} lies in the source {source}", remedy="choose a folder beside the source"
        )


def _original(answer: Answer) -> bytes | None:
    """Return the bytes of the image file; None of a frame, of DICOM, and of a file that is gone since it was read."""
    if answer.frame is not None:
        return None
    try:
        data = read_bytes(Path(answer.path))
    except ImageError:
        return None
    return None if is_dicom(data) else data
