"""What only a GPU can show: engines that are built, run and compared with onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from engines.record import BatchRange, Precision
from engines.runtimes import BuildOptions, get_runtime

pytestmark = pytest.mark.gpu

BATCH = BatchRange(1, 1, 8)
LAYERS = {"dsc": 9, "cnn": 6}
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "int8": 5e-2}  # of a probability, against onnxruntime in FP32


@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_answers_like_onnxruntime(
    tmp_path: Path,
    graph_in: Callable,
    record_of: Callable,
    pixels: Callable,
    name: str,
    precision: str,
    architecture: str,
) -> None:
    runtime = get_runtime(name)
    found = runtime.availability()
    if found.no_build or found.no_run:
        pytest.skip(f"{name}: {found.no_build or found.no_run}")
    engine = tmp_path / "a.engine"
    required = LAYERS[architecture] - (precision == "int8")
    options = BuildOptions(precision=Precision(precision), required_layers=required, batch=BATCH)
    result = runtime.build(graph_in(architecture, precision), engine, options)
    record = record_of(engine, architecture, precision, result, BATCH, runtime=name)
    plain = onnxruntime.InferenceSession(graph_in(architecture, "fp32"), providers=["CPUExecutionProvider"])
    with runtime.open_runner(engine, record) as runner:
        for count in (1, 8, 3):
            batch = pixels(count, seed=count)
            expected = plain.run(None, {"image": batch})[0]
            assert np.abs(runner.run(batch) - expected).max() < TOLERANCE[precision]
