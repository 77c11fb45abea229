"""Whole trainings with TensorFlow, as few and as short as they can be."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from edge_dsc.build.engine import BuildRequest, build_engine
from edge_dsc.build.export import export_run
from edge_dsc.build.gate import GateOptions
from edge_dsc.data import load_split
from edge_dsc.data.phantoms import write_phantoms
from edge_dsc.networks import build_network, load_network, multiply_adds, open_network, save_network
from edge_dsc.networks.keras_files import read_network
from edge_dsc.training import RECIPES, TrainOptions, TrainProgress, TrainResult, train
from edge_dsc.training.recipes import TEACHING, Ingredients
from edge_dsc.training.run_folder import (
    METRICS,
    TRAINING_RECORD,
    Teacher,
    TrainedNetwork,
    load_state,
    load_training_record,
)
from edge_dsc.training.train import check_folder
from edge_dsc.training.twin import TwinOptions, make_twin
from engines.errors import ArtefactError, BadInputError, EnvironmentProblem, UsageError
from engines.files import sha256_file
from engines.graph import count_multiply_adds

slow = pytest.mark.slow


def weights_of(options: TrainOptions) -> list[np.ndarray]:
    """The weights of a run of somebody's own function."""
    network, digest = open_network(options.network), load_training_record(options.out).network.config_sha256
    path = options.out / "model.keras"
    return load_network(path, "nets.build", 3, config_sha256=digest, network=network).get_weights()


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@slow
def test_the_run_folder_is_complete(dsc_run: Any) -> None:
    run = dsc_run.result.run
    assert sorted(path.name for path in run.iterdir()) == [
        "confusion.png",
        "curves.png",
        "metrics.json",
        "model.keras",
        "split.json",
        "training.json",
    ]
    for name in ("confusion.png", "curves.png"):
        assert cv2.imread(str(run / name)).std() > 5
    split = load_split(run / "split.json")
    assert split == replace(dsc_run.result.split, root=split.root)
    assert "damaged.png" not in (run / "split.json").read_text()
    assert dsc_run.result.notes == ()


@slow
def test_the_record(dsc_run: Any) -> None:
    result: TrainResult = dsc_run.result
    record = load_training_record(result.run)
    assert record == result.record
    assert (record.architecture, record.seed, record.interrupted) == ("dsc", 3, False)
    assert record.labels == ("clear", "diffuse", "focal")
    assert record.parameters == {"feature_extractor": 4640, "trainable": 406_307, "total": 406_499}
    assert record.recipe == asdict(replace(RECIPES["default"]["dsc"], epochs=2))
    assert record.model_sha256 == sha256_file(result.run / "model.keras")
    assert record.split_sha256 == result.split.sha256
    assert {name: len(figures) for name, figures in record.history.items()} == {
        "loss": 2,
        "accuracy": 2,
        "validation_loss": 2,
        "validation_accuracy": 2,
    }
    losses = record.history["validation_loss"]
    assert losses[record.best_epoch - 1] == min(losses)
    assert [path for path, _ in record.skipped] == ["clear/damaged.png"]
    assert {"python", "tensorflow", "keras", "numpy"} <= set(record.versions)


@slow
def test_the_metrics(dsc_run: Any) -> None:
    result: TrainResult = dsc_run.result
    saved = METRICS.load(result.run / "metrics.json")
    assert saved.model_sha256 == result.record.model_sha256
    counts = {part: len(result.split.samples(part)) for part in ("evaluation", "test")}
    counts["held_out"] = sum(counts.values())
    for part, count in counts.items():
        assert getattr(saved, part) == result.metrics[part]
        assert result.metrics[part].count == count


@pytest.fixture(scope="module")
def own(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """Two epochs of a network with a layer of its own, which no file can bring back."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "nets.py").write_text(
        """
import keras

class Halved(keras.layers.Layer):
    def call(self, x):
        return x * 0.5

def build(classes, size):
    image = keras.layers.Input((size, size, 3))
    x = Halved()(keras.layers.Rescaling(1 / 64)(image))
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(8, 5, strides=4, activation="relu")(x))
    x = keras.layers.Dropout(0.5)(keras.layers.GlobalAveragePooling2D()(x))
    return keras.Model(image, keras.layers.Dense(classes)(x))

def other(classes, size):
    return build(classes, size)
"""
    )
    return train(own_options(folder, phantom_folder, folder / "run"))


def own_options(folder: Path, data: Path, out: Path) -> TrainOptions:
    return TrainOptions(
        data=data,
        out=out,
        architecture=f"{folder / 'nets.py'}:build",
        size=48,
        recipe="quick",
        epochs=2,
        fold=(1, 2),
    )


@slow
def test_a_stopped_run_goes_on_to_the_same_weights_bit_for_bit(
    own: TrainResult, phantom_folder: Path, tmp_path: Path
) -> None:
    options = own_options(own.run.parent, phantom_folder, tmp_path / "run")

    def stop(state: TrainProgress) -> None:
        if (state.epoch, state.step) == (2, 2):
            raise KeyboardInterrupt

    stopped = train(options, progress=stop)
    assert (stopped.record.interrupted, stopped.record.best_epoch) == (True, 1)
    assert len(stopped.record.history["loss"]) == 1
    assert load_training_record(options.out) == stopped.record
    assert equal(weights_of(options), load_state(options.out / "state.npz").best_weights)
    with pytest.raises(
        UsageError, match=r"holds an unfinished run \(go on with --resume, begin anew with --overwrite"
    ):
        train(options)
    with pytest.raises(UsageError, match=r"begun with other options \(resume it with --arch nets\.py:build "):
        train(replace(options, resume=True, epochs=5))
    changed = tmp_path / "changed"
    shutil.copytree(phantom_folder, changed)
    next((changed / "focal").iterdir()).unlink()
    with pytest.raises(
        ArtefactError, match=r"the images in .*, or their split, changed since .* begun \(restore"
    ):
        train(replace(options, resume=True, data=changed))

    resumed = train(replace(options, resume=True))
    assert not resumed.record.interrupted
    assert resumed.record.history == own.record.history
    assert equal(weights_of(options), weights_of(replace(options, out=own.run)))
    assert not (options.out / "state.npz").exists()


@slow
def test_a_picture_that_cannot_be_drawn_costs_no_training(
    own: TrainResult, phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run is replaced when asked; another seed is another split with other weights."""

    def fail(*figures: object, **more: object) -> None:
        raise ValueError("$x^$\n  ^\nParseException")

    out = Path(shutil.copytree(own.run, tmp_path / "run"))
    # The package's ``train`` is the function; its module of the same name goes by importlib.
    monkeypatch.setattr(import_module("edge_dsc.training.train"), "draw_confusion", fail)
    options = own_options(own.run.parent, phantom_folder, out)
    result = train(replace(options, epochs=1, seed=4, overwrite=True))
    assert result.notes == ("confusion.png was not drawn: $x^$",)
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.png",
        "metrics.json",
        "model.keras",
        "split.json",
        "training.json",
    ]
    assert load_training_record(out) == result.record
    assert len(result.record.history["loss"]) == 1
    assert result.split.sha256 != own.split.sha256
    assert not equal(weights_of(options), weights_of(replace(options, out=own.run)))


def test_a_run_folder_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "training.json").write_text("{}")
    options = TrainOptions(data=tmp_path / "data", out=out)
    with pytest.raises(
        UsageError, match=r"run holds a finished run \(choose another --out, or replace it with"
    ):
        train(options)
    with pytest.raises(UsageError, match=r"holds a finished run, there is nothing to resume \(train without"):
        train(replace(options, resume=True))
    with pytest.raises(UsageError, match=r"holds no run, there is nothing to resume"):
        train(replace(options, resume=True, out=tmp_path / "nothing"))
    file = tmp_path / "file"
    file.write_text("mine")
    for link in (loop := tmp_path / "loop", tmp_path / "lost"):
        link.symlink_to("loop" if link == loop else "nothing")
    for place in (file, loop, tmp_path / "lost"):
        with pytest.raises(UsageError, match=rf"{place.name} is not a folder \(choose another run folder"):
            train(replace(options, out=place))
    assert json.loads((out / "training.json").read_text()) == {}


def test_a_run_is_never_written_into_its_data(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "clear", target_is_directory=True)
    for place in ("", "clear", "clear/..", "runs/dsc", "link/run"):
        with pytest.raises(UsageError, match="is in the data folder"):
            check_folder(TrainOptions(data=tmp_path, out=tmp_path / place, overwrite=True))
    check_folder(TrainOptions(data=tmp_path / "clear", out=tmp_path / "clearer"))


def test_a_run_never_replaces_the_network_that_it_starts_from(tmp_path: Path) -> None:
    start = tmp_path / "own" / "model.keras"
    start.parent.mkdir()
    start.write_bytes(b"weeks of work")
    (tmp_path / "link").symlink_to(start.parent, target_is_directory=True)
    for place, start_from in (
        ("own", {"weights": str(start)}),
        ("link", {"weights": str(start)}),
        ("own", {"architecture": str(start)}),
    ):
        options = TrainOptions(data=tmp_path / "xrays", out=tmp_path / place, overwrite=True, **start_from)
        with pytest.raises(UsageError, match=r"model\.keras is read, and would be replaced"):
            train(options)
    check_folder(TrainOptions(data=tmp_path / "xrays", out=tmp_path / "new", weights=str(start)))


def test_what_cannot_be_trained_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist"):
        train(TrainOptions(data=tmp_path / "nowhere", out=tmp_path / "run"))
    with pytest.raises(UsageError, match="no network 'vgg'"):
        train(TrainOptions(data=tmp_path / "data", out=tmp_path / "run", architecture="vgg"))
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_said_before_the_first_epoch(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "phantoms", 12, seed=1)
    (tmp_path / "file").write_text("mine")
    options = TrainOptions(data=tmp_path / "phantoms", out=tmp_path / "file" / "run", recipe="quick")
    steps: list[object] = []
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*state\.npz: Not a directory"):
        train(options, progress=steps.append)
    assert steps == []


@slow
def test_a_network_really_learns(tmp_path: Path, small_pictures: Any) -> None:
    write_phantoms(tmp_path / "phantoms", 40, seed=1)
    options = TrainOptions(
        data=tmp_path / "phantoms", out=tmp_path / "run", architecture="dsc", recipe="quick", epochs=8, seed=1
    )
    with small_pictures(96):
        metrics = train(options).metrics["held_out"]
    assert metrics.count >= 24
    assert metrics.accuracy >= 0.8


@slow
def test_a_backbone_trains_its_head_and_its_last_layers_and_is_exported(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "phantoms", 8, seed=1)
    given = tmp_path / "features.keras"
    save_network(build_network("mobilenetv2", 3, 32), given)
    options = TrainOptions(
        data=tmp_path / "phantoms",
        out=tmp_path / "run",
        architecture="mobilenetv2",
        size=32,
        weights=str(given),
        unfreeze=2,
        recipe="quick",
        epochs=1,
        augmentation=False,
    )
    record = train(options).record
    assert (record.architecture, record.network.size, record.network.unfreeze) == ("mobilenetv2", 32, 2)
    assert (record.network.weights, record.network.weights_sha256) == ("features.keras", sha256_file(given))
    assert record.recipe["augmentation"] is False
    assert record.parameters["trainable"] < record.parameters["feature_extractor"]
    digest = record.network.config_sha256
    loaded = load_network(options.out / "model.keras", "mobilenetv2", 3, config_sha256=digest)
    before, after = (
        {layer.name: layer.get_weights() for layer in model.layers} for model in (read_network(given), loaded)
    )
    changed = {name for name, weights in after.items() if not equal(weights, before[name])}
    assert changed == {"block_16_project", "Conv_1", "dense", "probabilities"}
    exported = export_run(options.out)
    assert exported.parity <= 1e-4 and exported.images > 0
    assert exported.contract.input_shape == (32, 32, 1)
    graph = exported.model.proto.graph
    assert [node.op_type for node in graph.node[:2]] == ["Cast", "Reshape"]
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert count_multiply_adds(exported.model.proto) == multiply_adds(loaded)


@slow
def test_a_network_of_ones_own_goes_on_after_a_stop_and_is_exported_by_its_function(
    own: TrainResult, phantom_folder: Path, tmp_path: Path
) -> None:
    options = own_options(own.run.parent, phantom_folder, tmp_path / "run")
    options = replace(options, augmentation=False)

    def stop(state: TrainProgress) -> None:
        if state.epoch == 2:
            raise SystemExit

    with pytest.raises(SystemExit):
        train(options, progress=stop)
    assert [path.name for path in options.out.iterdir()] == ["state.npz"]  # as after a kill
    with pytest.raises(UsageError, match="begun with other options") as caught:
        train(replace(options, resume=True, size=64))
    assert caught.value.remedy == (
        "resume it with --arch nets.py:build --recipe quick --epochs 2 --no-augmentation --size 48 --seed 0"
    )
    result = train(replace(options, resume=True))
    assert len(result.record.history["loss"]) == 2
    assert (result.record.architecture, result.record.network.size) == ("nets.build", 48)
    assert load_split(options.out / "split.json").fold == (1, 2)
    held_out = result.split.samples("evaluation") + result.split.samples("test")
    assert result.metrics["held_out"].count == len(held_out)
    with pytest.raises(
        ArtefactError, match=r"Keras cannot load .*edge-dsc export RUN --arch module:function"
    ):
        export_run(options.out)
    with pytest.raises(UsageError, match=r"is of nets\.build, not of .*nets\.py:other"):
        export_run(options.out, architecture=options.architecture.replace(":build", ":other"))
    exported = export_run(options.out, architecture=options.architecture)
    assert exported.parity <= 1e-4
    assert exported.contract.architecture == "nets.build"


@slow
def test_a_split_that_is_kept_is_warned_of_before_the_first_epoch(own: TrainResult, tmp_path: Path) -> None:
    """Two folders share a patient, by name; one file is in both."""
    rng = np.random.default_rng(0)
    for part in ("train", "val", "evaluation", "test"):
        for label in ("NORMAL", "PNEUMONIA"):
            folder = tmp_path / "data" / part / label
            folder.mkdir(parents=True)
            for index in range(2):
                name = f"person{index}_bacteria_{part}.png" if label == "PNEUMONIA" else f"{part}{index}.png"
                cv2.imwrite(str(folder / name), rng.integers(0, 256, (40, 40), np.uint8))
    shutil.copy(tmp_path / "data/test/NORMAL/test0.png", tmp_path / "data/train/NORMAL/copy.png")
    options = replace(
        own_options(own.run.parent, tmp_path / "data", tmp_path / "run"),
        recipe="paper",
        epochs=1,
        fold=None,
        keep_split=True,
        kinds=False,
    )
    said: list[str] = []
    result = train(options, say=lambda line: said.append(line), progress=lambda _: said.append("step"))
    assert said[0] == (
        "2 patients, such as person0, have images in train or validation and in evaluation or test:"
        " 4 of the 8 held-out images flatter the network"
    )
    assert said[1:] == ["step"]
    assert result.record.skipped == (("train/NORMAL/copy.png", "is the same file as test/NORMAL/test0.png"),)
    split = load_split(options.out / "split.json")
    assert split.kept and len(split.samples("train")) == 4


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for the epochs: notes what would train and validate, and leaves the weights as they were drawn."""
    seen: dict[str, Any] = {}

    def fit(model: Any, batches: Any, validation: Any, state: Any, progress: Any) -> bool:
        seen.update(trained=batches, validation=validation, recipe=batches.recipe)
        state.history, state.best_epoch = {"loss": [1.0], "accuracy": [0.5]}, 1
        return False

    monkeypatch.setattr(import_module("edge_dsc.training.train"), "fit_model", fit)
    return seen


@slow
def test_a_refit_trains_on_all_images_and_keeps_the_accuracy_of_its_recipe(
    dsc_run: Any, phantom_folder: Path, tmp_path: Path, fitted: dict[str, Any]
) -> None:
    run, split = dsc_run.result.run, dsc_run.result.split
    shutil.copytree(run, tmp_path / "dsc")
    path = tmp_path / "dsc" / "training.json"
    judged = msgspec.structs.replace(dsc_run.result.record, temperature=1.25)
    TRAINING_RECORD.save(path, judged)
    out = tmp_path / "refit"
    out.mkdir()
    for stale in ("metrics.json", "confusion.png"):
        (out / stale).write_text("of the run that is replaced")
    options = TrainOptions(data=phantom_folder, out=out, refit=tmp_path / "dsc", seed=5, overwrite=True)
    result = train(options)
    images = sum(map(len, split.parts.values()))
    assert len(fitted["trained"].pixels) == images and len(fitted["validation"][1]) == 0
    counts = np.bincount(fitted["trained"].targets).tolist()
    assert counts == [
        sum(s.label == label for p in split.parts.values() for s in p) for label in split.labels
    ]
    assert fitted["recipe"] == replace(RECIPES["default"]["dsc"], epochs=2, fixed=True)
    record = load_training_record(out)
    assert (record.seed, record.recipe["fixed"], record.temperature) == (5, True, 1.25)
    assert record.refit is not None and record.refit.run == "dsc"
    assert record.refit.held_out == dsc_run.result.metrics["held_out"]
    assert record.refit.model_sha256 == judged.model_sha256
    assert record.refit.split_sha256 == split.sha256 != record.split_sha256
    assert result.metrics == {}
    assert {path.name for path in out.iterdir()} == {
        "curves.png",
        "model.keras",
        "split.json",
        "training.json",
    }
    whole = load_split(out / "split.json")
    assert len(whole.samples("train")) == images and not whole.samples("test")
    # What is deployed says so: its temperature, and a gate that wants other images.
    exported = export_run(out, data=phantom_folder)
    assert exported.contract.temperature == 1.25 and exported.images > 8
    gate = GateOptions(data=phantom_folder)
    # Of this folder only the damaged file is in no part.
    with pytest.raises(BadInputError, match="none of the 1 images could be read"):
        build_engine(BuildRequest(model=exported.path, runtime="onnxruntime", gate=gate))
    with pytest.raises(UsageError, match="was made from another run"):
        train(TrainOptions(data=phantom_folder, out=tmp_path / "again", refit=out))
    with pytest.raises(UsageError, match="holds no validation images back"):
        make_twin(TwinOptions(original=out, out=tmp_path / "twin"))


@slow
def test_teachers_of_the_same_split_are_followed_and_named_in_the_record(
    dsc_run: Any, phantom_folder: Path, tmp_path: Path, fitted: dict[str, Any]
) -> None:
    run, record = dsc_run.result.run, dsc_run.result.record
    added = Ingredients(mixup=0.2, **TEACHING)
    options = replace(
        dsc_run.options, data=phantom_folder, out=tmp_path / "pupil", ingredients=added, teachers=(run,)
    )
    result = train(options)
    (teacher,) = fitted["trained"].teachers
    assert equal(teacher.get_weights(), read_network(run / "model.keras").get_weights())
    known = Teacher(run=run.name, model_sha256=record.model_sha256, split_sha256=record.split_sha256)
    assert load_training_record(options.out).teachers == result.record.teachers == (known,)
    assert {name: result.record.recipe[name] for name in vars(added)} == vars(added)
    assert result.record.split_sha256 == record.split_sha256
    # A refit of it asks who teaches now; one of a run without teachers takes none.
    again = replace(TrainOptions(data=phantom_folder, out=tmp_path / "whole"), refit=options.out)
    with pytest.raises(UsageError, match=r"pupil had teachers \(name them, or their refits, with --teacher"):
        train(again)
    refitted = train(replace(again, teachers=(run,)))
    assert refitted.record.teachers == (known,) and fitted["recipe"].distillation == 0.5
    with pytest.raises(UsageError, match=r"had no teachers \(leave --teacher out\)"):
        train(replace(again, refit=run, teachers=(run,)))


@slow
def test_a_teacher_that_cannot_teach_is_refused_before_anything_is_written(
    dsc_run: Any, phantom_folder: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(dsc_run.result.run, tmp_path / "dsc"))
    added = Ingredients(**TEACHING)
    options = replace(
        dsc_run.options, data=phantom_folder, out=tmp_path / "pupil", ingredients=added, teachers=(run,)
    )
    for changes, said in (
        ({"seed": 4}, "learnt from .* images that this run holds back"),
        ({"teachers": (run, run)}, "--teacher names .* twice"),
        ({"out": run, "overwrite": True}, r"model\.keras is read, and would be replaced"),
        ({"size": 48, "architecture": "mobilenetv2"}, "takes images of 224 pixels .*, this run of 48 pixels"),
    ):
        with pytest.raises(UsageError, match=said):
            train(replace(options, **changes))
    TRAINING_RECORD.save(
        run / "training.json", msgspec.structs.replace(dsc_run.result.record, split_sha256="0" * 64)
    )
    with pytest.raises(ArtefactError, match="are not of one run"):
        train(options)
    taught = Teacher(run="other", model_sha256="0" * 64, split_sha256="0" * 64)
    TRAINING_RECORD.save(
        run / "training.json", msgspec.structs.replace(dsc_run.result.record, teachers=(taught,))
    )
    with pytest.raises(
        UsageError, match="followed teachers or synthetic images: what these learnt from is known for its own"
    ):
        train(replace(options, last=True))
    assert not (tmp_path / "pupil").exists()


@slow
def test_a_fixed_schedule_lets_validation_images_train_and_is_judged_as_ever(
    dsc_run: Any, phantom_folder: Path, tmp_path: Path, fitted: dict[str, Any]
) -> None:
    split = dsc_run.result.split
    options = replace(dsc_run.options, data=phantom_folder, out=tmp_path / "last", last=True)
    result = train(options)
    assert len(fitted["trained"].pixels) == len(split.samples("train")) + len(split.samples("validation"))
    assert len(fitted["validation"][1]) == 0
    assert (result.record.recipe["fixed"], result.record.temperature, result.record.refit) == (
        True,
        1.0,
        None,
    )
    assert set(result.metrics) == {"evaluation", "test", "held_out"}
    for part in ("evaluation", "test"):
        assert result.split.samples(part) == split.samples(part)
    # A refit of it is the same schedule with what is left.
    shutil.copytree(tmp_path / "last", tmp_path / "copy")
    again = train(TrainOptions(data=phantom_folder, out=tmp_path / "whole", refit=tmp_path / "copy"))
    assert again.record.refit is not None and again.record.refit.held_out == result.metrics["held_out"]
    assert len(fitted["trained"].pixels) == sum(map(len, split.parts.values()))


@slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"interrupted": True}, "was interrupted"),
        ({"parent_sha256": "0" * 64}, "was made from another run"),
        ({"recipe": {"name": "default", "warp": 9}}, "has a recipe of another version"),
        ({"network": TrainedNetwork(source="cnn")}, "is not the network that"),
        ({"split_sha256": "0" * 64}, "are not of one run"),
    ],
)
def test_a_run_without_a_recipe_of_its_own_is_not_refitted(
    dsc_run: Any, phantom_folder: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    run = tmp_path / "dsc"
    shutil.copytree(dsc_run.result.run, run)
    TRAINING_RECORD.save(run / "training.json", msgspec.structs.replace(dsc_run.result.record, **changes))
    options = TrainOptions(data=phantom_folder, out=tmp_path / "out", refit=run, architecture="dsc")
    if "network" in changes:  # it was trained from a network of its own, and another is named
        options = replace(options, architecture="mobilenetv2")
    with pytest.raises((ArtefactError, UsageError), match=said):
        train(options)
    assert not (tmp_path / "out").exists()


def test_a_refit_does_not_replace_its_own_run(dsc_run: Any, phantom_folder: Path) -> None:
    run = dsc_run.result.run
    with pytest.raises(UsageError, match="would replace itself"):
        train(TrainOptions(data=phantom_folder, out=run, refit=run, overwrite=True))
