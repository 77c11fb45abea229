"""The runtime cache of TensorRT for RTX, kept beside the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from engines.errors import AccuracyGateError, EnvironmentProblem
from engines.files import atomic_path
from engines.trt import cache
from engines.trt.runner import TrtRunner

Open = Callable[..., TrtRunner]


@pytest.fixture
def release() -> str:
    return "rtx"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "dsc.engine"


def test_the_second_start_compiles_nothing(open_runner: Open, trt: Any, place: Path, pixels: Any) -> None:
    with open_runner(place=place) as runner:
        assert runner.description["runtime_cache"] == "kept in dsc.engine.cache"
    assert trt._compiled == 1  # two slots share what was compiled
    with open_runner(place=place) as runner:
        assert runner.description["runtime_cache"] == "read from dsc.engine.cache"
        assert trt._compiled == 1
        runner.run(pixels(3))
    assert trt._compiled == 2
    assert sorted(path.name for path in place.parent.iterdir()) == ["dsc.engine.cache"]


def test_what_was_compiled_while_running_is_kept_when_closing(
    open_runner: Open, trt: Any, place: Path, pixels: Any
) -> None:
    with open_runner(place=place) as runner:
        runner.run(pixels(3))
    with open_runner(place=place) as runner:
        runner.run(pixels(3))
    assert trt._compiled == 2


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-1], "is of another engine or damaged, made again"),
        (lambda data: data + b"x", "is of another engine or damaged, made again"),
        (lambda data: b"", "is of another engine or damaged, made again"),
    ],
)
def test_a_damaged_cache_costs_a_compilation(
    open_runner: Open, trt: Any, place: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    open_runner(place=place).close()
    path = cache.cache_path(place)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    runner = cache.RuntimeCache(Blob(), open_record(open_runner, place), place)
    assert runner.state == f"dsc.engine.cache {words}"
    with open_runner(place=place) as opened:
        assert opened.description["runtime_cache"] == "kept in dsc.engine.cache"
    assert path.read_bytes() == whole
    assert trt._compiled == 3


class Blob:
    """A cache that takes nothing and holds a word."""

    def deserialize(self, content: bytes) -> bool:
        return False

    def serialize(self) -> bytes:
        return b"compiled"


def open_record(open_runner: Open, place: Path) -> Any:
    with open_runner(place=place.with_name("other.engine")) as runner:
        return runner.record


def test_a_cache_of_another_engine_or_gpu(open_runner: Open, place: Path) -> None:
    open_runner(place=place).close()
    record = open_record(open_runner, place)
    other = cache.RuntimeCache(Blob(), replace(record, engine_sha256="1" * 64), place)
    assert other.state == "dsc.engine.cache is of another engine or damaged, made again"
    foreign = cache.RuntimeCache(Blob(), record, place)
    assert foreign.state == "dsc.engine.cache is of another GPU, driver or release, made again"
    foreign.save()
    assert foreign.state == "kept in dsc.engine.cache"
    assert cache.cache_path(place).read_bytes().endswith(b"\ncompiled")


def test_a_place_that_cannot_be_written_costs_nothing(
    open_runner: Open, place: Path, monkeypatch: pytest.MonkeyPatch, pixels: Any
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise EnvironmentProblem(f"cannot write {path.name}: Read-only file system", remedy="")

    monkeypatch.setattr(cache, "write_bytes", refuse)
    with open_runner(place=place) as runner:
        words = runner.description["runtime_cache"]
        assert words == "not kept: cannot write dsc.engine.cache: Read-only file system"
        runner.run(pixels(1))


def test_a_cache_that_rtx_does_not_give(open_runner: Open, place: Path) -> None:
    record = open_record(open_runner, place)
    silent = cache.RuntimeCache(SimpleNamespace(serialize=lambda: None), record, place)
    silent.save()
    assert silent.state == "not kept: TensorRT does not give it"
    assert not cache.cache_path(place).exists()


def test_the_cache_of_an_engine_that_is_tried_before_it_is_shipped_goes_with_it(
    open_runner: Open, trt: Any, place: Path, plan: bytes
) -> None:
    with atomic_path(place) as temporary:
        temporary.write_bytes(plan)
        open_runner(place=temporary).close()
    assert sorted(path.name for path in place.parent.iterdir()) == ["dsc.engine", "dsc.engine.cache"]
    with open_runner(place=place) as runner:
        assert runner.description["runtime_cache"] == "read from dsc.engine.cache"
    assert trt._compiled == 1


def test_an_engine_that_is_not_shipped_leaves_no_cache(open_runner: Open, place: Path, plan: bytes) -> None:
    with pytest.raises(AccuracyGateError), atomic_path(place) as temporary:
        temporary.write_bytes(plan)
        open_runner(place=temporary).close()
        raise AccuracyGateError("it loses too much", remedy="")
    assert list(place.parent.iterdir()) == []


def test_a_cache_that_rtx_refuses_to_use(open_runner: Open, trt: Any, cuda: Any) -> None:
    trt.fail["set_runtime_cache"] = "no room"
    with pytest.raises(EnvironmentProblem, match="the runtime cache is refused; first error logged: no room"):
        open_runner()
    assert cuda.idle


def test_an_engine_that_cannot_be_captured_is_enqueued(open_runner: Open, trt: Any, pixels: Any) -> None:
    trt._capturable = False
    with open_runner() as runner:
        runner.run(pixels(4))
        assert (
            runner.description["execution"]
            == "enqueue (no CUDA graph: the engine cannot be captured; it works in memory of its own)"
        )
