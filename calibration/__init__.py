"""From real images and an FP32 ONNX model to activation ranges, and from those to an INT8 (Q/DQ) model."""
