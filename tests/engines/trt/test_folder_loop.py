"""The folder loop drives a TensorRT runner: decoded in threads, run in the owner's, every slot busy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edge_dsc.infer.classify import classify_files
from engines.images import read_input
from engines.trt.runner import TrtRunner


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_folder_goes_through_the_slots_in_order(
    open_runner: Callable[..., TrtRunner], small_model: Path, textures: Path, slots: int
) -> None:
    paths = sorted(textures.rglob("*.png"))[:21]
    paths[4:4] = [textures / "missing.png"]
    with open_runner(slots=slots) as runner:
        assert not runner.thread_safe and runner.slots == slots
        answers = list(classify_files(paths, runner, threads=2))
        contract = runner.record.contract
    assert [answer.path for answer in answers] == paths
    assert [answer.error is not None for answer in answers] == [index == 4 for index in range(22)]
    pixels = [read_input(path, contract) for path in paths if path.exists()]
    session = onnxruntime.InferenceSession(small_model.read_bytes(), providers=["CPUExecutionProvider"])
    expected = [session.run(None, {contract.input_name: image[None]})[0][0] for image in pixels]
    got = [answer.probabilities for answer in answers if answer.probabilities is not None]
    assert np.abs(np.array(got) - np.array(expected)).max() < 1e-5
