"""MJPEG over HTTP, with a parser of our own instead of OpenCV's FFmpeg, for two reasons.

When the cable is pulled in the middle of a picture, FFmpeg hands out the half of it as a whole one; here it is none.
And FFmpeg decodes every frame, to colour. Here a picture stays a JPEG until the engine is free for it: a dropped frame
costs no decoding, and the others are decoded straight to grey, by the function that decodes image files.
"""

from __future__ import annotations

import http.client
import re
from base64 import b64encode
from urllib.parse import unquote, urlsplit

from edge_dsc.infer.source import SourceSpec
from engines.errors import BadInputError

_MAX_PART = 64 << 20
_MAX_LINE = 8192
_END_OF_IMAGE = b"\xff\xd9"


class MjpegStream:
    """A ``multipart/x-mixed-replace`` response, one JPEG in each part."""

    def __init__(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse, boundary: bytes
    ) -> None:
        self._connection, self._response = connection, response
        self._delimiter = b"--" + boundary

    def read(self) -> bytes | None:
        """Wait for the next picture and return the bytes of its JPEG, or None when the stream is over.

        A part that the stream ends in the middle of is no picture.
        """
        try:
            return self._read_part()
        except (OSError, http.client.HTTPException, ValueError):
            return None

    def release(self) -> None:
        """Close the connection."""
        self._response.close()
        self._connection.close()

    def _read_part(self) -> bytes | None:
        line = self._line()
        while line.rstrip(b"\r\n") != self._delimiter:  # the preamble, or the line end after a part
            if line.rstrip(b"\r\n") == self._delimiter + b"--":
                return None
            line = self._line()
        length = None
        while header := self._line().strip():
            name, _, value = header.partition(b":")
            if name.strip().lower() == b"content-length":
                length = int(value)
        if length is None:
            return self._read_to_delimiter()
        if not 0 < length <= _MAX_PART:
            raise ValueError(f"a part of {length} bytes")
        data = self._response.read(length)
        return data if len(data) == length else None

    def _read_to_delimiter(self) -> bytes:
        # Without a length the part ends at the next delimiter. Lines of a JPEG are of any length, so the end of
        # the image is looked for instead: what follows belongs to nobody.
        data = bytearray()
        while not data[-4:].rstrip(b"\r\n").endswith(_END_OF_IMAGE):
            piece = self._response.readline(_MAX_LINE)
            if not piece or len(data) > _MAX_PART:
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
        BadInputError: Nothing answers, or with an error.
    """
    parts = urlsplit(spec.target)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    try:
        connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"User-Agent": "edge-dsc", "Accept": "multipart/x-mixed-replace, */*"}
        if parts.username is not None:
            password = unquote(parts.password or "")
            token = b64encode(f"{unquote(parts.username)}:{password}".encode()).decode()
            headers["Authorization"] = f"Basic {token}"
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadInputError(
            f"cannot open {spec.name}: {reason}", remedy="check the address and the network"
        ) from error
    if response.status != http.client.OK:
        connection.close()
        raise BadInputError(
            f"{spec.name} answers {response.status} {response.reason}",
            remedy="check the path and the password",
        )
    content = response.getheader("Content-Type", "")
    match = re.search(r'boundary="?([^";]+)', content)
    if not content.lower().startswith("multipart/") or match is None:
        connection.close()
        return None
    # Some cameras write the two dashes of the delimiter into the boundary's name too.
    return MjpegStream(connection, response, match.group(1).strip().removeprefix("--").encode("latin-1"))
