"""Run in a process of its own by test_pycuda.py: the runner on the real pycuda, above the stub driver.

    python drive_pycuda.py RECORD_PICKLE RELEASE

It prints one JSON object; every answer was compared with ONNX Runtime's.
"""

from __future__ import annotations

import ctypes
import json
import pickle
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pycuda.driver as cuda
from double_tensorrt import DoubleTensorRt, session_of

from engines.errors import EnvironmentProblem
from engines.runtimes import RunnerOptions, answer_batches
from engines.trt.cuda import bound_device, primary_context
from engines.trt.loaded import StoredEngine
from engines.trt.runner import TrtRunner

# The 8 makes scratch memory grow, and graphs be captured again: in each of three slots by the end.
SIZES = (4, 1, 8, 8, 4, 3, 3, 1, 1, *[4] * 7)
DRIVER = ctypes.CDLL("libcuda.so.1")
CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
callbacks: list[Any] = []  # the driver keeps bare pointers to them


class Stream:
    """A stream of pycuda's, as the double of TensorRT sees it."""

    captured = None
    pending: tuple[Any, ...] = ()

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def enqueue(self, work: Any) -> None:
        callback = CALLBACK(lambda _: work.step())
        callbacks.append(callback)
        assert DRIVER.stub_enqueue(ctypes.c_void_p(self.handle), callback) == 0


class Device(SimpleNamespace):
    """The double of CUDA, as far as that of TensorRT asks it."""

    @property
    def here(self) -> int:
        return max(0, DRIVER.stub_device())


class Streams(dict):
    def get(self, handle: int, default: object = None) -> Stream:
        return self.setdefault(handle, Stream(handle))


def need_context(*_: object) -> None:
    assert DRIVER.stub_depth() > 0, "no current context"


def memory_at(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def count(name: str) -> int:
    return ctypes.c_long.in_dll(DRIVER, name).value


def main() -> None:
    plan, record, model = pickle.loads(Path(sys.argv[1]).read_bytes())  # noqa: S301 - the test wrote it
    device = Device(
        by_handle=Streams(),
        log=[],
        fail_on_device={},
        sick="",
        need_context=need_context,
        need_healthy=lambda: None,
        streams=lambda: [],
        stack=lambda: [None] * DRIVER.stub_depth(),
        owner_of=lambda address: address,
        need_memory=memory_at,
    )
    trt: Any = DoubleTensorRt(sys.argv[2], device)
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (n, 224, 224, 1), np.uint8) for n in SIZES]
    expected = [session_of(model).run(None, {"image": batch})[0] for batch in batches]
    found: dict[str, Any] = {"words": [], "devices": set()}

    def check(**options: Any) -> None:
        with TrtRunner(trt, cuda, StoredEngine(plan, record), RunnerOptions(**options)) as runner:
            answers = [each for _, each in answer_batches(runner, enumerate(batches))]
            for seen, right in zip(answers, expected, strict=True):
                np.testing.assert_array_equal(seen, right)
            ticket = runner.submit(batches[0])
            runner.collect(ticket)
            found["stages"] = sorted(ticket.stages_ns or found.get("stages", ()))
            found["words"].append(runner.description["execution"])
            found["devices"].add(runner.description["device"])

    for options in (
        {},
        {"graph": False},
        {"memory": "mapped"},
        {"time_stages": True},
        {"slots": 3, "blocking_wait": True, "device": 1},
    ):
        check(**options)
    threads = [threading.Thread(target=check) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with bound_device(1), primary_context(cuda):  # as a calibrator, in a build on the second GPU
        found["fed"] = DRIVER.stub_device()
        cuda.mem_alloc(4).free()
    try:
        check(device=2)
    except EnvironmentProblem as error:
        found["refused"] = error.what
    found["devices"] = sorted(found["devices"])
    found |= {"live": count("stub_live"), "bad": count("stub_bad"), "depth": DRIVER.stub_depth()}
    found["references"] = ctypes.c_int.in_dll(DRIVER, "stub_refs").value
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
