"""From real images and an FP32 ONNX model to activation ranges, and from ranges to an INT8 (Q/DQ) ONNX model."""
