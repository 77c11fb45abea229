from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from engines.errors import ArtefactError, BadInputError, EnvironmentProblem
from engines.record import BatchRange, EngineRecord
from engines.runtimes import BuildResult
from engines.trt.run import TrtRunner


@pytest.fixture
def plan(deployed_models: dict[str, Path]) -> bytes:
    return deployed_models["dsc"].read_bytes()


@pytest.fixture
def record(deployed_models: dict[str, Path], record_of: Callable[..., EngineRecord]) -> EngineRecord:
    result = BuildResult(layers={"FP32": 9}, layers_source="", platform={})
    return record_of(
        deployed_models["dsc"], "dsc", "fp32", result, BatchRange(1, 1, 8), runtime="tensorrt-rtx"
    )


def test_answers_of_every_batch_size(trt: Any, cuda: Any, plan: bytes, record: Any, pixels: Any) -> None:
    plain = onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"])
    with TrtRunner(trt, cuda, plan, record) as runner:
        assert not runner.thread_safe
        for count in (1, 8, 8, 3, 1):
            batch = pixels(count, seed=count)
            np.testing.assert_array_equal(runner.run(batch), plain.run(None, {"image": batch})[0])
    assert trt.shapes_set == 4  # only where the size changes


def test_answers_belong_to_the_caller(trt: Any, cuda: Any, plan: bytes, record: Any, pixels: Any) -> None:
    with TrtRunner(trt, cuda, plan, record) as runner:
        first = runner.run(pixels(2, seed=1))
        copy = first.copy()
        runner.run(pixels(2, seed=2))
        np.testing.assert_array_equal(first, copy)


def test_memory_is_allocated_once_and_freed(
    trt: Any, cuda: Any, plan: bytes, record: Any, pixels: Any
) -> None:
    runner = TrtRunner(trt, cuda, plan, record)
    assert cuda.allocations == 4
    runner.run(pixels(1))
    runner.run(pixels(8))
    assert cuda.allocations == 4
    runner.close()
    runner.close()
    assert cuda.log == ["free device", "free device", "free host", "free host", "detach"]
    assert (cuda.live, cuda.retained, cuda.stack()) == ([], 0, [])


def test_the_context_is_current_only_inside_a_call(trt: Any, cuda: Any, plan: bytes, record: Any) -> None:
    with TrtRunner(trt, cuda, plan, record):
        assert cuda.stack() == []


def test_two_runners_close_in_any_order(trt: Any, cuda: Any, plan: bytes, record: Any, pixels: Any) -> None:
    first = TrtRunner(trt, cuda, plan, record)
    second = TrtRunner(trt, cuda, plan, record)
    first.close()
    second.run(pixels(1))
    second.close()
    assert (cuda.live, cuda.retained) == ([], 0)


def test_another_thread_is_refused(trt: Any, cuda: Any, plan: bytes, record: Any, pixels: Any) -> None:
    caught: list[BaseException] = []

    def call(action: Callable[[], object]) -> None:
        try:
            action()
        except RuntimeError as error:
            caught.append(error)

    with TrtRunner(trt, cuda, plan, record) as runner:
        for action in (lambda: runner.run(pixels(1)), runner.close):
            thread = threading.Thread(target=call, args=(action,))
            thread.start()
            thread.join()
        assert [str(error) for error in caught] == [
            "the runner of dsc.onnx belongs to the thread that opened it"
        ] * 2
        assert runner.run(pixels(1)).shape == (1, 3)


def test_a_closed_runner_says_so(trt: Any, cuda: Any, plan: bytes, record: Any, pixels: Any) -> None:
    runner = TrtRunner(trt, cuda, plan, record)
    runner.close()
    with pytest.raises(ValueError, match=r"the runner of dsc.onnx is closed"):
        runner.run(pixels(1))


def test_a_wrong_batch_is_refused_before_the_gpu(trt: Any, cuda: Any, plan: bytes, record: Any) -> None:
    with TrtRunner(trt, cuda, plan, record) as runner, pytest.raises(BadInputError, match="N from 1 to 8"):
        runner.run(np.zeros((9, 224, 224, 1), np.uint8))


def test_a_refused_engine_names_the_first_error(trt: Any, cuda: Any, plan: bytes, record: Any) -> None:
    trt.fail = "deserialize_cuda_engine"
    with pytest.raises(ArtefactError, match="the engine plan file is not compatible") as caught:
        TrtRunner(trt, cuda, plan, record)
    assert caught.value.what == "tensorrt-rtx refuses dsc.onnx: the engine plan file is not compatible"
    assert caught.value.remedy == "rebuild it: edge-dsc build-engine model.onnx"
    assert (cuda.live, cuda.retained, cuda.stack()) == ([], 0, [])


def test_tensors_of_another_contract_are_refused(trt: Any, cuda: Any, plan: bytes, record: Any) -> None:
    trt.names = ("image", "probabilities", "more")
    with pytest.raises(ArtefactError, match=r"it takes \['image'\] and gives \['probabilities', 'more'\]"):
        TrtRunner(trt, cuda, plan, record)
    trt.names, trt.types = ("image", "probabilities"), {"image": "float", "probabilities": "float"}
    with pytest.raises(ArtefactError, match="it takes float and gives float"):
        TrtRunner(trt, cuda, plan, record)
    assert cuda.retained == 0


@pytest.mark.parametrize("call", ["create_execution_context", "set_tensor_address"])
def test_a_refusal_while_opening_frees_everything(
    trt: Any, cuda: Any, plan: bytes, record: Any, call: str
) -> None:
    trt.fail = call
    with pytest.raises(EnvironmentProblem, match=r"tensorrt-rtx cannot open dsc\.onnx"):
        TrtRunner(trt, cuda, plan, record)
    assert (cuda.live, cuda.retained, cuda.stack()) == ([], 0, [])


@pytest.mark.parametrize(
    "call", ["init", "retain_primary_context", "Stream", "pagelocked_empty", "mem_alloc"]
)
def test_cuda_failing_while_opening_frees_everything(
    trt: Any, cuda: Any, plan: bytes, record: Any, call: str
) -> None:
    cuda.fail = call
    with pytest.raises(EnvironmentProblem, match=f"cannot open dsc.onnx: {call} failed: out of memory"):
        TrtRunner(trt, cuda, plan, record)
    assert (cuda.live, cuda.retained, cuda.stack()) == ([], 0, [])


@pytest.mark.parametrize("call", ["set_input_shape", "execute_async_v3"])
def test_a_refusal_while_running(
    trt: Any, cuda: Any, plan: bytes, record: Any, pixels: Any, call: str
) -> None:
    with TrtRunner(trt, cuda, plan, record) as runner:
        trt.fail = call
        with pytest.raises(EnvironmentProblem, match=f"cannot run dsc.onnx: {call}"):
            runner.run(pixels(2))
        assert cuda.stack() == []


@pytest.mark.parametrize("call", ["memcpy_htod_async", "memcpy_dtoh_async", "synchronize"])
def test_cuda_failing_while_running(
    trt: Any, cuda: Any, plan: bytes, record: Any, pixels: Any, call: str
) -> None:
    with TrtRunner(trt, cuda, plan, record) as runner:
        cuda.fail = call
        with pytest.raises(EnvironmentProblem, match=f"cannot run dsc.onnx: {call} failed") as caught:
            runner.run(pixels(1))
        assert "edge-dsc doctor" in caught.value.remedy


def test_cuda_failing_while_freeing_still_lets_the_device_go(
    trt: Any, cuda: Any, plan: bytes, record: Any
) -> None:
    runner = TrtRunner(trt, cuda, plan, record)
    cuda.fail = "free"
    with pytest.raises(EnvironmentProblem, match=r"cannot close dsc\.onnx: free failed"):
        runner.close()
    assert (cuda.retained, cuda.stack()) == (0, [])
    runner.close()
