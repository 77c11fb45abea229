"""Cameras and streams: how OpenCV opens them, and a thread that keeps the newest frame."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_dsc.infer.source import Frame, Source, SourceSpec
from edge_dsc.infer.stop import Stop
from engines.errors import BadInputError, EdgeDscError, EnvironmentProblem, UsageError

_POLL_S = 0.1
_JOIN_S = 1.0
_TIMEOUT_MS = 5000
_NO_GSTREAMER = (
    "use JetPack's OpenCV (apt install python3-opencv, a venv with --system-site-packages and no "
    "opencv-python in it: pip uninstall opencv-python-headless); pip's has no GStreamer"
)
_NO_CAMERA = "check the cable; v4l2-ctl --list-devices (or nvgstcapture-1.0 for CSI) says what is there"


class Capture(Protocol):
    """An open camera or stream."""

    def read(self) -> NDArray[np.uint8] | bytes | None:
        """Wait for the next picture and return it, or None when the camera or stream is gone.

        Returns:
            ``uint8 [H, W]`` or ``uint8 [H, W, 3]`` BGR, or the bytes of a JPEG.
        """
        ...

    def release(self) -> None:
        """Close it; a second call does nothing."""
        ...


class OpenCvCapture:
    """A ``cv2.VideoCapture``, with its exceptions turned into "gone"."""

    def __init__(self, capture: cv2.VideoCapture, spec: SourceSpec, remedy: str) -> None:
        """Take over a capture.

        Args:
            capture: As OpenCV made it, open or not.
            spec: Named in the error.
            remedy: What to do where it is not open.

        Raises:
            BadInputError: It is not open.
        """
        if not capture.isOpened():
            capture.release()
            raise BadInputError(f"cannot open {spec.name}", remedy=remedy)
        self._capture = capture

    def read(self) -> NDArray[np.uint8] | None:
        """Wait for the next picture and return it, or None when the camera or stream is gone."""
        try:
            good, pixels = self._capture.read()
        except cv2.error:
            return None
        return cast("NDArray[np.uint8]", pixels) if good else None

    def release(self) -> None:
        """Close it."""
        self._capture.release()


def open_capture(spec: SourceSpec) -> Capture:
    """Open a live source.

    Raises:
        EnvironmentProblem: OpenCV lacks the backend that it needs.
        BadInputError: Nothing answers there.
    """
    if spec.scheme == "http":
        from edge_dsc.infer.mjpeg import open_mjpeg

        stream = open_mjpeg(spec, timeout_s=_TIMEOUT_MS / 1000)
        if stream is not None:
            return stream
    if spec.scheme == "csi":
        return _open_csi(spec)
    if spec.scheme == "v4l2":
        return _open_v4l2(spec)
    # Over UDP frames come torn. OpenCV does so itself, but for 4.11 (opencv/opencv#27091); a person's own wish stays.
    os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_flags;prefer_tcp")
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT_MS]
    capture = cv2.VideoCapture(spec.target, cv2.CAP_FFMPEG, limits)
    return OpenCvCapture(capture, spec, "check the address, the network and the password")


def csi_pipeline(spec: SourceSpec) -> str:
    """Return the GStreamer pipeline of a Jetson's CSI camera.

    The image processor gives NV12; its luma plane is the grey picture that the contract wants, so GRAY8 is
    asked for and a third of the bytes of BGR reach the CPU. The sink holds one frame, the newest.
    """
    mode = spec.mode
    width, height, fps = mode.width or 1280, mode.height or 720, mode.fps or 30
    return (
        f"nvarguscamerasrc sensor-id={spec.target} ! "
        f"video/x-raw(memory:NVMM), width=(int){width}, height=(int){height}, format=(string)NV12, "
        f"framerate=(fraction){fps}/1 ! nvvidconv ! video/x-raw, format=(string)GRAY8 ! "
        "appsink drop=true max-buffers=1 sync=false"
    )


def has_gstreamer() -> bool:
    """Say whether this OpenCV can run GStreamer pipelines."""
    try:
        return bool(cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER))
    except AttributeError:  # OpenCV before 4.5.4
        lines = cv2.getBuildInformation().splitlines()
        return any("GStreamer:" in line and "YES" in line for line in lines)


def _open_csi(spec: SourceSpec) -> Capture:
    if not has_gstreamer():
        raise EnvironmentProblem(
            f"{spec.name} needs GStreamer, and OpenCV {cv2.__version__} here has none", remedy=_NO_GSTREAMER
        )
    return OpenCvCapture(cv2.VideoCapture(csi_pipeline(spec), cv2.CAP_GSTREAMER), spec, _NO_CAMERA)


def _open_v4l2(spec: SourceSpec) -> Capture:
    device = Path(spec.target)
    if not device.exists():
        raise BadInputError(f"there is no camera {device}", remedy=_NO_CAMERA)
    # By number: V4L2 in pip's OpenCV refuses names.
    camera = cv2.VideoCapture(int(device.name.removeprefix("video")), cv2.CAP_V4L2)
    capture = OpenCvCapture(camera, spec, _NO_CAMERA)
    mode = spec.mode
    sides = (
        ("width", cv2.CAP_PROP_FRAME_WIDTH, mode.width),
        ("height", cv2.CAP_PROP_FRAME_HEIGHT, mode.height),
    )
    for _, key, value in (*sides, ("fps", cv2.CAP_PROP_FPS, mode.fps)):
        if value is not None:
            camera.set(key, value)
    camera.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the driver's queue is lag
    for name, key, value in sides:
        given = int(camera.get(key))
        if value is not None and given != value:
            capture.release()
            raise UsageError(
                f"{spec.name}: the camera gives {name} {given}, not {value}",
                remedy="v4l2-ctl --list-formats-ext says what it can",
            )
    return capture


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a camera or stream that is gone is waited for.

    Attributes:
        backoff_s: Seconds to wait before each attempt to open it again; the last one is repeated.
        give_up_s: End after so many seconds without a frame; None tries for ever.
    """

    backoff_s: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    give_up_s: float | None = None


class LiveSource(Source):
    """An open camera or stream: a thread reads it, and only the newest frame waits.

    Attributes:
        dropped: Frames that were replaced by newer ones before the engine was free.
        reconnects: How often it was lost and found again.
    """

    def __init__(
        self,
        spec: SourceSpec,
        *,
        open_source: Callable[[SourceSpec], Capture] = open_capture,
        patience: Patience = Patience(),
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open it and begin to read.

        Args:
            spec: A live source.
            open_source: Opens it.
            patience: How long it is waited for when it is gone.
            say: Called with a line when it is lost and when it is back.
            clock: Monotonic, seconds.

        Raises:
            BadInputError: It cannot be opened.
            EnvironmentProblem: OpenCV lacks what it needs.
        """
        self._spec, self._open, self._patience = spec, open_source, patience
        self._say, self._clock = say, clock
        self._closing = Stop()
        self._changed = threading.Condition()
        self._newest: Frame | None = None
        self._index = 0
        self._attempts = 0
        self._lost: float | None = None
        self._ended: BaseException | None = None
        self._done = False
        first = open_source(spec)
        self._thread = threading.Thread(target=self._read, args=(first,), name="camera", daemon=True)
        self._thread.start()

    def items(self, stop: Stop) -> Iterator[Frame]:
        """Yield the newest frame each time the caller is free for one.

        Args:
            stop: Ends the waiting.

        Raises:
            BadInputError: The source stayed away for longer than the patience lasts.
        """
        while not stop.asked:
            with self._changed:
                if self._newest is None and not self._done:
                    self._changed.wait(_POLL_S)
                frame, self._newest = self._newest, None
                done, ended = self._done, self._ended
            if frame is not None:
                yield frame
            elif ended is not None:
                raise ended
            elif done:
                return

    def close(self) -> None:
        """Stop reading. A read that hangs in the driver is left behind: it ends with the process."""
        self._closing.ask()
        self._thread.join(_JOIN_S)

    def _read(self, capture: Capture | None) -> None:
        try:
            while capture is not None and not self._closing.asked:
                pixels = capture.read()
                captured = self._clock()
                if pixels is not None:
                    self._put(pixels, captured)
                    continue
                capture.release()
                capture = self._open_again()
            if capture is not None:
                capture.release()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that takes the frames
            self._ended = error
        finally:
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def _put(self, pixels: NDArray[np.uint8] | bytes, captured: float) -> None:
        if self._lost is not None:  # only a frame proves that it is back: a bad cable opens and gives none
            self.reconnects += 1
            self._report(f"{self._spec.name} is back after {captured - self._lost:.1f} s")
            self._lost, self._attempts = None, 0
        with self._changed:
            self.dropped += self._newest is not None
            self._newest = Frame(index=self._index, pixels=pixels, captured=captured, dropped=self.dropped)
            self._index += 1
            self._changed.notify_all()

    def _open_again(self) -> Capture | None:
        if self._lost is None:
            self._lost = self._clock()
            self._report(f"{self._spec.name} is gone: trying to open it again")
        else:
            self._check_patience("it opens and gives no frame", "check the cable and the camera's mode")
        pauses = self._patience.backoff_s
        while not self._closing.wait(pauses[min(self._attempts, len(pauses) - 1)]):
            self._attempts += 1
            try:
                return self._open(self._spec)
            except EdgeDscError as error:
                self._check_patience(error.what, error.remedy)
        return None

    def _check_patience(self, what: str, remedy: str) -> None:
        away = self._clock() - (self._lost or 0.0)
        if self._patience.give_up_s is not None and away >= self._patience.give_up_s:
            raise BadInputError(f"{self._spec.name} stayed away for {away:.0f} s: {what}", remedy=remedy)

    def _report(self, line: str) -> None:
        if self._say is not None:
            self._say(line)
