"""INT8 by TensorRT's own calibrators, from images to the engine and again, on stand-ins of its releases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from double_cuda import DoubleCuda
from double_tensorrt import DoubleTensorRt
from msgspec import structs

from calibration.table import load_table, save_table
from calibration.tensorrt import read_cache
from edge_dsc.build.calibrate import CalibrationRequest, CalibrationRun, run_calibration
from edge_dsc.build.engine import BuildRequest, build_again, build_engine
from edge_dsc.build.gate import GateOptions
from engines import packages
from engines.errors import AccuracyGateError, ArtefactError, EnvironmentProblem, UsageError
from engines.record import BatchRange, Precision
from engines.runtimes import RunnerOptions, open_engine
from engines.trt import versions
from engines.trt.census import INSPECTOR

LAYERS = ("Conv_2", "Conv_5", "Conv_6", "Conv_9", "Conv_10", "Conv_13", "Conv_14", "MatMul_18")
Machine = Callable[[str], DoubleTensorRt]


def request_of(run: CalibrationRun, out: Path, **more: object) -> BuildRequest:
    return BuildRequest(
        model=run.model.path,
        precision=Precision.INT8,
        runtime="tensorrt",
        batch=BatchRange(1, 4, 8),
        calibration=run.path,
        out=out / "dsc.engine",
        **more,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("release", "method", "header"),
    [
        ("8.6", "tensorrt-entropy", "TRT-8601-EntropyCalibration2"),
        ("10.3", "tensorrt-entropy", "TRT-100300-EntropyCalibration2"),
        ("10.3", "tensorrt-minmax", "TRT-100300-MinMaxCalibration"),
    ],
)
def test_what_tensorrt_found_is_kept_and_built_from(
    machine: Machine,
    calibrated: Callable[..., CalibrationRun],
    calibrated_run: Path,
    tmp_path: Path,
    release: str,
    method: str,
    header: str,
) -> None:
    trt = machine(release)
    run = calibrated(release, method)
    table = load_table(run.path)
    assert (table.method, table.versions) == (method, {"tensorrt": trt.__version__})
    assert len(table.images) == 128
    assert {image.sha256 for image in table.images} <= {sample.sha256 for sample in run.dataset.samples}
    assert run.coverage is None
    assert run.trt_cache is not None and run.trt_cache.read_text().splitlines()[0] == header
    # The stand-in takes the extremes of the images that it gets: those of our minmax over the same ones.
    scales = read_cache(run.trt_cache.read_text(), source="c").scales
    ours = load_table(calibrated_run / "calibration.json").ranges
    assert len(ours) == 9
    for name, (low, high) in ours.items():
        assert scales[name] * 127 == pytest.approx(max(-low, high), rel=1e-5)

    for built in (
        build_engine(request_of(run, tmp_path), calibrated=run),
        build_engine(request_of(run, tmp_path)),
    ):
        record = built.record
        assert {name: kind for name, kind in record.layer_types.items() if kind == "INT8"} == dict.fromkeys(
            LAYERS, "INT8"
        )
        assert record.layers == {"INT8": 8, "FP16": 1}
        assert record.layers_source == INSPECTOR
        assert record.notes[-1].startswith("implicit quantisation: TensorRT rounds an FP32 graph")
        assert f"--calibration {run.path}" in record.build_command
    again = build_again(built.path, tmp_path / "again.engine")
    assert again.path.read_bytes() == built.path.read_bytes()
    assert again.record.calibration_sha256 == record.calibration_sha256


@pytest.mark.parametrize(
    ("backend", "release", "name"),
    [
        ("tensorrt", "11.4", "tensorrt 11\\.4\\.0\\.106"),
        ("tensorrt-rtx", "rtx", "tensorrt-rtx 1\\.7\\.1"),
        ("onnxruntime", "10.3", "onnxruntime"),
    ],
)
def test_what_has_no_calibrators_is_refused_before_the_work(
    machine: Machine, tmp_path: Path, backend: str, release: str, name: str
) -> None:
    machine(release)
    request = CalibrationRequest(
        model=tmp_path / "none.onnx", data=tmp_path, method="tensorrt-minmax", runtime=backend
    )
    with pytest.raises(UsageError, match=f"^{name} knows no ranges by tensorrt-minmax: TensorRT 8.6 to 10.x"):
        run_calibration(request)


def test_roundings_are_not_learnt_for_what_tensorrt_rounds(machine: Machine, tmp_path: Path) -> None:
    machine("10.3")
    request = CalibrationRequest(
        model=tmp_path / "none.onnx", data=tmp_path, method="tensorrt-minmax", rounding="adaround"
    )
    for asked in (request, replace(request, rounding=None, bias_correction=True)):
        with pytest.raises(UsageError, match="tensorrt-minmax go with TensorRT's own roundings") as caught:
            run_calibration(asked)
        assert caught.value.remedy.startswith("leave --rounding and --bias-correction out")


@pytest.mark.slow  # the calibration that it builds from
class TestBuilding:
    """From a table of 8.6, on 8.6 unless said otherwise."""

    @pytest.fixture
    def trt(self, machine: Machine) -> DoubleTensorRt:
        return machine("8.6")

    @pytest.fixture
    def run(self, trt: DoubleTensorRt, calibrated: Callable[..., CalibrationRun]) -> CalibrationRun:
        return calibrated("8.6")

    @pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt-rtx"])
    def test_another_runtime_is_refused(
        self, run: CalibrationRun, machine: Machine, tmp_path: Path, backend: str
    ) -> None:
        machine("rtx")
        with pytest.raises(UsageError, match=f"^{backend}.* knows no ranges by tensorrt-entropy"):
            build_engine(replace(request_of(run, tmp_path), runtime=backend))

    def test_another_release_is_stale(self, run: CalibrationRun, machine: Machine, tmp_path: Path) -> None:
        machine("10.3")
        with pytest.raises(ArtefactError, match=r"is of TensorRT 8\.6\.1, 10\.3\.0 is here"):
            build_engine(request_of(run, tmp_path))

    def test_a_cache_that_tensorrt_does_not_take(self, run: CalibrationRun, tmp_path: Path) -> None:
        table = structs.replace(run.table, parameters={"trt_version": 8602})
        save_table(tmp_path / "calibration.json", table)
        with pytest.raises(EnvironmentProblem, match="TensorRT does not take the cache that it wrote"):
            build_engine(replace(request_of(run, tmp_path), calibration=tmp_path / "calibration.json"))
        assert [path.name for path in tmp_path.iterdir() if path.suffix == ".engine"] == []

    def test_the_network_is_no_proof(self, run: CalibrationRun, trt: DoubleTensorRt, tmp_path: Path) -> None:
        trt._silent = True
        with pytest.raises(AccuracyGateError, match=r"a layer in INT8, .* would have 9 in unknown precision"):
            build_engine(request_of(run, tmp_path))
        trt._silent = False
        trt.fail["deserialize_cuda_engine"] = ""
        with pytest.raises(AccuracyGateError, match=r"a layer in INT8, .* would have 9 in unknown precision"):
            build_engine(request_of(run, tmp_path))
        assert list(tmp_path.glob("*.engine*")) == []

    def test_a_layer_that_left_int8_is_named(
        self, run: CalibrationRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        insist = versions.insist_on_int8
        monkeypatch.setattr(versions, "insist_on_int8", lambda *asked: insist(*asked[:2], LAYERS[1:]))
        with pytest.raises(AccuracyGateError, match="would run Conv_2 in FP16, not INT8"):
            build_engine(request_of(run, tmp_path))

    def test_no_graph_answers_for_the_engine(
        self, run: CalibrationRun, textures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(packages, "is_installed", lambda name: name != "pycuda")
        gate = GateOptions(data=textures)
        with pytest.raises(EnvironmentProblem, match="no graph holds its INT8: pycuda is not installed"):
            build_engine(request_of(run, tmp_path, gate=gate))

    def test_the_gpu_that_was_asked_for_calibrates_and_builds(
        self,
        run: CalibrationRun,
        textures: Path,
        tmp_path: Path,
        cuda: DoubleCuda,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        fed: set[int] = set()
        allocate = cuda.mem_alloc
        monkeypatch.setattr(cuda, "mem_alloc", lambda size: fed.add(cuda.here) or allocate(size))
        request = CalibrationRequest(
            model=run.model.path,
            data=textures,
            method="tensorrt-entropy",
            images=128,
            out=tmp_path / "calibration.json",
            device=1,
        )
        again = run_calibration(request)
        assert fed == {1}
        assert again.table.ranges == run.table.ranges
        built = build_engine(request_of(again, tmp_path, device=1))
        assert built.record.platform["gpu"] == "Second double"
        assert built.record.build_command.endswith(f"--device 1 --out {built.path}")
        with pytest.raises(ArtefactError, match="gpu Second double there, Double here"):
            open_engine(built.path)
        open_engine(built.path, options=RunnerOptions(device=1)).close()
        rebuilt = build_again(built.path, tmp_path / "again.engine", 1)
        assert rebuilt.record.platform == built.record.platform

    def test_the_gate_runs_the_engine_on_the_gpu_that_built_it(
        self, run: CalibrationRun, textures: Path, tmp_path: Path
    ) -> None:
        gate = GateOptions(data=textures, max_drop=100)
        built = build_engine(request_of(run, tmp_path, gate=gate, device=1))
        assert built.record.validation is not None
        assert built.record.validation.answered_by == "the engine on tensorrt 8.6.1"
