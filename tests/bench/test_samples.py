from __future__ import annotations

import base64
import zlib

import numpy as np
import pytest

from bench.report import as_samples, decode_samples, encode_samples, rounded_samples


@pytest.mark.parametrize("values", [[0], [1, 2, 3], [3, 1], [255, 256, 65_536, 2**53]])
def test_packed_samples_come_back_exactly(values: list[int]) -> None:
    found = decode_samples(encode_samples(as_samples(values)))
    assert (found.dtype, found.tolist()) == (np.int64, values)


def test_the_packing_is_as_documented() -> None:
    planes = zlib.decompress(base64.b64decode(encode_samples(as_samples([0x0304, 0x0102]))))
    assert planes == bytes([4, 2, 3, 1]) + bytes(12)
    mark, _, packed = encode_samples(as_samples([0x0102, 0x0304])).partition(":")
    assert mark == "ascending"
    assert zlib.decompress(base64.b64decode(packed)) == bytes([2, 2, 1, 2]) + bytes(12)


def test_samples_as_the_first_release_packed_them_load() -> None:
    planes = bytes([2, 4, 1, 3]) + bytes(12)
    assert list(decode_samples(base64.b64encode(zlib.compress(planes)).decode())) == [0x0102, 0x0304]


def test_a_millisecond_costs_less_than_four_characters() -> None:
    values = np.random.default_rng(0).lognormal(np.log(3e6), 0.05, 50_000).astype(np.int64).tolist()
    assert len(encode_samples(as_samples(values))) < 4 * len(values)


def test_a_plain_list_is_taken() -> None:
    assert decode_samples([5, 6]).tolist() == [5, 6]


def test_samples_are_rounded_to_significant_bits_and_ascend() -> None:
    found = rounded_samples(as_samples([4097, 4095, 0, 1, 8195, 2**40 + 1]), 12)
    assert found.tolist() == [0, 1, 4095, 4098, 8196, 2**40]
    values = np.random.default_rng(0).integers(1, 2**50, 20_000)
    rounded = rounded_samples(values, 12)
    assert np.all(np.abs(rounded / np.sort(values) - 1) <= 1 / 4096)


def test_only_whole_nanoseconds_are_packed() -> None:
    with pytest.raises(TypeError, match="Cannot cast"):
        encode_samples(np.array([1.5]))  # type: ignore[arg-type]


GOOD = encode_samples(as_samples([3, 2, 1]))


@pytest.mark.parametrize(
    ("packed", "text"),
    [
        ([], "no samples"),
        ([1, -2], "sample -2 is negative"),
        ([1.5], "sample 1.5 is not a whole number"),
        ([float("nan")], "sample nan is not a whole number"),
        ([True], "sample True is not a whole number"),
        (["1"], "sample '1' is not a whole number"),
        ([2**63], "too large"),
        ([10**16 + 1], "a sample is too large: 10000000000000001 ns"),
        (None, "samples are NoneType"),
        ("%%%", "damaged"),
        (GOOD[:-8], "damaged|cut short"),
        (base64.b64encode(zlib.compress(b"1234567")).decode(), "cut short"),
        (base64.b64encode(zlib.compress(b"")).decode(), "no samples"),
        (encode_samples(np.array([1, -7])), "sample -7 is negative"),
        ("ascending:" + encode_samples(np.array([5, -1])), "they descend"),
        ("ascending:", "damaged|cut short"),
    ],
)
def test_impossible_samples_are_refused(packed: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        decode_samples(packed)
