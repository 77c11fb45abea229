"""Samples: latencies in nanoseconds, exact or rounded, packed for JSON."""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.int64]  # latencies in nanoseconds, [calls]
_BYTES = 8
_LARGEST = 1 << 30  # bytes that one block may unpack to
_ASCENDING = "ascending:"  # then the differences are packed, from 0 on


def as_samples(values: Iterable[int]) -> Samples:
    """Return latencies in nanoseconds as ``int64 [n]``.

    Raises:
        ValueError: No value, or one that is no whole number, negative or too large.
    """
    numbers = list(values)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"sample {number!r} is not a whole number of nanoseconds")
    try:
        samples = np.array(numbers, dtype=np.int64)
    except OverflowError as error:
        raise ValueError(f"a sample is too large: {error}") from error
    return checked(samples)


def checked(samples: Samples) -> Samples:
    """Return the samples themselves.

    Raises:
        ValueError: There are none, or one is negative.
    """
    if not len(samples):
        raise ValueError("there are no samples")
    smallest = np.min(samples)
    if smallest < 0:
        raise ValueError(f"sample {smallest} is negative")
    return samples


def rounded_samples(samples: Samples, bits: int) -> Samples:
    """Return samples in ascending order, each rounded to so many significant bits.

    With 12 bits the error is at most one part in 4,096.
    """
    values = np.sort(samples)
    _, exponents = np.frexp(values.astype(np.float64))
    steps = np.int64(1) << np.maximum(0, exponents - bits).astype(np.int64)
    rounded: Samples = (values + steps // 2) // steps * steps
    return rounded


def encode_samples(samples: Samples) -> str:
    """Pack samples: little-endian int64, sorted into byte planes (all lowest bytes first), zlib, base64.

    The upper planes are nearly constant and vanish; exactness costs about three characters a sample. Samples in
    ascending order are packed as differences, with the word ``ascending:`` before them.
    """
    values, mark = samples, ""
    differences = np.diff(values, prepend=np.int64(0))
    if differences.min() >= 0:
        values, mark = differences, _ASCENDING
    data = values.astype("<i8", casting="safe").tobytes()
    planes = b"".join(data[plane::_BYTES] for plane in range(_BYTES))
    return mark + base64.b64encode(zlib.compress(planes, 6)).decode("ascii")


def decode_samples(packed: object) -> Samples:
    """Undo :func:`encode_samples`; a plain list of whole numbers is accepted too.

    Raises:
        ValueError: Neither of the two, damaged, empty or with a negative sample.
    """
    if isinstance(packed, list):
        return as_samples(packed)
    if not isinstance(packed, str):
        raise ValueError(f"samples are {type(packed).__name__}, not packed text or a list")
    values = _unpack(packed.removeprefix(_ASCENDING))
    if packed.startswith(_ASCENDING):
        if len(values) and values.min() < 0:
            raise ValueError("the packed samples are damaged: they descend")
        values = values.cumsum()
    return checked(values)


def _unpack(text: str) -> Samples:
    try:
        unpack = zlib.decompressobj()
        planes = unpack.decompress(base64.b64decode(text, validate=True), _LARGEST)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"the packed samples are damaged: {error}") from error
    count, rest = divmod(len(planes), _BYTES)
    if rest or not unpack.eof:
        raise ValueError("the packed samples are cut short")
    columns = np.frombuffer(planes, dtype=np.uint8).reshape(_BYTES, count)
    samples = np.ascontiguousarray(columns.T).view("<i8").reshape(count).astype(np.int64)
    return samples
