"""Commands that make things: what they write, and their ``--json``, one object on standard output."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import foreign_models
import pytest

from edge_dsc.cli.making import (
    NETWORKS,
    Backend,
    CalibMethod,
    Colour,
    DecoderName,
    Gives,
    InputType,
    Int8Backend,
    PrecisionName,
    RecipeName,
    Rounding,
)
from edge_dsc.networks import NetworkChoice
from edge_dsc.training.recipes import Ingredients
from engines.errors import UsageError
from engines.graph import load_model


def test_choices_are_those_of_the_library() -> None:
    from calibration.table import METHODS, ROUNDINGS, TENSORRT_METHODS
    from edge_dsc.build.conform import LOGITS, PROBABILITIES
    from edge_dsc.networks import NAMES
    from edge_dsc.training import RECIPES
    from engines.contract import DECODERS, INPUT_TYPES
    from engines.record import Precision
    from engines.runtimes import RUNTIME_NAMES

    assert [choice.value for choice in PrecisionName] == [precision.value for precision in Precision]
    assert [choice.value for choice in Backend] == ["auto", *RUNTIME_NAMES]
    assert [choice.value for choice in Int8Backend] == list(RUNTIME_NAMES)
    assert [choice.value for choice in CalibMethod] == [*METHODS, *TENSORRT_METHODS]
    assert [choice.value for choice in Rounding] == list(ROUNDINGS)
    assert [choice.value for choice in InputType] == list(INPUT_TYPES)
    assert [choice.value for choice in DecoderName] == list(DECODERS)
    assert [choice.value for choice in Gives] == [LOGITS, PROBABILITIES]
    assert [choice.value for choice in Colour] == ["grey", "rgb"]
    assert [choice.value for choice in RecipeName] == list(RECIPES)
    assert NETWORKS == NAMES


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

    def note(options: Any, *_progress: Any, **more: Any) -> None:
        asked.append((options, more))
        raise UsageError("enough", remedy="none")

    for target in (
        "training.train",
        "training.twin.make_twin",
        "build.qat.fine_tune",
        "build.export.export_run",
        "build.calibrate.run_calibration",
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


def test_what_is_added_to_a_recipe_is_handed_on(edge_dsc: Any, asked: list[Any]) -> None:
    edge_dsc("train", "xrays", "--mixup", 0.2, "--cutmix", 1, "--erasing", 0.25, "--weight-decay", 0.01)
    assert asked[0][0].ingredients == Ingredients(mixup=0.2, cutmix=1.0, erasing=0.25, weight_decay=0.01)
    edge_dsc("train", "xrays", "--teacher", "runs/a,runs/b", "--distillation", 0.7)
    assert asked[1][0].teachers == (Path("runs/a"), Path("runs/b"))
    assert asked[1][0].ingredients == Ingredients(distillation=0.7, temperature=2.0)
    edge_dsc("train", "xrays", "--refit", "runs/dsc", "--teacher", "runs/a")
    assert (asked[2][0].teachers, asked[2][0].ingredients) == ((Path("runs/a"),), Ingredients())
    for words, said in (
        (("--distillation", 0.5), "--distillation is for --teacher (name a finished run, or leave it out)"),
        (("--refit", "runs/dsc", "--mixup", 0.2), "--refit takes the network, the recipe and the images"),
        (("--qat", "runs/dsc", "--teacher", "runs/a"), "--qat takes the network, the images and the split"),
        (("--mixup", "inf"), "inf is not a finite number"),
        (("--erasing", "nan"), "Invalid value for '--erasing'"),
    ):
        done = edge_dsc("train", "xrays", *words)
        assert done.code == 2 and said in done.err
    assert len(asked) == 3


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


def test_calibrate_hands_on_what_was_asked_for(edge_dsc: Any, asked: list[Any], run: Path) -> None:
    words = ("--calib-data", "xrays", "--rounding", "nearest", "--no-bias-correction")
    assert edge_dsc("calibrate", run, *words).code == 2
    assert edge_dsc("calibrate", run, "--calib-data", "xrays", "--rounding", "adaround").code == 2
    assert edge_dsc("build-engine", run, "--int8", *words).code == 2
    seen = [(request.rounding, request.bias_correction) for request, _ in asked]
    assert seen == [("nearest", False), ("adaround", None), ("nearest", False)]


@pytest.mark.parametrize("words", [("--rounding", "adaround"), ("--no-bias-correction",)])
def test_roundings_are_learnt_by_a_calibration_alone(edge_dsc: Any, words: tuple[str, ...]) -> None:
    found = edge_dsc("build-engine", "none.onnx", "--int8", *words)
    assert found.code == 2
    assert (
        "--rounding and --bias-correction are for a calibration" in found.err and "--calib-data" in found.err
    )


@pytest.mark.slow
def test_calibrate(edge_dsc: Any, run: Path, textures: Path) -> None:
    done = edge_dsc("calibrate", run, "--calib-data", textures, "--calib-method", "minmax", "--json")
    assert done.code == 0
    assert done.json["kind"] == "edge-dsc/calibrate-result" and done.json["schema_version"] == 2
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
@pytest.mark.usefixtures("small_networks")
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
def test_a_fine_tuned_run_builds_in_int8_and_the_same_seed_gives_the_same_network(
    edge_dsc: Any, dsc_run: Any, tuned_run: Any, phantom_folder: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(dsc_run.result.run, tmp_path / "dsc"))
    done = edge_dsc("train", phantom_folder, "--qat", run, "--epochs", 1, "--seed", 3, "--json")
    assert done.code == 0, done.err
    before = tuned_run[1]
    # Not the bytes: the graph names the hash of model.keras, a zip file with the time in it.
    assert load_model(Path(done.json["onnx"])).proto.graph == load_model(before.onnx).proto.graph
    ranges = [
        json.loads(Path(path).read_text())["ranges"] for path in (done.json["calibration"], before.table)
    ]
    assert ranges[0] == ranges[1]
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


@pytest.mark.slow
def test_what_an_engine_takes_is_asked_for(edge_dsc: Any, run: Path, textures: Path) -> None:
    build = ("build-engine", run, "--backend", "onnxruntime", "--out", run / "a.engine", "--json")
    contract = edge_dsc(*build, "--int8", "--input", "int8").json["record"]["contract"]
    assert (contract["dtype"], contract["layout"], contract["resize"]) == (
        "int8",
        "NCHW",
        "halve-area-bordered-v1",
    )
    found = edge_dsc("inspect", run / "a.engine")
    assert "dtype: int8" in found.out
    assert edge_dsc("infer", run / "a.engine", textures / "focal").code == 0
    assert edge_dsc(*build, "--fp32", "--decode", "nvjpeg").json["record"]["contract"]["decode"] == (
        "grey8-nvjpeg-v1"
    )
    done = edge_dsc(*build, "--fp16", "--dla", "1", "--batch", "1")
    assert (done.code, "onnxruntime has no --dla" in done.err) == (2, True)


def test_adopt_says_what_became_of_the_pixels(edge_dsc: Any, tmp_path: Path) -> None:
    (tmp_path / "their net.onnx").write_bytes(foreign_models.residual().SerializeToString())
    words = ("--labels", "a, b,c", "--scale", "1/255", "--mean", "0.485,0.456,0.406", "--std", "0.25")
    found = edge_dsc("adopt", tmp_path / "their net.onnx", *words, "--out", tmp_path / "out")
    assert found.code == 0, found.err
    first, takes, front = found.out.splitlines()
    assert re.fullmatch(
        r".*/out/model\.onnx: equal to their net\.onnx within \d\.\de-\d\d on 8 images of phantoms", first
    )
    assert takes == "  takes grey pixels, 64 x 64; the original gives logits"
    assert front == (
        "  folded into the first convolution: Reshape, Concat, Mul, Add; its border: a constant plane"
    )
    assert f"next: edge-dsc build-engine {tmp_path / 'out'}" in found.err
    again = edge_dsc("adopt", tmp_path / "their net.onnx", *words, "--out", tmp_path / "out", "--json")
    document = json.loads(again.out)
    assert document["kind"] == "edge-dsc/adopt-result"
    record = document["record"]
    assert record["contract"]["labels"] == ["a", "b", "c"]
    assert record["contract"]["architecture"] == "their-net"
    assert (record["scale"], record["mean"], record["std"]) == (1 / 255, [0.485, 0.456, 0.406], [0.25])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--scale", "much"), "--scale 'much' is no number (write it such as --scale 0.5 or 1/255)"),
        (("--mean", "1,,2"), "--mean '1,,2' is no number"),
        (("--std", "1/0"), "--std '1/0' is no number"),
        (("--std", "0"), "--scale 1 --std 0: nothing is left of a pixel"),
        (("--scale", "1,2"), "--scale 1,2 --std 1: nothing is left of a pixel"),
        (("--scale", "nan"), "--scale 'nan' is no number"),
        (("--size", "224x"), "--size '224x' is no size (write --size 224 or --size HEIGHTxWIDTH)"),
    ],
)
def test_adopt_refuses_numbers_that_are_none(edge_dsc: Any, words: tuple[str, ...], message: str) -> None:
    found = edge_dsc("adopt", "none.onnx", "--labels", "a,b", *words)
    assert found.code == 2
    assert message in found.err


def test_adopt_hands_on_what_was_asked_for(edge_dsc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def note(request: Any, progress: Any) -> None:
        asked.append(request)
        raise UsageError("enough", remedy="none")

    monkeypatch.setattr("edge_dsc.build.adopt.adopt_model", note)
    edge_dsc("adopt", "n.onnx", "--labels", "a,b")
    edge_dsc(
        "adopt", "n.onnx", "--labels", "a,b", "--colour", "rgb", "--size", "96x64", "--output", "logits",
        "--check-on", "xrays",
    )  # fmt: skip
    first, second = asked
    assert (first.colour, first.size, first.gives, first.images, first.out) == (False, None, None, None, None)
    assert (first.normalisation.scale, first.normalisation.mean, first.normalisation.std) == (1, (0,), (1,))
    assert (second.colour, second.size, second.gives, second.images) == (
        True,
        (96, 64),
        "logits",
        Path("xrays"),
    )
