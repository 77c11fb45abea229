"""The floor: model contract, image input, engine records, the runtimes that build and run, and the errors."""

import os
import sys

# ONNX Runtime sends telemetry from 1.29 on and keeps a device identifier below ~/.cache (microsoft/onnxruntime#27379).
# It looks once, at its import: every process of ours comes through here before that, and child processes inherit it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# OpenVINO reports its own import to Google Analytics, and keeps an identifier in ~/intel, unless this package is
# missing (openvino/tools/ovc/telemetry_utils.py, 2026.4). It has no switch in the environment.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
# Ray reports its use, from its first start on, to usage-stats.ray.io.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
