from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_dsc.data import load_split
from edge_dsc.data.phantoms import write_phantoms
from edge_dsc.networks import build_network, load_network
from edge_dsc.training import TrainOptions, TrainProgress, TrainResult, train
from edge_dsc.training.fit import compile_model, predict, seed_everything, start_convolutions, start_dense
from edge_dsc.training.recipes import RECIPES
from edge_dsc.training.run_folder import TrainState, load_state, load_training_record, save_state
from engines.errors import ArtefactError, BadInputError, EdgeDscError, UsageError
from engines.files import read_document, sha256_file


def weights_of(run: Path) -> list[np.ndarray]:
    return load_network(run / "model.keras").get_weights()


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def stop_at(epoch: int, step: int) -> object:
    """Return a progress callback that is Ctrl-C at that step."""

    def report(state: TrainProgress) -> None:
        if (state.epoch, state.step) == (epoch, step):
            raise KeyboardInterrupt

    return report


def test_the_run_folder_is_complete(dsc_run: object) -> None:
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


def test_the_record(dsc_run: object) -> None:
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


def test_the_metrics(dsc_run: object) -> None:
    result: TrainResult = dsc_run.result
    body = read_document(result.run / "metrics.json", "edge-dsc/metrics", 1, renew="")
    assert body["model_sha256"] == result.record.model_sha256
    for part in ("evaluation", "test", "held_out"):
        assert body[part] == json.loads(json.dumps(result.metrics[part].to_dict()))
    counts = {part: len(result.split.samples(part)) for part in ("evaluation", "test")}
    assert {part: result.metrics[part].count for part in counts} == counts
    assert result.metrics["held_out"].count == sum(counts.values())


def test_progress_is_told_after_every_step(dsc_run: object) -> None:
    reports = dsc_run.reports
    steps = reports[0].steps
    assert [(report.epoch, report.step) for report in reports] == [
        (epoch, step) for epoch in (1, 2) for step in range(1, steps + 1)
    ]
    assert {report.epochs for report in reports} == {2}
    assert reports[-1].seconds_left == 0
    assert reports[0].seconds_left > 0
    assert all(math.isfinite(report.loss) for report in reports)
    assert reports[0].validation_accuracy is None
    assert reports[-1].validation_accuracy == dsc_run.result.record.history["validation_accuracy"][0]
    assert reports[-1].loss == dsc_run.result.record.history["loss"][1]


def test_the_same_seed_gives_the_same_weights_and_another_others(dsc_run: object, tmp_path: Path) -> None:
    again = train(replace(dsc_run.options, out=tmp_path / "again"))
    assert equal(weights_of(again.run), weights_of(dsc_run.result.run))
    assert again.record.history == dsc_run.result.record.history
    other = train(replace(dsc_run.options, out=tmp_path / "other", seed=4, epochs=1))
    assert other.split.sha256 != dsc_run.result.split.sha256
    assert not equal(weights_of(other.run), weights_of(dsc_run.result.run))


def test_ctrl_c_keeps_the_best_weights_and_resume_goes_on_bit_for_bit(
    dsc_run: object, tmp_path: Path
) -> None:
    options = replace(dsc_run.options, out=tmp_path / "run")
    stopped = train(options, progress=stop_at(2, 2))
    assert stopped.record.interrupted
    assert stopped.record.best_epoch == 1
    assert len(stopped.record.history["loss"]) == 1
    assert load_training_record(options.out) == stopped.record
    model = load_network(options.out / "model.keras")
    state = load_state(options.out / "state.npz")
    assert equal(model.get_weights(), state.best_weights)
    with pytest.raises(
        UsageError, match=r"holds an unfinished run \(go on with --resume, begin anew with --overwrite"
    ):
        train(options)
    resumed = train(replace(options, resume=True))
    assert not resumed.record.interrupted
    assert resumed.record.history == dsc_run.result.record.history
    assert equal(weights_of(options.out), weights_of(dsc_run.result.run))
    assert not (options.out / "state.npz").exists()


def test_training_that_diverges_says_so(
    dsc_run: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPES["quick"]["dsc"], learning_rate=float("inf"), warmup=0, cosine=False)
    monkeypatch.setitem(RECIPES["quick"], "dsc", recipe)
    options = replace(dsc_run.options, out=tmp_path / "run", recipe="quick")
    with pytest.raises(
        EdgeDscError, match=r"training diverged: the loss is nan in epoch 1, step \d+"
    ) as caught:
        train(options)
    assert "--seed" in caught.value.remedy
    assert not (tmp_path / "run" / "training.json").exists()


def test_ctrl_c_before_the_first_epoch_leaves_nothing(dsc_run: object, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(replace(dsc_run.options, out=tmp_path / "run"), progress=stop_at(1, 2))
    assert not (tmp_path / "run").exists()


def test_a_killed_run_can_be_resumed_only_as_it_was_begun(
    dsc_run: object, phantom_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(dsc_run.options, out=tmp_path / "run")

    def die(state: TrainProgress) -> None:
        if state.epoch == 2:
            raise SystemExit(137)

    with pytest.raises(SystemExit):
        train(options, progress=die)
    assert [path.name for path in options.out.iterdir()] == ["state.npz"]
    with pytest.raises(
        UsageError,
        match=r"begun with other options \(resume it with --arch dsc --recipe default --epochs 2 --seed 3\)",
    ):
        train(replace(options, resume=True, epochs=5))
    changed = tmp_path / "changed"
    shutil.copytree(phantom_folder, changed)
    next((changed / "focal").iterdir()).unlink()
    with pytest.raises(ArtefactError, match=r"the images in .*changed changed since .* begun \(restore them"):
        train(replace(options, resume=True, data=changed))
    resumed = train(replace(options, resume=True))
    assert equal(weights_of(resumed.run), weights_of(dsc_run.result.run))


def test_a_run_folder_is_not_overwritten_unless_asked(dsc_run: object, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(dsc_run.result.run, out)
    options = replace(dsc_run.options, out=out, epochs=1)
    with pytest.raises(
        UsageError, match=r"run holds a finished run \(choose another --out, or replace it with"
    ):
        train(options)
    with pytest.raises(UsageError, match=r"holds a finished run, there is nothing to resume \(train without"):
        train(replace(options, resume=True))
    with pytest.raises(UsageError, match=r"holds no run, there is nothing to resume"):
        train(replace(options, resume=True, out=tmp_path / "nothing"))
    assert load_training_record(out) == dsc_run.result.record
    assert len(train(replace(options, overwrite=True)).record.history["loss"]) == 1
    assert len(load_training_record(out).history["loss"]) == 1
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UsageError, match=r"file is not a folder \(choose another run folder"):
        train(replace(options, out=file))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "vgg"}, r"no network 'vgg' \(choose one of dsc, cnn\)"),
        ({"recipe": "best"}, r"no recipe 'best' \(choose one of default, quick, paper\)"),
        ({"epochs": 0}, r"0 epochs \(train for at least 1\)"),
        ({"seed": -1}, r"the seed -1 \(choose one from 0 to 4294967295\)"),
        ({"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
    ],
)
def test_options_that_cannot_be_met(change: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        train(TrainOptions(data=tmp_path, out=tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_used_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist"):
        train(TrainOptions(data=tmp_path / "nowhere", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_papers_recipe_is_its_table() -> None:
    paper = TrainOptions(data=Path(), out=Path(), recipe="paper").resolve_recipe()
    assert (paper.learning_rate, paper.batch, paper.epochs) == (1e-4, 32, 50)
    assert (paper.cosine, paper.class_weights, paper.label_smoothing) == (False, False, 0.0)
    assert (paper.dense_rate, paper.dense_start, paper.convolution_start) == (1.0, False, False)
    assert paper.flip
    assert paper.rotation > 0
    assert paper.zoom > 0


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04" + bytes(40)])
def test_a_damaged_state_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.npz").write_bytes(content)
    with pytest.raises(
        ArtefactError, match=r"state\.npz is .*\(begin anew: edge-dsc train DATA --overwrite\)"
    ):
        load_state(tmp_path / "state.npz")


def test_a_truncated_state_is_refused_and_a_whole_one_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    state = TrainState(
        settings={"seed": 1},
        epoch=2,
        history={"loss": [0.5, 0.25]},
        variables=[np.arange(4.0), np.array([7], np.uint32)],
        optimizer=[np.array(3)],
        best_epoch=1,
        best_weights=[np.ones((2, 2))],
    )
    save_state(path, state)
    loaded = load_state(path)
    for name in ("settings", "epoch", "history", "best_epoch"):
        assert getattr(loaded, name) == getattr(state, name)
    for name in ("variables", "optimizer", "best_weights"):
        assert equal(getattr(loaded, name), getattr(state, name))
        assert [a.dtype for a in getattr(loaded, name)] == [a.dtype for a in getattr(state, name)]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtefactError, match=r"state\.npz"):
        load_state(path)


def test_the_dense_layer_learns_at_its_share_of_the_rate() -> None:
    seed_everything(0)
    model = build_network("dsc", 3)
    recipe = replace(RECIPES["default"]["dsc"], learning_rate=0.01, cosine=False, dense_rate=0.02)
    start_dense(model, 0)
    compile_model(model, recipe, 1)
    before = {weight.path: weight.numpy().copy() for weight in model.trainable_weights}
    pixels = np.random.default_rng(0).integers(0, 256, (6, 224, 224, 1)).astype(np.float32)
    model.train_on_batch(pixels, np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]], np.ones(6, np.float32))
    # Adam's first step moves every weight by the learning rate, whatever the gradient.
    moves = {
        weight.path: np.abs(weight.numpy() - before[weight.path]).max() for weight in model.trainable_weights
    }
    assert moves.pop("dense/kernel") == pytest.approx(0.0002, rel=0.01)
    assert moves.pop("dense/bias") == pytest.approx(0.0002, rel=0.01)
    assert moves["probabilities/kernel"] == pytest.approx(0.01, rel=0.01)
    assert moves["block3_separable/pointwise_kernel"] == pytest.approx(0.01, rel=0.01)


def test_convolutions_start_at_unit_scale() -> None:
    import keras

    seed_everything(0)
    model = build_network("cnn", 3)
    images = np.random.default_rng(0).integers(60, 120, (4, 224, 224, 1), dtype=np.uint8)
    start_convolutions(model, images)
    layer = model.get_layer("block3_conv")
    features = keras.Model(model.input, layer.input)(images.astype(np.float32), training=False)
    kernel, bias = layer.get_weights()
    answers = keras.ops.convert_to_numpy(keras.ops.conv(features, kernel, padding="same")) + bias
    assert np.abs(answers.mean(axis=(0, 1, 2))).max() < 1e-3
    assert np.abs(answers.std(axis=(0, 1, 2)) - 1).max() < 1e-3


def test_prediction_does_not_depend_on_the_batch(cnn_run: object) -> None:
    model = load_network(cnn_run.result.run / "model.keras")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 1), dtype=np.uint8)
    whole = predict(model, pixels)
    assert whole.shape == (3, 3)
    assert np.array_equal(whole[1:2], predict(model, pixels[1:2]))


def test_a_network_really_learns(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "phantoms", 80, seed=1)
    options = TrainOptions(
        data=tmp_path / "phantoms", out=tmp_path / "run", architecture="cnn", recipe="quick", epochs=8, seed=1
    )
    metrics = train(options).metrics["held_out"]
    assert metrics.count >= 42
    assert metrics.accuracy >= 0.8
