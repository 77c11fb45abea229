"""Which image may be used for what: each cell of the table in :mod:`edge_dsc.data.purposes`, by exact names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from edge_dsc.data import PARTS, Dataset, Sample, Split, save_split
from edge_dsc.data.purposes import (
    PARTS_FOR,
    Purpose,
    images_as_asked,
    images_that_train_too,
    images_to_calibrate,
    images_to_choose_layers,
    images_to_compare,
    images_to_judge,
    images_to_synthesize,
    images_to_train,
    require_mixable,
    require_teachable,
    split_beside,
)
from edge_dsc.data.synthetic import SynthesisRecord, Worth
from engines.errors import ArtefactError, BadInputError, UsageError

NONE: frozenset[str] = frozenset()


def image(content: str, path: str | None = None, patient: str | None = None) -> Sample:
    """An image whose hash stands for its content: ``train1``, ``test2``, ``new3``."""
    return Sample(
        path=path or f"clear/{content}.png",
        label="clear",
        patient=patient or f"patient of {content}",
        sha256=content,
    )


def folder(*samples: Sample | str) -> Dataset:
    found = [image(sample) if isinstance(sample, str) else sample for sample in samples]
    ordered = tuple(sorted(found, key=lambda sample: sample.path))
    return Dataset(root=Path("xrays"), samples=ordered, labels=("clear", "focal"))


@pytest.fixture
def split() -> Split:
    """Two images in each part: ``train1``, ``train2``, ``validation1`` and so on."""
    parts = {part: tuple(image(f"{part}{number}") for number in (1, 2)) for part in PARTS}
    return Split(root=Path("xrays"), labels=("clear", "focal"), seed=0, parts=parts)


WHOLE = folder(*(f"{part}{number}" for part in PARTS for number in (1, 2)), "new1", "new2")


def names(samples: Iterable[Sample]) -> list[str]:
    return [sample.sha256 for sample in samples]


def parts_of(samples: Iterable[Sample]) -> set[str]:
    return {re.sub(r"\d", "", sample.sha256) for sample in samples}


def test_the_table_of_parts() -> None:
    assert PARTS_FOR == {
        Purpose.TRAIN: ("train",),
        Purpose.CHOOSE: ("validation",),
        Purpose.FIT: ("validation",),
        Purpose.CALIBRATE: ("train",),
        Purpose.COMPARE: ("evaluation", "test", "validation"),
        Purpose.JUDGE: ("evaluation", "test"),
    }


def test_what_makes_a_network_never_judges_it(split: Split) -> None:
    """Over a folder with every kind of image, the sets for making and for judging share nothing."""
    calibrates = images_to_calibrate(WHOLE, split)
    chooses = images_to_choose_layers(WHOLE, split, NONE)
    judges = images_to_judge(WHOLE, split, chooses.spent)
    assert parts_of(calibrates) == {"train", "new"}
    assert parts_of(chooses.samples) == {"validation"}
    assert parts_of(judges.samples) == {"evaluation", "test"}


def test_the_cells_of_a_whole_folder(split: Split) -> None:
    assert names(images_to_calibrate(WHOLE, split)) == ["new1", "new2", "train1", "train2"]
    assert names(images_to_choose_layers(WHOLE, split, NONE).samples) == ["validation1", "validation2"]
    judges = images_to_judge(WHOLE, split, NONE)
    assert names(judges.samples) == ["evaluation1", "evaluation2", "test1", "test2"]
    assert judges.origin == "evaluation and test of the model's split, in xrays"
    compares = images_to_compare(split, lambda sample: sample.sha256 != "test1")
    assert names(compares) == ["evaluation1", "evaluation2", "test2", "validation1", "validation2"]


@pytest.mark.parametrize("part", ["validation", "evaluation", "test"])
def test_a_held_back_image_calibrates_under_no_name(split: Split, part: str) -> None:
    copy = image(f"{part}1", path="focal/holiday.png", patient="somebody else")
    assert names(images_to_calibrate(folder("train1", copy), split)) == ["train1"]


def test_of_a_kept_split_all_held_out_images_judge_and_those_of_seen_patients_are_counted(
    split: Split,
) -> None:
    parts = {**split.parts, "test": (image("test1", patient="patient of train1"), image("test2"))}
    kept = replace(split, parts=parts, kept=True)
    judges = images_to_judge(WHOLE, kept, NONE)
    assert names(judges.samples) == ["evaluation1", "evaluation2", "test1", "test2"]
    assert judges.origin == (
        "evaluation and test of the model's split, in xrays; 1 of them of patients that training saw"
    )


def test_a_training_image_judges_under_no_name(split: Split) -> None:
    copy = image("train1", path="test/clear/unseen.png")
    assert names(images_to_judge(folder("new1", copy), split, NONE).samples) == ["new1"]


def test_both_copies_of_an_image_that_may_judge_do(split: Split) -> None:
    copies = folder(image("test1", path="clear/a.png"), image("test1", path="clear/b.png"))
    assert [sample.path for sample in images_to_judge(copies, split, NONE).samples] == [
        "clear/a.png",
        "clear/b.png",
    ]


def test_an_image_of_the_calibration_table_does_not_judge(split: Split) -> None:
    assert names(images_to_judge(WHOLE, split, {"test1", "evaluation2"}).samples) == ["evaluation1", "test2"]
    without_split = images_to_judge(folder("new1", "new2", "new3"), None, {"new2"})
    assert names(without_split.samples) == ["new1", "new3"]
    assert without_split.origin == "all of xrays but 1 that the model has seen"


def test_without_held_out_images_what_is_in_no_part_judges(split: Split) -> None:
    judges = images_to_judge(folder("train1", "validation1", "new1", "new2"), split, NONE)
    assert names(judges.samples) == ["new1", "new2"]
    assert judges.origin == "all of xrays but 2 that the model has seen"
    # Calibration saw all that is held out: the rest must not come from training instead.
    spent = {"evaluation1", "evaluation2", "test1", "test2"}
    assert names(images_to_judge(WHOLE, split, spent).samples) == ["new1", "new2"]


def test_nothing_left_to_judge_is_refused(split: Split) -> None:
    with pytest.raises(BadInputError, match="training or calibration saw all 2 images of xrays") as caught:
        images_to_judge(folder("train1", "validation2"), split, NONE)
    assert "--validate DIR" in caught.value.remedy
    with pytest.raises(BadInputError, match="saw all 1 images"):
        images_to_judge(folder("new1"), None, {"new1"})


def test_without_a_split_every_image_is_in_no_part() -> None:
    data = folder("new1", "new2")
    assert names(images_to_calibrate(data, None)) == ["new1", "new2"]
    judges = images_to_judge(data, None, NONE)
    assert (names(judges.samples), judges.origin) == (["new1", "new2"], "all of xrays")


def test_layers_are_chosen_on_calibration_images_where_validation_is_not_there(split: Split) -> None:
    """They cannot judge anyway, so nothing is spent."""
    for known in (split, None):
        chooses = images_to_choose_layers(folder("train1", "new1", "test1"), known, {"train1", "gone"})
        assert (names(chooses.samples), chooses.spent) == (["train1"], NONE)


def test_else_layers_are_chosen_on_half_which_then_may_not_judge() -> None:
    data = folder(*(image(f"new{number}", path=f"clear/{9 - number}.png") for number in range(1, 6)))
    chooses = images_to_choose_layers(data, None, NONE)
    assert names(chooses.samples) == ["new1", "new3", "new5"]  # every second by content, not by name
    assert chooses.spent == {"new1", "new3", "new5"}
    assert set(names(images_to_judge(data, None, chooses.spent).samples)) == {"new2", "new4"}


def test_a_copy_of_an_image_that_chose_layers_does_not_judge() -> None:
    data = folder("new1", image("new1", path="focal/copy.png"), "new2", "new3")
    spent = images_to_choose_layers(data, None, NONE).spent
    assert not set(names(images_to_judge(data, None, spent).samples)) & spent


def test_a_run_finds_its_images_again_by_content(split: Split) -> None:
    moved = folder(*(image(name, path=f"moved/{name}.png") for name in names(WHOLE.samples)))
    again = images_to_train(moved, split, run=Path("runs/dsc"))
    for part in PARTS:
        assert names(again.samples(part)) == [f"{part}1", f"{part}2"]
        assert [sample.path for sample in again.samples(part)] == [f"moved/{part}{n}.png" for n in (1, 2)]
        assert [sample.patient for sample in again.samples(part)] == [
            sample.patient for sample in split.samples(part)
        ]


def test_a_run_whose_images_are_not_all_there_is_not_trained_further(split: Split) -> None:
    rest = folder(*(name for name in names(WHOLE.samples) if name != "validation2"))
    with pytest.raises(
        BadInputError, match="xrays lacks 1 of the 8 images of runs/dsc, such as clear/validation2"
    ):
        images_to_train(rest, split, run=Path("runs/dsc"))


def test_parts_by_name(split: Split) -> None:
    assert names(images_as_asked(WHOLE, split, ["test", "train"])) == ["test1", "test2", "train1", "train2"]
    assert images_as_asked(folder("new1"), split, ["test"]) == ()
    with pytest.raises(UsageError, match="there is no part tset") as caught:
        images_as_asked(WHOLE, split, ["tset"])
    assert caught.value.remedy == "choose of train, validation, evaluation, test"


def test_the_split_is_the_one_beside_the_model(split: Split, tmp_path: Path) -> None:
    assert split_beside(tmp_path / "model.onnx") is None
    save_split(split, tmp_path / "split.json")
    found = split_beside(tmp_path / "model.onnx")
    assert found is not None and found.parts == split.parts


@pytest.mark.parametrize(
    ("leaked", "words"),
    [
        (image("test3", patient="patient of train1"), "patient patient of train1 in train and in test"),
        (image("train1", path="focal/copy.png", patient="other"), "file train1 in train and in test"),
    ],
)
def test_a_split_that_leaks_serves_no_purpose(
    split: Split, tmp_path: Path, leaked: Sample, words: str
) -> None:
    """A patient, or a copied image, on two sides."""
    parts = {**split.parts, "test": (*split.samples("test"), leaked)}
    save_split(Split(root=split.root, labels=split.labels, seed=0, parts=parts), tmp_path / "split.json")
    with pytest.raises(ArtefactError, match=words):
        split_beside(tmp_path / "model.onnx")


def test_a_fixed_schedule_trains_on_validation_images_and_is_judged_as_before(split: Split) -> None:
    fixed = images_that_train_too(split, PARTS_FOR[Purpose.CHOOSE])
    assert names(fixed.samples("train")) == ["train1", "train2", "validation1", "validation2"]
    assert fixed.samples("validation") == ()
    assert images_to_judge(WHOLE, fixed, NONE) == images_to_judge(WHOLE, split, NONE)
    assert names(images_to_calibrate(WHOLE, fixed)) == [
        "new1", "new2", "train1", "train2", "validation1", "validation2",
    ]  # fmt: skip
    assert [words.split()[0] for words in fixed.warnings()] == ["train", "evaluation", "test"]


def test_a_network_for_deployment_is_judged_by_images_from_elsewhere_alone(
    split: Split, tmp_path: Path
) -> None:
    whole = images_that_train_too(split, PARTS[1:])
    assert len(whole.samples("train")) == 8 and not any(whole.samples(part) for part in PARTS[1:])
    assert names(images_to_judge(WHOLE, whole, NONE).samples) == ["new1", "new2"]
    with pytest.raises(BadInputError, match="training or calibration saw all 2 images") as caught:
        images_to_judge(folder("test1", "validation2"), whole, NONE)
    assert "give images of your own that the model has not seen" in caught.value.remedy
    # Two forms of the network may be held against each other on what trained: nothing is adjusted.
    assert len(images_to_compare(whole, lambda sample: True)) == 8
    assert names(images_to_compare(split, lambda sample: sample.sha256.startswith("train"))) == []
    save_split(whole, tmp_path / "split.json")
    assert split_beside(tmp_path / "model.onnx") == replace(whole, root=Path("xrays").resolve())


def dealt(**parts: tuple[str, ...]) -> Split:
    """A split of these images by part."""
    made = {part: tuple(image(content) for content in parts.get(part, ())) for part in PARTS}
    return Split(root=Path("xrays"), labels=("clear", "focal"), seed=0, parts=made)


def test_a_teacher_of_the_same_split_hands_on_nothing_that_is_held_back(split: Split) -> None:
    require_teachable(split, split, Path("runs/cnn"))
    # Nor where it holds back more, or where nothing is held back any more.
    require_teachable(images_that_train_too(split, ("validation",)), split, Path("runs/cnn"))
    whole = images_that_train_too(split, PARTS[1:])
    require_teachable(whole, whole, Path("runs/cnn"))


@pytest.mark.parametrize(
    ("theirs", "leaked"),
    [
        ({"train": ("b",)}, "b"),  # what chooses this run's epoch
        ({"train": ("c",)}, "c"),
        ({"train": ("d",)}, "d"),
        ({"validation": ("c",)}, "c"),  # what chose the teacher's epoch would judge
    ],
)
def test_a_teacher_that_learnt_from_what_is_held_back_is_refused(
    theirs: dict[str, tuple[str, ...]], leaked: str
) -> None:
    ours = dealt(train=("a",), validation=("b",), evaluation=("c",), test=("d",))
    with pytest.raises(UsageError) as caught:
        require_teachable(ours, dealt(**theirs), Path("runs/cnn"))
    assert f"runs/cnn learnt from 1 images that this run holds back, such as clear/{leaked}.png" in str(
        caught.value
    )
    assert "train both with the same --seed" in caught.value.remedy
    require_teachable(ours, dealt(validation=("a", "b"), evaluation=("b", "c")), Path("runs/cnn"))


def test_a_generator_learns_one_class_of_the_training_part(split: Split) -> None:
    other = replace(split, labels=("clear", "focal"))
    assert names(images_to_synthesize(other, "clear", 2)) == ["train1", "train2"]
    with pytest.raises(
        BadInputError, match=r"2 images of 'clear' are in the training part, .* needs 3 at least"
    ):
        images_to_synthesize(other, "clear", 3)
    with pytest.raises(BadInputError, match="0 images of 'focal'"):
        images_to_synthesize(other, "focal", 1)
    with pytest.raises(UsageError, match="xrays has no class 'covid19'") as caught:
        images_to_synthesize(other, "covid19", 2)
    assert caught.value.remedy == "choose one of clear, focal"


def synthesis(*seen: str, label: str = "clear") -> SynthesisRecord:
    """The record of a generator that saw some images."""
    worth = Worth(
        real=2, copies=0, copy_below=4, nearest=9, nearest_real=8, similarity=0, similarity_real=0, scales=3
    )
    return SynthesisRecord(
        label=label, labels=("clear", "focal"), settings={}, seed=5, split_sha256="", seen=seen,
        generator_sha256="", asked=2, images=(), history={}, best_epoch=1, ended="epochs", seconds=1, costs=(),
        worth=worth, versions={}, created="", edge_dsc="",
    )  # fmt: skip


def test_synthetic_images_train_where_their_generator_saw_nothing_that_is_held_back(split: Split) -> None:
    for seen in (("train1", "train2"), ("train1", "new1"), ()):
        require_mixable(synthesis(*seen), split, Path("made"))
    with pytest.raises(BadInputError, match="holds synthetic images of 'virus', which is no class of xrays"):
        require_mixable(synthesis("train1", label="virus"), split, Path("made"))


@pytest.mark.parametrize("part", ["validation", "evaluation", "test"])
def test_synthetic_images_of_a_generator_that_saw_a_held_back_image_do_not_train(
    split: Split, part: str
) -> None:
    with pytest.raises(
        BadInputError, match=f"made learnt from 1 images that this run holds back, such as clear/{part}2"
    ) as caught:
        require_mixable(synthesis("train1", f"{part}2"), split, Path("made"))
    assert "--seed 5" in caught.value.remedy
    if part == "validation":  # with a fixed schedule it trains, and so may what was learnt of it
        require_mixable(
            synthesis("validation2"), images_that_train_too(split, PARTS_FOR[Purpose.CHOOSE]), Path("made")
        )
