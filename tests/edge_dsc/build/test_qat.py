"""Quantisation-aware fine-tuning: the roundings are those of the INT8 graph, and they are learnt with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from calibration.layers import find_layers
from calibration.qdq import quantize
from calibration.table import CalibrationTable, check_table, load_table
from edge_dsc.build.export import convert_to_onnx, deploy_graph
from edge_dsc.build.qat import (
    QatOptions,
    QatResult,
    deployed_weights,
    fine_tune,
    learnt_ranges,
    quantized_network,
    rounded_weights_layer,
    rounding_layer,
    weighted_layers,
)
from edge_dsc.data.split import load_split
from edge_dsc.networks import build_network, fold_network, load_keras, load_network
from edge_dsc.training.run_folder import load_training_record
from engines.contract import ModelContract
from engines.errors import BadInputError, UsageError
from engines.graph import load_model

pytestmark = pytest.mark.slow  # TensorFlow alone takes seconds to start


@dataclass(frozen=True)
class Tuned:
    options: QatOptions
    result: QatResult


@pytest.fixture(scope="module")
def tuned(tuned_run: tuple[QatOptions, QatResult]) -> Tuned:
    return Tuned(*tuned_run)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (8, 7, 7, 1)).repeat(32, axis=1).repeat(32, axis=2)
    return coarse.astype(np.uint8)


def answers_of(model: object, pixels: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(),  # type: ignore[attr-defined]
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["WeightBiasQuantization"],
    )
    return session.run(None, {"image": pixels})[0]


def test_the_run_needs_no_calibration(tuned: Tuned) -> None:
    out = tuned.options.out
    table = load_table(out / "calibration.json")
    check_table(table, load_model(out / "model.onnx"))
    assert (table.method, table.seed) == ("qat", 3)
    model = load_model(out / "model.onnx").proto
    assert set(table.ranges) == {layer.input for layer in find_layers(model)}
    train = load_split(out / "split.json").samples("train")
    assert {image.sha256 for image in table.images} == {sample.sha256 for sample in train}


def test_the_split_and_the_parent_are_kept(tuned: Tuned) -> None:
    run, out = tuned.options.run, tuned.options.out
    assert load_split(out / "split.json").sha256 == load_split(run / "split.json").sha256
    record = load_training_record(out)
    assert record.parent_sha256 == load_training_record(run).model_sha256
    assert record.recipe["name"] == "qat" and record.recipe["epochs"] == 1
    assert record.recipe["learning_rate"] == pytest.approx(9e-5)


def test_ranges_begin_at_zero_behind_relu_only(tuned: Tuned) -> None:
    table = load_table(tuned.options.out / "calibration.json")
    model = load_model(tuned.options.out / "model.onnx").proto
    negative = {layer.name: table.ranges[layer.input][0] < 0 for layer in find_layers(model)}
    # Only what a depthwise convolution gives has no ReLU: the inputs of the pointwise ones.
    assert {name for name, found in negative.items() if found} == {f"block{n}_pointwise" for n in (1, 2, 3)}
    assert table.ranges["planes"] == (0.0, 255.0)


def test_weights_move_a_little(tuned: Tuned) -> None:
    before = fold_network(load_network(tuned.options.run / "model.keras", "dsc", 3))
    after = load_network(tuned.options.out / "model.keras", "dsc", 3)
    assert [layer.name for layer in before.layers] == [layer.name for layer in after.layers]
    moved = {}
    for old, new in zip(weighted_layers(before), weighted_layers(after), strict=True):
        moved[old.name] = float(np.abs(old.get_weights()[0] - new.get_weights()[0]).max())
    assert 1e-5 < moved["probabilities"] < 1e-2, moved


def test_everything_learns(pixels: np.ndarray) -> None:
    """Every weight, bias and range gets a gradient through the roundings."""
    keras = load_keras()
    keras.utils.set_random_seed(1)
    import tensorflow

    model = quantized_network(fold_network(build_network("dsc", 3)), pixels)
    with tensorflow.GradientTape() as tape:
        loss = -tensorflow.reduce_mean(tensorflow.math.log(model(pixels.astype(np.float32))[:, 0]))
    variables = model.trainable_variables
    for variable, gradient in zip(variables, tape.gradient(loss, [v.value for v in variables]), strict=True):
        assert float(tensorflow.reduce_max(tensorflow.abs(gradient))) > 0, variable.path
    assert not model.non_trainable_variables
    assert "stem_range" not in {layer.name for layer in model.layers}  # pixels are whole numbers


@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_the_trained_graph_is_the_deployed_one(architecture: str, pixels: np.ndarray) -> None:
    """What Keras computes with its roundings is what ONNX Runtime computes with the Q/DQ pairs."""
    load_keras().utils.set_random_seed(2)
    deployed = fold_network(build_network(architecture, 3))
    quantized = quantized_network(deployed, pixels)
    contract = ModelContract(labels=("clear", "diffuse", "focal"), architecture=architecture)
    model = deploy_graph(convert_to_onnx(deployed), contract, {})
    bounds = learnt_ranges(quantized, deployed).values()
    table = CalibrationTable(
        method="qat",
        parameters={},
        seed=0,
        ranges={layer.input: pair for layer, pair in zip(find_layers(model), bounds, strict=True)},
        onnx_sha256="",
        preprocess_sha256="",
        images=(),
        versions={},
    )
    keras = load_keras()
    hidden = keras.Model(quantized.input, quantized.get_layer("dense").output)
    kernel, bias = quantized.get_layer("probabilities").get_weights()
    # The last layer's input is rounded in the unsigned graph only.
    logits = np.asarray(hidden(pixels.astype(np.float32), training=False)) @ kernel + bias
    ours = np.exp(logits - logits.max(axis=1, keepdims=True))
    ours /= ours.sum(axis=1, keepdims=True)
    exact = np.asarray(deployed(pixels.astype(np.float32), training=False))
    theirs = answers_of(quantize(model, table, signed_activations=True), pixels)
    # Float sums in another order flip single roundings; what INT8 does to the answers is far more than that.
    assert np.abs(ours - theirs).max() < 0.05 * np.abs(theirs - exact).max() + 1e-5


def test_rounding_is_symmetric_saturating_and_learns() -> None:
    keras = load_keras()
    layer = rounding_layer(keras)(start=1.27, name="r")
    values = np.array([[-5.0, -1.28, -0.014, 0.0, 0.014, 0.016, 1.27, 5.0]], np.float32)
    found = np.asarray(layer(values))
    np.testing.assert_allclose(found, [[-1.28, -1.28, -0.01, 0, 0.01, 0.02, 1.27, 1.27]], atol=1e-6)
    import tensorflow

    x = tensorflow.Variable(values)
    with tensorflow.GradientTape() as tape:
        total = tensorflow.reduce_sum(layer(x))
    inside, scale = tape.gradient(total, [x, layer.moved.value])
    np.testing.assert_array_equal(inside.numpy(), [[0, 1, 1, 1, 1, 1, 1, 0]])
    assert float(scale) != 0.0


def test_weights_are_rounded_per_output_channel() -> None:
    keras = load_keras()
    source = keras.layers.DepthwiseConv2D(3, padding="same", use_bias=False)
    source.build((None, 4, 4, 2))
    kernel = np.zeros((3, 3, 2, 1), np.float32)
    kernel[1, 1, :, 0] = [127.0, 0.127]  # scales 1 and 0.001
    kernel[0, 0, :, 0] = [0.4, 0.0004]  # both round to nothing
    source.set_weights([kernel])
    layer = rounded_weights_layer(keras)(source, middle=0.0, name="rounded")
    ones = np.ones((1, 4, 4, 2), np.float32)
    layer(ones)
    layer.set_weights([kernel])
    np.testing.assert_allclose(np.asarray(layer(ones))[0, 2, 2], [127.0, 0.127], rtol=1e-6)


def test_the_way_there_and_back_keeps_the_weights(pixels: np.ndarray) -> None:
    load_keras().utils.set_random_seed(0)
    deployed = fold_network(build_network("dsc", 3))
    before = [layer.get_weights() for layer in weighted_layers(deployed)]
    quantized = quantized_network(deployed, pixels)
    deployed_weights(quantized, deployed)
    for old, layer in zip(before, weighted_layers(deployed), strict=True):
        for one, other in zip(old, layer.get_weights(), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-7)
    assert fold_network(deployed) is deployed


def test_images_that_are_not_all_there(tuned: Tuned, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tuned.options.data, tmp_path / "data"))
    gone = load_split(tuned.options.run / "split.json").samples("train")[0]
    (data / gone.path).unlink()
    with pytest.raises(BadInputError, match=r"lacks 1 of the \d+ images"):
        fine_tune(QatOptions(data=data, run=tuned.options.run, out=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_what_makes_no_sense_is_refused(tuned: Tuned, tmp_path: Path) -> None:
    options = tuned.options
    with pytest.raises(UsageError, match="is the run to start from"):
        fine_tune(QatOptions(data=options.data, run=options.run, out=options.run))
    with pytest.raises(UsageError, match="was fine-tuned for INT8 already"):
        fine_tune(QatOptions(data=options.data, run=options.out, out=tmp_path / "new"))
    with pytest.raises(UsageError, match="0 epochs"):
        fine_tune(QatOptions(data=options.data, run=options.run, out=tmp_path / "new", epochs=0))
    with pytest.raises(UsageError, match="holds a finished run"):
        fine_tune(options)
