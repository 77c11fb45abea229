"""TensorRT for RTX: builds ahead of time on any x86 machine, runs on RTX GPUs."""

from __future__ import annotations

from engines.trt.runtime import TensorRtRuntime
from engines.trt.versions import RTX_GPUS

RUNTIME = TensorRtRuntime(
    name="tensorrt-rtx",
    package="tensorrt_rtx",
    distributions=("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    builds_on_cpu=True,
    portable_to=RTX_GPUS,
)
