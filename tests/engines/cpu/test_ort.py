from __future__ import annotations

import platform
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from msgspec.structs import replace

from engines.cpu.ort import EXACT_SUMS, RUNTIME, OrtRunner, open_reference, open_session
from engines.errors import AccuracyGateError, ArtefactError, BadInputError, EnvironmentProblem, UsageError
from engines.files import sha256_bytes
from engines.record import BatchRange, Precision, Tuning
from engines.runtimes import BuildOptions, RunnerOptions

BATCH = BatchRange(1, 1, 8)
LAYERS = {"dsc": 9, "cnn": 6}


def options(precision: str, required: int) -> BuildOptions:
    return BuildOptions(precision=Precision(precision), required_layers=required, batch=BATCH)


@pytest.fixture
def open_engine(tmp_path: Path, graph_in: Callable, record_of: Callable) -> Callable[..., OrtRunner]:
    def build_and_open(architecture: str = "dsc", precision: str = "fp32", threads: int = 1) -> OrtRunner:
        engine = tmp_path / f"{architecture}-{precision}.engine"
        model = graph_in(architecture, precision, signed=False)
        result = RUNTIME.build(model, engine, options(precision, LAYERS[architecture] - 1))
        record = record_of(engine, architecture, precision, result, BATCH)
        return RUNTIME.open_runner(engine, record, RunnerOptions(threads=threads))

    return build_and_open


@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_engine_answers_bit_for_bit_like_the_model(
    open_engine: Callable, graph_in: Callable, pixels: Callable, architecture: str, precision: str
) -> None:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.add_session_config_entry(*EXACT_SUMS)
    model = graph_in(architecture, precision, signed=False)
    plain = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    with open_engine(architecture, precision) as runner:
        for count in (1, 8):
            batch = pixels(count, seed=count)
            seen = runner.run(batch)
            assert seen.dtype == np.float32
            assert seen.shape == (count, 3)
            np.testing.assert_array_equal(seen, plain.run(None, {"image": batch})[0])


def test_sums_of_large_products_do_not_overflow(
    open_engine: Callable, graph_in: Callable, pixels: Callable
) -> None:
    """As on a CPU without VNNI, where two products of 8-bit numbers do not fit into what they are summed in."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact = onnxruntime.InferenceSession(graph_in("cnn", "int8", signed=False), settings)
    with open_engine("cnn", "int8") as runner:
        found = runner.run(pixels(8))
    np.testing.assert_allclose(found, exact.run(None, {"image": pixels(8)})[0], atol=0.01)


@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_the_census_of_an_engine(tmp_path: Path, graph_in: Callable, architecture: str) -> None:
    layers = LAYERS[architecture]
    built = RUNTIME.build(graph_in(architecture, "fp32"), tmp_path / "a.engine", options("fp32", layers))
    assert built.layers == {"FP32": layers}
    assert built.layers_source == "graph as ONNX Runtime runs it on this machine"
    assert built.platform == {"system": platform.system(), "machine": platform.machine()}
    assert built.notes == ()


@pytest.mark.parametrize(("architecture", "word"), [("dsc", "depthwise"), ("cnn", "may be slower")])
def test_int8_is_fused_and_comes_with_a_warning(
    tmp_path: Path, graph_in: Callable, architecture: str, word: str
) -> None:
    layers = LAYERS[architecture]
    engine = tmp_path / "a.engine"
    model = graph_in(architecture, "int8", signed=False)
    built = RUNTIME.build(model, engine, options("int8", layers - 1))
    assert built.layers == {"INT8": layers - 1, "FP32": 1}
    assert len(built.notes) == 1
    assert word in built.notes[0]
    stored = [node.op_type for node in onnx.load(engine).graph.node]
    assert stored.count("QLinearConv") == layers - 2
    assert stored.count("QGemm") == 1
    assert "Conv" not in stored


ONNX_LAYERS = [
    "Conv_2",
    "Conv_5",
    "Conv_6",
    "Conv_9",
    "Conv_10",
    "Conv_13",
    "Conv_14",
    "MatMul_18",
    "MatMul_21",
]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_layers_are_the_nodes_that_run_and_have_times(
    tmp_path: Path, graph_in: Callable, record_of: Callable, precision: str
) -> None:
    engine = tmp_path / "a.engine"
    model = graph_in("dsc", precision, signed=False)
    built = RUNTIME.build(model, engine, options(precision, LAYERS["dsc"] - 1))
    record = replace(record_of(engine, "dsc", precision, built, BATCH), layer_types=built.layer_types)
    layers, report = RUNTIME.inspect_layers(engine, record)
    assert report is None
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "running.onnx")
    onnxruntime.InferenceSession(
        engine.read_bytes(),
        settings,
        ["CPUExecutionProvider"],
        disabled_optimizers=["WeightBiasQuantization"],
    )
    running = onnx.load(tmp_path / "running.onnx").graph.node
    assert [(layer.name, layer.kind) for layer in layers] == [(node.name, node.op_type) for node in running]
    named = {layer.onnx[0]: layer.precision for layer in layers if layer.onnx}
    assert named == {**dict.fromkeys(ONNX_LAYERS, precision.upper()), "MatMul_21": "FP32"}
    assert list(named) == ONNX_LAYERS
    assert (layers[0].name, layers[0].precision, layers[-1].name) == ("Cast_0", "FP32", "softmax")
    times = [layer.microseconds or 0.0 for layer in layers]
    assert min(times) >= 0 and all(time > 0 for time, layer in zip(times, layers, strict=True) if layer.onnx)


def test_layers_of_an_engine_that_onnxruntime_cannot_load(
    tmp_path: Path, graph_in: Callable, record_of: Callable
) -> None:
    engine = tmp_path / "a.engine"
    built = RUNTIME.build(graph_in("dsc", "fp32"), engine, options("fp32", LAYERS["dsc"]))
    record = record_of(engine, "dsc", "fp32", built, BATCH)
    with pytest.raises(ArtefactError, match=r"was built by onnxruntime 0\.1, here is"):
        RUNTIME.inspect_layers(engine, replace(record, runtime_version="0.1"))
    engine.write_bytes(b"nonsense")
    record = record_of(engine, "dsc", "fp32", built, BATCH)
    with pytest.raises(ArtefactError, match=r"onnxruntime cannot load .*a\.engine"):
        RUNTIME.inspect_layers(engine, record)


def test_the_stored_graph_is_not_tied_to_this_cpu(tmp_path: Path, graph_in: Callable) -> None:
    RUNTIME.build(graph_in("cnn", "fp32"), tmp_path / "a.engine", options("fp32", 6))
    domains = {node.domain for node in onnx.load(tmp_path / "a.engine").graph.node}
    assert domains <= {"", "com.microsoft"}  # not com.microsoft.nchwc


@pytest.mark.skipif(platform.machine() != "x86_64", reason="ARM64 CPUs have FP16 convolutions")
def test_fp16_on_x86_would_be_fp32_and_is_refused(tmp_path: Path, graph_in: Callable) -> None:
    with pytest.raises(
        AccuracyGateError, match="asked for 9 layers in FP16, the engine would have 9 in FP32"
    ):
        RUNTIME.build(graph_in("dsc", "fp16"), tmp_path / "a.engine", options("fp16", 9))
    assert list(tmp_path.iterdir()) == []


def test_signed_pairs_that_stay_float_are_refused(tmp_path: Path, graph_in: Callable) -> None:
    model = graph_in("cnn", "int8", signed=True)
    with pytest.raises(AccuracyGateError, match="asked for 5 layers in INT8"):
        RUNTIME.build(model, tmp_path / "a.engine", options("int8", 5))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_onnxruntime_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="onnxruntime cannot read the model") as caught:
        RUNTIME.build(b"nonsense", tmp_path / "a.engine", options("fp32", 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((1, 224, 224, 1), np.float32),
        np.zeros((224, 224, 1), np.uint8),
        np.zeros((1, 224, 224, 3), np.uint8),
        np.zeros((0, 224, 224, 1), np.uint8),
        np.zeros((9, 224, 224, 1), np.uint8),
        [[1, 2]],
    ],
)
def test_a_wrong_batch_is_named(open_engine: Callable, batch: object) -> None:
    with open_engine() as runner, pytest.raises(BadInputError) as caught:
        runner.run(batch)
    assert "takes uint8 [N, 224, 224, 1], N from 1 to 8, not" in caught.value.what
    assert "edge-dsc build-engine model.onnx" in caught.value.remedy


def test_a_strided_batch_is_taken_as_it_is(open_engine: Callable, pixels: Callable) -> None:
    batch = pixels(2)
    with open_engine() as runner:
        np.testing.assert_array_equal(runner.run(batch[:, ::-1]), runner.run(batch[:, ::-1].copy()))


def test_threads_share_a_runner(open_engine: Callable, pixels: Callable) -> None:
    with open_engine() as runner:
        assert runner.thread_safe
        batches = [pixels(1, seed=seed) for seed in range(8)]
        expected = [runner.run(batch) for batch in batches]
        seen: dict[int, np.ndarray] = {}

        def work(index: int) -> None:
            seen[index] = runner.run(batches[index])

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, probabilities in enumerate(expected):
        np.testing.assert_array_equal(seen[index], probabilities)


def test_a_closed_runner_says_so(open_engine: Callable, pixels: Callable) -> None:
    runner = open_engine()
    runner.close()
    runner.close()
    with pytest.raises(ValueError, match=r"the runner of dsc-fp32.engine is closed"):
        runner.run(pixels(1))


def test_an_engine_of_another_version_is_refused(open_engine: Callable, tmp_path: Path) -> None:
    with open_engine() as runner:
        record = replace(runner.record, runtime_version="1.2.9")
    with pytest.raises(ArtefactError, match=r"built by onnxruntime 1\.2\.9, here is") as caught:
        RUNTIME.open_runner(tmp_path / record.engine, record)
    assert caught.value.remedy == "rebuild it: edge-dsc build-engine model.onnx"


def test_a_patch_release_is_no_reason_to_refuse(open_engine: Callable, tmp_path: Path) -> None:
    with open_engine() as runner:
        minor = ".".join(onnxruntime.__version__.split(".")[:2])
        record = replace(runner.record, runtime_version=f"{minor}.99")
    RUNTIME.open_runner(tmp_path / record.engine, record).close()


def test_fp16_is_proven_for_one_architecture_only(open_engine: Callable, tmp_path: Path) -> None:
    with open_engine() as runner:
        record = replace(runner.record, precision=Precision.FP16, platform={"machine": "riscv64"})
    with pytest.raises(ArtefactError, match=f"FP16 on riscv64, which is not proven for {platform.machine()}"):
        RUNTIME.open_runner(tmp_path / record.engine, record)


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 100]
)
def test_a_damaged_engine_is_refused(open_engine: Callable, tmp_path: Path, damage: Callable) -> None:
    with open_engine() as runner:
        record = runner.record
    engine = tmp_path / record.engine
    damaged = damage(engine.read_bytes())
    engine.write_bytes(damaged)
    with pytest.raises(ArtefactError, match="is not the engine of its record"):
        RUNTIME.open_runner(engine, record)
    with pytest.raises(ArtefactError, match="onnxruntime cannot load") as caught:
        RUNTIME.open_runner(engine, replace(record, engine_sha256=sha256_bytes(damaged)))
    assert caught.value.remedy == "rebuild it: edge-dsc build-engine model.onnx"


class StandIn:
    """A session that fails as told."""

    def __init__(self, failure: Exception) -> None:
        self.failure = failure

    def run(self, outputs: object, feed: object) -> None:
        raise self.failure


STATE = onnxruntime.capi.onnxruntime_pybind11_state


@pytest.mark.parametrize(
    "failure",
    [
        STATE.Fail(
            "[ONNXRuntimeError] : 1 : FAIL : BFCArena Failed to allocate memory for requested buffer of size 9"
        ),
        STATE.Fail("Available memory of 1024 is smaller than requested bytes of 2048"),
        STATE.RuntimeException("Non-zero status code: std::bad_alloc"),
        MemoryError("std::bad_alloc"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_a_problem_of_the_machine(
    open_engine: Callable, pixels: Callable, failure: Exception
) -> None:
    with open_engine() as runner:
        failing = OrtRunner(StandIn(failure), runner.record)
    with pytest.raises(EnvironmentProblem, match=r"onnxruntime cannot run dsc-fp32\.engine: \S") as caught:
        failing.run(pixels(1))
    assert caught.value.remedy == "free some memory, or use a smaller batch"


@pytest.mark.parametrize("kind", ["Fail", "InvalidArgument", "InvalidGraph", "NotImplemented", "EPFail"])
def test_any_other_failure_is_one_of_the_engine(open_engine: Callable, pixels: Callable, kind: str) -> None:
    with open_engine() as runner:
        failing = OrtRunner(StandIn(getattr(STATE, kind)("Conv node\nand more")), runner.record)
    with pytest.raises(ArtefactError) as caught:
        failing.run(pixels(1))
    assert caught.value.what == "onnxruntime cannot run dsc-fp32.engine: Conv node"
    assert caught.value.remedy == "rebuild it: edge-dsc build-engine model.onnx"


@pytest.mark.parametrize("bug", [ValueError("no such input"), RuntimeError("not an array"), TypeError("x")])
def test_a_wrong_call_is_not_dressed_up(open_engine: Callable, pixels: Callable, bug: Exception) -> None:
    with open_engine() as runner:
        failing = OrtRunner(StandIn(bug), runner.record)
    with pytest.raises(type(bug), match=str(bug)):
        failing.run(pixels(1))


def one_node_session(op: str, *inputs: onnx.ValueInfoProto) -> object:
    """A session of ONNX Runtime itself that fails when it runs, not when it is opened."""
    node = onnx.helper.make_node(op, [value.name for value in inputs], ["probabilities"])
    answer = onnx.helper.make_tensor_value_info("probabilities", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([node], "g", list(inputs), [answer])
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    return open_session(model.SerializeToString(), "g", threads=1, remedy="none")


class Feeding:
    """Hands other values to a session than those it is given."""

    def __init__(self, session: object, **feed: np.ndarray) -> None:
        self.session, self.feed = session, feed

    def run(self, outputs: list[str], feed: object) -> list[np.ndarray]:
        return self.session.run(outputs, self.feed)


def test_what_onnxruntime_says_when_memory_runs_out(open_engine: Callable, pixels: Callable) -> None:
    shape = onnx.helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [2])
    petabytes = Feeding(one_node_session("ConstantOfShape", shape), shape=np.array([1 << 24, 1 << 24]))
    with open_engine() as runner:
        failing = OrtRunner(petabytes, runner.record)
    with pytest.raises(EnvironmentProblem, match="allocate memory"):
        failing.run(pixels(1))


def test_what_onnxruntime_says_when_a_node_fails(open_engine: Callable, pixels: Callable) -> None:
    values = onnx.helper.make_tensor_value_info("values", onnx.TensorProto.FLOAT, [None])
    shape = onnx.helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [1])
    session = one_node_session("Reshape", values, shape)
    feed = {"values": np.zeros(6, np.float32), "shape": np.array([4])}
    with open_engine() as runner:
        failing = OrtRunner(Feeding(session, **feed), runner.record)
    with pytest.raises(ArtefactError, match="Reshape") as caught:
        failing.run(pixels(1))
    assert caught.value.remedy == "rebuild it: edge-dsc build-engine model.onnx"


def test_submitting_and_collecting(open_engine: Callable, pixels: Callable) -> None:
    with open_engine() as runner:
        assert (runner.slots, runner.description["execution"]) == (1, "ONNX Runtime session")
        batch = pixels(2)
        np.testing.assert_array_equal(runner.collect(runner.submit(batch)), runner.run(batch))


def test_it_works_here() -> None:
    found = RUNTIME.availability()
    assert found.version == onnxruntime.__version__
    assert (found.no_build, found.no_run) == (None, None)


def test_the_reference_answers_like_the_engine(
    open_engine: Callable, graph_in: Callable, pixels: Callable
) -> None:
    graph = onnx.load_model_from_string(graph_in("dsc", "int8", signed=False))
    with open_engine("dsc", "int8") as runner, open_reference(graph, runner.record) as reference:
        assert reference.record == runner.record
        np.testing.assert_array_equal(reference.run(pixels(2)), runner.run(pixels(2)))


def test_a_graph_that_cannot_be_opened_is_named_with_its_engine(open_engine: Callable) -> None:
    with open_engine() as runner, pytest.raises(ArtefactError) as caught:
        open_reference(onnx.ModelProto(), runner.record)
    assert caught.value.what.startswith("onnxruntime cannot load the graph of dsc-fp32.engine: ")
    assert caught.value.remedy == "rebuild it: edge-dsc build-engine model.onnx"


def test_no_place_for_temporary_files(
    tmp_path: Path, graph_in: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(EnvironmentProblem, match=r"cannot write temporary files: .*No such file") as caught:
        RUNTIME.build(graph_in("dsc", "fp32"), tmp_path / "a.engine", options("fp32", 9))
    assert "TMPDIR" in caught.value.remedy


@pytest.mark.parametrize("change", [{"labels": ("a", "b")}, {"input_name": "pixels"}, {"height": 112}])
def test_an_engine_whose_record_describes_another_is_refused(
    open_engine: Callable, tmp_path: Path, change: dict[str, object]
) -> None:
    with open_engine("dsc", "fp32") as runner:
        record = runner.record
    other = replace(record, contract=replace(record.contract, **change))
    with pytest.raises(ArtefactError, match=r"has the inputs and outputs .*, its record says"):
        RUNTIME.open_runner(tmp_path / record.engine, other)


def test_what_onnxruntime_cannot_be_told_is_refused_by_name(
    tmp_path: Path, deployed_models: dict[str, Path]
) -> None:
    wanted = BuildOptions(precision=Precision.FP32, tuning=Tuning(optimization_level=5))
    with pytest.raises(UsageError, match="onnxruntime has no --optimization-level") as caught:
        RUNTIME.build(deployed_models["dsc"].read_bytes(), tmp_path / "a.engine", wanted)
    assert caught.value.remedy == "leave it out, or choose another --backend"
