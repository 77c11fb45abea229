from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest

from calibration.layers import find_layers
from calibration.table import CalibrationTable
from calibration.tensorrt import (
    TrtCache,
    check_cache,
    decode_scale,
    encode_scale,
    read_cache,
    version_number,
    write_cache,
)
from engines.errors import ArtefactError, UsageError


def test_scales_are_big_endian_float32_bits() -> None:
    # Lines of NVIDIA's own: 1/127 of pixels scaled to 1, 2.008 of raw pixels.
    assert encode_scale(1 / 127) == "3c010204"
    assert decode_scale("3c008912") == pytest.approx(0.00784518, rel=1e-6)
    assert decode_scale("4000889d") == pytest.approx(2.00834, rel=1e-5)
    assert encode_scale(decode_scale("4000889d")) == "4000889d"
    assert decode_scale("1") == 2**-149


def test_the_number_of_a_release() -> None:
    numbers = [version_number(text) for text in ("8.6.1", "8.6.2.3", "10.0.1", "10.3.0", "10.13.0.35")]
    assert numbers == [8601, 8602, 100001, 100300, 101300]
    with pytest.raises(UsageError, match=r"TensorRT 11\.0\.0 reads no calibration cache"):
        version_number("11.0.0")


def test_a_cache_byte_for_byte(small_model: Path, small_table: CalibrationTable) -> None:
    table = dataclasses.replace(
        small_table, ranges={"pixels": (0.0, 200.0), "features": (0.0, 12.7), "hidden": (-1.0, 127.0)}
    )
    text = write_cache(table, onnx.load(small_model), "8.6.2")
    assert text == (
        "TRT-8602-MinMaxCalibration\n"
        "cast: 40008102\n"
        "pixels: 40008102\n"
        "conv: 3dcccccd\n"
        "relu: 3dcccccd\n"
        "pool: 3dcccccd\n"
        "features: 3dcccccd\n"
        "matmul: 3f800000\n"
        "dense_out: 3f800000\n"
        "hidden: 3f800000\n"
    )
    entropy = write_cache(dataclasses.replace(table, method="percentile"), onnx.load(small_model), "10.3.0")
    assert entropy.splitlines()[0] == "TRT-100300-EntropyCalibration2"
    assert entropy.splitlines()[1:] == text.splitlines()[1:]


@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_a_cache_is_read_back_and_checked(
    deployed_models: dict[str, Path], network_tables: dict[str, CalibrationTable], architecture: str
) -> None:
    model, table = onnx.load(deployed_models[architecture]), network_tables[architecture]
    cache = read_cache(write_cache(table, model, "10.3.0"), source="c")
    assert {layer.input for layer in find_layers(model)} <= set(cache.scales)
    check_cache(cache, table, model, "10.3.0")
    with pytest.raises(ArtefactError, match="the cache is for TensorRT 100300, not 8601"):
        check_cache(cache, table, model, "8.6.1")
    name = find_layers(model)[2].input
    wrong = TrtCache(cache.version, cache.algorithm, {**cache.scales, name: 1.5})
    with pytest.raises(ArtefactError, match=rf"gives {name} the scale 1\.5, the table gives it 0\.\d+"):
        check_cache(wrong, table, model, "10.3.0")
    fewer = TrtCache(cache.version, cache.algorithm, {k: v for k, v in cache.scales.items() if k != name})
    with pytest.raises(ArtefactError, match=f"gives {name} the scale None"):
        check_cache(fewer, table, model, "10.3.0")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "line 1 is ''"),
        ("TRT-8.6-EntropyCalibration2\n", "line 1"),
        ("TRT-8601-EntropyCalibration2\nx 3f800000\n", "line 2 is 'x 3f800000'"),
        ("TRT-8601-EntropyCalibration2\nx: 3f800000\nx: 3f800000\n", "line 3"),
        ("TRT-8601-EntropyCalibration2\nx: bf800000\n", "line 2"),
        ("TRT-8601-EntropyCalibration2\nx: 7f800000\n", "line 2"),
    ],
)
def test_a_text_that_is_no_cache_is_refused(text: str, line: str) -> None:
    with pytest.raises(ArtefactError, match=f"^c {line}"):
        read_cache(text, source="c")


def test_scaled_channels_cannot_be_told(small_model: Path, small_table: CalibrationTable) -> None:
    table = dataclasses.replace(small_table, method="mse", channel_factors={"features": (1.0, 2.0, 1.0, 1.0)})
    with pytest.raises(UsageError, match="a network with scaled channels"):
        write_cache(table, onnx.load(small_model), "8.6.1")
    with pytest.raises(UsageError, match="no calibration algorithm 'Legacy'"):
        write_cache(small_table, onnx.load(small_model), "8.6.1", algorithm="Legacy")
