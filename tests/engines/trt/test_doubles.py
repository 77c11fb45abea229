"""The doubles are held to account: every misuse that they promise to find is made here."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from double_cuda import API, POISON, DoubleCuda, DoubleDriver, Error, Misuse
from double_tensorrt import IMAGE_BYTES, LAYER_MS, RELEASES, DoubleTensorRt

from engines.trt import versions
from engines.trt.cuda import GraphError, bound_device, capture_graph
from engines.trt.faults import process_logger

SHAPE = (2, 224, 224, 1)


class Device:
    """The least that runs an engine by hand."""

    def __init__(self, cuda: DoubleCuda, trt: DoubleTensorRt, plan: bytes) -> None:
        self.cuda = cuda
        self.runtime = trt.Runtime(process_logger(trt))
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        self.execution = self.engine.create_execution_context()
        self.stream = cuda.Stream(1)
        self.host_in = cuda.pagelocked_empty(SHAPE, np.uint8)
        self.host_out = cuda.pagelocked_empty((2, 3), np.float32)
        self.memory_in, self.memory_out = cuda.mem_alloc(self.host_in.nbytes), cuda.mem_alloc(24)
        self.host_in[:] = 7

    def address(self) -> None:
        assert self.execution.set_tensor_address("image", int(self.memory_in))
        assert self.execution.set_tensor_address("probabilities", int(self.memory_out))
        assert self.execution.set_input_shape("image", SHAPE)

    def work(self) -> None:
        self.cuda.memcpy_htod_async(self.memory_in, self.host_in, self.stream)
        if not self.execution.execute_async_v3(self.stream.handle):
            raise Error("refused")
        self.cuda.memcpy_dtoh_async(self.host_out, self.memory_out, self.stream)


@pytest.fixture
def device(cuda: DoubleCuda, trt: DoubleTensorRt, plan: bytes) -> Device:
    cuda.init()
    cuda.Device(0).retain_primary_context().push()
    made = Device(cuda, trt, plan)
    made.address()
    return made


def test_reading_before_synchronising_sees_poison(device: Device) -> None:
    device.work()
    assert set(device.host_out.view(np.uint8).reshape(-1).tolist()) == {POISON}
    device.stream.synchronize()
    np.testing.assert_allclose(device.host_out.sum(axis=1), 1, rtol=1e-6)


def test_changing_the_input_before_synchronising_changes_the_answer(device: Device) -> None:
    device.host_in[0] = np.arange(224, dtype=np.uint8)[:, None, None]
    device.work()
    device.stream.synchronize()
    right = device.host_out.copy()
    device.work()
    device.host_in[:] = 7
    device.stream.synchronize()
    assert not np.array_equal(device.host_out, right)


@pytest.mark.parametrize("which", ["memory_in", "memory_out"])
def test_using_freed_memory(device: Device, which: str) -> None:
    getattr(device, which).free()
    with pytest.raises(Misuse, match="nothing is allocated"):
        device.work()


def test_freeing_under_waiting_work_and_twice(device: Device) -> None:
    device.work()
    with pytest.raises(Misuse, match="freed while work on it waits"):
        device.memory_in.free()
    device.stream.synchronize()
    device.memory_in.free()
    with pytest.raises(Misuse, match="freed twice"):
        device.memory_in.free()


def test_freed_host_memory(device: Device) -> None:
    device.host_in.base.free()
    with pytest.raises(Misuse, match="freed host memory"):
        device.work()


def test_pageable_memory_in_an_asynchronous_copy(device: Device, cuda: DoubleCuda) -> None:
    with pytest.raises(Misuse, match="pageable"):
        cuda.memcpy_htod_async(device.memory_in, np.zeros(SHAPE, np.uint8), device.stream)


def test_a_buffer_that_is_too_small(device: Device, cuda: DoubleCuda) -> None:
    device.execution.set_tensor_address("probabilities", int(cuda.mem_alloc(20)))
    with pytest.raises(Misuse, match="24 bytes are wanted where 20 are allocated"):
        device.work()


def test_host_memory_that_is_not_mapped(device: Device) -> None:
    with pytest.raises(Error, match="cuMemHostGetDevicePointer"):
        device.host_in.base.get_device_pointer()
    device.execution.set_tensor_address("image", device.host_in.base.address)
    with pytest.raises(Misuse, match="not mapped"):
        device.work()


def test_no_context_in_another_thread(device: Device) -> None:
    caught: list[BaseException] = []

    def call() -> None:
        try:
            device.work()
        except Misuse as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "without a current context in this thread" in str(caught[0])


def test_unset_addresses_and_shape_are_refused(device: Device, trt: DoubleTensorRt) -> None:
    bare = device.engine.create_execution_context()
    assert not bare.execute_async_v3(device.stream.handle)
    assert "no shape, or no address for ['image', 'probabilities']" in trt._logger.errors[0]


def test_shapes_outside_the_profile_are_refused(device: Device) -> None:
    assert not device.execution.set_input_shape("image", (9, 224, 224, 1))
    assert not device.execution.set_input_shape("image", (1, 112, 112, 1))


def test_a_stream_that_does_not_exist(device: Device) -> None:
    with pytest.raises(Misuse, match="does not exist, or on the default one"):
        device.execution.execute_async_v3(0)


def test_one_context_on_two_streams(device: Device, cuda: DoubleCuda) -> None:
    other = cuda.Stream(1)
    device.execution.execute_async_v3(device.stream.handle)
    with pytest.raises(Misuse, match="two streams at once"):
        device.execution.execute_async_v3(other.handle)


def test_contexts_take_memory_of_the_largest_shape_unless_it_is_theirs_to_be_given(
    device: Device, cuda: DoubleCuda, trt: DoubleTensorRt
) -> None:
    assert next(item.memory.nbytes for item in cuda.live if item.kind == "device") == 8 * IMAGE_BYTES
    count = len(cuda.live)
    bare = versions.create_execution(trt, device.engine, None)
    assert len(cuda.live) == count
    device.execution = bare
    device.address()
    assert not bare.execute_async_v3(device.stream.handle)
    assert trt._logger.errors == ["the context has no device memory"]
    with pytest.raises(Misuse, match="are too few"):
        bare.set_device_memory(int(device.memory_in), IMAGE_BYTES)


def test_two_contexts_in_one_memory_at_once(device: Device, cuda: DoubleCuda, trt: DoubleTensorRt) -> None:
    memory, other = int(cuda.mem_alloc(2 * IMAGE_BYTES)), cuda.Stream(1)
    for stream in (device.stream, other):
        device.execution = versions.create_execution(trt, device.engine, None)
        device.address()
        device.execution.set_device_memory(memory, 2 * IMAGE_BYTES)
        if stream is device.stream:
            first = device.execution  # it lives on while its work waits
            first.execute_async_v3(stream.handle)
    with pytest.raises(Misuse, match="two contexts use one memory at once"):
        device.execution.execute_async_v3(other.handle)


@pytest.mark.parametrize("release", ["rtx"], indirect=True)
def test_an_engine_for_rtx_without_the_flag_is_not_captured(
    cuda: DoubleCuda, driver: DoubleDriver, trt: DoubleTensorRt, plan: bytes
) -> None:
    cuda.init()
    cuda.Device(0).retain_primary_context().push()
    made = Device(cuda, trt, plan.replace(b'"user_allocation": true', b'"user_allocation": false'))
    made.address()
    made.work()
    made.stream.synchronize()
    assert not made.execution.is_stream_capturable(made.stream.handle)
    with pytest.raises(Error, match="refused"):
        capture_graph(driver, made.stream.handle, made.work)


def test_what_is_raised_in_the_log_is_dropped(
    device: Device, trt: DoubleTensorRt, capsys: pytest.CaptureFixture[str]
) -> None:
    trt._interrupted = True
    trt._log("a message")
    assert capsys.readouterr().err.startswith("[ERROR] Exception caught in log()")


def test_a_logger_that_is_gone(cuda: DoubleCuda) -> None:
    trt = DoubleTensorRt("10.3", cuda)
    trt.Builder(type("Logger", (trt.ILogger,), {})())
    trt.Builder(process_logger(trt))  # the first one stays the global one
    with pytest.raises(Misuse, match="a logger that is gone"):
        trt._log("a message")


@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_an_engine_of_another_gpu_is_warned_of_and_loaded(
    cuda: DoubleCuda, trt: DoubleTensorRt, plan: bytes, release: str
) -> None:
    cuda.init()
    cuda.Device(1).retain_primary_context().push()
    logger = process_logger(trt)
    made = Device(cuda, trt, plan)
    made.address()
    made.work()
    made.stream.synchronize()
    words = "Using an engine plan file across different models of devices is not recommended"
    assert logger.warnings == ([] if release == "rtx" else [words])


def test_what_is_of_one_gpu_is_not_used_on_the_other(device: Device, cuda: DoubleCuda) -> None:
    device.work()
    device.stream.synchronize()
    cuda.Device(1).retain_primary_context().push()
    with pytest.raises(Misuse, match="an engine on GPU 0 runs while GPU 1 is current"):
        device.execution.execute_async_v3(device.stream.handle)
    with pytest.raises(Misuse, match="memory of GPU 0 is used while GPU 1 is current"):
        cuda.need_memory(int(device.memory_in), 4)
    with pytest.raises(Misuse, match="a stream of GPU 0 is used while GPU 1 is current"):
        cuda.Event().record(device.stream)
    assert cuda.mem_get_info()[0] == cuda.mem_get_info()[1]  # nothing is allocated there
    with pytest.raises(Error, match="invalid device ordinal"):
        cuda.Device(2)


def test_pycuda_works_only_in_contexts_that_it_pushed(cuda: DoubleCuda, driver: DoubleDriver) -> None:
    with bound_device(1):
        assert cuda.Context.get_device() is not None
        with pytest.raises(Error, match="no currently active context"):
            cuda.mem_alloc(4)
    with pytest.raises(Error, match="invalid device context"):
        cuda.Context.get_device()


def test_a_change_under_waiting_work(device: Device) -> None:
    device.work()
    device.execution.set_input_shape("image", (1, 224, 224, 1))
    with pytest.raises(Misuse, match="the context of this work was changed"):
        device.stream.synchronize()


class TestProfiler:
    @pytest.fixture
    def seen(self, device: Device, trt: DoubleTensorRt) -> list[tuple[str, float]]:
        found: list[tuple[str, float]] = []

        class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]
            def report_layer_time(self, layer_name: str, ms: float) -> None:
                found.append((layer_name, ms))

        device.execution.profiler = Profiler()
        return found

    @pytest.mark.parametrize("release", RELEASES, indirect=True)
    def test_a_run_waits_for_its_end_and_reports_each_layer(self, device: Device, seen: list[Any]) -> None:
        device.cuda.memcpy_htod_async(device.memory_in, device.host_in, device.stream)
        assert device.execution.execute_async_v3(device.stream.handle)
        assert device.stream.is_done()
        assert [ms for _, ms in seen] == [LAYER_MS]

    def test_a_capture_and_the_launch_of_its_graph_report_nothing(
        self, device: Device, driver: DoubleDriver, seen: list[Any]
    ) -> None:
        device.work()
        device.stream.synchronize()
        graph = capture_graph(driver, device.stream.handle, device.work)
        graph.launch()
        device.stream.synchronize()
        assert len(seen) == 1
        graph.destroy()

    def test_nothing_is_reported_where_that_was_put_off(self, device: Device, seen: list[Any]) -> None:
        device.execution.enqueue_emits_profile = False
        device.work()
        assert not device.stream.is_done()
        device.stream.synchronize()
        assert seen == []

    def test_what_a_profiler_raises_is_dropped(
        self, device: Device, trt: DoubleTensorRt, capsys: pytest.CaptureFixture[str]
    ) -> None:
        device.execution.profiler = trt.IProfiler()  # without the method
        device.work()
        assert capsys.readouterr().err.startswith("[ERROR] Exception caught in report_layer_time()")


class TestGraphs:
    def captured(self, device: Device, driver: DoubleDriver) -> Any:
        device.work()
        device.stream.synchronize()
        return capture_graph(driver, device.stream.handle, device.work)

    def test_a_replay_answers_again(self, device: Device, driver: DoubleDriver) -> None:
        graph = self.captured(device, driver)
        expected = device.host_out.copy()
        device.host_out[:] = 0
        graph.launch()
        device.stream.synchronize()
        np.testing.assert_array_equal(device.host_out, expected)
        graph.destroy()
        graph.destroy()
        assert device.cuda.graphs == {}

    def test_a_new_shape_cannot_be_captured_at_once(self, device: Device, driver: DoubleDriver) -> None:
        with pytest.raises(Error, match="refused"):
            capture_graph(driver, device.stream.handle, device.work)
        device.work()  # the stream left the capture and works
        device.stream.synchronize()
        assert driver.caught == {}

    def test_synchronising_while_capturing(self, device: Device, driver: DoubleDriver) -> None:
        with pytest.raises(Error, match="not permitted when stream is capturing"):
            capture_graph(driver, device.stream.handle, device.stream.synchronize)

    def test_a_graph_whose_buffers_were_freed(self, device: Device, driver: DoubleDriver) -> None:
        graph = self.captured(device, driver)
        device.memory_in.free()
        with pytest.raises(Misuse, match="nothing is allocated"):
            graph.launch()

    def test_a_graph_whose_context_changed_or_went(self, device: Device, driver: DoubleDriver) -> None:
        graph = self.captured(device, driver)
        device.execution.set_input_shape("image", (1, 224, 224, 1))
        with pytest.raises(Misuse, match="was changed"):
            graph.launch()
        device.execution = None
        with pytest.raises(Misuse, match="is gone"):
            graph.launch()

    def test_destroying_a_graph_that_runs(self, device: Device, driver: DoubleDriver) -> None:
        graph = self.captured(device, driver)
        graph.launch()
        with pytest.raises(Misuse, match="destroyed while it runs"):
            graph.destroy()

    def test_allocating_while_capturing(self, device: Device, driver: DoubleDriver) -> None:
        with pytest.raises(Error, match="would make the capture invalid"):
            capture_graph(driver, device.stream.handle, lambda: device.cuda.mem_alloc(4))
        with pytest.raises(GraphError, match="cuStreamEndCapture failed: CUDA_ERROR_STREAM_CAPTURE_INVALID"):
            capture_graph(driver, device.stream.handle, lambda: setattr(device.stream, "invalid", True))


def test_the_last_context_goes_last(device: Device, cuda: DoubleCuda) -> None:
    with pytest.raises(Misuse, match="the last context goes before"):
        cuda.stack()[-1].detach()


@pytest.mark.parametrize("release", RELEASES, indirect=True)
@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("BuilderFlag.FP16", {"8.6", "10.3"}),
        ("PreviewFeature.PROFILE_SHARING_0806", {"8.6", "10.3"}),
        ("NetworkDefinitionCreationFlag.STRONGLY_TYPED", {"10.3", "11.4", "rtx"}),
        ("DataType.INT64", {"10.3", "11.4", "rtx"}),
        ("IProgressMonitor", {"10.3", "11.4", "rtx"}),
        ("IRuntimeCache", {"rtx"}),
    ],
)
def test_names_are_those_of_the_release(
    trt: DoubleTensorRt, release: str, name: str, there: set[str]
) -> None:
    owner, _, member = name.partition(".")
    found = hasattr(trt, owner) and (not member or hasattr(getattr(trt, owner), member))
    assert found == (release in there)


@pytest.mark.parametrize("release", RELEASES, indirect=True)
def test_methods_are_those_of_the_release(device: Device, trt: DoubleTensorRt, release: str) -> None:
    assert hasattr(device.execution, "is_stream_capturable") == (release == "rtx")
    assert hasattr(device.engine, "create_runtime_config") == (release in ("11.4", "rtx"))
    assert not hasattr(device.execution, "execute_async_v2") and not hasattr(trt, "Bilder")
    config = trt.Builder(process_logger(trt)).create_builder_config()
    assert hasattr(config, "progress_monitor") == (release != "8.6")
    with pytest.raises(AttributeError, match=r"IBuilderConfig of TensorRT .* has no 'max_workspace'"):
        config.max_workspace = 1


def test_the_cuda_double_has_no_name_that_pycuda_lacks(device: Device) -> None:
    own = {"init", "Device", "Stream", "Event", "pagelocked_empty", "mem_alloc", "Error", "MemoryError"}
    own |= {
        "memcpy_htod_async",
        "memcpy_dtoh_async",
        "host_alloc_flags",
        "event_flags",
        "device_attribute",
        "Context",
    }
    assert own <= set(API["module"])
    for thing, kind in (
        (device.stream, "Stream"),
        (device.cuda.Event(), "Event"),
        (device.memory_in, "DeviceAllocation"),
        (device.host_in.base, "PagelockedHostAllocation"),
        (device.cuda.stack()[0], "Context"),
    ):
        ours = {name for name, value in vars(type(thing)).items() if callable(value) and name[0] != "_"}
        assert ours - set(API[kind]) <= {"enqueue", "finish"}, kind
    for flags in ("host_alloc_flags", "event_flags", "device_attribute"):
        assert set(vars(getattr(device.cuda, flags))) <= set(API[flags])
