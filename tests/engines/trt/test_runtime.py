from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace as replace_gpu
from pathlib import Path

import pytest
from double_cuda import DoubleCuda, DoubleDriver
from double_tensorrt import LAYER_MS, RELEASES, DoubleTensorRt
from msgspec.structs import replace

from engines import packages
from engines.errors import ArtefactError, EnvironmentProblem
from engines.record import BatchRange, EngineRecord, Precision, Tuning
from engines.runtimes import Availability, BuildOptions, BuildResult, RunnerOptions, get_runtime
from engines.trt import runtime
from engines.trt.cuda import Gpu

NO_DRIVER = "no CUDA driver: libcuda.so.1 not found"
ORIN = Gpu("Orin", "8.7")
TENSORRT, RTX = get_runtime("tensorrt"), get_runtime("tensorrt-rtx")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``machine(gpu, version, pycuda)``: what this machine has."""

    def have(gpu: Gpu | None = None, version: str | None = "10.3.0", pycuda: bool = True) -> None:
        monkeypatch.setattr(runtime, "find_gpu", lambda *_: (gpu, "" if gpu else NO_DRIVER))
        monkeypatch.setattr(packages, "installed_version", lambda name, *distributions: version)
        monkeypatch.setattr(packages, "is_installed", lambda name: pycuda)

    return have


@pytest.fixture
def record(deployed_models: dict[str, Path], record_of: Callable[..., EngineRecord]) -> EngineRecord:
    platform_of_orin = {
        "package": "tensorrt",
        "machine": platform.machine(),
        "system": platform.system(),
        "hardware_compatibility": "none",
        "gpu": "Orin",
        "compute_capability": "8.7",
    }
    result = BuildResult(layers={"FP32": 9}, layers_source="", platform=platform_of_orin)
    made = record_of(deployed_models["dsc"], "dsc", "fp32", result, BatchRange(), runtime="tensorrt")
    return replace(made, runtime_version="10.3.0")


@pytest.mark.parametrize(
    ("name", "gpu", "version", "pycuda", "expected"),
    [
        ("tensorrt", None, None, True, (None, "tensorrt is not installed", "tensorrt is not installed")),
        ("tensorrt", None, "10.3.0", True, ("10.3.0", NO_DRIVER, NO_DRIVER)),
        ("tensorrt", ORIN, "10.3.0", False, ("10.3.0", None, "pycuda is not installed")),
        ("tensorrt", ORIN, "10.3.0", True, ("10.3.0", None, None)),
        (
            "tensorrt-rtx",
            None,
            None,
            True,
            (None, "tensorrt_rtx is not installed", "tensorrt_rtx is not installed"),
        ),
        ("tensorrt-rtx", None, "1.7.1", True, ("1.7.1", None, NO_DRIVER)),
        ("tensorrt-rtx", ORIN, "1.7.1", True, ("1.7.1", None, None)),
    ],
)
def test_availability(
    machine: Callable[..., None],
    name: str,
    gpu: Gpu | None,
    version: str | None,
    pycuda: bool,
    expected: tuple[str | None, str | None, str | None],
) -> None:
    machine(gpu, version, pycuda)
    assert get_runtime(name).availability() == Availability(*expected)


def test_tensorrt_does_not_build_without_a_gpu(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine()
    monkeypatch.setattr(packages, "load", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=f"tensorrt cannot build here: {NO_DRIVER}") as caught:
        TENSORRT.build(b"", tmp_path / "a.engine", BuildOptions(precision=Precision.FP32))
    assert "--backend onnxruntime" in caught.value.remedy


def test_no_gpu_to_run_on(machine: Callable[..., None], record: EngineRecord, tmp_path: Path) -> None:
    machine()
    with pytest.raises(EnvironmentProblem, match=f"tensorrt cannot run here: {NO_DRIVER}"):
        TENSORRT.open_runner(tmp_path / record.engine, record)


@pytest.mark.parametrize(
    ("gpu", "version", "words"),
    [
        (ORIN, "10.13.0.35", r"version 10\.3\.0 there, 10\.13\.0\.35 here$"),
        (
            Gpu("Thor", "11.0"),
            "10.3.0",
            r"gpu Orin there, Thor here; compute_capability 8\.7 there, 11\.0 here$",
        ),
        (None, "10.7.0", r"version 10\.3\.0 there, 10\.7\.0 here$"),
    ],
)
def test_an_engine_from_elsewhere_names_both_sides(
    machine: Callable[..., None],
    record: EngineRecord,
    tmp_path: Path,
    gpu: Gpu | None,
    version: str,
    words: str,
) -> None:
    machine(gpu, version)
    with pytest.raises(ArtefactError) as caught:
        TENSORRT.open_runner(tmp_path / record.engine, record)
    assert caught.value.what.startswith("dsc.onnx was built elsewhere: ")
    assert caught.match(words.removesuffix("$"))
    assert caught.value.remedy == "rebuild it here: edge-dsc build-engine model.onnx"


NANO = Gpu("Orin", "8.7", 8, 7620, "NVIDIA Jetson Orin Nano Developer Kit")


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (replace_gpu(NANO, board="NVIDIA Jetson AGX Orin Developer Kit"), "board NVIDIA Jetson Orin Nano"),
        (replace_gpu(NANO, multiprocessors=16), "multiprocessors 8 there, 16 here"),
        (replace_gpu(NANO, memory_mib=15530), "memory 7620 MiB there, 15530 MiB here"),
    ],
)
def test_an_engine_of_another_orin_is_refused(
    machine: Callable[..., None], record: EngineRecord, tmp_path: Path, gpu: Gpu, words: str
) -> None:
    """All Orin modules have one name and one compute capability (NVIDIA/TensorRT#2900)."""
    machine(gpu)
    there = replace(record, platform=TENSORRT._platform(NANO, Tuning()))
    with pytest.raises(ArtefactError, match=words):
        TENSORRT.open_runner(tmp_path / record.engine, there)


@pytest.mark.parametrize(
    "gpu",
    [
        NANO,
        replace_gpu(NANO, memory_mib=7607, board=f"{NANO.board} Super"),  # another release of JetPack 6
        Gpu("Orin", "8.7"),  # a driver, or a record, that says less
    ],
)
def test_the_same_module_is_the_same(
    machine: Callable[..., None], record: EngineRecord, tmp_path: Path, gpu: Gpu
) -> None:
    machine(gpu, pycuda=False)
    there = replace(record, platform=TENSORRT._platform(NANO, Tuning()))
    with pytest.raises(EnvironmentProblem):  # it comes as far as loading
        TENSORRT.open_runner(tmp_path / record.engine, there)


@pytest.mark.parametrize(
    ("there", "here", "loads"),
    [
        ("8.6.2", "10.3.0", True),
        ("10.3.0", "10.16.1.11", True),
        ("10.3.0", "11.4.0", True),
        ("8.6.2", "11.4.0", False),
        ("10.16.1", "10.3.0", False),
        ("11.4.0", "10.3.0", False),
    ],
)
def test_a_version_compatible_engine_goes_forward(
    machine: Callable[..., None], record: EngineRecord, tmp_path: Path, there: str, here: str, loads: bool
) -> None:
    machine(ORIN, here, pycuda=False)
    plain = replace(record, runtime_version=there)
    compatible = replace(plain, tuning=Tuning(version_compatible=True))
    with pytest.raises(ArtefactError, match=f"version {there} there, {here} here"):
        TENSORRT.open_runner(tmp_path / record.engine, plain)
    with pytest.raises(EnvironmentProblem if loads else ArtefactError):  # it comes as far as loading
        TENSORRT.open_runner(tmp_path / record.engine, compatible)


def test_a_hardware_compatible_engine_goes_to_other_gpus(
    machine: Callable[..., None], record: EngineRecord, tmp_path: Path
) -> None:
    tuning = Tuning(hardware_compatible=True)
    facts = TENSORRT._platform(NANO, tuning)
    assert facts["hardware_compatibility"] == "compute capability 8.0 and later"
    assert "gpu" not in facts
    machine(Gpu("NVIDIA RTX A4000", "8.6"), pycuda=False)
    with pytest.raises(EnvironmentProblem):  # it comes as far as loading
        TENSORRT.open_runner(tmp_path / record.engine, replace(record, platform=facts, tuning=tuning))


def test_an_engine_of_another_system_is_refused(
    machine: Callable[..., None], record: EngineRecord, tmp_path: Path
) -> None:
    machine(ORIN)
    foreign = replace(record, platform={**record.platform, "system": "Plan9", "machine": "vax"})
    with pytest.raises(
        ArtefactError, match=f"machine vax there, {platform.machine()} here; system Plan9 there"
    ):
        TENSORRT.open_runner(tmp_path / record.engine, foreign)


def test_a_missing_package_is_named(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, record: EngineRecord, tmp_path: Path
) -> None:
    machine(ORIN, None)

    def missing(name: str) -> None:
        raise EnvironmentProblem(f"cannot import {name}", remedy="install it")

    monkeypatch.setattr(packages, "load", missing)
    with pytest.raises(EnvironmentProblem, match=r"cannot import tensorrt \(install it\)"):
        TENSORRT.open_runner(tmp_path / record.engine, record)


def test_a_repackaged_release_is_the_same_version(
    machine: Callable[..., None], record: EngineRecord, tmp_path: Path
) -> None:
    machine(None, "10.3.0.post1")
    with pytest.raises(EnvironmentProblem, match="cannot run here"):
        TENSORRT.open_runner(tmp_path / record.engine, record)


class TestTwoGpus:
    """Of two kinds; the driver is asked for each by its number."""

    @pytest.fixture
    def trt(
        self, release: str, cuda: DoubleCuda, driver: DoubleDriver, monkeypatch: pytest.MonkeyPatch
    ) -> DoubleTensorRt:
        trt = DoubleTensorRt(release, cuda)
        modules = {trt.__name__: trt, "pycuda.driver": cuda}
        monkeypatch.setattr(packages, "load", modules.__getitem__)
        monkeypatch.setattr(packages, "installed_version", lambda *_: trt.__version__)
        monkeypatch.setattr(packages, "is_installed", lambda name: True)
        return trt

    @pytest.fixture
    def build(
        self, trt: DoubleTensorRt, small_model: Path, record_of: Callable[..., EngineRecord], tmp_path: Path
    ) -> Callable[[int], tuple[Path, EngineRecord]]:
        """``build(device)``: an engine with its record, built on that GPU."""
        name = trt.__name__.replace("_", "-")

        def make(device: int) -> tuple[Path, EngineRecord]:
            engine, batch = tmp_path / f"{device}.engine", BatchRange(1, 4, 8)
            options = BuildOptions(precision=Precision.FP32, batch=batch, device=device)
            result = get_runtime(name).build(small_model.read_bytes(), engine, options)
            made = record_of(engine, "dsc", "fp32", result, batch, runtime=name)
            contract = replace(made.contract, labels=("clear", "focal", "diffuse"))
            return engine, replace(made, runtime_version=trt.__version__, contract=contract)

        return make

    @pytest.mark.parametrize("release", RELEASES, indirect=True)
    def test_an_engine_is_built_and_run_on_the_gpu_that_was_asked_for(
        self, build: Callable[..., tuple[Path, EngineRecord]], cuda: DoubleCuda, pixels: Callable
    ) -> None:
        engine, made = build(1)
        assert b'"gpu": 1' in engine.read_bytes()
        assert cuda.idle
        if made.runtime == "tensorrt":
            assert made.platform["gpu"] == "Second double"
            assert made.platform["compute_capability"] == "8.7"
            assert made.platform["multiprocessors"] == "2"
        runtime_here = get_runtime(made.runtime)
        with runtime_here.open_runner(engine, made, RunnerOptions(device=1)) as runner:
            assert runner.description["device"] == "1 (Second double)"
            assert cuda.references == [0, 1]
            assert runner.run(pixels(2)).shape == (2, 3)
        layers, _ = runtime_here.inspect_layers(engine, made, 1)
        assert [layer.microseconds for layer in layers] == [1000 * LAYER_MS]
        assert cuda.idle

    @pytest.mark.parametrize("release", ["8.6", "10.3", "11.4"], indirect=True)
    def test_an_engine_of_the_other_kind_of_gpu_is_refused(
        self, build: Callable[..., tuple[Path, EngineRecord]]
    ) -> None:
        engine, made = build(1)
        with pytest.raises(ArtefactError, match="gpu Second double there, Double here"):
            TENSORRT.open_runner(engine, made)
        first, made = build(0)
        with pytest.raises(ArtefactError, match="gpu Double there, Second double here") as caught:
            TENSORRT.open_runner(first, made, RunnerOptions(device=1))
        assert caught.value.remedy == f"rebuild it here: {made.build_command} --device 1"

    @pytest.mark.parametrize("release", RELEASES, indirect=True)
    def test_a_gpu_that_is_not_there_is_no_place_to_build_or_run(
        self, build: Callable[..., tuple[Path, EngineRecord]], cuda: DoubleCuda, tmp_path: Path
    ) -> None:
        words = "^there is no GPU 2: the CUDA driver finds 2, numbered 0 to 1"
        with pytest.raises(EnvironmentProblem, match=words) as caught:
            build(2)
        assert caught.value.exit_code == 3
        assert list(tmp_path.glob("*.engine")) == []
        engine, made = build(0)
        with pytest.raises(EnvironmentProblem, match=words):
            get_runtime(made.runtime).open_runner(engine, made, RunnerOptions(device=2))
        with pytest.raises(EnvironmentProblem, match=words):
            get_runtime(made.runtime).inspect_layers(engine, made, 2)
        assert cuda.idle
