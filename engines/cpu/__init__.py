"""Runtimes on the processor: ONNX Runtime, which is always there, and OpenVINO."""
