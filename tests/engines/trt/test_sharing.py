"""Profiles that contexts do not share: an engine of TensorRT 8.6 that another tool built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from double_tensorrt import session_of
from msgspec.structs import replace

from engines.files import sha256_bytes
from engines.runtimes import RunnerOptions
from engines.trt.loaded import StoredEngine
from engines.trt.runner import TrtRunner


@pytest.fixture(params=["8.6", "10.3"])
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def open_unshared(trt: Any, cuda: Any, driver: Any, plan: bytes, record: Any) -> Callable[..., TrtRunner]:
    assert b'"shared": true' in plan  # our own builder asks for it
    unshared = plan.replace(b'"shared": true', b'"shared": false')
    changed = replace(record, engine_sha256=sha256_bytes(unshared))
    return lambda **options: TrtRunner(trt, cuda, StoredEngine(unshared, changed), RunnerOptions(**options))


def test_one_slot_is_left_and_said(open_unshared: Callable[..., TrtRunner], cuda: Any, pixels: Any) -> None:
    with open_unshared(slots=2) as runner:
        assert runner.slots == 1
        words = runner.description["slots"]
        assert words.startswith("1 of 2: tensorrt cannot open dsc.engine: no execution context")
        assert "Profile 0 has been chosen by another IExecutionContext" in words
        assert runner.description["execution"] == "CUDA graph"
    assert cuda.idle


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
