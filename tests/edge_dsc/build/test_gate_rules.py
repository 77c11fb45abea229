from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from calibration.table import CalibrationImage, CalibrationTable
from edge_dsc.build.gate import GateOptions, validation_samples
from edge_dsc.data import discover
from edge_dsc.data.split import save_split, split_dataset
from engines.errors import BadInputError, UsageError


def table_of(*hashes: str) -> CalibrationTable:
    return CalibrationTable(
        method="minmax",
        parameters={},
        seed=0,
        ranges={"x": (0.0, 1.0)},
        onnx_sha256="",
        preprocess_sha256="",
        images=tuple(CalibrationImage(str(index), "clear", digest) for index, digest in enumerate(hashes)),
        versions={},
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "run" / "model.onnx"


@pytest.fixture
def split_model(textures: Path, model: Path) -> Path:
    """A model with a split of the textures beside it."""
    model.parent.mkdir()
    save_split(split_dataset(discover(textures), 0), model.parent / "split.json")
    return model


def test_the_held_out_parts_of_the_split(textures: Path, split_model: Path) -> None:
    split = split_dataset(discover(textures), 0)
    samples, which = validation_samples(textures, split_model, None)
    held = {sample.path for part in ("evaluation", "test") for sample in split.samples(part)}
    assert {sample.path for sample in samples} == held
    assert which == f"evaluation and test of the model's split, in {textures}"


def test_what_calibration_saw_is_left_out(textures: Path, split_model: Path, model: Path) -> None:
    split = split_dataset(discover(textures), 0)
    first, second = split.samples("test")[:2]
    samples, _ = validation_samples(textures, split_model, table_of(first.sha256))
    assert first not in samples and second in samples
    (model.parent / "split.json").unlink()
    samples, which = validation_samples(textures, model, table_of(first.sha256))
    assert len(samples) == 149 and first not in samples
    assert which == f"all of {textures} but 1 that the model has seen"


def test_a_folder_of_other_images(textures: Path, split_model: Path, tmp_path: Path) -> None:
    """None of the held-out images are there: everything that the split does not know."""
    split = split_dataset(discover(textures), 0)
    other = tmp_path / "other"
    for label in ("clear", "focal"):
        (other / label).mkdir(parents=True)
        (other / label / "new.png").write_bytes(label.encode())
    known = split.samples("train")[0]
    shutil.copy(textures / known.path, other / known.label / "known.png")
    samples, which = validation_samples(other, split_model, None)
    assert [sample.path for sample in samples] == ["clear/new.png", "focal/new.png"]
    assert which == f"all of {other} but 1 that the model has seen"


def test_without_a_split_all_of_a_folder(textures: Path, model: Path) -> None:
    samples, which = validation_samples(textures, model, None)
    assert (len(samples), which) == (150, f"all of {textures}")


def test_a_folder_that_was_seen_whole_is_refused(textures: Path, model: Path) -> None:
    hashes = [sample.sha256 for sample in discover(textures).samples]
    with pytest.raises(BadInputError, match="saw all 150 images") as caught:
        validation_samples(textures, model, table_of(*hashes))
    assert "--validate DIR" in caught.value.remedy


@pytest.mark.parametrize("drop", [-0.1, 101, float("nan")])
def test_a_budget_that_makes_no_sense(drop: float) -> None:
    with pytest.raises(UsageError, match="a budget of"):
        GateOptions(data=Path("x"), max_drop=drop)
