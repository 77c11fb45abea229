"""``train --qat``: fine-tuning for INT8, from a trained run to one whose network and ranges were trained for it.

The graph that is trained is the one that is deployed: folded, with every rounding of the signed INT8 graph at its
place. The second half of this file builds it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibration.layers import find_layers
from calibration.table import QAT_METHOD, CalibrationImage, CalibrationTable, save_table
from edge_dsc.build.calibrate import CALIBRATION_NAME
from edge_dsc.build.export import export_run
from edge_dsc.data import Split, load_split
from edge_dsc.data.split import SPLIT_FILE
from edge_dsc.networks import ARCHITECTURES, fold_network, load_keras, load_network
from edge_dsc.training.batches import TaughtBatches
from edge_dsc.training.fit import compile_model, fit_model, seed_everything
from edge_dsc.training.recipes import RECIPES, Recipe, ReportProgress, TrainOptions
from edge_dsc.training.run_folder import MODEL_FILE, TrainingRecord, TrainState, load_training_record
from edge_dsc.training.train import (
    Fitted,
    TrainResult,
    check_folder,
    finish_run,
    make_batches,
    read_run_images,
    require_validation,
)
from engines.errors import ArtefactError, UsageError
from engines.files import KERAS_MODEL, require_writable
from engines.graph import OnnxModel
from engines.packages import load
from engines.runtimes import Progress

if TYPE_CHECKING:
    from keras import Layer, Model

EPOCHS = 5
# The share of the recipe's learning rate: the network is trained, it only has to move by fractions of a step.
RATE_SHARE = 0.03
PIXELS = 255.0
MIDDLE = 128 / PIXELS  # of the stem's input, which is scaled
LEVELS = 127.0  # positive levels of int8; a scale is the largest magnitude over this
_SMALLEST = 1e-12  # scale of a channel of zeros
# Adam moves every variable by about its learning rate a step, and a range must move by percents, not by 1e-4.
_RANGE_SPEED = 10.0
_RANGE_PERCENTILE = 99.99
_RANGE_IMAGES = 64
_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class QatOptions:
    """What a fine-tuning run is asked for.

    Attributes:
        data: The folder of images that the run was trained on.
        run: The trained run folder.
        out: The new run folder.
        epochs: Passes over the training images.
        seed: Decides order and augmentation.
        overwrite: Replace the run in ``out``.
    """

    data: Path
    run: Path
    out: Path
    epochs: int = EPOCHS
    seed: int = 0
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class QatResult:
    """What a fine-tuning run gave.

    Attributes:
        trained: The run; its metrics are those of the INT8 form.
        onnx: The exported FP32 graph.
        table: The calibration table of the learnt ranges, which ``build-engine --int8`` takes.
    """

    trained: TrainResult
    onnx: Path
    table: Path


def fine_tune(
    options: QatOptions, *, progress: ReportProgress | None = None, reading: Progress | None = None
) -> QatResult:
    """Fine-tune a trained network for INT8 and write a run folder that needs no calibration.

    The network is trained to answer as the trained run does in FP32. The new folder holds the same split, the
    deployed network as ``model.keras``, ``model.onnx`` and a calibration table with the method ``qat``. Same run,
    images, seed and machine: same weights.

    Raises:
        UsageError: ``out`` is the run itself or in use.
        ArtefactError: ``run`` is no finished run.
        BadInputError: The images of the run's split are not all in ``data``.
        EnvironmentProblem: A package is missing, or the folder cannot be written.
        KeyboardInterrupt: Ctrl-C before the first epoch was done.
    """
    parent = load_training_record(options.run)
    settings = _settings(options, parent)
    check_folder(settings)
    recipe = _recipe(parent, options.epochs)
    split = load_split(options.run / SPLIT_FILE)
    require_validation(split, options.run)
    images = read_run_images(options.data, split, run=options.run, reading=reading)
    require_writable(options.out / MODEL_FILE, KERAS_MODEL)  # said before an epoch is trained
    trained = load_network(
        options.run / MODEL_FILE,
        parent.architecture,
        len(parent.labels),
        config_sha256=parent.network.config_sha256,
    )
    seed_everything(options.seed)
    deployed = fold_network(trained)
    batches = make_batches(images, recipe, options.seed)
    stride = max(1, len(batches.pixels) // _RANGE_IMAGES)
    model = quantized_network(deployed, batches.pixels[::stride][:_RANGE_IMAGES])
    quantised = compile_model(model, recipe, batches.steps)
    batches = TaughtBatches(**vars(batches), teacher=deployed)
    state = TrainState()
    started = time.monotonic()
    interrupted = fit_model(quantised, batches, images.pixels["validation"], state, progress)
    deployed_weights(model, deployed)  # its own are not needed any more
    fitted = Fitted(
        model=model,
        architecture=parent.architecture,
        network=parent.network,
        recipe=recipe,
        state=state,
        interrupted=interrupted,
        seconds=time.monotonic() - started,
        deployed=deployed,
        parent_sha256=parent.model_sha256,
    )
    trained = finish_run(settings, images, fitted)
    exported = export_run(options.out, data=options.data)
    table = options.out / CALIBRATION_NAME
    ranges = list(learnt_ranges(model, deployed).values())
    save_table(table, _table(exported.model, ranges, images.split, options))
    return QatResult(trained=trained, onnx=exported.path, table=table)


def _settings(options: QatOptions, parent: TrainingRecord) -> TrainOptions:
    if os.path.realpath(options.out) == os.path.realpath(options.run):
        raise UsageError(f"{options.out} is the run to start from", remedy="give another folder with --out")
    if options.epochs < 1:
        raise UsageError(f"{options.epochs} epochs", remedy="train for at least 1")
    if parent.recipe.get("name") == QAT_METHOD:
        raise UsageError(
            f"{options.run} was fine-tuned for INT8 already", remedy="start from the run it came from"
        )
    return TrainOptions(
        data=options.data,
        out=options.out,
        architecture=parent.architecture,
        epochs=options.epochs,
        seed=options.seed,
        overwrite=options.overwrite,
    )


def _recipe(parent: TrainingRecord, epochs: int) -> Recipe:
    if parent.architecture not in ARCHITECTURES:
        raise ArtefactError(
            f"fine-tuning for INT8 knows {' and '.join(ARCHITECTURES)}, and the run is of {parent.architecture}",
            remedy="calibrate it instead: edge-dsc calibrate",
        )
    base = RECIPES["default"][parent.architecture]
    return replace(
        base,
        name=QAT_METHOD,
        epochs=epochs,
        learning_rate=base.learning_rate * RATE_SHARE,
        warmup=0,
        label_smoothing=0.0,
        dense_start=False,
        convolution_start=False,
    )


def _table(
    model: OnnxModel, ranges: Sequence[tuple[float, float]], split: Split, options: QatOptions
) -> CalibrationTable:
    return CalibrationTable(
        method=QAT_METHOD,
        parameters={"epochs": options.epochs},
        seed=options.seed,
        ranges={layer.input: bounds for layer, bounds in zip(find_layers(model.proto), ranges, strict=True)},
        onnx_sha256=model.sha256,
        preprocess_sha256=model.contract.preprocess_sha256,
        images=tuple(
            CalibrationImage(sample.path, sample.label, sample.sha256) for sample in split.samples("train")
        ),
        versions={name: load(name).__version__ for name in ("numpy", "tensorflow", "keras")},
    )


def quantized_network(deployed: Model, images: NDArray[np.uint8]) -> Model:
    """Build the trainable INT8 form of a deployed network, with its weights.

    Args:
        deployed: From :func:`edge_dsc.networks.fold_network`.
        images: ``uint8 [N, 224, 224, 1]``, a few dozen of all classes, on which the ranges start.

    Returns:
        A ``keras.Model`` of the same input and output: float32 raw grey in, probabilities out. Layers with weights
        keep their names; the layer that rounds the input of ``X`` is ``X_range``, and the stem has none.
    """
    keras = load_keras()
    rounding, weighted = rounding_layer(keras), rounded_weights_layer(keras)
    starts = _starting_ranges(deployed, images)
    x = image = keras.layers.Input(deployed.input_shape[1:], name="image")
    for layer in deployed.layers[1:]:
        if layer.name not in starts:
            x = type(layer).from_config(layer.get_config())(x)
            continue
        first, last = layer is deployed.layers[1], layer is deployed.layers[-1]
        if not first:
            x = rounding(start=starts[layer.name], name=f"{layer.name}_range")(x)
        else:
            # The stem's kernel holds the scale 1/255; at that size no learning rate would fit it and the others.
            x = keras.layers.Rescaling(1 / PIXELS, name="scale")(x)
        new = (
            type(layer).from_config(layer.get_config())
            if last
            else weighted(layer, middle=MIDDLE if first else 0.0, name=layer.name)
        )
        x = new(x)
        values = layer.get_weights()
        new.set_weights([values[0] * PIXELS, *values[1:]] if first else values)
    return keras.Model(image, x, name=deployed.name)


def deployed_weights(quantized: Model, deployed: Model) -> None:
    """Write the weights of the trained INT8 form back into the deployed network, in place, not rounded."""
    for layer in weighted_layers(deployed):
        values = quantized.get_layer(layer.name).get_weights()
        if layer is deployed.layers[1]:
            values = [(values[0].astype("float64") / PIXELS).astype("float32"), *values[1:]]
        layer.set_weights(values)


def learnt_ranges(quantized: Model, deployed: Model) -> dict[str, tuple[float, float]]:
    """Return the range of the input of every layer with weights, by the layer's name, in the network's order.

    A tensor that ReLU left without negative values has 0 as its lowest: an unsigned graph spends all levels on it.
    """
    found = {deployed.layers[1].name: (0.0, PIXELS)}
    negative = False
    for layer in weighted_layers(deployed)[1:]:
        highest = float(quantized.get_layer(f"{layer.name}_range").current())
        found[layer.name] = (-highest if negative else 0.0, highest)
        negative = layer.activation.__name__ == "linear"
    return found


def weighted_layers(deployed: Model) -> list[Layer]:
    """List the layers with weights, in the network's order."""
    return [layer for layer in deployed.layers if layer.weights]


def _starting_ranges(deployed: Model, images: NDArray[np.uint8]) -> dict[str, float]:
    """Return the 99.99th percentile of the magnitudes at every layer's input; the largest at the last one's.

    The stem's input are the pixels: their range is known.
    """
    keras = load_keras()
    layers = weighted_layers(deployed)
    inputs = keras.Model(deployed.input, [layer.input for layer in layers[1:]])
    seen: list[list[float]] = []
    for start in range(0, len(images), _BATCH):
        values = inputs(images[start : start + _BATCH].astype("float32"), training=False)
        shares = [_RANGE_PERCENTILE] * (len(values) - 1) + [100.0]
        seen.append([float(np.percentile(np.abs(v), q)) for v, q in zip(values, shares, strict=True)])
    highest = np.mean(seen, axis=0)
    highest[-1] = np.max(seen, axis=0)[-1]
    starts = [max(float(value), _SMALLEST) for value in highest]
    return dict(zip([layer.name for layer in layers], [PIXELS, *starts], strict=True))


def _rounded(ops: Any, values: Any) -> Any:
    """Round to whole numbers; the gradient passes as if nothing were rounded."""
    return values + ops.stop_gradient(ops.round(values) - values)


def rounding_layer(keras: Any) -> Any:
    """Make the layer class that rounds a tensor."""
    ops = keras.ops
    base: Any = keras.layers.Layer

    class Rounding(base):  # type: ignore[misc]
        """Round a tensor to 256 levels, symmetric about zero, over a range that is learnt."""

        def __init__(self, *, start: float, name: str) -> None:
            super().__init__(name=name)
            self._start = start

        def build(self, shape: Any) -> None:
            """Make the range's variable: the logarithm of its size against the start."""
            self.moved = self.add_weight(shape=(), initializer="zeros", name="moved")

        def current(self) -> Any:
            """Return the range's upper end."""
            return self._start * ops.exp(_RANGE_SPEED * self.moved)

        def call(self, inputs: Any) -> Any:
            """Round."""
            scale = self.current() / LEVELS
            return _rounded(ops, ops.clip(inputs / scale, -LEVELS - 1, LEVELS)) * scale

    return Rounding


def rounded_weights_layer(keras: Any) -> Any:
    """Make the layer class that rounds its own weights."""
    ops = keras.ops
    base: Any = keras.layers.Layer

    class RoundedWeights(base):  # type: ignore[misc]
        """A convolution or dense layer that computes with its weights rounded per output channel."""

        def __init__(self, layer: Layer, *, middle: float, name: str) -> None:
            super().__init__(name=name)
            self._middle = middle
            self._kind = type(layer).__name__
            self._shapes = [tuple(weight.shape) for weight in layer.weights]
            self._activation = layer.activation
            # A depthwise kernel is [h, w, channels, 1], any other [..., outputs].
            self._within = (
                (0, 1) if self._kind == "DepthwiseConv2D" else tuple(range(len(self._shapes[0]) - 1))
            )

        def build(self, shape: Any) -> None:
            """Make kernel and bias."""
            self.kernel = self.add_weight(shape=self._shapes[0], name="kernel")
            self.bias = self.add_weight(shape=self._shapes[1], name="bias") if len(self._shapes) > 1 else None

        def call(self, inputs: Any) -> Any:
            """Compute with rounded weights; the scale follows the largest weight and takes no gradient."""
            largest = ops.max(ops.abs(self.kernel), axis=self._within, keepdims=True)
            scale = ops.stop_gradient(ops.maximum(largest / LEVELS, _SMALLEST))
            kernel = _rounded(ops, self.kernel / scale) * scale
            if self._kind == "Dense":
                outputs = ops.matmul(inputs, kernel)
            elif self._kind == "DepthwiseConv2D":
                outputs = ops.depthwise_conv(inputs, kernel, padding="same")
            else:
                outputs = ops.conv(inputs, kernel, padding="same")
                # calibration.rewrites: the INT8 graph subtracts the middle from the pixels and gives it back
                # through the bias with float kernels, and so without their rounding.
                outputs = outputs + self._middle * ops.sum(self.kernel - kernel, axis=self._within)
            return self._activation(outputs if self.bias is None else outputs + self.bias)

    return RoundedWeights
