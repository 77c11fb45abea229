"""How OpenCV opens a camera or a stream: backends, pipelines, time limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from edge_dsc.sources.uri import SourceSpec
from engines.errors import BadInputError, EnvironmentProblem, UsageError
from engines.images import Array
from engines.packages import load

_TIMEOUT_MS = 5000
_NO_GSTREAMER = (
    "use JetPack's OpenCV (apt install python3-opencv, a venv with --system-site-packages and no "
    "opencv-python in it: pip uninstall opencv-python-headless); pip's has no GStreamer"
)
_NO_CAMERA = "check the cable; v4l2-ctl --list-devices (or nvgstcapture-1.0 for CSI) says what is there"


class Capture(Protocol):
    """An open camera or stream."""

    def read(self) -> Array | None:
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

    def __init__(self, capture: Any, failure: type[Exception]) -> None:
        self._capture, self._failure = capture, failure

    def read(self) -> Array | None:
        """Wait for the next picture and return it, or None when the camera or stream is gone."""
        try:
            good, pixels = self._capture.read()
        except self._failure:
            return None
        return pixels if good else None

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
        from edge_dsc.sources.mjpeg import open_mjpeg

        stream = open_mjpeg(spec, timeout_s=_TIMEOUT_MS / 1000)
        if stream is not None:
            return stream
    return {"csi": _open_csi, "v4l2": _open_v4l2}.get(spec.scheme, _open_stream)(spec)


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
    cv2 = load("cv2")
    try:
        return bool(cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER))
    except AttributeError:  # OpenCV before 4.5.4
        lines = cv2.getBuildInformation().splitlines()
        return any("GStreamer:" in line and "YES" in line for line in lines)


def _open_csi(spec: SourceSpec) -> Capture:
    cv2 = load("cv2")
    if not has_gstreamer():
        raise EnvironmentProblem(
            f"{spec.name} needs GStreamer, and OpenCV {cv2.__version__} here has none", remedy=_NO_GSTREAMER
        )
    return _opened(cv2, cv2.VideoCapture(csi_pipeline(spec), cv2.CAP_GSTREAMER), spec, _NO_CAMERA)


def _open_v4l2(spec: SourceSpec) -> Capture:
    cv2 = load("cv2")
    device = Path(spec.target)
    if not device.exists():
        raise BadInputError(f"there is no camera {device}", remedy=_NO_CAMERA)
    # By number: V4L2 in pip's OpenCV refuses names.
    camera = cv2.VideoCapture(int(device.name.removeprefix("video")), cv2.CAP_V4L2)
    capture = _opened(cv2, camera, spec, _NO_CAMERA)
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


def _open_stream(spec: SourceSpec) -> Capture:
    cv2 = load("cv2")
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT_MS]
    capture = cv2.VideoCapture(spec.target, cv2.CAP_FFMPEG, limits)
    return _opened(cv2, capture, spec, "check the address, the network and the password")


def _opened(cv2: Any, capture: Any, spec: SourceSpec, remedy: str) -> OpenCvCapture:
    if not capture.isOpened():
        capture.release()
        raise BadInputError(f"cannot open {spec.name}", remedy=remedy)
    return OpenCvCapture(capture, cv2.error)
