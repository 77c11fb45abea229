"""The calibrators over a stand-in for TensorRT, and their names held against the real releases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from calibration.tensorrt import make_calibrator
from engines.contract import ModelContract
from engines.errors import EnvironmentProblem, UsageError
from engines.images import read_input

SURFACE = json.loads((Path(__file__).parents[1] / "engines" / "tensorrt_api.json").read_text())
UNTIL_10 = list(range(6))  # 8.6.1 to 10.16
METHODS = ("get_batch_size", "get_batch", "read_calibration_cache", "write_calibration_cache")


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
    metadata = {entry.key: entry.value for entry in onnx.load(small_model).metadata_props}
    return ModelContract.from_metadata(metadata, source="test")


@pytest.mark.parametrize("name", ["IInt8EntropyCalibrator2", "IInt8MinMaxCalibrator"])
def test_the_names_are_those_of_the_releases_until_10(name: str) -> None:
    members = SURFACE["classes"][name]
    assert {member: members[member] for member in ("", *METHODS)} == dict.fromkeys(("", *METHODS), UNTIL_10)


@pytest.mark.parametrize(("algorithm", "base"), [("entropy", Entropy), ("minmax", MinMax)])
def test_whole_batches_of_real_pixels_are_fed(
    textures: Path, contract: ModelContract, algorithm: str, base: type
) -> None:
    images = sorted((textures / "clear").iterdir())[:10]
    cuda = Cuda()
    made = make_calibrator(TRT, cuda, images, contract, algorithm=algorithm, batch=4)
    assert isinstance(made, base)
    assert made.started
    assert made.get_batch_size() == 4
    for start in (0, 4):
        assert made.get_batch(["image"]) == [4096]
        expected = np.stack([read_input(path, contract) for path in images[start : start + 4]])
        np.testing.assert_array_equal(cuda.memory.reshape(expected.shape), expected)
    assert made.get_batch(["image"]) is None  # two are left, no whole batch
    assert made.failure is None
    made.release()
    assert cuda.freed == 1
    assert {name for name in vars(type(made)) if not name.startswith("_")} == {*METHODS, "release"}


def test_a_cache_is_written_and_offered_again(
    textures: Path, contract: ModelContract, tmp_path: Path
) -> None:
    images = sorted((textures / "clear").iterdir())
    cache = tmp_path / "cache.txt"
    made = make_calibrator(TRT, Cuda(), images, contract, cache=cache)
    assert made.read_calibration_cache() is None
    made.write_calibration_cache(memoryview(b"TRT-8601-EntropyCalibration2\n"))
    assert made.read_calibration_cache() == b"TRT-8601-EntropyCalibration2\n"


def test_damaged_images_are_skipped_and_failures_kept(
    textures: Path, contract: ModelContract, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    images = [bad, *sorted((textures / "clear").iterdir())[:4]]
    cuda = Cuda()
    made = make_calibrator(TRT, cuda, images, contract, batch=2)
    assert made.get_batch(["image"]) == [4096]
    assert len(made.skipped) == 1

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    cuda.memcpy_htod_async = fail  # type: ignore[method-assign]
    assert made.get_batch(["image"]) is None
    assert str(made.failure) == "out of memory"


def test_what_cannot_calibrate_is_refused(textures: Path, contract: ModelContract) -> None:
    images = sorted((textures / "clear").iterdir())
    with pytest.raises(EnvironmentProblem, match=r"TensorRT 11\.0\.0 has no calibrators"):
        make_calibrator(SimpleNamespace(__version__="11.0.0"), Cuda(), images, contract)
    with pytest.raises(UsageError, match="no calibrator 'legacy'"):
        make_calibrator(TRT, Cuda(), images, contract, algorithm="legacy")
    with pytest.raises(UsageError, match="2 images for batches of 8"):
        make_calibrator(TRT, Cuda(), images[:2], contract)
