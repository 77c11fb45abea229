"""TensorRT's text cache, and its calibrators over a stand-in, their names held against the real releases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from double_cuda import DoubleCuda, DoubleDriver, Error
from double_tensorrt import DoubleTensorRt
from msgspec import structs

from calibration.layers import find_layers
from calibration.qdq import activation_ranges
from calibration.select import CalibrationSet
from calibration.table import CalibrationTable
from calibration.tensorrt import (
    OwnCalibration,
    TrtCache,
    cache_of_table,
    check_cache,
    check_release,
    decode_scale,
    encode_scale,
    read_cache,
    table_of_cache,
    version_number,
    write_cache,
)
from engines import packages
from engines.contract import ModelContract
from engines.errors import ArtefactError, EnvironmentProblem, UsageError
from engines.graph import load_model
from engines.trt import cuda as cuda_driver
from engines.trt.cuda import bound_device

SURFACE = json.loads((Path(__file__).parents[1] / "engines" / "tensorrt_api.json").read_text())
UNTIL_10 = list(range(6))  # 8.6.1 to 10.16
METHODS = ("get_batch_size", "get_batch", "read_calibration_cache", "write_calibration_cache")


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
    table = structs.replace(
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
    entropy = write_cache(structs.replace(table, method="percentile"), onnx.load(small_model), "10.3.0")
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
    table = structs.replace(small_table, method="mse", channel_factors={"features": (1.0, 2.0, 1.0, 1.0)})
    with pytest.raises(UsageError, match="a network with scaled channels"):
        write_cache(table, onnx.load(small_model), "8.6.1")
    with pytest.raises(UsageError, match="no calibration algorithm 'Legacy'"):
        write_cache(small_table, onnx.load(small_model), "8.6.1", algorithm="Legacy")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[DoubleCuda]:
    double = DoubleCuda()
    monkeypatch.setattr(packages, "load", lambda name: {"pycuda.driver": double}[name])
    monkeypatch.setattr(cuda_driver, "load_driver", lambda: DoubleDriver(double))
    yield double
    assert double.idle


@pytest.fixture
def trt(cuda: DoubleCuda) -> Iterator[DoubleTensorRt]:
    with bound_device(1):  # as a build has it: batches go where the builder works
        yield DoubleTensorRt("8.6", cuda)


@pytest.fixture
def contract(small_model: Path) -> ModelContract:
    return load_model(small_model).contract


@pytest.mark.parametrize("name", ["IInt8EntropyCalibrator2", "IInt8MinMaxCalibrator"])
def test_the_names_are_those_of_the_releases_until_10(name: str) -> None:
    members = SURFACE["classes"][name]
    assert {member: members[member] for member in ("", *METHODS)} == dict.fromkeys(("", *METHODS), UNTIL_10)


@pytest.mark.parametrize(
    ("method", "base"),
    [("tensorrt-entropy", "IInt8EntropyCalibrator2"), ("tensorrt-minmax", "IInt8MinMaxCalibrator")],
)
def test_whole_batches_are_fed_in_the_order_of_the_draw(
    small_set: CalibrationSet,
    contract: ModelContract,
    trt: DoubleTensorRt,
    cuda: DoubleCuda,
    method: str,
    base: str,
) -> None:
    images = replace(small_set, drawn=small_set.drawn[:20])
    with OwnCalibration(method, contract, images).attach(trt) as made:
        assert isinstance(made, getattr(trt, base))
        assert made.started
        assert made.get_batch_size() == 8
        for start in (0, 8):
            (address,) = made.get_batch(["image"])
            expected = small_set.pixels[list(small_set.drawn[start : start + 8])]
            np.testing.assert_array_equal(
                cuda.need_memory(address, expected.size).reshape(expected.shape), expected
            )
        assert made.get_batch(["image"]) is None  # 4 are left, no whole batch
        assert {name for name in vars(type(made)) if not name.startswith("_")} == set(METHODS)


def test_a_cache_is_written_and_offered_again(
    small_set: CalibrationSet, contract: ModelContract, trt: DoubleTensorRt
) -> None:
    own = OwnCalibration("tensorrt-entropy", contract, small_set)
    with own.attach(trt) as made:
        assert made.read_calibration_cache() is None
        made.write_calibration_cache(memoryview(b"TRT-8601-EntropyCalibration2\n"))
    with OwnCalibration("tensorrt-entropy", contract, cache=own.cache).attach(trt) as again:
        assert again.read_calibration_cache() == b"TRT-8601-EntropyCalibration2\n"


def test_failures_are_raised_when_the_builder_is_done(
    small_set: CalibrationSet, contract: ModelContract, trt: DoubleTensorRt, cuda: DoubleCuda
) -> None:
    own = OwnCalibration("tensorrt-entropy", contract, small_set)
    with pytest.raises(Error, match="memcpy_htod_async failed"), own.attach(trt) as made:
        cuda.fail["memcpy_htod_async"] = 0
        assert made.get_batch(["image"]) is None
        cuda.fail.clear()
        assert made.get_batch(["image"]) is None
        raise EnvironmentProblem("cannot build", remedy="that is not why")
    with (
        pytest.raises(EnvironmentProblem, match="TensorRT does not take the cache that it wrote") as caught,
        OwnCalibration("tensorrt-minmax", contract, cache=b"").attach(trt) as made,
    ):
        assert made.get_batch(["image"]) is None
    assert caught.value.remedy.endswith("--calib-method tensorrt-minmax")


def test_a_table_holds_the_cache_that_it_was_made_of(small_set: CalibrationSet, small_model: Path) -> None:
    text = b"TRT-8601-MinMaxCalibration\nimage: 3c010204\n(Unnamed Layer* 3) [Constant]_output: 1\n"
    images = replace(small_set, drawn=small_set.drawn[:20])
    table = table_of_cache(text, "tensorrt-minmax", 7, load_model(small_model), images, "8.6.1")
    assert (table.method, table.seed, table.implicit) == ("tensorrt-minmax", 7, True)
    assert table.ranges["image"] == pytest.approx((-1, 1))
    assert {image.sha256 for image in table.images} == {
        small_set.images[place].sha256 for place in small_set.drawn[:16]
    }
    held, written = (read_cache(cache, source="c") for cache in (text.decode(), cache_of_table(table)))
    assert held == written
    check_release(table, "8.6.1.post1")
    with pytest.raises(ArtefactError, match=r"is of TensorRT 8\.6\.1, 10\.3\.0 is here") as caught:
        check_release(table, "10.3.0")
    assert "--calib-method tensorrt-minmax" in caught.value.remedy
    with pytest.raises(UsageError, match="no Q/DQ graph is made of them"):
        activation_ranges(onnx.load(small_model), table, signed=True)
    with pytest.raises(EnvironmentProblem, match=r"TensorRT 8\.6\.1 wrote no calibration cache"):
        table_of_cache(None, "tensorrt-minmax", 7, load_model(small_model), images, "8.6.1")


def test_a_cache_of_a_branched_graph_holds_every_tensor_with_a_range(
    branched_models: dict[str, Path], branched_tables: dict[str, CalibrationTable]
) -> None:
    table = structs.replace(branched_tables["residual"], method="entropy")
    text = write_cache(table, onnx.load(branched_models["residual"]), "8.6.2")
    cache = read_cache(text, source="cache")
    assert set(cache.scales) == set(table.ranges)
    expected = {name: max(-low, high) / 127 for name, (low, high) in table.ranges.items()}
    expected["planes.out"] = 255 / 127
    assert cache.scales == pytest.approx(expected)
