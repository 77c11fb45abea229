"""Keras to ONNX through tf2onnx: the only module that knows it."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from edge_dsc.networks import load_keras
from engines.packages import load

OPSET = 18
INPUT_NAME = "image"

Model = Any


def convert_to_onnx(model: Model) -> Any:
    """Convert a Keras model with one input ``float32 [N, H, W, 1]``.

    Returns:
        ``onnx.ModelProto`` as tf2onnx writes it, with a channels-first input.

    Raises:
        EnvironmentProblem: tf2onnx is missing.
    """
    load_keras()
    tensorflow = load("tensorflow")
    with warnings.catch_warnings():
        # tf2onnx 1.17 and TensorFlow call each other's and numpy's deprecated names; nothing a user can act on.
        warnings.simplefilter("ignore")
        tf2onnx = load("tf2onnx")
        logging.getLogger("tf2onnx").setLevel(logging.ERROR)
        # Keras 3 models only convert with an explicit signature (onnx/tensorflow-onnx#2329).
        signature = [
            tensorflow.TensorSpec((None, *model.input_shape[1:]), tensorflow.float32, name=INPUT_NAME)
        ]
        proto, _ = tf2onnx.convert.from_keras(
            model, input_signature=signature, opset=OPSET, inputs_as_nchw=[INPUT_NAME]
        )
    return proto
