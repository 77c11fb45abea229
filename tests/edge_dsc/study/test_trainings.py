"""What a study is and whose folder it goes on with."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from made_study import leave_answers, leave_record

from edge_dsc.study.trainings import (
    ANSWERS_FILE,
    STUDY_FILE,
    Setting,
    Study,
    StudyOptions,
    Training,
    hold_folder,
    load_study,
    open_study,
)
from edge_dsc.training.run_folder import RECORD_FILE, STATE_FILE, TrainState, save_state
from engines.errors import ArtefactError, BadInputError, UsageError


def test_all_networks_come_seed_by_seed(study: Study) -> None:
    titles = ["cnn", "dsc", "cnn aug.", "dsc aug."]
    assert [one.title for one in study.settings] == titles
    assert [one.title for one in study.trainings] == [f"{t}, seed {s}" for s in (0, 1) for t in titles]
    assert [one.folder for one in study.trainings[:4]] == [
        "cnn-plain-seed0", "dsc-plain-seed0", "cnn-augmented-seed0", "dsc-augmented-seed0",
    ]  # fmt: skip
    assert study.reference == "cnn"


def test_folds_instead_of_seeds(options: StudyOptions) -> None:
    with open_study(replace(options, seeds=None, folds=3, networks=("dsc",), augmentation=(True,))) as study:
        assert [(one.title, one.folder, one.number) for one in study.trainings] == [
            (f"dsc aug., fold {number} of 3", f"dsc-augmented-fold{number}of3", number)
            for number in (1, 2, 3)
        ]
        assert {study.train_options(one).fold for one in study.trainings} == {(1, 3), (2, 3), (3, 3)}
        assert study.reference == "dsc"


def test_a_network_of_anyone_has_a_folder_that_is_none_of_theirs() -> None:
    training = Training(Setting("../mine/net.keras", False), seed=1)
    assert (training.folder, training.title) == ("net.keras-plain-seed1", "net.keras, seed 1")


def test_a_training_is_asked_for_with_all_that_the_study_says(options: StudyOptions) -> None:
    with open_study(replace(options, recipe="quick", epochs=7)) as study:
        asked = study.train_options(study.trainings[-1])
    assert (asked.architecture, asked.augmentation, asked.seed, asked.recipe) == ("dsc", True, 1, "quick")
    assert asked.resolve_recipe().epochs == 7
    assert asked.out == options.out / "dsc-augmented-seed1"
    assert asked.data == options.data.resolve()
    assert (asked.resume, asked.overwrite) == (False, True)


def test_the_same_command_goes_on(options: StudyOptions) -> None:
    with open_study(options) as begun:
        first = (options.out / STUDY_FILE).read_bytes()
    with open_study(replace(options, jobs=2, bench=True)) as again:
        assert again.trainings == begun.trainings
    assert (options.out / STUDY_FILE).read_bytes() == first
    assert load_study(options.out).plan == begun.plan


def test_data_that_moved_are_the_same_data(options: StudyOptions, tmp_path: Path) -> None:
    with open_study(options):
        pass
    moved = Path(shutil.copytree(options.data, tmp_path / "moved"))
    with open_study(replace(options, data=moved)):
        assert load_study(options.out).data == moved


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"networks": ("dsc", "cnn")}, "--arch cnn,dsc"),
        ({"augmentation": (True,)}, "--augmentation both"),
        ({"seeds": 3}, "--seeds 2"),
        ({"seeds": None, "folds": 5}, "--seeds 2, --folds left out"),
        ({"recipe": "quick"}, "--recipe paper"),
        ({"epochs": 3}, "--epochs left out"),
        ({"margin": 5.0}, "--margin 2"),
        ({"keep_split": True}, "--keep-split left out"),
    ],
)
def test_other_options_are_another_study(
    options: StudyOptions, changes: dict[str, object], said: str
) -> None:
    with open_study(options):
        pass
    with (
        pytest.raises(UsageError, match=f"holds a study with {said} ") as refused,
        open_study(replace(options, **changes)),
    ):  # type: ignore[arg-type]
        pass
    assert "another study with --out" in str(refused.value)


def test_other_images_are_another_study(options: StudyOptions, tmp_path: Path) -> None:
    with open_study(options):
        pass
    other = Path(shutil.copytree(options.data, tmp_path / "other"))
    next(other.rglob("*.png")).unlink()
    with (
        pytest.raises(ArtefactError, match=r"150 were in .*, 149 are in .*other"),
        open_study(replace(options, data=other)),
    ):
        pass


def test_another_recipe_of_the_same_name_is_refused(
    options: StudyOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_dsc.training import recipes

    with open_study(options):
        pass
    known = recipes.RECIPES["paper"]
    monkeypatch.setitem(recipes.RECIPES, "paper", {**known, "dsc": replace(known["dsc"], learning_rate=2e-4)})
    with (
        pytest.raises(ArtefactError, match="with another recipe 'paper', or another file"),
        open_study(options),
    ):
        pass


def test_an_edited_study_is_refused(options: StudyOptions) -> None:
    with open_study(options):
        pass
    file = options.out / STUDY_FILE
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "margin": 9.0}))
    with pytest.raises(ArtefactError, match="was edited after it was made"), open_study(options):
        pass


def test_a_folder_of_other_things_is_spared(options: StudyOptions) -> None:
    options.out.mkdir()
    (options.out / "other").touch()
    with pytest.raises(UsageError, match="is not empty and holds no study"), open_study(options):
        pass
    assert [one.name for one in options.out.iterdir()] == ["other"]


def test_a_folder_among_the_images_is_refused(options: StudyOptions) -> None:
    with (
        pytest.raises(UsageError, match="is in the data folder"),
        open_study(replace(options, out=options.data / "s")),
    ):
        pass


def test_one_study_at_a_time(options: StudyOptions) -> None:
    with open_study(options):
        with pytest.raises(UsageError, match="another study is at work in") as refused, open_study(options):
            pass
        assert "wait for it" in str(refused.value)
    with open_study(options):
        pass


def test_what_lies_in_the_place_of_the_lock_is_neither_emptied_nor_waited_for(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("mine")
    (tmp_path / ".lock").symlink_to("theirs")
    with hold_folder(tmp_path, wait=False):
        pass
    assert (tmp_path / "theirs").read_text() == "mine"
    (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / ".lock")
    with hold_folder(tmp_path, wait=False):
        pass


def test_a_folder_is_let_go_of_when_its_block_ends(tmp_path: Path) -> None:
    for _ in range(2):
        with hold_folder(tmp_path / "run", wait=True):
            assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"networks": ()}, "the networks ''"),
        ({"networks": ("dsc", "dsc")}, "the networks 'dsc,dsc'"),
        ({"networks": ("dsc", "resnet999")}, "there is no network 'resnet999'"),
        ({"recipe": "secret"}, "there is no recipe 'secret'"),
        ({"folds": 5}, "over seeds or over folds"),
        ({"seeds": None}, "over seeds or over folds"),
        ({"seeds": None, "folds": 2}, "2 folds"),
        ({"seeds": None, "folds": 3, "keep_split": True}, "--fold and --keep-split exclude each other"),
        ({"seeds": 0}, "0 trainings"),
        ({"seeds": 251}, "1004 trainings"),
        ({"margin": 0.0}, "a margin of 0 points"),
        ({"margin": 101.0}, "a margin of 101 points"),
        ({"jobs": 0}, "--jobs 0 on"),
        ({"jobs": 999}, "--jobs 999 on"),
    ],
)
def test_what_no_study_can_be(options: StudyOptions, changes: dict[str, object], what: str) -> None:
    with pytest.raises(UsageError, match=what), open_study(replace(options, **changes)):  # type: ignore[arg-type]
        pass
    assert not options.out.exists()


def test_data_that_are_none(options: StudyOptions, tmp_path: Path) -> None:
    with (
        pytest.raises(BadInputError, match="does not exist"),
        open_study(replace(options, data=tmp_path / "none")),
    ):
        pass


def test_where_a_training_stands(study: Study) -> None:
    new, begun, ended, stopped, done, *_ = study.trainings
    save_state_of(study, begun, epochs=4)
    leave_record(study, ended, epochs=50)
    leave_record(study, stopped, epochs=9, interrupted=True)
    save_state_of(study, stopped, epochs=9)
    leave_answers(study, done, [])
    assert [study.epochs_done(one) for one in (new, begun, ended, stopped, done)] == [0, 4, 50, 9, 3]
    assert [study.trained(one) is not None for one in (new, begun, ended, stopped, done)] == [
        False, False, True, False, True,
    ]  # fmt: skip
    assert [study.answers(one) is not None for one in study.trainings] == [False] * 4 + [True] + [False] * 3
    assert [study.train_options(one).resume for one in (new, begun, stopped)] == [False, True, True]


def test_answers_of_another_model_are_made_again(study: Study) -> None:
    training = study.trainings[0]
    leave_answers(study, training, [])
    answers = study.run_folder(training) / ANSWERS_FILE
    kept = answers.read_bytes()
    answers.write_bytes(kept[:-20])
    assert study.answers(training) is None
    answers.write_bytes(kept)
    (study.run_folder(training) / RECORD_FILE).unlink()
    assert study.answers(training) is None


def save_state_of(study: Study, training: Training, *, epochs: int) -> None:
    file = study.run_folder(training) / STATE_FILE
    save_state(TrainState(file=file, epoch=epochs, history={"loss": [1.0] * epochs}))
