"""``separate``: a twin is fine-tuned to answer as its original does, and is a run like any other."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_dsc.build.export import export_run
from edge_dsc.data import load_split
from edge_dsc.networks import load_keras, load_network, save_network
from edge_dsc.networks.keras_files import read_network
from edge_dsc.networks.separable import SeparationOptions, separate_network
from edge_dsc.training.run_folder import METRICS, load_training_record
from edge_dsc.training.twin import TwinOptions, TwinResult, fit_pairs, make_twin
from engines.errors import ArtefactError, BadInputError, UsageError
from engines.files import sha256_file

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_networks")]


@pytest.fixture(scope="module")
def twin(cnn_run: Any, small_pictures: Any, tmp_path_factory: pytest.TempPathFactory) -> TwinResult:
    out = tmp_path_factory.mktemp("twin") / "run"
    with small_pictures():
        return make_twin(TwinOptions(original=cnn_run.result.run, out=out, epochs=1))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Someone's network of 16 x 16 grey pixels and three classes, in a file."""
    keras = load_keras()
    keras.utils.set_random_seed(1)
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((16, 16, 1)),
            layers.Rescaling(1 / 255),
            layers.Conv2D(8, 1, name="mix"),
            layers.Conv2D(8, 3, activation="relu", name="edges"),
            layers.Conv2D(8, 3, activation="relu", name="shapes"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    path = tmp_path_factory.mktemp("own") / "own.keras"
    save_network(model, path)
    return path


def test_the_twin_of_cnn_is_a_run_of_dsc(twin: TwinResult, cnn_run: Any) -> None:
    parent = load_training_record(cnn_run.result.run)
    record = load_training_record(twin.out)
    assert twin.trained is not None and record == twin.trained.record
    assert (record.architecture, record.labels) == ("dsc", parent.labels)
    assert record.parameters["feature_extractor"] == 4_640
    assert record.parent_sha256 == parent.model_sha256 == record.network.weights_sha256
    assert record.separation == twin.separation
    assert record.separation.parameters == (28_640, 4_640)
    assert [layer.name for layer in record.separation.layers][1:] == [f"block{n}_conv" for n in (1, 2, 3)]
    recipe = record.recipe
    assert (recipe["name"], recipe["epochs"], recipe["batch"]) == ("twin", 1, parent.recipe["batch"])
    assert recipe["label_smoothing"] == 0.0 and recipe["temperature"] > 1
    assert load_split(twin.out / "split.json").sha256 == parent.split_sha256
    assert METRICS.load(twin.out / "metrics.json").held_out == twin.trained.metrics["held_out"]
    assert len(record.history["validation_accuracy"]) == 1
    assert twin.validation is not None
    kept = twin.validation[1] if record.best_epoch == 0 else record.history["validation_accuracy"][0]
    assert twin.validation[2] == kept


def test_the_twin_is_exported_as_dsc_is(twin: TwinResult) -> None:
    exported = export_run(twin.out)
    assert exported.parity <= 1e-5
    assert exported.contract.architecture == "dsc"


def test_another_twin_of_cnn_has_a_name_of_its_own(cnn_run: Any, tmp_path: Path) -> None:
    separation = SeparationOptions(rank=2, batch_norm=False, layers=("^stem",))
    made = make_twin(
        TwinOptions(original=cnn_run.result.run, out=tmp_path / "out", separation=separation, epochs=0)
    )
    record = load_training_record(made.out)
    assert record.architecture == "cnn-separable"
    assert record.parameters["feature_extractor"] == 896 + 3 * (2 * 1_312 + 32)
    assert record.history == {} and record.best_epoch == 0
    assert made.validation is not None and made.validation[1] == made.validation[2]
    model = load_network(
        made.out / "model.keras", "cnn-separable", 3, config_sha256=record.network.config_sha256
    )
    assert model.name == "cnn-separable"


def test_a_file_becomes_a_file(own: Path, tmp_path: Path) -> None:
    options = TwinOptions(original=own, out=tmp_path / "twin.keras")
    made = make_twin(options)
    assert (made.trained, made.validation) == (None, None)
    assert [layer.name for layer in made.separation.layers] == ["edges", "shapes"]
    names = [layer.name for layer in read_network(made.out).layers]
    assert names[3:6] == ["edges_separable", "edges_norm", "edges_relu"]
    with pytest.raises(UsageError, match=r"twin\.keras exists"):
        make_twin(options)
    make_twin(replace(options, overwrite=True))


def test_a_file_and_images_become_a_run(own: Path, phantom_folder: Path, tmp_path: Path) -> None:
    made = make_twin(TwinOptions(original=own, out=tmp_path / "run", data=phantom_folder, epochs=2))
    record = load_training_record(made.out)
    assert record.architecture == "own-separable"
    assert record.parent_sha256 == sha256_file(own)
    assert (record.network.size, record.network.weights) == (16, "own.keras")
    assert [path for path, _ in record.skipped] == ["clear/damaged.png"]
    assert record.history["loss"][1] < record.history["loss"][0]


def test_a_stop_in_the_first_epoch_leaves_no_run(own: Path, phantom_folder: Path, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    options = TwinOptions(original=own, out=tmp_path / "run", data=phantom_folder, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        make_twin(options, progress=stop)
    assert not (tmp_path / "run" / "training.json").exists()


def test_what_is_no_network_is_refused(own: Path, cnn_run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.keras"
    truncated = tmp_path / "truncated.keras"
    truncated.write_bytes(own.read_bytes()[:3000])
    (tmp_path / "empty.keras").touch()
    for path in (truncated, tmp_path / "empty.keras", tmp_path / "nowhere.keras"):
        with pytest.raises(ArtefactError, match="Keras cannot load"):
            make_twin(TwinOptions(original=path, out=out))
    with pytest.raises(ArtefactError, match=r"training\.json"):
        make_twin(TwinOptions(original=tmp_path, out=tmp_path / "run"))
    broken = Path(shutil.copytree(cnn_run.result.run, tmp_path / "broken"))
    (broken / "model.keras").write_bytes(own.read_bytes())
    with pytest.raises(ArtefactError, match=r"is not the model of training\.json"):
        make_twin(TwinOptions(original=broken, out=tmp_path / "run"))
    assert not out.exists() and not (tmp_path / "run").exists()


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    keras = load_keras()
    layers = keras.layers
    image = layers.Input((16, 16, 8))
    x = layers.Lambda(lambda tensor: tensor * 2.0)(layers.Conv2D(8, 3)(image))
    save_network(keras.Model(image, x), tmp_path / "lambda.keras")
    options = TwinOptions(original=tmp_path / "lambda.keras", out=tmp_path / "twin.keras")
    with pytest.raises(ArtefactError, match="Lambda") as refused:
        make_twin(options)
    assert "module:function" in refused.value.remedy

    class Mine(layers.Layer):  # type: ignore[misc, name-defined]
        def call(self, inputs: Any) -> Any:
            return inputs

    save_network(keras.Model(image, Mine()(layers.Conv2D(8, 3)(image))), tmp_path / "mine.keras")
    with pytest.raises(ArtefactError, match="Keras cannot load"):
        make_twin(replace(options, original=tmp_path / "mine.keras"))


def test_options_that_cannot_be_met(own: Path, cnn_run: Any, tmp_path: Path) -> None:
    run = cnn_run.result.run
    with pytest.raises(UsageError, match="is the original itself"):
        make_twin(TwinOptions(original=run, out=run))
    with pytest.raises(UsageError, match=r"model\.keras is read, and would be replaced"):
        beside = Path(shutil.copy(own, tmp_path / "model.keras"))
        make_twin(TwinOptions(original=beside, out=tmp_path, data=tmp_path / "none", overwrite=True))
    with pytest.raises(UsageError, match="fine-tuning needs images"):
        make_twin(TwinOptions(original=own, out=tmp_path / "t.keras", epochs=3))
    with pytest.raises(UsageError, match="-1 epochs"):
        make_twin(TwinOptions(original=run, out=tmp_path / "t", epochs=-1))
    with pytest.raises(UsageError, match="--layers block9: no convolution larger than 1x1 has that name"):
        make_twin(
            TwinOptions(original=run, out=tmp_path / "t", separation=SeparationOptions(layers=("block9",)))
        )
    with pytest.raises(UsageError, match="holds a finished run"):
        make_twin(TwinOptions(original=own, out=run, data=tmp_path / "none"))


def test_the_runs_own_images_are_needed(cnn_run: Any, textures: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"textures.* lacks \d+ of the \d+ images"):
        make_twin(TwinOptions(original=cnn_run.result.run, out=tmp_path / "t", data=textures))


def convolutions(batch_norm: bool) -> tuple[Any, Any]:
    """A network of two convolutions, plain and grouped with a stride, and its twin as it is built."""
    keras = load_keras()
    keras.utils.set_random_seed(5)
    layers = keras.layers
    image = layers.Input((12, 12, 8))
    x = layers.Conv2D(8, 3, activation="relu", name="a_conv")(image)
    x = layers.Conv2D(16, 3, strides=2, groups=2, name="b_conv")(x)
    model = keras.Model(image, layers.GlobalAveragePooling2D()(x))
    return model, separate_network(model, SeparationOptions(batch_norm=batch_norm))


def smooth(count: int) -> np.ndarray:
    coarse = np.random.default_rng(3).standard_normal((count, 3, 3, 8)).astype(np.float32)
    return np.stack([cv2.resize(image, (12, 12), interpolation=cv2.INTER_CUBIC) for image in coarse])


def outputs(model: Any, name: str, images: np.ndarray) -> np.ndarray:
    keras = load_keras()
    return np.asarray(keras.Model(model.input, model.get_layer(name).output)(images, training=False))


@pytest.mark.parametrize("batch_norm", [True, False])
def test_fitted_pairs_give_what_the_original_gives(batch_norm: bool) -> None:
    model, twin = convolutions(batch_norm)
    images = smooth(32)
    last = "b_norm" if batch_norm else "b_pointwise"
    wanted = outputs(model, "b_conv", images)
    before = np.linalg.norm(outputs(twin.model, last, images) - wanted)
    separation = fit_pairs(twin, images)
    found = outputs(twin.model, last, images)
    assert np.linalg.norm(found - wanted) < 0.8 * before
    np.testing.assert_allclose(found.mean(axis=(0, 1, 2)), wanted.mean(axis=(0, 1, 2)), atol=1e-3)
    np.testing.assert_allclose(found.std(axis=(0, 1, 2)), wanted.std(axis=(0, 1, 2)), rtol=1e-2)
    assert all(layer.missed is not None and 0.01 < layer.missed < 0.7 for layer in separation.layers)
    assert [layer.error for layer in separation.layers] == [layer.error for layer in twin.separation.layers]


def test_a_batch_norm_of_the_original_gets_new_averages_alone() -> None:
    keras = load_keras()
    layers = keras.layers
    image = layers.Input((12, 12, 8))
    x = layers.BatchNormalization(name="c_bn")(layers.Conv2D(8, 3, use_bias=False, name="c_conv")(image))
    model = keras.Model(image, layers.GlobalAveragePooling2D()(x))
    rng = np.random.default_rng(1)
    model.get_layer("c_bn").set_weights([*rng.standard_normal((3, 8)), np.full(8, 2.0)])
    twin = separate_network(model)
    fit_pairs(twin, smooth(16))
    norm = twin.model.get_layer("c_bn")
    for one, other in zip(norm.get_weights()[:2], model.get_layer("c_bn").get_weights()[:2], strict=True):
        np.testing.assert_array_equal(one, other)
    into = outputs(twin.model, "c_separable", smooth(16))
    np.testing.assert_allclose(norm.moving_mean, into.mean(axis=(0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(norm.moving_variance, into.var(axis=(0, 1, 2)), rtol=1e-4)


def test_the_original_is_left_as_it_is() -> None:
    model, twin = convolutions(batch_norm=True)
    layer, before = model.get_layer("a_conv"), np.asarray(model(smooth(4)))
    fit_pairs(twin, smooth(4))
    assert layer.activation is load_keras().activations.relu
    assert "call" not in vars(layer) and "call" not in vars(twin.pairs[0].layers[0])
    np.testing.assert_array_equal(np.asarray(model(smooth(4))), before)


def test_the_teacher_brings_the_twin_nearer(own: Path, phantom_folder: Path, tmp_path: Path) -> None:
    teacher = read_network(own)
    kernel, bias = teacher.layers[-1].get_weights()
    teacher.layers[-1].set_weights([kernel * 20, bias])  # sure of its answers, and not of the labels
    save_network(teacher, tmp_path / "sure.keras")
    made = make_twin(
        TwinOptions(original=tmp_path / "sure.keras", out=tmp_path / "run", data=phantom_folder, epochs=12)
    )
    assert made.trained is not None
    losses = made.trained.record.history["loss"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_a_start_that_no_epoch_betters_is_kept(
    own: Path, phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TwinOptions(original=own, out=tmp_path / "run", data=phantom_folder, epochs=0)
    start = read_network(make_twin(options).out / "model.keras").get_weights()

    def spoil(model: Any, batches: Any, validation: Any, state: Any, progress: Any) -> bool:
        model.set_weights([weight + 1.0 for weight in model.get_weights()])
        state.history, state.best_epoch = {"validation_loss": [99.0]}, 1
        return False

    monkeypatch.setattr("edge_dsc.training.twin.fit_model", spoil)
    made = make_twin(replace(options, epochs=1, overwrite=True))
    assert load_training_record(made.out).best_epoch == 0
    for one, other in zip(read_network(made.out / "model.keras").get_weights(), start, strict=True):
        np.testing.assert_array_equal(one, other)
