"""TensorRT's text cache, and its calibrators over a stand-in, their names held against the real releases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from msgspec import structs

from calibration.layers import find_layers
from calibration.select import CalibrationSet
from calibration.table import CalibrationTable
from calibration.tensorrt import (
    CalibratorOptions,
    TrtCache,
    check_cache,
    decode_scale,
    encode_scale,
    make_calibrator,
    read_cache,
    version_number,
    write_cache,
)
from engines.contract import ModelContract
from engines.errors import ArtefactError, EnvironmentProblem, UsageError
from engines.graph import load_model

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


class Base:
    started = False

    def __init__(self) -> None:
        self.started = True


class Cuda:
    """Device memory that is an array; a copy waits for its stream."""

    def __init__(self) -> None:
        self.memory = np.zeros(0, np.uint8)
        self.freed = 0

    def mem_alloc(self, size: int) -> Any:
        self.memory = np.zeros(size, np.uint8)

        class Allocation:
            def __int__(self) -> int:
                return 4096

            def free(allocation) -> None:
                self.freed += 1

        return Allocation()

    def Stream(self) -> Any:
        self.work: list[Callable[[], None]] = []

        def synchronize() -> None:
            for step in self.work:
                step()
            self.work.clear()

        return SimpleNamespace(synchronize=synchronize)

    def memcpy_htod_async(self, target: Any, source: np.ndarray, stream: Any) -> None:
        def copy() -> None:
            self.memory[:] = source.reshape(-1)

        self.work.append(copy)


class Entropy(Base):
    pass


class MinMax(Base):
    pass


TRT = SimpleNamespace(IInt8EntropyCalibrator2=Entropy, IInt8MinMaxCalibrator=MinMax, __version__="8.6.1")


@pytest.fixture
def contract(small_model: Path) -> ModelContract:
    return load_model(small_model).contract


@pytest.mark.parametrize("name", ["IInt8EntropyCalibrator2", "IInt8MinMaxCalibrator"])
def test_the_names_are_those_of_the_releases_until_10(name: str) -> None:
    members = SURFACE["classes"][name]
    assert {member: members[member] for member in ("", *METHODS)} == dict.fromkeys(("", *METHODS), UNTIL_10)


@pytest.mark.parametrize(("algorithm", "base"), [("entropy", Entropy), ("minmax", MinMax)])
def test_whole_batches_are_fed_in_the_order_of_the_draw(
    small_set: CalibrationSet, contract: ModelContract, algorithm: str, base: type
) -> None:
    cuda = Cuda()
    options = CalibratorOptions(algorithm=algorithm, batch=50)
    made = make_calibrator(TRT, cuda, small_set, contract, options)
    assert isinstance(made, base)
    assert made.started
    assert made.get_batch_size() == 50
    for start in (0, 50):
        assert made.get_batch(["image"]) == [4096]
        expected = small_set.pixels[list(small_set.drawn[start : start + 50])]
        np.testing.assert_array_equal(cuda.memory.reshape(expected.shape), expected)
    assert made.get_batch(["image"]) is None  # 28 are left, no whole batch
    assert made.failure is None
    made.release()
    assert cuda.freed == 1
    assert {name for name in vars(type(made)) if not name.startswith("_")} == {*METHODS, "release"}


def test_a_cache_is_written_and_offered_again(
    small_set: CalibrationSet, contract: ModelContract, tmp_path: Path
) -> None:
    options = CalibratorOptions(cache=tmp_path / "cache.txt")
    made = make_calibrator(TRT, Cuda(), small_set, contract, options)
    assert made.read_calibration_cache() is None
    made.write_calibration_cache(memoryview(b"TRT-8601-EntropyCalibration2\n"))
    assert made.read_calibration_cache() == b"TRT-8601-EntropyCalibration2\n"


def test_failures_are_kept_for_the_builder(
    small_set: CalibrationSet, contract: ModelContract, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    cuda = Cuda()
    made = make_calibrator(
        TRT, cuda, small_set, contract, CalibratorOptions(cache=tmp_path / "file" / "cache.txt")
    )
    made.write_calibration_cache(b"x")
    assert str(made.failure).startswith("cannot write ")

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    cuda.memcpy_htod_async = fail  # type: ignore[method-assign]
    assert made.get_batch(["image"]) is None
    assert str(made.failure) == "out of memory"


def test_what_cannot_calibrate_is_refused(small_set: CalibrationSet, contract: ModelContract) -> None:
    with pytest.raises(EnvironmentProblem, match=r"TensorRT 11\.0\.0 has no calibrators"):
        make_calibrator(SimpleNamespace(__version__="11.0.0"), Cuda(), small_set, contract)
    with pytest.raises(UsageError, match="no calibrator 'legacy'"):
        make_calibrator(TRT, Cuda(), small_set, contract, CalibratorOptions(algorithm="legacy"))
    with pytest.raises(UsageError, match="128 images for batches of 129"):
        make_calibrator(TRT, Cuda(), small_set, contract, CalibratorOptions(batch=129))
