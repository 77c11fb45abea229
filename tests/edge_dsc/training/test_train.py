"""Whole trainings with TensorFlow, as few and as short as they can be."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_dsc.data import load_split
from edge_dsc.data.phantoms import write_phantoms
from edge_dsc.networks import load_network
from edge_dsc.training import RECIPES, TrainOptions, TrainProgress, TrainResult, train
from edge_dsc.training.run_folder import METRICS, load_state, load_training_record
from edge_dsc.training.train import check_folder
from engines.errors import ArtefactError, BadInputError, EnvironmentProblem, UsageError
from engines.files import sha256_file

slow = pytest.mark.slow


def weights_of(run: Path) -> list[np.ndarray]:
    return load_network(run / "model.keras", "dsc", 3).get_weights()


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


@slow
def test_a_stopped_run_goes_on_to_the_same_weights_bit_for_bit(
    dsc_run: Any, phantom_folder: Path, tmp_path: Path
) -> None:
    options = replace(dsc_run.options, out=tmp_path / "run")

    def stop(error: type[BaseException]) -> Any:
        def report(state: TrainProgress) -> None:
            if (state.epoch, state.step) == (2, 2):
                raise error

        return report

    with pytest.raises(SystemExit):
        train(options, progress=stop(SystemExit))
    assert [path.name for path in options.out.iterdir()] == ["state.npz"]  # as after a kill
    with pytest.raises(
        UsageError, match=r"holds an unfinished run \(go on with --resume, begin anew with --overwrite"
    ):
        train(options)
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

    stopped = train(replace(options, resume=True), progress=stop(KeyboardInterrupt))
    assert (stopped.record.interrupted, stopped.record.best_epoch) == (True, 1)
    assert len(stopped.record.history["loss"]) == 1
    assert load_training_record(options.out) == stopped.record
    assert equal(weights_of(options.out), load_state(options.out / "state.npz").best_weights)

    resumed = train(replace(options, resume=True))
    assert not resumed.record.interrupted
    assert resumed.record.history == dsc_run.result.record.history
    assert equal(weights_of(options.out), weights_of(dsc_run.result.run))
    assert not (options.out / "state.npz").exists()


@slow
def test_a_picture_that_cannot_be_drawn_costs_no_training(
    dsc_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run is replaced when asked; another seed is another split with other weights."""

    def fail(*figures: object, **more: object) -> None:
        raise ValueError("$x^$\n  ^\nParseException")

    out = tmp_path / "run"
    shutil.copytree(dsc_run.result.run, out)
    # The package's ``train`` is the function; its module of the same name goes by importlib.
    monkeypatch.setattr(import_module("edge_dsc.training.train"), "draw_confusion", fail)
    result = train(replace(dsc_run.options, out=out, epochs=1, seed=4, overwrite=True))
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
    assert result.split.sha256 != dsc_run.result.split.sha256
    assert not equal(weights_of(out), weights_of(dsc_run.result.run))


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
def test_a_network_really_learns(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "phantoms", 60, seed=1)
    options = TrainOptions(
        data=tmp_path / "phantoms", out=tmp_path / "run", architecture="dsc", recipe="quick", epochs=8, seed=1
    )
    metrics = train(options).metrics["held_out"]
    assert metrics.count >= 30
    assert metrics.accuracy >= 0.8
