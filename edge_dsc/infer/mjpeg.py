"""MJPEG over HTTP, with a parser of our own instead of OpenCV's FFmpeg, for two reasons.

When the cable is pulled in the middle of a picture, FFmpeg hands out the half of it as a whole one; here it is none.
And FFmpeg decodes every frame, to colour. Here a picture stays a JPEG until the engine is free for it: a dropped frame
costs no decoding, and the others are decoded straight to grey, by the function that decodes image files.
"""

from __future__ import annotations

import http.client
import io
import re
import time
from base64 import b64encode
from contextlib import ExitStack
from typing import Any
from urllib.parse import unquote, urlsplit

from edge_dsc.infer.source import SourceSpec
from engines.errors import BadInputError

# What a server may send before the response, and then before each picture, and how long it may take for it. A second
# limit is the timeout of each wait for data, which a byte now and then keeps from ever passing.
_MAX_BYTES = 64 << 20
_MAX_WAIT_S = 10.0
_MAX_HEADERS = 100  # of a part; as many as http.client allows a response
_MAX_LINE = 8192
_END_OF_IMAGE = b"\xff\xd9"


class _Bounded(io.RawIOBase):
    """A socket's file that fails when too much or too long was read since the last picture."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self.begin()

    def begin(self) -> None:
        """Begin to count for the next picture."""
        self._left, self._until = _MAX_BYTES, time.monotonic() + _MAX_WAIT_S

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._left <= 0:
            raise TimeoutError(f"{_MAX_BYTES >> 20} MiB without a picture")
        if time.monotonic() >= self._until:
            raise TimeoutError(f"{_MAX_WAIT_S:g} s without a picture")
        count = self._raw.readinto(buffer)
        self._left -= count or 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _BoundedResponse(http.client.HTTPResponse):
    """A response that is read through :class:`_Bounded`: status, headers, chunks, trailers and parts."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.bounded = _Bounded(self.fp.detach())
        self.fp = io.BufferedReader(self.bounded)


class MjpegStream:
    """A ``multipart/x-mixed-replace`` response, one JPEG in each part."""

    def __init__(self, opened: ExitStack, response: _BoundedResponse, boundary: bytes) -> None:
        self._opened, self._response = opened, response
        self._delimiter = b"--" + boundary

    def read(self) -> bytes | None:
        """Wait for the next picture and return the bytes of its JPEG, or None when the stream is over.

        A part that the stream ends in the middle of is no picture. A stream without a picture in 64 MiB or in ten
        seconds counts as over, whatever it sends.
        """
        self._response.bounded.begin()
        try:
            return self._read_part()
        except (OSError, http.client.HTTPException, ValueError):
            return None

    def release(self) -> None:
        """Close the connection."""
        self._opened.close()

    def _read_part(self) -> bytes | None:
        line = self._line()
        while line.rstrip(b"\r\n") != self._delimiter:  # the preamble, or the line end after a part
            if line.rstrip(b"\r\n") == self._delimiter + b"--":
                return None
            line = self._line()
        length, headers = None, 0
        while header := self._line().strip():
            headers += 1
            if headers > _MAX_HEADERS:
                raise ValueError(f"more than {_MAX_HEADERS} headers")
            name, _, value = header.partition(b":")
            if name.strip().lower() == b"content-length":
                length = int(value)
        if length is None:
            return self._read_to_delimiter()
        if not 0 < length <= _MAX_BYTES:
            raise ValueError(f"a part of {length} bytes")
        data = self._response.read(length)
        return data if len(data) == length else None

    def _read_to_delimiter(self) -> bytes:
        # Without a length the part ends at the next delimiter. Lines of a JPEG are of any length, so the end of
        # the image is looked for instead: what follows belongs to nobody.
        data = bytearray()
        while not data[-4:].rstrip(b"\r\n").endswith(_END_OF_IMAGE):
            piece = self._response.readline(_MAX_LINE)
            if not piece or len(data) > _MAX_BYTES:
                raise ValueError("a part without end")
            data += piece
        return bytes(data)

    def _line(self) -> bytes:
        line = self._response.readline(_MAX_LINE)
        if not line:
            raise ValueError("the stream is over")
        return line


def open_mjpeg(spec: SourceSpec, *, timeout_s: float) -> MjpegStream | None:
    """Ask a URL for MJPEG.

    Args:
        spec: An ``http`` source.
        timeout_s: For connecting, and for each wait for data.

    Returns:
        The stream, or None where the answer is something else that FFmpeg may know.

    Raises:
        BadInputError: Nothing answers, or with an error, compressed, or with parts that nothing separates.
    """
    with ExitStack() as opened:
        try:
            response = _ask(spec, timeout_s, opened)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise BadInputError(
                f"cannot open {spec.name}: {reason}", remedy="check the address and the network"
            ) from error
        except http.client.HTTPException as error:  # its text is the server's
            raise BadInputError(
                f"{spec.name} does not speak HTTP ({type(error).__name__})",
                remedy="check the address and the port",
            ) from None
        remedy = "check the path and the password"
        if response.status != http.client.OK:
            meaning = http.client.responses.get(
                response.status, ""
            )  # the server's own words may be any bytes
            raise BadInputError(f"{spec.name} answers {response.status} {meaning}".rstrip(), remedy=remedy)
        encoding = response.getheader("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise BadInputError(
                f"{spec.name} is compressed ({encoding[:20]!r})", remedy="let it send MJPEG as it is"
            )
        content = response.getheader("Content-Type", "")
        if not content.lower().startswith("multipart/"):
            return None
        match = re.search(r'boundary="?([^";]+)', content)
        if match is None:
            raise BadInputError(f"{spec.name} names no boundary of its pictures", remedy=remedy)
        # Some cameras write the two dashes of the delimiter into the boundary's name too.
        boundary = match.group(1).strip().removeprefix("--").encode("latin-1")
        return MjpegStream(opened.pop_all(), response, boundary)


def _ask(spec: SourceSpec, timeout_s: float, opened: ExitStack) -> _BoundedResponse:
    parts = urlsplit(spec.target)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
    opened.callback(connection.close)
    connection.response_class = _BoundedResponse
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {"User-Agent": "edge-dsc", "Accept": "multipart/x-mixed-replace, */*"}
    if parts.username is not None:
        password = unquote(parts.password or "")
        token = b64encode(f"{unquote(parts.username)}:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {token}"
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    assert isinstance(response, _BoundedResponse)
    opened.callback(response.close)
    return response
