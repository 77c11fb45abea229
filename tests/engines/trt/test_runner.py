from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from double_cuda import PagelockedHostAllocation, current
from double_tensorrt import IMAGE_BYTES, LAYER_MS, RELEASES, session_of
from msgspec.structs import replace

from edge_dsc.build.cam import add_cam
from engines import packages
from engines.errors import ArtefactError, BadInputError, EnvironmentProblem, UsageError
from engines.files import sha256_bytes
from engines.record import Precision, Tuning
from engines.runtimes import BuildOptions, EngineLayer, RunnerOptions, answer_batches, get_runtime
from engines.trt import cuda as cuda_driver
from engines.trt import runtime
from engines.trt.builder import build_plan
from engines.trt.cuda import Gpu
from engines.trt.loaded import StoredEngine
from engines.trt.runner import TrtRunner

Open = Callable[..., TrtRunner]


@pytest.fixture
def expected(small_model: Path) -> Callable[[np.ndarray], np.ndarray]:
    plain = session_of(small_model.read_bytes())
    return lambda batch: plain.run(None, {"image": batch})[0]


def in_thread(action: Callable[[], object]) -> BaseException | None:
    caught: list[BaseException] = []

    def call() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return caught[0] if caught else None


SIZES = (1, 8, 8, 4, 3, 1, 1, 8, 8, 8, 4, 4)


def answers_are_right(runner: TrtRunner, pixels: Any, expected: Any) -> None:
    for count in SIZES:
        batch = pixels(count, seed=count)
        np.testing.assert_array_equal(runner.run(batch), expected(batch))


@pytest.mark.parametrize("release", RELEASES, indirect=True)
@pytest.mark.parametrize("graph", [True, False])
def test_answers_of_every_batch_size(
    open_runner: Open, cuda: Any, pixels: Any, expected: Any, graph: bool
) -> None:
    with open_runner(graph=graph) as runner:
        assert (runner.thread_safe, runner.slots) == (False, 2)
        answers_are_right(runner, pixels, expected)
        assert (cuda.launches > 0) == graph
    assert cuda.idle


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(("memory", "time_stages"), [("device", True), ("mapped", False), ("mapped", True)])
def test_answers_do_not_depend_on_memory_or_timing(
    open_runner: Open, cuda: Any, pixels: Any, expected: Any, graph: bool, memory: str, time_stages: bool
) -> None:
    with open_runner(graph=graph, memory=memory, time_stages=time_stages) as runner:
        answers_are_right(runner, pixels, expected)
        assert (cuda.launches > 0) == graph
    assert cuda.idle


@pytest.mark.parametrize("release", RELEASES, indirect=True)
@pytest.mark.parametrize("memory", ["device", "mapped"])
def test_maps_come_as_a_second_output(
    trt: Any, cuda: Any, driver: Any, record: Any, small_model: Path, pixels: Any, memory: str
) -> None:
    graph, contract = add_cam(onnx.load(small_model), record.contract)
    options = BuildOptions(precision=Precision.FP32, batch=record.batch)
    with current(cuda):
        plan = bytes(build_plan(trt, graph.SerializeToString(), options, has_gpu=False).data)
    told = replace(record, contract=contract, engine_sha256=sha256_bytes(plan), engine_bytes=len(plan))
    plain = session_of(graph.SerializeToString())
    with TrtRunner(trt, cuda, StoredEngine(plan, told), RunnerOptions(memory=memory)) as runner:
        for count in (1, 4, 4, 4, 8, 3):  # also by a graph, and by one whose buffers were used for more
            batch = pixels(count, seed=count)
            answers, maps = runner.explain(batch)
            wanted = plain.run(None, {"image": batch})
            assert maps.shape == (count, 3, 7, 7)
            np.testing.assert_array_equal(answers, wanted[0])
            np.testing.assert_array_equal(maps, wanted[1])
            np.testing.assert_array_equal(runner.run(batch), wanted[0])
        assert cuda.launches > 0
    with pytest.raises(ArtefactError, match="it takes"):
        TrtRunner(trt, cuda, StoredEngine(plan, replace(told, contract=record.contract)), RunnerOptions())
    assert cuda.idle


def test_an_engine_without_maps_explains_nothing(open_runner: Open, pixels: Any) -> None:
    with open_runner() as runner, pytest.raises(UsageError, match="without class activation maps"):
        runner.explain(pixels(1, seed=0))


def test_batches_in_flight_do_not_touch_each_other(
    open_runner: Open, cuda: Any, pixels: Any, expected: Any
) -> None:
    with open_runner(slots=3) as runner:
        batches = [pixels(4, seed=index) for index in range(3)]
        tickets = [runner.submit(batch) for batch in batches]
        for index in (2, 0, 1):  # any order
            np.testing.assert_array_equal(runner.collect(tickets[index]), expected(batches[index]))


def test_the_loop_keeps_the_slots_full(open_runner: Open, pixels: Any, expected: Any) -> None:
    whole = pixels(19, seed=3)
    reused = np.empty((4, 224, 224, 1), np.uint8)

    def batches() -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, 19, 4):
            part = whole[start : start + 4]
            reused[: len(part)] = part  # the caller's buffer is free again as soon as it is submitted
            yield start, reused[: len(part)]

    with open_runner(slots=2) as runner:
        found = list(answer_batches(runner, batches()))
    assert [tag for tag, _ in found] == [0, 4, 8, 12, 16]
    np.testing.assert_array_equal(np.concatenate([answers for _, answers in found]), expected(whole))


def test_no_more_tickets_than_slots(open_runner: Open, pixels: Any) -> None:
    with open_runner(slots=2) as runner:
        first = runner.submit(pixels(1))
        runner.submit(pixels(1))
        with pytest.raises(RuntimeError, match=r"all 2 slots of dsc\.engine are in flight: collect a ticket"):
            runner.submit(pixels(1))
        runner.collect(first)
        runner.submit(pixels(1))


def test_a_ticket_is_collected_once_and_by_its_runner(open_runner: Open, pixels: Any) -> None:
    with open_runner() as runner, open_runner() as other:
        ticket = runner.submit(pixels(1))
        with pytest.raises(ValueError, match="of another runner"):
            other.collect(ticket)
        runner.collect(ticket)
        with pytest.raises(ValueError, match="collected before"):
            runner.collect(ticket)


def test_answers_belong_to_the_caller(open_runner: Open, pixels: Any) -> None:
    with open_runner(slots=1) as runner:
        first = runner.run(pixels(2, seed=1))
        copy = first.copy()
        runner.run(pixels(2, seed=2))
        np.testing.assert_array_equal(first, copy)


@pytest.mark.parametrize("graph", [True, False])
def test_stages_are_timed_on_the_device(open_runner: Open, pixels: Any, graph: bool) -> None:
    with open_runner(time_stages=True, graph=graph) as runner:
        tickets = [runner.submit(pixels(4)) for _ in range(2)]
        assert [ticket.stages_ns for ticket in tickets] == [None, None]
        for ticket in tickets:
            runner.collect(ticket)
            assert ticket.stages_ns == {"h2d": 100_000, "execute": 1_000_000, "d2h": 50_000}
    with open_runner(graph=graph) as runner:
        ticket = runner.submit(pixels(4))
        runner.collect(ticket)
        assert ticket.stages_ns is None


@pytest.mark.parametrize("release", ["10.3", "rtx"], indirect=True)
def test_memory_is_allocated_once_and_freed_in_order(open_runner: Open, cuda: Any, pixels: Any) -> None:
    runner = open_runner(slots=1)
    assert cuda.allocations == 5
    for count in (1, 8, 8, 4, 4, 8):
        runner.run(pixels(count))
    assert cuda.allocations == 6  # scratch memory grew once, from four images to eight
    cuda.log.clear()
    runner.close()
    runner.close()
    assert cuda.log == [
        "destroy graph",
        "destroy graph",
        "drop execution",
        "drop execution",
        "free device",
        "free device",
        "free device",
        "free host",
        "free host",
        "drop engine",
        "drop runtime",
        "detach",
    ]
    assert cuda.idle


@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_a_single_image_runs_on_the_profile_that_was_made_for_it(
    open_runner: Open, trt: Any, plan: bytes, record: Any, cuda: Any, pixels: Any, expected: Any
) -> None:
    assert b'"profiles": [[1, 4, 8], [1, 1, 1]]' in plan
    with open_runner() as runner:
        answers_are_right(runner, pixels, expected)
    assert trt._ran == {(1, 1), (3, 0), (4, 0), (8, 0)}
    trt._ran.clear()
    single = plan.replace(b"[[1, 4, 8], [1, 1, 1]]", b"[[1, 4, 8]]")  # as older versions of ours built them
    with TrtRunner(trt, cuda, StoredEngine(single, record)) as runner:
        np.testing.assert_array_equal(runner.run(pixels(1)), expected(pixels(1)))
    assert trt._ran == {(1, 0), (4, 0)}


@pytest.mark.parametrize("release", RELEASES, indirect=True)
@pytest.mark.parametrize(("batch", "warm", "scratch"), [(1, 1, 1), (8, 8, 8), (None, 4, 4), (99, 8, 8)])
def test_the_size_that_will_be_used_is_warmed_up(
    open_runner: Open, cuda: Any, pixels: Any, batch: int | None, warm: int, scratch: int, release: str
) -> None:
    with open_runner(slots=1, batch=batch) as runner:
        assert runner.description["execution"] == "CUDA graph"
        before = cuda.launches
        runner.run(pixels(warm))
        assert cuda.launches == before + 1
        sizes = {item.memory.nbytes for item in cuda.live}
        assert (8 if release == "8.6" else scratch) * IMAGE_BYTES in sizes


@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_the_contexts_of_a_slot_share_one_block_of_the_size_in_use(
    open_runner: Open, cuda: Any, pixels: Any, expected: Any, release: str
) -> None:
    def scratch() -> list[int]:
        sizes = [item.memory.nbytes for item in cuda.live]
        return [size for size in sizes if IMAGE_BYTES <= size <= 8 * IMAGE_BYTES]

    with open_runner(slots=1) as runner:
        assert scratch() == [
            (8 if release == "8.6" else 4) * IMAGE_BYTES
        ]  # 8.6 knows the largest shape alone
        runner.run(pixels(1))
        assert scratch() == [(8 if release == "8.6" else 4) * IMAGE_BYTES]
        answers_are_right(runner, pixels, expected)
        assert scratch() == [8 * IMAGE_BYTES]
        assert runner.description["scratch"] == "0.0 MiB of device memory for 1 slots"


def test_scratch_memory_that_is_refused_leaves_the_runner_usable(
    open_runner: Open, cuda: Any, pixels: Any, expected: Any
) -> None:
    with open_runner(slots=1) as runner:
        cuda.fail["mem_alloc"] = 0
        with pytest.raises(EnvironmentProblem, match="mem_alloc failed: out of memory"):
            runner.run(pixels(8))
        answers = runner.run(pixels(4))
        np.testing.assert_array_equal(answers, expected(pixels(4)))
        cuda.fail.clear()
        np.testing.assert_array_equal(runner.run(pixels(8)), expected(pixels(8)))
    assert cuda.idle


@pytest.mark.parametrize("release", ["10.3", "rtx"], indirect=True)
def test_closing_with_batches_in_flight(open_runner: Open, cuda: Any, pixels: Any) -> None:
    runner = open_runner(slots=2)
    ticket = runner.submit(pixels(1))
    runner.close()
    assert cuda.idle
    with pytest.raises(ValueError, match=r"the runner of dsc\.engine is closed"):
        runner.collect(ticket)


def test_the_context_is_current_only_inside_a_call(open_runner: Open, cuda: Any, pixels: Any) -> None:
    with open_runner() as runner:
        assert cuda.stack() == []
        ticket = runner.submit(pixels(1))
        assert cuda.stack() == []
        runner.collect(ticket)
        assert cuda.stack() == []


def test_a_wrong_batch_is_refused_before_the_gpu(open_runner: Open) -> None:
    with open_runner() as runner, pytest.raises(BadInputError, match="N from 1 to 8"):
        runner.run(np.zeros((9, 224, 224, 1), np.uint8))


@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_what_it_says_of_itself(open_runner: Open, trt: Any) -> None:
    with open_runner() as runner:
        words = dict(runner.description)
    cache = words.pop("runtime_cache", None)
    assert words.pop("scratch").endswith(" MiB of device memory for 2 slots")
    assert words == {
        "device": "0",
        "execution": "CUDA graph",
        "memory": "device",
        "memory_choice": "the GPU has its own",
        "slots": "2",
        "wait": "spin",
    }
    assert cache == ("not kept" if trt.__name__ == "tensorrt_rtx" else None)
    assert runner.description["execution"] == "CUDA graph"  # still told after closing
    with open_runner(graph=False, memory="mapped", slots=1) as runner:
        assert runner.description["execution"] == "enqueue (no CUDA graph: as asked)"
        assert (runner.description["memory"], runner.description["memory_choice"]) == ("mapped", "as asked")
    with open_runner(time_stages=True) as runner:
        assert runner.description["execution"] == "CUDA graph of the execution"


@pytest.mark.parametrize(("device_us", "mapped_us", "chosen"), [(80, 50, "mapped"), (50, 80, "device")])
def test_memory_is_chosen_by_measuring_in_turns_where_it_is_shared(
    open_runner: Open,
    cuda: Any,
    pixels: Any,
    expected: Any,
    turns: Any,
    device_us: int,
    mapped_us: int,
    chosen: str,
) -> None:
    cuda.integrated = True
    with open_runner(clock=turns(device_us, mapped_us)) as runner:
        assert runner.description["memory"] == chosen
        assert runner.description["memory_choice"] == (
            f"measured in turns at batch 4, device {device_us} us, mapped {mapped_us} us, not kept"
        )
        assert cuda.allocations - len(cuda.live) == 8  # what the measurement needed is freed
        np.testing.assert_array_equal(runner.run(pixels(4)), expected(pixels(4)))
    assert cuda.idle


@pytest.mark.parametrize("batch", [1, 8])
def test_memory_is_tried_at_the_size_that_will_be_used(
    open_runner: Open, cuda: Any, trt: Any, batch: int
) -> None:
    cuda.integrated = True
    with open_runner(batch=batch) as runner:
        assert f"at batch {batch}, " in runner.description["memory_choice"]
    assert {size for size, _ in trt._ran} == {batch}


@pytest.mark.parametrize(
    ("left", "call", "after"),
    [
        ("device", "get_device_pointer", 0),  # mapped memory that the driver refuses
        ("device", "Stream", 1),
        ("mapped", "memcpy_htod_async", 0),
        ("mapped", "memcpy_htod_async", 20),  # in the middle of the turns
    ],
)
def test_a_trial_that_fails_leaves_the_other_kind(
    open_runner: Open,
    cuda: Any,
    pixels: Any,
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    left: str,
    call: str,
    after: int,
) -> None:
    cuda.integrated = True
    if call == "Stream":  # the second one only: the runner itself needs some
        make, made = cuda.Stream, []

        def second(flags: int) -> Any:
            made.append(flags)
            if len(made) == 2:
                raise cuda.Error("Stream failed: out of memory")
            return make(flags)

        monkeypatch.setattr(cuda, "Stream", second)
    elif call == "get_device_pointer":

        def refuse(memory: Any) -> int:
            raise cuda.Error("get_device_pointer failed: not supported")

        monkeypatch.setattr(PagelockedHostAllocation, "get_device_pointer", refuse)
    else:
        cuda.fail[call] = after
    gone = "device" if left == "mapped" else "mapped"
    with open_runner(place=tmp_path / "dsc.engine", gpu=Gpu("Orin", "8.7"), graph=False) as runner:
        cuda.fail.clear()
        words = runner.description
        assert words["memory"] == left
        assert words["memory_choice"].startswith(
            f"{left} is left, {gone} memory failed: tensorrt cannot open dsc"
        )
        assert call in words["memory_choice"]
        np.testing.assert_array_equal(runner.run(pixels(4)), expected(pixels(4)))
    assert cuda.idle
    assert list(tmp_path.iterdir()) == []  # it may work next time: nothing is kept


@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_the_gpu_that_was_asked_for_runs(
    open_runner: Open, driver: Any, cuda: Any, pixels: Any, expected: Any, trt: Any
) -> None:
    with open_runner(device=1, gpu=Gpu("Second double", "8.7"), blocking_wait=True) as runner:
        assert runner.description["device"] == "1 (Second double)"
        assert cuda.references == [0, 1]
        assert {memory.device for memory in cuda.live} == {1}
        assert (driver.flags_of, runner.description["wait"]) == ([0, 4], "sleep")
        answers_are_right(runner, pixels, expected)
        with open_runner() as other:  # the first GPU, beside it
            assert cuda.references == [1, 1]
            tickets = [runner.submit(pixels(3, seed=1)), other.submit(pixels(2, seed=2))]
            np.testing.assert_array_equal(other.collect(tickets[1]), expected(pixels(2, seed=2)))
            np.testing.assert_array_equal(runner.collect(tickets[0]), expected(pixels(3, seed=1)))
    assert cuda.idle


def test_the_wait_is_decided_before_the_device_is_taken(
    open_runner: Open, driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_runner() as runner:
        assert (driver.flags, runner.description["wait"]) == (1, "spin")
        with open_runner() as other:
            assert other.description["wait"] == "spin"
    with open_runner(blocking_wait=True) as runner:
        assert (driver.flags, runner.description["wait"]) == (4, "sleep")
        with open_runner() as other:
            assert driver.flags == 4
            assert other.description["wait"] == (
                "as the driver likes, not spin: cuDevicePrimaryCtxSetFlags_v2 failed: "
                "CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE"
            )
    monkeypatch.delattr(type(driver), "cuDevicePrimaryCtxSetFlags_v2")
    with open_runner() as runner:
        assert "the driver lacks cuDevicePrimaryCtxSetFlags_v2" in runner.description["wait"]


def test_sleeping_instead_of_spinning(open_runner: Open, cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[int] = []
    make = cuda.Event
    monkeypatch.setattr(cuda, "Event", lambda flag: flags.append(flag) or make(flag))
    open_runner(slots=1, blocking_wait=True).close()
    open_runner(slots=1).close()
    open_runner(slots=1, time_stages=True).close()
    open_runner(slots=1, time_stages=True, blocking_wait=True).close()
    assert flags == [3] + [0] * 4 + [1] * 4


class TestGraphs:
    @pytest.mark.parametrize("release", RELEASES, indirect=True)
    def test_two_sizes_have_graphs_and_a_third_takes_the_oldest_place(
        self, open_runner: Open, cuda: Any, pixels: Any
    ) -> None:
        with open_runner(slots=1) as runner:
            assert len(cuda.graphs) == 1  # of the best size, captured when it opened
            for count in (8, 8, 4, 4):  # the larger size needs more scratch memory: both graphs are made anew
                runner.run(pixels(count))
            assert len(cuda.graphs) == 2
            for count in (1, 1, 1):
                runner.run(pixels(count))
            assert len(cuda.graphs) == 2
        assert cuda.idle

    @pytest.mark.parametrize("release", RELEASES, indirect=True)
    def test_the_first_run_of_a_size_is_enqueued(self, open_runner: Open, cuda: Any, pixels: Any) -> None:
        with open_runner(slots=1) as runner:
            before = cuda.launches
            runner.run(pixels(7))
            assert cuda.launches == before
            runner.run(pixels(7))
            assert cuda.launches == before + 1

    @pytest.mark.parametrize(
        ("function", "status", "words"),
        [
            ("cuStreamBeginCapture_v2", 800, "cuStreamBeginCapture_v2 failed: CUDA_ERROR_NOT_PERMITTED"),
            ("cuStreamEndCapture", 901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"),
            ("cuGraphInstantiateWithFlags", 2, "CUDA_ERROR_OUT_OF_MEMORY"),
            ("cuGraphInstantiateWithFlags", 77, "cuGraphInstantiateWithFlags failed: error 77"),
        ],
    )
    def test_a_refused_graph_means_enqueueing(
        self,
        open_runner: Open,
        driver: Any,
        cuda: Any,
        pixels: Any,
        expected: Any,
        function: str,
        status: int,
        words: str,
    ) -> None:
        driver.refuse[function] = status
        with open_runner() as runner:
            assert runner.description["execution"].startswith("enqueue (no CUDA graph: ")
            assert words in runner.description["execution"]
            np.testing.assert_array_equal(runner.run(pixels(3)), expected(pixels(3)))
        assert cuda.idle

    def test_a_driver_without_graphs(
        self, open_runner: Open, driver: Any, monkeypatch: pytest.MonkeyPatch, pixels: Any
    ) -> None:
        for name in ("cuGraphLaunch", "cuStreamEndCapture"):
            monkeypatch.delattr(type(driver), name)
        with open_runner() as runner:
            runner.run(pixels(1))
            assert runner.description["execution"] == (
                "enqueue (no CUDA graph: the driver lacks cuStreamEndCapture, cuGraphLaunch)"
            )

    def test_a_driver_under_another_name(
        self, open_runner: Open, cuda: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing() -> None:
            raise OSError("libcuda.so.1: cannot open shared object file")

        open_runner().close()  # the fixture's driver is in place
        monkeypatch.setattr(cuda_driver, "load_driver", missing)
        with pytest.raises(EnvironmentProblem, match=r"cannot open dsc\.engine: libcuda\.so\.1: cannot open"):
            open_runner()
        assert cuda.idle

    @pytest.mark.parametrize("release", ["10.3", "rtx"], indirect=True)
    def test_the_best_size_keeps_its_graph(self, open_runner: Open, cuda: Any, pixels: Any) -> None:
        with open_runner(slots=1) as runner:
            for count in (1, 1, 2, 2, 3, 3):
                runner.run(pixels(count))
            before = cuda.launches
            runner.run(pixels(4))
            assert cuda.launches == before + 1
            assert runner.description["execution"] == "CUDA graph"

    def test_a_launch_that_fails_is_told(self, open_runner: Open, driver: Any, pixels: Any) -> None:
        with open_runner() as runner:
            driver.refuse["cuGraphLaunch"] = 2
            with pytest.raises(EnvironmentProblem, match="cuGraphLaunch failed: CUDA_ERROR_OUT_OF_MEMORY"):
                runner.run(pixels(4))
            driver.refuse.clear()
            runner.run(pixels(4))


class TestRefusals:
    @pytest.mark.parametrize("release", RELEASES, indirect=True)
    def test_a_refused_engine_names_the_first_error(self, open_runner: Open, trt: Any, cuda: Any) -> None:
        trt.fail["deserialize_cuda_engine"] = ""
        with pytest.raises(ArtefactError) as caught:
            open_runner()
        runtime = trt.__name__.replace("_", "-")
        assert caught.value.what == (
            f"{runtime} refuses dsc.engine: the engine plan file is not compatible with this version of TensorRT"
        )
        assert caught.value.remedy == "rebuild it: edge-dsc build-engine model.onnx"
        assert cuda.idle

    @pytest.mark.parametrize("release", ["8.6", "10.3"], indirect=True)
    def test_host_code_is_loaded_where_the_record_says_so(
        self, trt: Any, cuda: Any, driver: Any, plan: bytes, record: Any
    ) -> None:
        compatible = plan.replace(b'"compatible": false', b'"compatible": true')
        with pytest.raises(ArtefactError, match="holds host code, and that is not allowed"):
            TrtRunner(trt, cuda, StoredEngine(compatible, record))
        allowed = replace(record, tuning=Tuning(version_compatible=True))
        TrtRunner(trt, cuda, StoredEngine(compatible, allowed)).close()

    @pytest.mark.parametrize("release", RELEASES, indirect=True)
    def test_a_plan_of_another_release(
        self, trt: Any, cuda: Any, driver: Any, plan: bytes, record: Any
    ) -> None:
        foreign = plan.replace(trt.__version__.encode(), b"0.1", 1)
        with pytest.raises(ArtefactError, match=r"version tag 0\.1 does not match"):
            TrtRunner(trt, cuda, StoredEngine(foreign, record))

    @pytest.mark.parametrize(
        ("there", "here", "words"),
        [
            (b'"image"', b'"picture"', r"it takes \['picture'\] and gives \['probabilities'\]"),
            (b'"UINT8"', b'"FLOAT"', "it takes .* and gives"),
            (b"[-1, 3]", b"[-1, 4]", r"it takes \[224, 224, 1\] and gives \[4\] for each image"),
            (b"[1, 4, 8]", b"[1, 4, 4]", r"its profile is for batches of 1 to 4, its record says 1:4:8"),
        ],
    )
    def test_an_engine_of_another_contract(
        self,
        trt: Any,
        cuda: Any,
        driver: Any,
        plan: bytes,
        record: Any,
        there: bytes,
        here: bytes,
        words: str,
    ) -> None:
        assert there in plan
        with pytest.raises(ArtefactError, match=words):
            TrtRunner(trt, cuda, StoredEngine(plan.replace(there, here, 1), record))
        assert cuda.idle

    @pytest.mark.parametrize("call", ["create_execution_context", "set_tensor_address", "set_input_shape"])
    def test_a_refusal_while_opening_frees_everything(
        self, open_runner: Open, trt: Any, cuda: Any, call: str
    ) -> None:
        trt.fail[call] = f"{call} says why"
        with pytest.raises(
            EnvironmentProblem, match=rf"dsc\.engine: .*; first error logged: {call} says why"
        ):
            open_runner()
        assert cuda.idle

    def test_a_failure_is_told_by_its_own_message(self, open_runner: Open, trt: Any, pixels: Any) -> None:
        with open_runner(graph=False) as runner:
            for message in ("the first", "the second"):
                trt.fail["execute_async_v3"] = message
                with pytest.raises(EnvironmentProblem, match=f"first error logged: {message}"):
                    runner.run(pixels(2))
            trt.fail.clear()
            runner.run(pixels(2))

    def test_a_size_that_is_refused_leaves_the_runner_usable(
        self, open_runner: Open, trt: Any, cuda: Any, pixels: Any, expected: Any
    ) -> None:
        with open_runner() as runner:
            trt.fail["set_input_shape"] = "no"
            for _ in range(3):
                with pytest.raises(EnvironmentProblem, match="set_input_shape refuses a batch of 2"):
                    runner.run(pixels(2))
            assert "drop execution" not in cuda.log  # the context waits for a shape that it takes
            trt.fail.clear()
            np.testing.assert_array_equal(runner.run(pixels(2)), expected(pixels(2)))

    def test_a_second_slot_that_is_refused_is_said(
        self, open_runner: Open, trt: Any, cuda: Any, pixels: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = iter([True, False])
        monkeypatch.setattr(
            type(trt), "_fails", lambda self, call: call == "create_execution_context" and not next(made)
        )
        with open_runner(slots=2) as runner:
            assert runner.slots == 1
            assert runner.description["slots"].startswith("1 of 2: ")
            monkeypatch.undo()
            runner.run(pixels(4))


class TestFaults:
    """CUDA fails: at every step of opening, while running, and for good."""

    @pytest.mark.parametrize(
        "call", ["init", "retain_primary_context", "push", "Stream", "pagelocked_empty", "mem_alloc", "Event"]
    )
    @pytest.mark.parametrize("after", [0, 1, 2])
    def test_while_opening(self, open_runner: Open, cuda: Any, call: str, after: int) -> None:
        cuda.fail[call] = after
        try:
            with open_runner(slots=3) as runner:
                assert runner.slots == 3  # the call is not made so often
                cuda.fail.clear()
        except EnvironmentProblem as error:
            assert f"dsc.engine: {call} failed: out of memory" in error.what
            assert "use a smaller batch" in error.remedy
        cuda.fail.clear()
        assert cuda.idle

    def test_out_of_memory_at_open_is_ours_and_frees_the_first_slot(
        self, open_runner: Open, cuda: Any
    ) -> None:
        cuda.fail["mem_alloc"] = 3  # in the second slot
        with pytest.raises(EnvironmentProblem, match="mem_alloc failed: out of memory") as caught:
            open_runner(slots=2)
        assert caught.value.exit_code == 3
        assert cuda.idle

    @pytest.mark.parametrize(
        "call", ["memcpy_htod_async", "memcpy_dtoh_async", "synchronize", "record", "event synchronize"]
    )
    def test_while_running(self, open_runner: Open, cuda: Any, pixels: Any, expected: Any, call: str) -> None:
        with open_runner(graph=False, blocking_wait="event" in call or call == "record") as runner:
            cuda.fail[call] = 0
            for _ in range(3):
                with pytest.raises(
                    EnvironmentProblem, match=f"cannot run dsc.engine: {call} failed"
                ) as caught:
                    runner.run(pixels(1))
            assert "edge-dsc doctor" in caught.value.remedy
            cuda.fail.clear()
            runner.collect(runner.submit(pixels(1)))
            assert all(stream.is_done() for stream in cuda.streams())  # nothing of a failed batch waits
            np.testing.assert_array_equal(runner.run(pixels(1)), expected(pixels(1)))
        assert cuda.idle

    def test_nothing_of_a_batch_that_could_not_be_enqueued_stays_on_the_stream(
        self, open_runner: Open, cuda: Any, pixels: Any
    ) -> None:
        with open_runner(graph=False) as runner:
            cuda.fail["memcpy_dtoh_async"] = 0  # the last of three steps
            with pytest.raises(EnvironmentProblem, match="memcpy_dtoh_async failed"):
                runner.submit(pixels(1))
            assert all(stream.is_done() for stream in cuda.streams())
            cuda.fail.clear()

    @pytest.mark.parametrize("release", ["10.3", "rtx"], indirect=True)
    def test_an_error_of_the_device_in_the_middle(self, open_runner: Open, cuda: Any, pixels: Any) -> None:
        runner = open_runner(slots=2)
        tickets = [runner.submit(pixels(4)) for _ in range(2)]
        cuda.fail_on_device["execute"] = "cuStreamSynchronize failed: an illegal memory access"
        for ticket in tickets:  # the error stays: the device is lost for this process
            with pytest.raises(EnvironmentProblem, match=r"cannot run dsc\.engine: .*illegal memory access"):
                runner.collect(ticket)
        with pytest.raises(EnvironmentProblem, match="illegal memory access"):
            runner.run(pixels(4))
        with pytest.raises(EnvironmentProblem, match=r"cannot close dsc\.engine: .*illegal memory access"):
            runner.close()
        assert (cuda.retained, cuda.stack()) == (0, [])
        runner.close()

    def test_while_freeing_the_rest_is_freed_and_the_device_let_go(
        self, open_runner: Open, cuda: Any
    ) -> None:
        runner = open_runner()
        cuda.fail["free"] = 0
        with pytest.raises(EnvironmentProblem, match=r"cannot close dsc\.engine: free failed"):
            runner.close()
        assert (cuda.retained, cuda.stack()) == (0, [])

    def test_another_thread_is_refused_and_harms_nothing(self, open_runner: Open, pixels: Any) -> None:
        with open_runner() as runner:
            ticket = runner.submit(pixels(1))
            for action in (
                lambda: runner.run(pixels(1)),
                lambda: runner.submit(pixels(1)),
                lambda: runner.collect(ticket),
                runner.close,
            ):
                error = in_thread(action)
                assert isinstance(error, RuntimeError)
                assert str(error) == "the runner of dsc.engine belongs to the thread that opened it"
            assert runner.collect(ticket).shape == (1, 3)

    def test_two_loops_in_one_process(self, open_runner: Open, cuda: Any, pixels: Any, expected: Any) -> None:
        failures: list[BaseException | None] = []

        def loop(seed: int) -> None:
            with open_runner() as runner:
                for index in range(6):
                    batch = pixels(1 + index % 2, seed=seed + index)
                    np.testing.assert_array_equal(runner.run(batch), expected(batch))

        threads = [
            threading.Thread(target=lambda seed=seed: failures.append(in_thread(lambda: loop(seed))))
            for seed in (0, 100)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == [None, None]
        assert cuda.idle

    def test_two_runners_in_one_thread_close_in_any_order(
        self, open_runner: Open, cuda: Any, pixels: Any
    ) -> None:
        first, second = open_runner(), open_runner()
        tickets = [first.submit(pixels(1)), second.submit(pixels(2))]
        first.collect(tickets[0])
        first.close()
        assert second.collect(tickets[1]).shape == (2, 3)
        second.close()
        assert cuda.idle

    @pytest.mark.parametrize("release", ["10.3", "rtx"], indirect=True)
    def test_no_gpu_memory_is_lost_over_many_openings(
        self, open_runner: Open, cuda: Any, pixels: Any
    ) -> None:
        for _ in range(5):
            with open_runner() as runner:
                runner.run(pixels(3))
            assert cuda.idle


def test_the_batch_range_of_the_record_is_what_counts(
    trt: Any, cuda: Any, driver: Any, plan: bytes, record: Any, pixels: Any
) -> None:
    narrow = replace(record, batch=replace(record.batch, largest=4))
    with TrtRunner(trt, cuda, StoredEngine(plan, narrow)) as runner:
        with pytest.raises(BadInputError, match="N from 1 to 4"):
            runner.run(pixels(5))


FUSED = EngineLayer(
    name="__myl_CastMulConvMaxRe_myl0_0 [profile 1]",
    onnx=("e", "e_relu"),
    kind="kgen",
    precision="FP32",  # its inputs' formats, which are known for the shape that was set
    kernel="__myl_CastMulConvMaxRe_0x7ad83d0a9d0c93c5",
    microseconds=1000 * LAYER_MS,
)
CASK = EngineLayer(
    name="e + e_relu [profile 1]",
    onnx=("e", "e_relu"),
    kind="CaskGemmMatrixMultiply",
    precision="FP32",
    kernel="sm80_xmma_fprop_implicit_gemm_f32f32_f32f32_f32_nhwckrsc_nhwc",
    microseconds=1000 * LAYER_MS,
)


@pytest.mark.parametrize(
    ("release", "expected"),
    [("8.6", CASK), ("10.3", FUSED), ("11.4", FUSED), ("rtx", FUSED)],
    indirect=["release"],
)
def test_layers_are_those_of_a_single_image_and_have_times(
    trt: Any,
    cuda: Any,
    driver: Any,
    plan: bytes,
    record: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: EngineLayer,
) -> None:
    engine = tmp_path / record.engine
    engine.write_bytes(plan)
    modules = {"tensorrt": trt, "tensorrt_rtx": trt, "pycuda.driver": cuda}
    monkeypatch.setattr(packages, "load", modules.__getitem__)
    monkeypatch.setattr(packages, "installed_version", lambda *names: record.runtime_version)
    monkeypatch.setattr(runtime, "find_gpu", lambda *_: (Gpu("Double", "8.9"), ""))
    layers, report = get_runtime(record.runtime).inspect_layers(engine, record)
    assert layers == (expected,)
    names = [entry["Name"] for entry in json.loads(report or "")["Layers"]]
    assert names == [expected.name.removesuffix(" [profile 1]"), expected.name]
    assert trt._ran == {(1, 1)}  # size and profile
    assert cuda.idle


@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_other_sizes_have_the_layers_of_their_profile(open_runner: Open) -> None:
    with open_runner(graph=False, slots=1, batch=4) as runner:
        (layer,), _ = runner.inspect_layers(3)
    assert not layer.name.endswith("]")
    assert layer.microseconds == 1000 * LAYER_MS


def test_the_launch_of_a_graph_times_no_layer(open_runner: Open) -> None:
    with open_runner(slots=1) as runner:
        (layer,), report = runner.inspect_layers(3)
        assert runner.description["execution"] == "CUDA graph"
    assert (layer.name, layer.microseconds) == (FUSED.name.removesuffix(" [profile 1]"), None)
    assert report is not None


# Profiles that contexts do not share: an engine of TensorRT 8.6 that another tool built.


@pytest.fixture
def open_unshared(trt: Any, cuda: Any, driver: Any, plan: bytes, record: Any) -> Callable[..., TrtRunner]:
    assert b'"shared": true' in plan  # our own builder asks for it
    unshared = plan.replace(b'"shared": true', b'"shared": false')
    changed = replace(record, engine_sha256=sha256_bytes(unshared))
    return lambda **options: TrtRunner(trt, cuda, StoredEngine(unshared, changed), RunnerOptions(**options))


@pytest.mark.parametrize("release", ["8.6"], indirect=True)
def test_one_slot_is_left_and_said(open_unshared: Callable[..., TrtRunner], cuda: Any, pixels: Any) -> None:
    with open_unshared(slots=2) as runner:
        assert runner.slots == 1
        words = runner.description["slots"]
        assert words.startswith("1 of 2: tensorrt cannot open dsc.engine: no execution context")
        assert "Profile 0 has been chosen by another IExecutionContext" in words
        assert runner.description["execution"] == "CUDA graph"
    assert cuda.idle


@pytest.mark.parametrize("release", ["8.6"], indirect=True)
def test_one_context_serves_every_size(
    open_unshared: Callable[..., TrtRunner], cuda: Any, small_model: Any, pixels: Any
) -> None:
    plain = session_of(small_model.read_bytes())
    with open_unshared(slots=1) as runner:
        for count in (4, 4, 3, 3, 3, 4, 4, 8, 1, 1):
            batch = pixels(count, seed=count)
            np.testing.assert_array_equal(runner.run(batch), plain.run(None, {"image": batch})[0])
            assert len(cuda.graphs) <= 1
    assert cuda.idle


@pytest.mark.parametrize("release", ["10.3", "11.4", "rtx"], indirect=True)
def test_from_10_on_profiles_are_shared_unasked(open_runner: Open, plan: bytes) -> None:
    """The preview feature is of 8.6 and always on since 10.0 (NvInfer.h 10.3 line 8602)."""
    assert b'"shared": false' in plan
    with open_runner(slots=2) as runner:
        assert (runner.slots, runner.description["slots"]) == (2, "2")
