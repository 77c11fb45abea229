"""Latency samples as text: every nanosecond kept, about three bytes each."""

from __future__ import annotations

import base64
import binascii
import sys
import zlib
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Samples = array[int]

_BYTES = 8
_LARGEST = 1 << 30  # bytes that one block may unpack to


def as_samples(values: Iterable[int]) -> Samples:
    """Return latencies in nanoseconds as a compact ``int64`` array.

    Raises:
        ValueError: No value, a value that is no whole number, negative or too large.
    """
    numbers = list(values)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"sample {number!r} is not a whole number of nanoseconds")
    try:
        samples = array("q", numbers)
    except OverflowError as error:
        raise ValueError(f"a sample is too large: {error}") from error
    return checked(samples)


def checked(samples: Samples) -> Samples:
    """Return the samples themselves.

    Raises:
        ValueError: There is none, or one is negative.
    """
    if not samples:
        raise ValueError("there are no samples")
    if min(samples) < 0:
        raise ValueError(f"sample {min(samples)} is negative")
    return samples


def encode_samples(samples: Samples) -> str:
    """Pack samples: little-endian int64, sorted into byte planes (all lowest bytes first), zlib, base64.

    The upper planes are nearly constant and vanish; exactness costs about three characters a sample.
    """
    data = _little_endian(samples).tobytes()
    planes = b"".join(data[plane::_BYTES] for plane in range(_BYTES))
    return base64.b64encode(zlib.compress(planes, 6)).decode("ascii")


def decode_samples(packed: object) -> Samples:
    """Undo :func:`encode_samples`; a plain list of whole numbers is taken too.

    Raises:
        ValueError: Neither of the two, damaged, empty or with a negative sample.
    """
    if isinstance(packed, list):
        return as_samples(packed)
    if not isinstance(packed, str):
        raise ValueError(f"samples are {type(packed).__name__}, not packed text or a list")
    try:
        unpack = zlib.decompressobj()
        planes = unpack.decompress(base64.b64decode(packed, validate=True), _LARGEST)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"the packed samples are damaged: {error}") from error
    count, rest = divmod(len(planes), _BYTES)
    if rest or not unpack.eof:
        raise ValueError("the packed samples are cut short")
    data = bytearray(len(planes))
    for plane in range(_BYTES):
        data[plane::_BYTES] = planes[plane * count : (plane + 1) * count]
    return checked(_little_endian(array("q", bytes(data))))


def _little_endian(samples: Samples) -> Samples:
    if sys.byteorder == "big":
        samples = samples[:]
        samples.byteswap()
    return samples
