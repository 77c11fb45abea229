"""TensorRT for RTX really builds here: its parser and builder need no GPU."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from double_cuda import DoubleCuda, current
from double_tensorrt import RELEASES, DoubleTensorRt
from onnx import TensorProto, helper, load_model_from_string

from engines.errors import AccuracyGateError, ArtefactError, EnvironmentProblem, UsageError
from engines.record import BatchRange, Precision, Tuning
from engines.runtimes import BuildOptions
from engines.trt import builder as build
from engines.trt import census, runtime, versions
from engines.trt.builder import build_plan
from engines.trt.census import INSPECTOR, NETWORK
from engines.trt.cuda import find_gpu
from engines.trt.faults import process_logger
from engines.trt.runtime import TENSORRT_RTX

trt = pytest.importorskip("tensorrt_rtx")

LAYERS = {"dsc": 9, "cnn": 6}
LOGGERS: list[object] = []  # TensorRT keeps bare pointers to them
BATCH = BatchRange(1, 8, 32)
Graphs = Callable[..., bytes]


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "find_gpu", lambda *_: (None, "no CUDA driver: libcuda.so.1 not found"))


def options(precision: str, required: int = 1, **more: object) -> BuildOptions:
    return BuildOptions(precision=Precision(precision), required_layers=required, batch=BATCH, **more)


@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_both_networks_in_every_precision(
    tmp_path: Path, graph_in: Graphs, architecture: str, precision: str
) -> None:
    engine = tmp_path / "a.engine"
    layers = LAYERS[architecture]
    required = layers - 1 if precision == "int8" else layers  # the last dense layer stays in FP32
    result = TENSORRT_RTX.build(graph_in(architecture, precision), engine, options(precision, required))
    expected = {"INT8": layers - 1, "FP32": 1} if precision == "int8" else {precision.upper(): layers}
    assert result.layers == expected
    assert result.layers_source == NETWORK
    assert result.platform["package"] == "tensorrt_rtx"
    assert result.platform["hardware_compatibility"] == "compute capability 8.6, 8.9 and 12.0"
    assert [note[:10] for note in result.notes] == {
        "fp32": ["TF32 is of"],
        "fp16": [],
        "int8": ["the suppor"],  # its matrix promises INT8 for weights of matrix multiplications only
    }[precision]
    assert engine.stat().st_size > 500_000
    assert list(tmp_path.iterdir()) == [engine]


def test_a_graph_of_another_precision_is_refused(tmp_path: Path, graph_in: Graphs) -> None:
    with pytest.raises(
        AccuracyGateError, match="asked for 9 layers in FP16, the engine would have 9 in FP32"
    ):
        TENSORRT_RTX.build(graph_in("dsc", "fp32"), tmp_path / "a.engine", options("fp16", 9))
    assert list(tmp_path.iterdir()) == []


def test_progress_is_reported_to_its_end(tmp_path: Path, graph_in: Graphs) -> None:
    seen: list[tuple[str, int, int]] = []
    TENSORRT_RTX.build(
        graph_in("dsc", "fp32"),
        tmp_path / "a.engine",
        options("fp32", progress=lambda *step: seen.append(step)),
    )
    phase, _, total = seen[0]
    assert seen[0] == (phase, 0, total)
    assert seen[-1] == (phase, total, total)
    assert all(0 <= done <= total for _, done, total in seen)


def test_ctrl_c_while_building_ends_it(tmp_path: Path, graph_in: Graphs) -> None:
    calls: list[int] = []

    def interrupt(phase: str, done: int, total: int) -> None:
        calls.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TENSORRT_RTX.build(
            graph_in("dsc", "fp32"), tmp_path / "a.engine", options("fp32", progress=interrupt)
        )
    assert calls == [0]
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_rtx_logs_is_not_lost(
    tmp_path: Path, graph_in: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real binding drops what is raised in ``log``, which RTX calls for every message."""
    reached: list[str] = []

    class Interrupted(type(process_logger(trt))):  # type: ignore[misc]
        def log(self, severity: object, msg: str) -> None:
            if not reached:
                reached.append(msg)
                signal.raise_signal(signal.SIGINT)

    logger = Interrupted()
    LOGGERS.append(logger)
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(build, "process_logger", lambda module: logger)
    with pytest.raises(KeyboardInterrupt):
        TENSORRT_RTX.build(graph_in("dsc", "fp32"), tmp_path / "a.engine", options("fp32"))
    assert reached
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_stops_rtx_at_its_next_step(tmp_path: Path, graph_in: Graphs) -> None:
    steps: list[int] = []

    def interrupt(phase: str, done: int, total: int) -> None:
        steps.append(done)
        if done == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        TENSORRT_RTX.build(
            graph_in("dsc", "fp32"), tmp_path / "a.engine", options("fp32", progress=interrupt)
        )
    assert max(steps) == 1
    assert list(tmp_path.iterdir()) == []


def test_sigterm_while_rtx_logs_is_not_lost_either(
    tmp_path: Path, graph_in: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminated(type(process_logger(trt))):  # type: ignore[misc]
        def log(self, severity: object, msg: str) -> None:
            if not ended:
                ended.append(msg)
                signal.raise_signal(signal.SIGTERM)

    def end(number: int, frame: object) -> None:
        raise SystemExit(143)

    ended: list[str] = []
    logger = Terminated()
    LOGGERS.append(logger)
    monkeypatch.setattr(build, "process_logger", lambda module: logger)
    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(SystemExit):
            TENSORRT_RTX.build(graph_in("dsc", "fp32"), tmp_path / "a.engine", options("fp32"))
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_ctrl_c_in_any_release(release: str, cuda: DoubleCuda, graph_in: Graphs) -> None:
    double = DoubleTensorRt(release, cuda)
    double._interrupted = True
    with current(cuda), pytest.raises(KeyboardInterrupt):
        build_plan(double, graph_in("dsc", "fp32"), options("fp32"), has_gpu=False)


def test_a_build_in_another_thread_leaves_signals_alone(
    tmp_path: Path, graph_in: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *arguments: pytest.fail("only the main thread may"))
    with ThreadPoolExecutor(1) as pool:
        model = graph_in("dsc", "fp32")
        pool.submit(TENSORRT_RTX.build, model, tmp_path / "a.engine", options("fp32")).result()


def test_a_model_that_the_parser_refuses(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"tensorrt_rtx [\d.]+ cannot read the model: .*ONNX") as caught:
        TENSORRT_RTX.build(b"nonsense", tmp_path / "a.engine", options("fp32"))
    assert "\n" not in str(caught.value)
    assert "edge-dsc export" in caught.value.remedy


def test_an_operator_that_the_parser_does_not_know(tmp_path: Path, graph_in: Graphs) -> None:
    model = load_model_from_string(graph_in("dsc", "fp32"))
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "Mystery"
    with pytest.raises(ArtefactError, match="Mystery"):
        TENSORRT_RTX.build(model.SerializeToString(), tmp_path / "a.engine", options("fp32"))


def test_a_fixed_batch_that_the_profile_does_not_fit(tmp_path: Path, graph_in: Graphs) -> None:
    model = load_model_from_string(graph_in("dsc", "fp32"))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 224, 224, 1]))
    with pytest.raises(EnvironmentProblem, match="cannot build"):
        TENSORRT_RTX.build(model.SerializeToString(), tmp_path / "a.engine", options("fp32"))


def test_a_builder_that_does_not_start_tells_why(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = SimpleNamespace(errors=["CUDA initialization failure with error: 35"])

    def refuse(_: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(build, "process_logger", lambda module: logger)
    fake = SimpleNamespace(__name__="tensorrt", __version__="10.3.0", Builder=refuse)
    with pytest.raises(
        EnvironmentProblem, match=r"tensorrt 10\.3\.0 cannot build: CUDA initialization failure"
    ):
        build_plan(fake, b"", options("fp32"), has_gpu=False)


@pytest.mark.skipif(find_gpu()[0] is not None, reason="what happens without a GPU")
def test_without_a_gpu_the_engine_cannot_be_loaded(tmp_path: Path, graph_in: Graphs) -> None:
    from engines.trt.census import inspect_plan
    from engines.trt.faults import first_error, process_logger

    TENSORRT_RTX.build(graph_in("dsc", "fp32"), tmp_path / "a.engine", options("fp32"))
    logger = process_logger(trt)
    assert inspect_plan(trt, logger, (tmp_path / "a.engine").read_bytes(), {}) is None
    assert "cudaError 35" in first_error(logger)


class TestProof:
    """What the engine inspector tells, in the words of each release, against the precision that was asked for."""

    @pytest.fixture
    def built(
        self, double: DoubleTensorRt, cuda: DoubleCuda, graph_in: Graphs
    ) -> Callable[[str, str], build.Plan]:
        def make(precision: str, graph: str = "") -> build.Plan:
            model = graph_in("dsc", graph or precision)
            with current(cuda):
                return build_plan(double, model, options(precision, 8), has_gpu=True)

        return make

    @pytest.fixture
    def double(self, release: str, cuda: DoubleCuda) -> DoubleTensorRt:
        return DoubleTensorRt(release, cuda)

    @pytest.mark.parametrize("release", RELEASES, indirect=True)
    @pytest.mark.parametrize(
        ("precision", "expected"), [("fp32", {"FP32": 9}), ("fp16", {"FP16": 9}), ("int8", {"INT8": 8})]
    )
    def test_every_layer_is_proven_by_the_engine(
        self, built: Callable[[str], build.Plan], precision: str, expected: dict[str, int]
    ) -> None:
        plan = built(precision)
        assert {kind: plan.layers[kind] for kind in expected} == expected
        assert plan.layers_source == INSPECTOR
        assert len(plan.layer_types) == 9
        assert (
            "each batch in flight takes up to 0.1 MiB of device memory, by its size, beside" in plan.notes[-1]
        )
        assert not any("inspector" in note for note in plan.notes)

    @pytest.mark.parametrize("release", ["8.6", "10.3"], indirect=True)
    def test_where_the_inspector_is_silent_the_network_is_the_proof(
        self, built: Callable[[str], build.Plan], double: DoubleTensorRt, release: str
    ) -> None:
        double._silent = True
        plan = built("int8")
        assert plan.layers["INT8"] == 8
        if release == "8.6":  # it knows no format of a dynamic shape, with a context or without
            assert plan.layers_source == NETWORK
            assert "the engine inspector does not tell the precision of any layer" in plan.notes[-1]
        else:
            assert plan.layers_source == INSPECTOR

    def test_the_names_of_the_network_stay_where_the_inspector_leaves_a_gap(
        self, built: Callable[[str], build.Plan], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = census.engine_layer_types

        def gap(report: str, parsed: Mapping[str, str]) -> dict[str, str]:
            return dict(list(whole(report, parsed).items())[2:])

        monkeypatch.setattr(census, "engine_layer_types", gap)
        plan = built("int8")
        assert plan.layers_source == f"{INSPECTOR} for 7 of 9 layers, else {NETWORK}"
        assert (len(plan.layer_types), plan.layers["INT8"]) == (9, 8)

    def test_an_engine_that_left_the_precision_is_refused(
        self, built: Callable[[str], build.Plan], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            census, "engine_layer_types", lambda report, parsed: dict.fromkeys(list(parsed)[:2], "FP32")
        )
        with pytest.raises(AccuracyGateError, match="the engine would have 7 in FP16, 2 in FP32"):
            built("fp16")

    def test_an_fp16_build_of_8_6_binds_every_layer(
        self, double: DoubleTensorRt, cuda: DoubleCuda, graph_in: Graphs
    ) -> None:
        wanted = options("fp16", 9)
        double = DoubleTensorRt("8.6", cuda)
        with current(cuda):
            assert build_plan(double, graph_in("dsc", "fp16"), wanted, has_gpu=True).layers == {"FP16": 9}


def test_real_rtx_takes_the_flag_that_capture_needs() -> None:
    config = trt.Builder(process_logger(trt)).create_builder_config()
    assert not config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    versions.allow_capture(trt, config)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


class TestTuning:
    """What else a builder can be told, in every release that can; refused by name where it cannot."""

    ALL = Tuning(optimization_level=5, max_aux_streams=2, version_compatible=True, hardware_compatible=True)

    def build(self, release: str, cuda: DoubleCuda, model: bytes, **more: object) -> build.Plan:
        with current(cuda):
            return build_plan(DoubleTensorRt(release, cuda), model, options("fp32", **more), has_gpu=True)

    @pytest.mark.parametrize("release", [name for name in RELEASES if name != "rtx"])
    def test_the_builder_is_told(self, release: str, cuda: DoubleCuda, graph_in: Graphs) -> None:
        plan = self.build(release, cuda, graph_in("dsc", "fp32"), tuning=self.ALL)
        assert b'"compatible": true, "told": [5, 2, "AMPERE_PLUS"]' in plan.data
        plain = self.build(release, cuda, graph_in("dsc", "fp32"))
        assert b'"compatible": false, "told": [3, -1, null]' in plain.data

    @pytest.mark.parametrize("name", ["version_compatible", "hardware_compatible"])
    def test_rtx_refuses_what_it_lacks(self, tmp_path: Path, graph_in: Graphs, name: str) -> None:
        option = name.replace("_", "-")
        with pytest.raises(UsageError, match=rf"tensorrt_rtx [\d.]+ has no --{option}") as caught:
            TENSORRT_RTX.build(
                graph_in("dsc", "fp32"), tmp_path / "a.engine", options("fp32", tuning=Tuning(**{name: True}))
            )
        assert caught.value.exit_code == 2

    def test_real_rtx_is_told_the_rest(self, tmp_path: Path, graph_in: Graphs) -> None:
        tuning = Tuning(optimization_level=0, max_aux_streams=0)
        wanted = options("fp32", tuning=tuning, timing_cache=tmp_path)
        TENSORRT_RTX.build(graph_in("dsc", "fp32"), tmp_path / "a.engine", wanted)
        assert [path.name for path in tmp_path.iterdir()] == ["a.engine"]  # it times nothing
        config = trt.Builder(process_logger(trt)).create_builder_config()
        versions.tune(trt, config, Tuning(optimization_level=4, max_aux_streams=1))
        assert (config.builder_optimization_level, config.max_aux_streams) == (4, 1)

    @pytest.mark.parametrize("release", ["8.6", "10.3", "11.4"])
    def test_timings_are_kept_for_the_next_build(
        self, release: str, cuda: DoubleCuda, graph_in: Graphs, tmp_path: Path
    ) -> None:
        def notes() -> list[str]:
            plan = self.build(release, cuda, graph_in("dsc", "fp32"), timing_cache=tmp_path)
            return [note for note in plan.notes if "timings" in note]

        assert notes() == []
        (path,) = tmp_path.iterdir()
        assert path.name == f"tensorrt-{DoubleTensorRt(release, cuda).__version__}.timing.cache"
        known = path.read_bytes()
        assert notes() == [f"kernels were chosen by the timings in {path.name} too"]
        assert path.read_bytes() == known
        for foreign in (b"0.1\nstem", b"nonsense"):  # another release or GPU, and damage: measured again
            path.write_bytes(foreign)
            assert notes() == []
            assert path.read_bytes() == known

    def test_timings_that_cannot_be_kept_cost_nothing_else(
        self, cuda: DoubleCuda, graph_in: Graphs, tmp_path: Path
    ) -> None:
        place = tmp_path / "file"
        place.write_text("")
        plan = self.build("10.3", cuda, graph_in("dsc", "fp32"), timing_cache=place)
        assert any(note.startswith("the timings of this build are not kept: ") for note in plan.notes)

    @pytest.mark.parametrize("release", RELEASES)
    def test_warnings_land_in_the_notes_and_the_log_is_heard(
        self, release: str, cuda: DoubleCuda, graph_in: Graphs
    ) -> None:
        double, heard = DoubleTensorRt(release, cuda), list[str]()
        double._warns = "no calibrator"
        with current(cuda):
            plan = build_plan(
                double, graph_in("dsc", "fp32"), options("fp32", log=heard.append), has_gpu=False
            )
        assert plan.notes[-1] == "TensorRT gave 1 warnings (--verbose shows all): no calibrator"
        assert heard == ["[2] no calibrator", *(f"[4] Step {step}" for step in range(4))]
