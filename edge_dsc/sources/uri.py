"""What a source is, by the way it is named; the schemes are those that Jetson users know."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from engines.errors import UsageError

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm"})
_SCHEMES = "csi://N, v4l2://N, /dev/videoN, rtsp://, http://, a file, a folder, a glob or -"
_STREAMS = frozenset({"rtsp", "rtsps", "http", "https"})


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
        width: Pixels a row.
        height: Rows.
        fps: Frames a second.
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
    """Tell what kind of source a text names; nothing is opened.

    Args:
        source: ``-``, ``csi://0?width=1280&height=720&fps=30``, ``v4l2:///dev/video0``, ``/dev/video0``,
            ``rtsp://...``, ``http://...``, a video file, or an image, a folder or a glob.

    Raises:
        UsageError: An unknown scheme, or a camera that is no number.
    """
    if source == "-":
        return SourceSpec(kind=SourceKind.LIST, name="-", target="-")
    scheme, marker, rest = source.partition("://")
    scheme = scheme.lower()
    if not marker:
        if re.fullmatch(r"/dev/video\d+", source):
            return SourceSpec(kind=SourceKind.LIVE, name=source, target=source, scheme="v4l2")
        kind = SourceKind.VIDEO if Path(source).suffix.lower() in VIDEO_SUFFIXES else SourceKind.FILES
        # A folder may be called "study.ts", a glob may end in it: only a single file is a video.
        single = not Path(source).is_dir() and not set("*?[") & set(source)
        return SourceSpec(kind=kind if single else SourceKind.FILES, name=source, target=source)
    if scheme in _STREAMS:
        short = "rtsp" if scheme.startswith("rtsp") else "http"
        return SourceSpec(kind=SourceKind.LIVE, name=hide_password(source), target=source, scheme=short)
    if scheme in ("csi", "v4l2"):
        return _camera(source, scheme, rest)
    raise UsageError(f"cannot read {scheme}:// sources ({source!r})", remedy=f"a source is {_SCHEMES}")


def _camera(source: str, scheme: str, rest: str) -> SourceSpec:
    device, _, query = rest.partition("?")
    match = re.fullmatch(r"/?(?:/dev/video)?(\d+)", device)
    if match is None:
        raise UsageError(f"{source!r} names no camera", remedy=f"write {scheme}://0")
    target = match.group(1) if scheme == "csi" else f"/dev/video{match.group(1)}"
    return SourceSpec(
        kind=SourceKind.LIVE, name=source, target=target, scheme=scheme, mode=_mode(source, query)
    )


def _mode(source: str, query: str) -> CameraMode:
    values = {name: found[-1] for name, found in parse_qs(query, keep_blank_values=True).items()}
    remedy = "such as csi://0?width=1280&height=720&fps=30"
    unknown = sorted(set(values) - {"width", "height", "fps"})
    if unknown:
        raise UsageError(f"{source!r} asks for {', '.join(unknown)}", remedy=remedy)
    for name, value in values.items():
        if not value.isascii() or not value.isdigit() or int(value) < 1:
            raise UsageError(f"{source!r}: {name} is {value!r}, not a positive number", remedy=remedy)
    return CameraMode(**{name: int(value) for name, value in values.items()})


def hide_password(url: str) -> str:
    """Return a URL as it may stand in results and logs: ``rtsp://user:***@host/path``."""
    parts = urlsplit(url)
    user, marker, host = parts.netloc.rpartition("@")
    if not marker:
        return url
    return parts._replace(netloc=f"{user.partition(':')[0]}:***@{host}").geturl()
