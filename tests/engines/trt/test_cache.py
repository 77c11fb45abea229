"""The runtime cache of TensorRT for RTX and the choice of memory, kept beside the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace as replace_gpu
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from engines.errors import AccuracyGateError, EnvironmentProblem
from engines.files import atomic_path
from engines.trt import cache
from engines.trt.cuda import Gpu
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


ORIN = Gpu("Orin", "8.7", 8, 7620, "NVIDIA Jetson Orin Nano Developer Kit")
KEPT = ", as kept beside the engine"


class TestMemory:
    @pytest.fixture
    def release(self) -> str:
        return "10.3"

    @pytest.fixture
    def choice(self, open_runner: Open, cuda: Any, place: Path, turns: Any) -> Callable[..., tuple[str, str]]:
        """``choice(device_us, mapped_us)``: the memory that a runner takes, and why."""
        cuda.integrated = True

        def choose(*microseconds: int, gpu: Gpu = ORIN, **options: Any) -> tuple[str, str]:
            clock = turns(*microseconds) if microseconds else (lambda: pytest.fail("a trial"))
            with open_runner(place=place, gpu=gpu, clock=clock, **options) as runner:
                return runner.description["memory"], runner.description["memory_choice"]

        return choose

    def test_a_second_run_repeats_the_choice_of_the_first(
        self, choice: Callable[..., tuple[str, str]], place: Path
    ) -> None:
        measured = "measured in turns at batch 4, device 80 us, mapped 50 us"
        assert choice(80, 50) == ("mapped", f"{measured}, kept in dsc.engine.memory.json")
        assert choice() == ("mapped", measured + KEPT)
        assert [path.name for path in place.parent.iterdir()] == ["dsc.engine.memory.json"]
        document = json.loads(cache.memory_path(place).read_text())
        assert (document["kind"], document["schema_version"]) == ("edge-dsc/memory-choices", 1)
        (kept,) = document["choices"]
        assert kept.pop("created").startswith("20")
        assert kept == {
            "gpu": {
                "gpu": "Orin",
                "compute_capability": "8.7",
                "multiprocessors": "8",
                "memory": "7620 MiB",
                "board": "NVIDIA Jetson Orin Nano Developer Kit",
            },
            "runtime_version": "10.3.0",
            "batch": 4,
            "kind": "mapped",
            "medians_us": {"device": 80.0, "mapped": 50.0},
        }

    def test_each_batch_size_and_gpu_has_a_choice_of_its_own(
        self, choice: Callable[..., tuple[str, str]]
    ) -> None:
        larger = replace_gpu(ORIN, multiprocessors=16)
        for microseconds, options in (
            ((80, 50), {}),
            ((50, 80), {"batch": 1}),
            ((40, 30), {"gpu": larger}),
        ):
            assert choice(*microseconds, **options)[1].endswith(", kept in dsc.engine.memory.json")
        assert choice()[0] == "mapped"
        assert choice(batch=1) == (
            "device",
            f"measured in turns at batch 1, device 50 us, mapped 80 us{KEPT}",
        )
        assert choice(gpu=larger)[1].startswith("measured in turns at batch 4, device 40 us, mapped 30 us")

    def test_what_is_asked_for_by_hand_is_neither_tried_nor_kept(
        self, choice: Callable[..., tuple[str, str]], place: Path
    ) -> None:
        assert choice(memory="mapped") == ("mapped", "as asked")
        assert not cache.memory_path(place).exists()

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[:-20],
            lambda text: "",
            lambda text: "\0" * 100,
            lambda text: "[1, 2]",
            lambda text: text.replace('"mapped",', '"device",'),  # the seal
            lambda text: text.replace('"schema_version": 1', '"schema_version": 2'),
        ],
    )
    def test_a_damaged_file_costs_a_trial(
        self, choice: Callable[..., tuple[str, str]], place: Path, damage: Callable[[str], str]
    ) -> None:
        choice(80, 50)
        path = cache.memory_path(place)
        whole = path.read_text()
        assert damage(whole) != whole
        path.write_text(damage(whole))
        memory, words = choice(50, 80)
        assert memory == "device"
        if damage(whole) == "[1, 2]":  # it may be somebody's: it stays
            assert "not kept" in words and path.read_text() == "[1, 2]"
        else:
            assert words.endswith(", kept in dsc.engine.memory.json")
            assert choice()[0] == "device"

    def test_a_file_of_another_engine_costs_a_trial(
        self, choice: Callable[..., tuple[str, str]], place: Path
    ) -> None:
        choice(80, 50)
        path = cache.memory_path(place)
        found = cache.MEMORY.load(path)
        cache.MEMORY.save(path, replace(found, engine_sha256="1" * 64))
        assert choice(50, 80)[0] == "device"
        assert len(cache.MEMORY.load(path).choices) == 1  # the other engine's are gone

    def test_a_folder_that_cannot_be_written_costs_nothing(
        self, choice: Callable[..., tuple[str, str]], place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise EnvironmentProblem("cannot write dsc: Read-only file system", remedy="")

        monkeypatch.setattr(type(cache.MEMORY), "save", refuse)
        assert choice(80, 50) == (
            "mapped",
            "measured in turns at batch 4, device 80 us, mapped 50 us, "
            "not kept: cannot write dsc: Read-only file system",
        )
        assert list(place.parent.iterdir()) == []

    def test_the_file_does_not_grow_for_ever(self, place: Path, record: Any) -> None:
        kept = cache.MemoryFile(place, record, ORIN, "10.3.0")
        for batch in range(1, 100):
            kept.keep(batch, {"device": 1.0, "mapped": 2.0})
        assert [choice.batch for choice in cache.MEMORY.load(cache.memory_path(place)).choices] == list(
            range(36, 100)
        )

    def test_the_choice_made_before_an_engine_is_shipped_goes_with_it(
        self, open_runner: Open, cuda: Any, place: Path, plan: bytes, turns: Any
    ) -> None:
        cuda.integrated = True
        with atomic_path(place) as temporary:
            temporary.write_bytes(plan)
            open_runner(place=temporary, gpu=ORIN, clock=turns(80, 50)).close()
        assert sorted(path.name for path in place.parent.iterdir()) == [
            "dsc.engine",
            "dsc.engine.memory.json",
        ]
        with open_runner(place=place, gpu=ORIN) as runner:
            assert runner.description["memory_choice"].endswith(KEPT)
