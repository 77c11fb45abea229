"""The floor: model contract, image input, engine records, the runtimes that build and run, and the errors."""

import os

# ONNX Runtime sends telemetry from 1.29 on and keeps a device identifier below ~/.cache (microsoft/onnxruntime#27379).
# It looks once, at its import: every process of ours comes through here before that, and child processes inherit it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
