"""TensorRT and TensorRT for RTX: one code path, and one module that knows how their releases differ."""
