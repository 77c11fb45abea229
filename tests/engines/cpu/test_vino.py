from __future__ import annotations

import io
import json
import platform
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from branched_networks import BRANCHED
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("openvino")

from engines.cpu import vino
from engines.cpu.vino import RUNTIME, VinoRunner
from engines.errors import AccuracyGateError, ArtefactError, BadInputError, EnvironmentProblem, UsageError
from engines.files import sha256_bytes
from engines.graph import layer_types
from engines.images import usable_processors
from engines.packages import load
from engines.record import BatchRange, EngineRecord, Precision, Tuning
from engines.runtimes import BuildOptions, RunnerOptions

BATCH = BatchRange(1, 4, 8)
CPUINFO = Path("/proc/cpuinfo")
NAMES = {
    "dsc": [
        "Conv_2",
        "Conv_5",
        "Conv_6",
        "Conv_9",
        "Conv_10",
        "Conv_13",
        "Conv_14",
        "MatMul_18",
        "MatMul_21",
    ],
    "cnn": ["Conv_2", "Conv_5", "Conv_8", "Conv_11", "MatMul_15", "MatMul_18"],
}


def options(precision: str, required: int) -> BuildOptions:
    return BuildOptions(precision=Precision(precision), required_layers=required, batch=BATCH)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, graph_in: Callable) -> Callable[..., tuple[Path, Any]]:
    """``built("dsc", "int8")``: the engine and what its build found. Read only; copy before you change it."""
    made: dict[tuple[str, str], tuple[Path, Any]] = {}

    def build(architecture: str, precision: str) -> tuple[Path, Any]:
        if (architecture, precision) not in made:
            out = tmp_path_factory.mktemp("vino") / f"{architecture}-{precision}.engine"
            model = graph_in(architecture, precision, signed=False)
            result = RUNTIME.build(model, out, options(precision, len(NAMES[architecture]) - 1))
            made[architecture, precision] = (out, result)
        return made[architecture, precision]

    return build


@pytest.fixture
def copied(tmp_path: Path, built: Callable, record_of: Callable) -> Callable[..., tuple[Path, EngineRecord]]:
    """An engine of one's own, with what was compiled of it, and its record."""

    def copy(architecture: str = "dsc", precision: str = "fp32") -> tuple[Path, EngineRecord]:
        source, result = built(architecture, precision)
        for path in source.parent.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        engine = tmp_path / source.name
        return engine, record_of(engine, architecture, precision, result, BATCH, "openvino")

    return copy


def exact_answers(model: bytes, batch: np.ndarray) -> np.ndarray:
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": batch})[0]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-5), ("int8", 0.02)])
def test_the_engine_answers_as_its_graph_says(
    copied: Callable, graph_in: Callable, pixels: Callable, architecture: str, precision: str, most: float
) -> None:
    """Also without VNNI, where two products of 8-bit numbers do not fit into what they are summed in."""
    expected = exact_answers(graph_in(architecture, precision, signed=False), pixels(8))
    with RUNTIME.open_runner(*copied(architecture, precision)) as runner:
        for count in (8, 1, 3):  # the largest and the smallest, each compiled for itself, and one of any size
            seen = runner.run(pixels(8)[:count])
            assert (seen.dtype, seen.shape) == (np.float32, (count, 3))
            np.testing.assert_allclose(seen, expected[:count], atol=most)


@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_layer_is_named_with_the_precision_that_it_runs_in(
    built: Callable, architecture: str, precision: str
) -> None:
    _, result = built(architecture, precision)
    *inner, last = NAMES[architecture]
    assert result.layer_types == {**dict.fromkeys(inner, precision.upper()), last: "FP32"}
    assert list(result.layer_types) == NAMES[architecture]
    assert result.layers_source == "execution graph of OpenVINO on this machine"
    assert (result.platform["machine"], "FP32" in result.platform["processor"]) == (platform.machine(), True)
    assert ("VNNI" in "".join(result.notes)) == (precision == "int8")


@pytest.mark.parametrize("name", BRANCHED)
def test_layers_of_networks_that_are_no_chains_have_their_names(tmp_path: Path, name: str) -> None:
    model = BRANCHED[name]()
    result = RUNTIME.build(
        model.SerializeToString(), tmp_path / "a.engine", BuildOptions(precision=Precision.FP32)
    )
    assert result.layer_types == layer_types(model)


def test_fp32_under_the_name_of_int8_is_refused(tmp_path: Path, graph_in: Callable) -> None:
    with pytest.raises(
        AccuracyGateError, match="asked for 8 layers in INT8, the engine would have 9 in FP32"
    ):
        RUNTIME.build(graph_in("dsc", "fp32"), tmp_path / "a.engine", options("int8", 8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_type_that_the_processor_lacks_is_refused_by_name(
    tmp_path: Path, graph_in: Callable, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    plain = vino._Compiler.__init__

    def without(self: Any, *arguments: Any, **named: Any) -> None:
        plain(self, *arguments, **named)
        self._types = ["FP32", "INT8"]

    monkeypatch.setattr(vino._Compiler, "__init__", without)
    with pytest.raises(AccuracyGateError, match=f"this processor has no {precision.upper()}: OpenVINO sees "):
        RUNTIME.build(graph_in("dsc", "fp32"), tmp_path / "a.engine", options(precision, 9))
    assert list(tmp_path.iterdir()) == []


def test_what_openvino_cannot_read_or_be_told(tmp_path: Path, graph_in: Callable) -> None:
    with pytest.raises(ArtefactError, match="is not an ONNX model"):
        RUNTIME.build(b"nonsense", tmp_path / "a.engine", options("fp32", 1))
    with pytest.raises(UsageError, match="openvino has no --dla"):
        tuned = BuildOptions(precision=Precision.FP32, tuning=Tuning(dla=0))
        RUNTIME.build(graph_in("dsc", "fp32"), tmp_path / "a.engine", tuned)
    with pytest.raises(UsageError, match="openvino knows no ranges by tensorrt-entropy"):
        RUNTIME.require_calibrators("tensorrt-entropy")


def test_the_engine_is_the_graph_and_tied_to_nothing(built: Callable, graph_in: Callable) -> None:
    engine, _ = built("dsc", "int8")
    assert engine.read_bytes() == graph_in("dsc", "int8", signed=False)


def state_of(engine: Path, record: EngineRecord) -> str:
    with RUNTIME.open_runner(engine, record) as runner:
        return runner.description["runtime_cache"]


def test_what_was_compiled_is_kept_and_read_again(copied: Callable) -> None:
    engine, record = copied()
    kept = engine.with_name("dsc-fp32.engine.b1.compiled")
    assert state_of(engine, record) == f"read from {kept.name}"
    kept.unlink()
    assert state_of(engine, record) == f"none beside the engine, kept in {kept.name}"
    assert state_of(engine, record) == f"read from {kept.name}"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"processor": "another"}, r"was compiled for processor another, here is .*"),
        ({"openvino": "2026.0"}, r"was compiled for openvino 2026\.0, here is .*"),
        ({"engine_sha256": "0" * 64}, "is of another engine or damaged"),
        ({"content_sha256": "0" * 64}, "is of another engine or damaged"),
        (None, "is of another engine or damaged"),
    ],
)
def test_what_was_compiled_elsewhere_is_compiled_again(
    copied: Callable, pixels: Callable, change: dict[str, str] | None, why: str
) -> None:
    engine, record = copied()
    kept = engine.with_name("dsc-fp32.engine.b1.compiled")
    line, _, content = kept.read_bytes().partition(b"\n")
    if change is None:
        kept.write_bytes(b"\x00no JSON")
    else:
        kept.write_bytes(json.dumps({**json.loads(line), **change}).encode() + b"\n" + content)
    state = state_of(engine, record)
    name = kept.name.replace(".", r"\.")
    assert re.fullmatch(f"{name} {why}: compiled again, kept in {name}", state)
    assert state_of(engine, record) == f"read from {kept.name}"


def test_content_that_openvino_refuses_is_compiled_again(copied: Callable) -> None:
    engine, record = copied()
    kept = engine.with_name("dsc-fp32.engine.b1.compiled")
    head = {**json.loads(kept.read_bytes().partition(b"\n")[0]), "content_sha256": sha256_bytes(b"nonsense")}
    kept.write_bytes(json.dumps(head).encode() + b"\nnonsense")
    assert "is refused by OpenVINO" in state_of(engine, record)
    assert state_of(engine, record) == f"read from {kept.name}"


def test_a_folder_that_cannot_be_written_costs_only_time(
    copied: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise EnvironmentProblem("cannot write it", remedy="none")

    engine, record = copied()
    engine.with_name("dsc-fp32.engine.b1.compiled").unlink()
    monkeypatch.setattr(vino, "write_bytes", refuse)
    assert state_of(engine, record) == "none beside the engine, not kept: cannot write it"


def test_another_processor_must_keep_the_precision(copied: Callable) -> None:
    engine, record = copied("dsc", "int8")
    engine.with_name("dsc-int8.engine.b1.compiled").unlink()
    elsewhere = replace(record, layers={"INT8": 9}, platform={"processor": "another"})
    with pytest.raises(
        ArtefactError,
        match=r"would run 1 in FP32, 8 in INT8 on this processor .*, not as it was built on another",
    ):
        RUNTIME.open_runner(engine, elsewhere)
    assert not engine.with_name("dsc-int8.engine.b1.compiled").exists()


@pytest.mark.parametrize("exactly", [True, False])
def test_weights_of_8_bits_need_a_processor_that_sums_them_exactly(
    copied: Callable, monkeypatch: pytest.MonkeyPatch, exactly: bool
) -> None:
    engine, record = copied("dsc", "int8")
    monkeypatch.setattr(vino, "_sums_exactly", lambda: exactly)
    assert state_of(engine, replace(record, weight_bits=7)).startswith("read from ")
    engine.with_name("dsc-int8.engine.b1.compiled").unlink()
    brought = replace(record, weight_bits=8, platform={"processor": "another"})
    if exactly:
        assert state_of(engine, brought).startswith("none beside the engine, kept in ")
        return
    with pytest.raises(
        ArtefactError,
        match=r"has INT8 weights of 8 bits, whose sums overflow on this processor .*; it was built on another",
    ) as caught:
        RUNTIME.open_runner(engine, brought)
    assert caught.value.remedy.startswith("rebuild it: ")
    assert not engine.with_name("dsc-int8.engine.b1.compiled").exists()
    assert state_of(engine, replace(record, weight_bits=7)).startswith("none beside the engine, kept in ")


@pytest.mark.skipif(platform.machine() != "x86_64" or not CPUINFO.exists(), reason="tells nothing of VNNI")
def test_the_network_that_overflows_without_vnni_tells_whether_there_is_any() -> None:
    flags = set(CPUINFO.read_text().partition("flags")[2].partition("\n")[0].split())
    assert RUNTIME.weight_bits() == (8 if flags & {"avx_vnni", "avx512_vnni"} else 7)


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(1, 32, 1), (32, 32, 32)])
def test_layers_that_keep_8_bits_are_summed_exactly_on_any_processor(
    inputs: int, outputs: int, groups: int
) -> None:
    """The kernels that :meth:`calibration.layers.Layer.bits` trusts: sums of 255 times 127, as large as they come."""
    constants = {
        "step": np.array(1, np.float32), "zero": np.array(0, np.uint8), "weight_step": np.array(1 / 127, np.float32),
        "weight_zero": np.array(0, np.int8), "weight": np.full((outputs, inputs // groups, 3, 3), 127, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "step", "zero"], ["integers"]),
        helper.make_node("DequantizeLinear", ["integers", "step", "zero"], ["values"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_step", "weight_zero"], ["kernel"]),
        helper.make_node("Conv", ["values", "kernel"], ["sums"], pads=[1] * 4, group=groups),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, channels, 8, 8))
        for name, channels in (("image", inputs), ("sums", outputs))
    ]
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "sums", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    core = load("openvino").Core()
    compiled = core.compile_model(core.read_model(io.BytesIO(model.SerializeToString())), "CPU")
    assert vino._census_by_order(compiled) == {"INT8": 1}
    (found,) = compiled([np.full((1, inputs, 8, 8), 255, np.float32)]).values()
    expected = 255 * 9 * inputs / groups
    assert found.max() == pytest.approx(expected, rel=1e-3)


def test_damaged_engines_and_foreign_ends_are_refused(copied: Callable) -> None:
    engine, record = copied()
    contract = replace(record.contract, labels=("a", "b"))
    with pytest.raises(ArtefactError, match=r"has the inputs and outputs .*\[3\]\)\], its record says"):
        RUNTIME.open_runner(engine, replace(record, contract=contract))
    engine.with_name("dsc-fp32.engine.b1.compiled").unlink()
    damaged = engine.read_bytes()[:-100]
    engine.write_bytes(damaged)
    with pytest.raises(ArtefactError, match="is not the engine of its record"):
        RUNTIME.open_runner(engine, record)
    with pytest.raises(ArtefactError, match=r"openvino cannot load .*dsc-fp32\.engine: \S") as caught:
        RUNTIME.open_runner(engine, replace(record, engine_sha256=sha256_bytes(damaged)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("running", "streams"),
    [
        (RunnerOptions(slots=1, threads=1), "1 stream (latency)"),
        (RunnerOptions(slots=1, threads=2), "1 stream (latency)"),
        (RunnerOptions(threads=usable_processors()), "1 stream (latency)"),
        pytest.param(
            RunnerOptions(slots=2),
            "2 streams (throughput)",
            marks=pytest.mark.skipif(
                usable_processors() < 2, reason="OpenVINO makes no more streams than processors"
            ),
        ),
    ],
)
def test_one_request_at_a_time_is_run_for_latency(
    copied: Callable, pixels: Callable, running: RunnerOptions, streams: str
) -> None:
    with RUNTIME.open_runner(*copied(), running) as runner:
        assert runner.description["execution"] == f"OpenVINO, {streams}"
        assert runner.run(pixels(1)).shape == (1, 3)


def test_threads_share_a_runner(copied: Callable, pixels: Callable) -> None:
    with RUNTIME.open_runner(*copied(), RunnerOptions(slots=2)) as runner:
        batches = [pixels(1, seed=seed) for seed in range(8)]
        expected = [runner.run(batch) for batch in batches]
        seen: dict[int, np.ndarray] = {}
        threads = [
            threading.Thread(target=lambda at: seen.update({at: runner.run(batches[at])}), args=(index,))
            for index in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, probabilities in enumerate(expected):
        np.testing.assert_array_equal(seen[index], probabilities)
    assert len({probabilities.tobytes() for probabilities in expected}) == 8


def test_answers_are_the_callers_and_batches_are_checked(copied: Callable, pixels: Callable) -> None:
    with RUNTIME.open_runner(*copied()) as runner:
        first = runner.run(pixels(1))
        kept = first.copy()
        runner.run(pixels(1, seed=5)[:, ::-1])
        np.testing.assert_array_equal(first, kept)
        with pytest.raises(BadInputError, match="takes uint8"):
            runner.run(pixels(1).astype(np.float32))
    runner.close()
    with pytest.raises(ValueError, match=r"the runner of dsc-fp32\.engine is closed"):
        runner.run(pixels(1))


@pytest.mark.parametrize(
    ("failure", "kind", "remedy"),
    [
        (RuntimeError("Exception from src/x.cpp:1:\nno such kernel\n"), ArtefactError, "rebuild it: "),
        (RuntimeError("Exception from src/x.cpp:1:\nstd::bad_alloc"), EnvironmentProblem, "free some memory"),
        (MemoryError(), EnvironmentProblem, "free some memory"),
    ],
)
def test_failures_of_a_run_have_one_line(
    copied: Callable, pixels: Callable, failure: Exception, kind: type[Exception], remedy: str
) -> None:
    def fail(**_: object) -> None:
        raise failure

    with RUNTIME.open_runner(*copied()) as runner:
        assert isinstance(runner, VinoRunner)
        runner.run(pixels(1))
        slots = vars(runner._local)["slots"]
        slots[1] = slots[1]._replace(infer=fail)
        with pytest.raises(kind, match=r"openvino cannot run dsc-fp32\.engine: ") as caught:
            runner.run(pixels(1))
    assert "Exception from" not in str(caught.value) and remedy in str(caught.value)


def test_layers_have_kernels_and_times(copied: Callable) -> None:
    layers, report = RUNTIME.inspect_layers(*copied("dsc", "int8"))
    assert report is None
    weighted = {layer.onnx[0]: layer for layer in layers if layer.onnx}
    assert list(weighted) == NAMES["dsc"]
    assert [layer.precision for layer in weighted.values()] == [*["INT8"] * 8, "FP32"]
    assert {layer.kind for layer in weighted.values()} == {"Convolution", "FullyConnected"}
    assert all(layer.kernel and (layer.microseconds or 0) > 0 for layer in weighted.values())
    assert "Softmax" in {layer.kind for layer in layers}
