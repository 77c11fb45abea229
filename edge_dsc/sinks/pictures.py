"""Pictures on disk: annotated ones in a folder or a video, unsure ones in a folder for labelling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from edge_dsc.loop.answers import Answer
from edge_dsc.sinks.drawing import draw_answer
from edge_dsc.sources.uri import VIDEO_SUFFIXES, SourceKind
from engines.dicom import is_dicom
from engines.errors import EnvironmentProblem, ImageError, UsageError
from engines.files import write_bytes
from engines.images import Array, read_bytes
from engines.packages import load

_VIDEO_FPS = 25.0
_LIVE_PAUSE_S = 1.0
_CODECS = {".avi": "MJPG", ".mp4": "mp4v", ".mkv": "mp4v", ".mov": "mp4v"}


class AnnotatedFolder:
    """One annotated JPEG a picture, under the source's own folders and names."""

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

    def write(self, answer: Answer) -> None:
        """Write one; a picture that could not be decoded has none.

        Raises:
            EnvironmentProblem: The disk is full, or the place cannot be written.
        """
        if answer.picture is not None:
            drawn = draw_answer(answer.picture, answer, self._labels)
            write_bytes(self._folder / picture_name(answer, self._source, ".jpg"), encode(drawn, ".jpg"))

    def close(self) -> None:
        """Do nothing: each picture is whole."""


class AnnotatedVideo:
    """An annotated video; its first frame decides the size."""

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
        self._writer: Any = None
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
            self._open(drawn)
        if (drawn.shape[1], drawn.shape[0]) != self._size:  # a camera came back in another mode
            drawn = load("cv2").resize(drawn, self._size)
        self._writer.write(drawn)
        self._frames += 1

    def close(self) -> None:
        """Finish the file and look for its last frame: OpenCV says nothing of a full disk.

        Raises:
            EnvironmentProblem: The file does not hold every frame.
        """
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        cv2 = load("cv2")
        written = cv2.VideoCapture(str(self._path))
        # A cut .avi, .mp4 or .mov tells another number; a cut .mkv tells this one and does not have it.
        told = int(written.get(cv2.CAP_PROP_FRAME_COUNT))
        written.set(cv2.CAP_PROP_POS_FRAMES, self._frames - 1)
        whole = told == self._frames and written.grab()
        written.release()
        if not whole:
            raise EnvironmentProblem(
                f"{self._path} does not hold all of its {self._frames} frames",
                remedy="free some space or choose another place with --annotate",
            )

    def _open(self, drawn: Array) -> None:
        cv2 = load("cv2")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._size = (drawn.shape[1], drawn.shape[0])
        codec = cv2.VideoWriter_fourcc(*_CODECS[self._path.suffix.lower()])
        self._writer = cv2.VideoWriter(str(self._path), codec, _VIDEO_FPS, self._size)
        if not self._writer.isOpened():
            raise EnvironmentProblem(f"cannot write {self._path}", remedy="name an .avi in a writable folder")


class UnsureFolder:
    """Keeps pictures whose best class stays under a threshold, unannotated, for labelling.

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
        self.kept = 0
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
        original = _original(answer)
        if original is not None:
            write_bytes(self._folder / picture_name(answer, self._source, ""), original)
        elif answer.picture is not None:
            target = self._folder / picture_name(answer, self._source, ".png")
            write_bytes(target, encode(answer.picture, ".png"))
        self.kept += 1

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


def encode(picture: Array, suffix: str) -> bytes:
    """Encode pixels as JPEG or PNG.

    Raises:
        EnvironmentProblem: OpenCV cannot.
    """
    good, data = load("cv2").imencode(suffix, picture)
    if not good:
        raise EnvironmentProblem(f"OpenCV cannot encode {suffix}", remedy="free some memory")
    return bytes(data)


def refuse_inside(folder: Path, source: Path | None, option: str) -> None:
    """Refuse to write pictures into the folder that is being read.

    Raises:
        UsageError: ``folder`` lies in ``source``.
    """
    if source is not None and folder.resolve().is_relative_to(source.resolve()):
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
