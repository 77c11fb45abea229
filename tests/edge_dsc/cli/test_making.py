"""Commands that make things: what they write, and their ``--json``, one object on standard output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge_dsc.cli.making import Backend, CalibMethod, Int8Backend, PrecisionName, RecipeName
from edge_dsc.networks import NetworkChoice
from engines.errors import UsageError


def test_choices_are_those_of_the_library() -> None:
    from calibration.table import METHODS, TENSORRT_METHODS
    from edge_dsc.training import RECIPES
    from engines.record import Precision
    from engines.runtimes import RUNTIME_NAMES

    assert [choice.value for choice in PrecisionName] == [precision.value for precision in Precision]
    assert [choice.value for choice in Backend] == ["auto", *RUNTIME_NAMES]
    assert [choice.value for choice in Int8Backend] == list(RUNTIME_NAMES)
    assert [choice.value for choice in CalibMethod] == [*METHODS, *TENSORRT_METHODS]
    assert [choice.value for choice in RecipeName] == list(RECIPES)


@pytest.mark.parametrize(
    "words", [("--int8",), ("--precision", "mixed", "--calib-data", "x", "--validate", "x")]
)
def test_tensorrts_own_calibration_is_of_int8_and_of_images(edge_dsc: Any, words: tuple[str, ...]) -> None:
    found = edge_dsc("build-engine", "none.onnx", "--calib-method", "tensorrt-minmax", *words)
    assert found.code == 2
    assert "--calib-method tensorrt-minmax is for --int8 over images" in found.err


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What training, fine-tuning or export was asked for; none of them begins."""
    asked: list[Any] = []

    def note(options: Any, **more: Any) -> None:
        asked.append((options, more))
        raise UsageError("enough", remedy="none")

    for target in (
        "training.train",
        "training.twin.make_twin",
        "build.qat.fine_tune",
        "build.export.export_run",
    ):
        monkeypatch.setattr(f"edge_dsc.{target}", note)
    return asked


def test_train_hands_on_what_was_asked_for(edge_dsc: Any, asked: list[Any]) -> None:
    assert edge_dsc("train", "xrays").code == 2
    options = asked[0][0]
    assert (options.data, options.out) == (Path("xrays"), Path("runs/dsc"))
    assert (options.architecture, options.recipe, options.epochs, options.seed) == ("dsc", "default", None, 0)
    assert not options.resume and not options.overwrite
    edge_dsc("train", "xrays", "--arch", "cnn", "--recipe", "paper", "--epochs", 7, "--seed", 5, "--resume")
    options = asked[1][0]
    assert (options.architecture, options.recipe, options.epochs, options.seed) == ("cnn", "paper", 7, 5)
    assert options.out == Path("runs/cnn") and options.resume
    words = ("--arch", "mobilenetv2", "--size", 96, "--weights", "w.h5", "--unfreeze", 4, "--no-augmentation")
    edge_dsc("train", "xrays", *words, "--fold", "2/5", "--kinds")
    options = asked[2][0]
    assert options.network == NetworkChoice(architecture="mobilenetv2", size=96, weights="w.h5", unfreeze=4)
    assert (options.augmentation, options.fold, options.keep_split, options.kinds) == (
        False,
        (2, 5),
        False,
        True,
    )
    assert options.out == Path("runs/mobilenetv2")
    edge_dsc("train", "xrays", "--arch", "my/nets.py:small", "--keep-split", "--no-kinds")
    options = asked[3][0]
    assert (options.architecture, options.out) == ("my/nets.py:small", Path("runs/nets.small"))
    assert (options.augmentation, options.fold, options.keep_split, options.kinds) == (
        True,
        None,
        True,
        False,
    )
    edge_dsc("train", "xrays", "--qat", "runs/cnn", "--overwrite")
    options = asked[4][0]
    assert (options.run, options.out) == (Path("runs/cnn"), Path("runs/cnn-qat"))
    assert (options.epochs, options.overwrite) == (5, True)


@pytest.mark.parametrize("fold", ["2", "2/", "a/b", "-1/5", "2/5/6", "1000/2"])
def test_a_fold_is_two_plain_numbers(edge_dsc: Any, fold: str) -> None:
    found = edge_dsc("train", "xrays", "--fold", fold)
    assert (found.code, found.out) == (2, "")
    assert f"--fold '{fold}' is no fold (write K/N, such as --fold 2/5)" in found.err


@pytest.mark.parametrize(
    "words", [("--size", 96), ("--weights", "none"), ("--unfreeze", 1), ("--fold", "1/5"), ("--keep-split",),
              ("--kinds",), ("--no-augmentation",)], ids=lambda words: words[0],
)  # fmt: skip
def test_fine_tuning_takes_all_that_from_its_run(
    edge_dsc: Any, asked: list[Any], words: tuple[Any, ...]
) -> None:
    found = edge_dsc("train", "xrays", "--qat", "runs/cnn", *words)
    assert found.code == 2 and not asked
    assert "--qat takes the network, the images and the split of its run" in found.err


def test_separate_hands_on_what_was_asked_for(edge_dsc: Any, asked: list[Any], tmp_path: Path) -> None:
    assert edge_dsc("separate", "runs/cnn").code == 2
    options = asked[0][0]
    assert (options.original, options.out) == (Path("runs/cnn"), Path("runs/cnn-separable"))
    assert (options.separation.rank, options.separation.batch_norm, options.separation.layers) == (
        1,
        True,
        (),
    )
    assert (options.data, options.epochs, options.seed, options.overwrite) == (None, None, 0, False)
    words = ("--layers", "stem, ^block*,", "--rank", 3, "--no-batch-norm", "--data", "xrays", "--epochs", 0)
    edge_dsc("separate", "own.keras", *words, "--seed", 4, "--overwrite")
    options = asked[1][0]
    assert (options.separation.layers, options.separation.rank) == (("stem", "^block*"), 3)
    assert not options.separation.batch_norm
    assert (options.data, options.epochs, options.seed, options.overwrite) == (Path("xrays"), 0, 4, True)
    assert options.out == Path("own-separable")  # with images it is a run
    edge_dsc("separate", "own.keras")
    assert asked[2][0].out == Path("own-separable.keras")
    edge_dsc("separate", "own.keras", "--out", tmp_path)
    assert asked[3][0].out == tmp_path


def test_export_hands_on_what_was_asked_for(edge_dsc: Any, asked: list[Any]) -> None:
    assert edge_dsc("export", "runs/cnn", "--data", "xrays", "--out", "a.onnx").code == 2
    ((run, more),) = asked
    assert (run, more["data"], more["out"]) == (Path("runs/cnn"), Path("xrays"), Path("a.onnx"))


@pytest.mark.slow
def test_calibrate(edge_dsc: Any, run: Path, textures: Path) -> None:
    done = edge_dsc("calibrate", run, "--calib-data", textures, "--calib-method", "minmax", "--json")
    assert done.code == 0
    assert done.json["kind"] == "edge-dsc/calibrate-result" and done.json["schema_version"] == 1
    assert (done.json["method"], done.json["images"]) == ("minmax", 150)
    assert json.loads((run / "calibration.json").read_text())["method"] == "minmax"


def test_build_engine_takes_the_table_beside_the_model(edge_dsc: Any, run: Path) -> None:
    done = edge_dsc("build-engine", run, "--int8", "--backend", "onnxruntime", "--batch", "2", "--json")
    assert done.code == 0, done.err
    assert "using the calibration table" in done.err
    record = done.json["record"]
    assert record["precision"] == "int8"
    assert record["batch"] == {"smallest": 2, "best": 2, "largest": 2}
    assert record["layers"]["INT8"] >= 7
    assert "--batch 2:2:2 --calibration" in record["build_command"]


@pytest.mark.slow
def test_build_engine_calibrates_on_the_way(edge_dsc: Any, run: Path, textures: Path) -> None:
    (run / "calibration.json").unlink()
    out = run / "mine.engine"
    calibration = ("--calib-data", textures, "--calib-method", "minmax", "--calib-images", 128)
    done = edge_dsc(
        "build-engine", run / "model.onnx", "--int8", *calibration, "--backend", "onnxruntime", "--out", out
    )
    assert done.code == 0, done.err
    assert done.out.startswith(f"{out}\n")
    table = json.loads((run / "calibration.json").read_text())
    assert (table["method"], len(table["images"])) == ("minmax", 128)


@pytest.mark.slow
def test_a_twin_without_an_epoch_is_a_run_all_the_same(edge_dsc: Any, cnn_run: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(cnn_run.result.run, tmp_path / "cnn"))
    done = edge_dsc("separate", run, "--epochs", 0)
    assert done.code == 0, done.err
    assert "28,640 parameters, of the twin 4,640 (83.80% fewer)" in done.out
    assert f"{tmp_path / 'cnn-separable'}: evaluation and test images together" in done.out
    assert "\naccuracy on validation images: original " in done.out
    again = edge_dsc("separate", run, "--epochs", 0)
    assert again.code == 2 and "holds a finished run" in again.err
    alone = edge_dsc("separate", run / "model.keras", "--layers", "block?_conv", "--json")
    assert alone.code == 0, alone.err
    assert f"next: edge-dsc train DATA --arch {run / 'model-separable.keras'}" in alone.err
    assert alone.json["kind"] == "edge-dsc/separate-result"
    assert alone.json["separation"]["left_alone"] == [["stem", "as asked"]]
    assert (alone.json["metrics"], alone.json["validation"]) == (None, None)
    nowhere = edge_dsc("separate", run, "--layers", "block9", "--out", tmp_path / "x")
    assert nowhere.code == 2
    assert "--layers block9: no convolution larger than 1x1 has that name (choose among stem, " in nowhere.err


@pytest.mark.slow
def test_a_fine_tuned_run_builds_in_int8(
    edge_dsc: Any, dsc_run: Any, phantom_folder: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(dsc_run.result.run, tmp_path / "dsc"))
    done = edge_dsc("train", phantom_folder, "--qat", run, "--epochs", 1, "--json")
    assert done.code == 0, done.err
    tuned = tmp_path / "dsc-qat"
    assert (done.json["run"], done.json["calibration"]) == (str(tuned), str(tuned / "calibration.json"))
    assert set(done.json["metrics"]) == {"evaluation", "test", "held_out"}
    ort = ("--backend", "onnxruntime", "--validate", phantom_folder, "--max-drop", 100)
    built = edge_dsc("build-engine", tuned, "--int8", *ort, "--json")
    assert built.code == 0, built.err
    assert f"using the calibration table {tuned / 'calibration.json'}" in built.err
    record = built.json["record"]
    assert record["layers"] == {"INT8": 8, "FP32": 1}
    assert record["validation"]["images"].startswith("evaluation and test of the model's split")
    assert json.loads((tuned / "training.json").read_text())["parent_sha256"]
    again = edge_dsc("train", phantom_folder, "--qat", run, "--epochs", 1)
    assert again.code == 2 and "holds a finished run" in again.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        (("--resume",), 2, "--resume has no use with --qat"),
        (("--out", "{run}"), 2, "is the run to start from"),
        (("--qat", "{run}/nowhere"), 4, "cannot read"),
    ],
)
def test_what_fine_tuning_refuses(
    edge_dsc: Any, dsc_run: Any, phantom_folder: Path, extra: tuple[str, ...], code: int, words: str
) -> None:
    run = dsc_run.result.run
    done = edge_dsc("train", phantom_folder, "--qat", run, *(word.format(run=run) for word in extra))
    assert done.code == code, done.err
    assert words in done.err and done.out == ""
