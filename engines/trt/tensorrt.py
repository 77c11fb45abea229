"""TensorRT on Jetson and on x86: builds and runs on the GPU at hand."""

from __future__ import annotations

from engines.trt.runtime import TensorRtRuntime

RUNTIME = TensorRtRuntime(
    name="tensorrt",
    package="tensorrt",
    distributions=("tensorrt",),
    builds_on_cpu=False,
    portable_to="",
)
