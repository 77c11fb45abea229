from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from engines import runtimes
from engines.errors import AccuracyGateError, ArtefactError, BadInputError, EnvironmentProblem, UsageError
from engines.record import BatchRange, Precision
from engines.runtimes import (
    Availability,
    BatchCheck,
    BuildOptions,
    BuildResult,
    DirectSubmission,
    EngineLayer,
    RunnerOptions,
    Ticket,
    answer_batches,
    check_layers,
    check_precision,
    choose_runtime,
    get_runtime,
    layer_times,
    refuse_on_processor,
)


@pytest.mark.parametrize("name", runtimes.RUNTIME_NAMES)
def test_the_table_holds_what_it_names(name: str) -> None:
    runtime = get_runtime(name)
    assert runtime.name == name
    found = runtime.availability()
    assert (found.version is None) <= (found.no_build is not None and found.no_run is not None)


def test_an_unknown_runtime_is_refused_with_the_names() -> None:
    with pytest.raises(UsageError, match="no runtime 'tvm'") as caught:
        get_runtime("tvm")
    assert "onnxruntime, openvino, tensorrt, tensorrt-rtx" in caught.value.remedy


@pytest.mark.parametrize(
    ("found", "name", "reason"),
    [
        (Availability("10.3", None, None), "tensorrt", "tensorrt 10.3 and a GPU are here"),
        (Availability(None, "not installed", "not installed"), "onnxruntime", "not installed"),
        (Availability("10.3", None, "no CUDA driver"), "onnxruntime", "no CUDA driver"),
    ],
)
def test_auto_takes_tensorrt_where_it_works_and_says_why(
    monkeypatch: pytest.MonkeyPatch, found: Availability, name: str, reason: str
) -> None:
    monkeypatch.setattr(type(get_runtime("tensorrt")), "availability", lambda self: found)
    runtime, why = choose_runtime("auto")
    assert runtime.name == name
    assert reason in why


def test_a_precision_that_too_few_layers_have_is_refused() -> None:
    options = BuildOptions(precision=Precision.INT8, required_layers=8)
    check_precision({"INT8": 8, "FP32": 1}, options)
    with pytest.raises(
        AccuracyGateError, match="asked for 8 layers in INT8, the engine would have 2 in FP32, 7 in INT8"
    ):
        check_precision({"INT8": 7, "FP32": 2}, options)


def test_an_engine_is_checked_before_its_runtime_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(name: str) -> None:
        raise AssertionError("the runtime was asked for an engine without a record")

    monkeypatch.setattr(runtimes, "get_runtime", never)
    (tmp_path / "a.engine").write_bytes(b"plan")
    with pytest.raises(ArtefactError, match="has no record"):
        runtimes.open_engine(tmp_path / "a.engine")


WANTED = {"stem": "INT8", "dense": "INT8", "logits": "float"}


def built(layers: dict[str, int], **layer_types: str) -> BuildResult:
    return BuildResult(layers=layers, layers_source="test", platform={}, layer_types=layer_types)


@pytest.mark.parametrize("rest", ["FP32", "FP16"])
def test_every_layer_is_held_by_its_name(rest: str) -> None:
    check_layers(built({"INT8": 2, rest: 1}, stem="INT8", dense="INT8", logits=rest), WANTED)


def test_layers_in_another_precision_are_named() -> None:
    found = built({"INT8": 2, "FP32": 1}, stem="INT8", dense="FP32", logits="INT8")
    with pytest.raises(AccuracyGateError) as caught:
        check_layers(found, {**WANTED, "absent": "INT8"})
    assert caught.value.what == (
        "the engine would run dense in FP32, not INT8; logits in INT8, not float; "
        "absent in no precision that is known, not INT8 (test)"
    )
    assert caught.value.remedy == "choose another precision or --backend; nothing was written"


def test_layers_without_names_are_counted() -> None:
    check_layers(built({"INT8": 2, "FP32": 1}), WANTED)
    with pytest.raises(AccuracyGateError, match="would run 1 layers in INT8, not 2"):
        check_layers(built({"INT8": 1, "FP32": 2}), WANTED)


def test_what_each_runtime_wants_and_where_it_runs() -> None:
    facts = {
        name: (runtime.signed_activations, runtime.float_precision, runtime.runs_on_cpu)
        for name in runtimes.RUNTIME_NAMES
        for runtime in [get_runtime(name)]
    }
    assert facts == {
        "onnxruntime": (False, Precision.FP32, True),
        "openvino": (False, Precision.FP32, True),
        "tensorrt": (True, Precision.FP16, False),
        "tensorrt-rtx": (True, Precision.FP16, False),
    }


def test_all_but_openvino_sum_products_of_8_bits_exactly_everywhere() -> None:
    names = [name for name in runtimes.RUNTIME_NAMES if name != "openvino"]
    assert {get_runtime(name).weight_bits() for name in names} == {8}


def test_what_is_for_a_gpu_is_refused_by_name_on_the_processor() -> None:
    refuse_on_processor(get_runtime("tensorrt"), ["--device"])
    refuse_on_processor(get_runtime("onnxruntime"), [])
    with pytest.raises(UsageError) as caught:
        refuse_on_processor(get_runtime("onnxruntime"), ["--slots", "--device"])
    assert str(caught.value) == (
        "onnxruntime runs on the processor: --slots is for a GPU (leave --slots and --device out)"
    )
    with pytest.raises(
        UsageError, match=r"^a\.engine is of onnxruntime, which runs on the processor: --device"
    ):
        refuse_on_processor(get_runtime("onnxruntime"), ["--device"], Path("a.engine"))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        # 8.6 joins the names, 10 and 11 tell them beside a name of their own.
        ([("stem + stem_relu", (), 2000.0), ("dense + logits.1", (), 500.0)], {"stem": 2.0, "dense": 0.5}),
        ([("__myl_0", ("stem", "stem_relu"), 2000.0), ("__myl_1", ("dense",), 500.0)], {"stem": 2.0, "dense": 0.5}),
        ([("__myl_0", ("stem", "pool"), 2000.0), ("__myl_1", ("dense", "logits"), 500.0)], {"stem": 2.0}),
        ([("part 1 of stem", (), 2000.0), ("Reformatting CopyNode for Input Tensor 0 to stem", (), 250.0)],
         {"stem": 2.25}),
        ([("stem_relu", (), 1.0), ("model/stem", (), 1.0), ("stem.centre", (), 1.0)], {}),
        ([("stem", (), None)], {}),
        ([("stem [profile 1]", (), 1000.0), ("stem + dense", (), 1000.0)], {}),
    ],
)  # fmt: skip
def test_the_time_of_an_onnx_layer_is_that_of_what_holds_it_alone(
    layers: list[tuple[str, tuple[str, ...], float | None]], expected: dict[str, float]
) -> None:
    seen = [EngineLayer(name=name, onnx=onnx, microseconds=time) for name, onnx, time in layers]
    assert layer_times(seen, ["stem", "dense", "logits"]) == expected


class Doubling(DirectSubmission):
    def run(self, batch: int) -> int:
        return 2 * batch


class Slots:
    """A runner with two slots that notes what happens, and fails where told."""

    slots = 2

    def __init__(self, fails: int = -1) -> None:
        self.log: list[str] = []
        self.fails = fails
        self.open = 0

    def submit(self, batch: int) -> Ticket:
        assert self.open < self.slots
        self.open += 1
        self.log.append(f"submit {batch}")
        return Ticket(self, batch)

    def collect(self, ticket: Ticket) -> int:
        batch = ticket.take(self)
        self.open -= 1
        self.log.append(f"collect {batch}")
        if batch >= self.fails >= 0:
            raise EnvironmentProblem(f"batch {batch} fails", remedy="none")
        return 2 * batch


def tagged(count: int) -> Iterator[tuple[str, int]]:
    return ((f"t{index}", index) for index in range(count))


def test_direct_submission_runs_at_once() -> None:
    runner = Doubling()
    ticket = runner.submit(4)
    assert (runner.collect(ticket), ticket.stages_ns, runner.slots) == (8, None, 1)
    assert list(answer_batches(runner, tagged(3))) == [("t0", 0), ("t1", 2), ("t2", 4)]


def test_a_ticket_is_collected_once_and_by_its_runner() -> None:
    runner = Doubling()
    ticket = runner.submit(1)
    with pytest.raises(ValueError, match="of another runner"):
        Doubling().collect(ticket)
    runner.collect(ticket)
    with pytest.raises(ValueError, match="collected before"):
        runner.collect(ticket)


def test_the_slots_are_kept_full_and_answers_stay_in_order() -> None:
    runner = Slots()
    answers = answer_batches(runner, tagged(4))
    assert next(answers) == ("t0", 0)
    # The device has the third batch before the caller gets the first answer.
    assert runner.log == ["submit 0", "submit 1", "collect 0", "submit 2"]
    assert list(answers) == [("t1", 2), ("t2", 4), ("t3", 6)]
    assert runner.log[4:] == ["collect 1", "submit 3", "collect 2", "collect 3"]


def test_stopping_early_leaves_no_ticket_open() -> None:
    runner = Slots()
    answers = answer_batches(runner, tagged(9))
    next(answers)
    answers.close()
    assert runner.open == 0


def test_a_source_that_fails_leaves_no_ticket_open() -> None:
    def failing() -> Iterator[tuple[str, int]]:
        yield from tagged(2)
        raise OSError("unplugged")

    runner = Slots()
    with pytest.raises(OSError, match="unplugged"):
        list(answer_batches(runner, failing()))
    assert runner.open == 0


def test_the_first_failure_is_told_and_the_rest_dropped() -> None:
    runner = Slots(fails=1)
    with pytest.raises(EnvironmentProblem, match="batch 1 fails"):
        list(answer_batches(runner, tagged(5)))
    assert runner.open == 0


@pytest.mark.parametrize("wrong", [{"slots": 0}, {"threads": 0}, {"memory": "managed"}, {"device": -1}])
def test_options_are_checked(wrong: dict) -> None:
    with pytest.raises(ValueError, match="no slot, no thread, no batch, no GPU, or a memory"):
        RunnerOptions(**wrong)


@pytest.fixture
def check(deployed_models: dict[str, Path], record_of: Callable) -> BatchCheck:
    result = BuildResult(layers={}, layers_source="", platform={})
    return BatchCheck(record_of(deployed_models["dsc"], "dsc", "fp32", result, BatchRange(2, 4, 8)))


@pytest.mark.parametrize("count", [2, 8])
def test_the_range_of_batches_is_inclusive(check: BatchCheck, count: int) -> None:
    check(np.zeros((count, 224, 224, 1), np.uint8))


@pytest.mark.parametrize(
    ("batch", "seen"),
    [
        (np.zeros((1, 224, 224, 1), np.uint8), "uint8 [1, 224, 224, 1]"),
        (np.zeros((9, 224, 224, 1), np.uint8), "uint8 [9, 224, 224, 1]"),
        (np.zeros((2, 224, 224, 1), np.float32), "float32 [2, 224, 224, 1]"),
        (np.zeros((2, 224, 224), np.uint8), "uint8 [2, 224, 224]"),
        (np.zeros((2, 1, 224, 224), np.uint8), "uint8 [2, 1, 224, 224]"),
        ([0, 1], "list []"),
    ],
)
def test_any_other_batch_is_named(check: BatchCheck, batch: object, seen: str) -> None:
    with pytest.raises(BadInputError) as caught:
        check(batch)
    assert caught.value.what == f"dsc.onnx takes uint8 [N, 224, 224, 1], N from 2 to 8, not {seen}"
    assert caught.value.remedy.endswith("build with another --batch: edge-dsc build-engine model.onnx")
