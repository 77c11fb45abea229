"""What a source is by its name; image files, lists of paths and video files as pictures in order."""

from __future__ import annotations

import enum
import glob
import io
import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO, cast
from urllib.parse import parse_qs, urlsplit

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_dsc.infer.stop import Stop
from engines.dicom import is_dicom
from engines.errors import BadInputError, UsageError
from engines.images import IMAGE_SUFFIXES

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm"})
_SCHEMES = "csi://N, v4l2://N, /dev/videoN, rtsp://, http://, a file, a folder, a glob or -"
STREAMS = frozenset({"rtsp", "rtsps", "http", "https"})
_GLOB_CHARACTERS = frozenset("*?[")
_LINES_AHEAD = 1024
_LONGEST_LINE = 1 << 16  # characters; a path of Linux has 4,096 bytes at most
_IDLE_S = 0.05


class SourceKind(enum.Enum):
    """How a source behaves."""

    FILES = "files"  # image files: counted, in a stable order, resumable
    LIST = "list"  # paths on standard input: the same, but not counted
    VIDEO = "video"  # every frame of a file, in order
    LIVE = "live"  # the newest frame wins


@dataclass(frozen=True, kw_only=True)
class CameraMode:
    """What a local camera is asked for; None leaves the driver's choice.

    Attributes:
        width: Pixels per row.
        height: Rows.
        fps: Frames per second.
    """

    width: int | None = None
    height: int | None = None
    fps: int | None = None


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """A source as it was named.

    Attributes:
        kind: How it behaves.
        name: What rows and messages call it: the name as given, without password.
        target: What is opened: a path, a device, a sensor's number or a URL.
        scheme: ``csi``, ``v4l2``, ``rtsp``, ``http`` or ``file``.
        mode: What a local camera is asked for.
    """

    kind: SourceKind
    name: str
    target: str
    scheme: str = "file"
    mode: CameraMode = CameraMode()


def parse_source(source: str) -> SourceSpec:
    """Say what kind of source a text names; nothing is opened.

    Args:
        source: ``-``, ``csi://0?width=1280&height=720&fps=30``, ``v4l2:///dev/video0``, ``/dev/video0``,
            ``rtsp://...``, ``http://...``, a video file, or an image, a folder or a glob.

    Raises:
        UsageError: An unknown scheme, or a camera that is no number.
    """
    if source == "-":
        return SourceSpec(kind=SourceKind.LIST, name="-", target="-")
    scheme = source.partition(":")[0].lower()
    # It may hold a password: not quoted.
    if scheme in STREAMS and not source[len(scheme) :].startswith("://"):
        raise UsageError(f"a {scheme} address begins with {scheme}://", remedy=f"a source is {_SCHEMES}")
    scheme, marker, rest = source.partition("://")
    scheme = scheme.lower()
    if not marker:
        if re.fullmatch(r"/dev/video[0-9]{1,4}", source):
            return SourceSpec(kind=SourceKind.LIVE, name=source, target=source, scheme="v4l2")
        kind = SourceKind.VIDEO if Path(source).suffix.lower() in VIDEO_SUFFIXES else SourceKind.FILES
        # A folder may be called "study.ts", a glob may end in it: only a single file is a video.
        single = not Path(source).is_dir() and not _GLOB_CHARACTERS & set(source)
        return SourceSpec(kind=kind if single else SourceKind.FILES, name=source, target=source)
    name = hide_password(source)
    if scheme in STREAMS:
        short = "rtsp" if scheme.startswith("rtsp") else "http"
        try:
            urlsplit(source)
        except ValueError:  # its text repeats the password
            remedy = f"write {scheme}://USER:PASSWORD@HOST:PORT/PATH, other characters as %XX"
            raise UsageError(f"{name!r} is no address", remedy=remedy) from None
        return SourceSpec(kind=SourceKind.LIVE, name=name, target=source, scheme=short)
    if scheme in ("csi", "v4l2"):
        return _camera(name, scheme, rest)
    raise UsageError(f"cannot read {scheme}:// sources ({name!r})", remedy=f"a source is {_SCHEMES}")


def _camera(name: str, scheme: str, rest: str) -> SourceSpec:
    device, _, query = rest.partition("?")
    match = re.fullmatch(r"/?(?:/dev/video)?([0-9]{1,4})", device)
    if match is None:
        raise UsageError(f"{name!r} names no camera", remedy=f"write {scheme}://0")
    target = match.group(1) if scheme == "csi" else f"/dev/video{match.group(1)}"
    return SourceSpec(kind=SourceKind.LIVE, name=name, target=target, scheme=scheme, mode=_mode(name, query))


def _mode(source: str, query: str) -> CameraMode:
    values = {name: found[-1] for name, found in parse_qs(query, keep_blank_values=True).items()}
    remedy = "such as csi://0?width=1280&height=720&fps=30"
    unknown = sorted(set(values) - {"width", "height", "fps"})
    if unknown:
        raise UsageError(f"{source!r} asks for {', '.join(unknown)}", remedy=remedy)
    for name, value in values.items():
        if not re.fullmatch("[0-9]{1,5}", value) or int(value) < 1:
            raise UsageError(f"{source!r}: {name} is {value!r}, not a number from 1 to 99999", remedy=remedy)
    return CameraMode(**{name: int(value) for name, value in values.items()})


def hide_password(url: str) -> str:
    """Return a URL as it may stand in results and logs: ``rtsp://user:***@host/path``.

    A password may hold ``/``, ``?``, ``#`` and ``@``, where a URL must not: it ends at the last ``@`` of all.
    """
    return re.sub(r"^([^/]+://[^:@/?#]*)(:.*)?@", r"\1:***@", url, flags=re.DOTALL)


class Source:
    """An open source; each kind overrides what it knows.

    Attributes:
        total: Pictures in it, where they can be counted beforehand.
        dropped: Frames that were replaced by newer ones before the engine was free.
        reconnects: How often it was lost and found again.
    """

    total: int | None = None
    dropped: int = 0
    reconnects: int = 0

    @property
    def note(self) -> str | None:
        """What the reader of the summary should know about the source, after the last picture."""
        return None

    def items(self, stop: Stop) -> Iterator[Path | Frame | None]:
        """Yield an image file or a frame after the other.

        Args:
            stop: Ends the waiting for one that is not there yet.

        Yields:
            A picture, or None while none is at hand.

        Raises:
            BadInputError: Nothing can be read from it.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close what is open."""


class ImageFiles(Source):
    """The image files of a file's name, a folder or a glob."""

    def __init__(self, source: str) -> None:
        """Find them; see :func:`expand_source`.

        Raises:
            BadInputError: Nothing is there, or no image is in it.
        """
        self._paths = expand_source(source)
        self.total = len(self._paths)

    def items(self, stop: Stop) -> Iterator[Path]:
        """Return the paths; each one is at hand."""
        return iter(self._paths)


def expand_source(source: str) -> list[Path]:
    """Name the image files of a source.

    Args:
        source: A file (taken whatever its suffix), a folder (searched recursively for image suffixes and for
            DICOM files without one; hidden files and folders are left out, links to folders are not followed) or a glob
            (``**`` allowed).

    Returns:
        Paths sorted by name, without repetition.

    Raises:
        BadInputError: Nothing is there, or no image is in it.
    """
    path = Path(source)
    if path.is_dir():
        found = _walk(path)
    elif path.exists():
        return [path]
    elif _GLOB_CHARACTERS & set(source):
        matches = (Path(match) for match in glob.glob(source, recursive=True))  # noqa: PTH207 - absolute patterns
        found = [match for match in matches if match.is_file() and _is_image(match)]
    else:
        raise BadInputError(f"there is no file, folder or glob match {source!r}", remedy="check the path")
    if not found:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise BadInputError(f"no images in {source!r}", remedy=f"image files end in one of {suffixes}")
    return sorted(set(found))


def _walk(root: Path) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(folder, name) for name in files if not name.startswith("."))
        found += [path for path in paths if _is_image(path)]
    return found


def _is_image(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    # Archives export DICOM as IM000001, or as a UID, whose last number looks like a suffix.
    if (suffix and not suffix[1:].isdigit()) or not path.is_file():
        return False
    try:
        with path.open("rb") as stream:
            return is_dicom(stream.read(132))
    except OSError:
        return False


class ListedFiles(Source):
    """Paths on a stream, such as standard input."""

    def __init__(self, stream: TextIO | None) -> None:
        """Take the stream.

        Args:
            stream: Text, one path per line; None where the process has no standard input.
        """
        self._stream = stream

    def items(self, stop: Stop) -> Iterator[Path | None]:
        """Yield the paths as they come; empty lines are skipped.

        A thread reads, because reading a pipe that is open and silent cannot be interrupted.

        Args:
            stop: Ends the waiting.

        Yields:
            A path, or None while no line is at hand.

        Raises:
            BadInputError: There is no stream, or no path can be so long as one of its lines.
        """
        stream = self._stream
        if stream is None:
            raise BadInputError("standard input is closed", remedy="pipe a list of paths into it")
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # a file's name may be any bytes
        lines: queue.Queue[str | BaseException | None] = queue.Queue(_LINES_AHEAD)

        def read() -> None:
            try:
                while line := stream.readline(_LONGEST_LINE):
                    if len(line) == _LONGEST_LINE:  # /dev/zero is one line without an end
                        raise BadInputError(
                            f"a line of standard input has more than {_LONGEST_LINE} characters",
                            remedy="give one path a line",
                        )
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


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One picture of a video or a camera.

    Attributes:
        index: Counted from 0 as the source gave them, dropped ones included.
        pixels: ``uint8 [H, W]`` grey or ``uint8 [H, W, 3]`` BGR; or the bytes of a JPEG that nobody has decoded
            yet, so that a dropped frame costs no decoding. Empty bytes in an answer, which keeps a picture only
            where somebody will draw it.
        captured: Monotonic time at which the frame was there, seconds.
        seconds: Position in a video file; None for a camera.
        dropped: Frames that a camera had given and that were replaced by newer ones, up to this frame.
    """

    index: int
    pixels: NDArray[np.uint8] | bytes = field(compare=False, repr=False)
    captured: float
    seconds: float | None = None
    dropped: int = 0


class VideoFile(Source):
    """An open video file.

    Attributes:
        total: Frames that its header states, or None where it states none.
        read: Frames read so far.
    """

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            BadInputError: There is no such file, or it is no video that OpenCV can read.
        """
        if not path.is_file():
            raise BadInputError(f"there is no video file {path}", remedy="check the path")
        self._path = path
        self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise BadInputError(
                f"{path} is damaged or no video that OpenCV can read ({path.stat().st_size} bytes)",
                remedy="convert it: ffmpeg -i FILE -c:v mjpeg video.avi",
            )
        stated = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.total = stated if stated > 0 else None
        self.read = 0
        self._fps = float(self._capture.get(cv2.CAP_PROP_FPS)) or None

    def items(self, stop: Stop) -> Iterator[Frame]:
        """Yield the frames; ``seconds`` is the index over the frame rate.

        Args:
            stop: Not looked at: the next frame is always at hand.

        Raises:
            BadInputError: Not one frame can be decoded.
        """
        while True:
            good, pixels = self._capture.read()
            if not good:
                break
            seconds = round(self.read / self._fps, 6) if self._fps else 0.0
            picture = cast("NDArray[np.uint8]", pixels)
            yield Frame(index=self.read, pixels=picture, captured=time.monotonic(), seconds=seconds)
            self.read += 1
        if not self.read:
            raise BadInputError(f"no frame of {self._path} can be decoded", remedy="check the file")

    @property
    def note(self) -> str | None:
        """How many frames are missing at the end, or None where all that the header states could be read."""
        if self.total is None or self.read >= self.total:
            return None
        return (
            f"{self._path} states {self.total} frames, {self.read} could be read: it is damaged or truncated"
        )

    def close(self) -> None:
        """Close the file."""
        self._capture.release()
