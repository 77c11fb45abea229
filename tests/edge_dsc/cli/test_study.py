"""The study's command: what it refuses, what it prints, how it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_study import leave_answers

from edge_dsc.study.run_study import Problem
from edge_dsc.study.trainings import StudyOptions, open_study
from edge_dsc.study.verdict import OPEN

ARGUMENTS = ("--augmentation", "on", "--seeds", "1", "--no-bench")
SAID = "Is dsc aug. not inferior to cnn aug. by more than 2 points? Not decided: "


@pytest.fixture
def out(textures: Path, tmp_path: Path) -> Path:
    """A study whose trainings are done."""
    options = StudyOptions(data=textures, out=tmp_path / "study", augmentation=(True,), seeds=1)
    with open_study(options) as study:
        for training, wrong in zip(study.trainings, ([0], [1, 2]), strict=True):
            leave_answers(study, training, wrong)
    return options.out


@pytest.mark.slow
def test_a_study_that_is_done_prints_its_tables_and_its_verdict(
    textures: Path, out: Path, edge_dsc: Any
) -> None:
    done = edge_dsc("study", textures, "--out", out, *ARGUMENTS)
    assert done.code == 0, done.err
    assert "published: Model-1 Aug." in done.out and SAID in done.out
    assert f"page: {out / 'study.html'}" in done.err.splitlines()
    printed = edge_dsc("study", textures, "--out", out, *ARGUMENTS, "--json").json
    assert (printed["kind"], printed["schema_version"]) == ("edge-dsc/study-report", 2)
    assert [one["answer"] for one in printed["verdicts"]] == [OPEN]
    for name, what in (("study", "study"), ("report", "study report")):
        assert edge_dsc("inspect", out / f"{name}.json", "--json").json["what"] == what
    assert edge_dsc("inspect", out / "dsc-augmented-seed0" / "answers.json").out.startswith(
        "what: study answers"
    )


def test_a_plan_of_a_study_that_is_done(textures: Path, out: Path, edge_dsc: Any) -> None:
    done = edge_dsc("study", textures, "--out", out, *ARGUMENTS, "--plan")
    assert (done.code, done.out.splitlines()[0]) == (0, "0 of 2 trainings are left: about 0 minutes")
    printed = edge_dsc("study", textures, "--out", out, *ARGUMENTS, "--plan", "--json").json
    assert [one["done"] for one in printed["trainings"]] == [50, 50]


@pytest.mark.slow
def test_a_training_that_diverged_ends_it_with_7_after_the_report(
    textures: Path, out: Path, edge_dsc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverged = Problem(exit_code=7, what="training diverged: the loss is nan", remedy="another seed")
    monkeypatch.setattr(
        "edge_dsc.study.run_study.run_trainings", lambda study, **_: {study.trainings[1]: diverged}
    )
    done = edge_dsc("study", textures, "--out", out, *ARGUMENTS)
    assert done.code == 7
    assert done.err.splitlines()[-1].startswith(
        "error: 1 of 2 trainings failed, the report is of the others: "
    )
    assert "exit code 7: training diverged: the loss is nan" in done.out


def test_ctrl_c_says_how_to_go_on(
    textures: Path, out: Path, edge_dsc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edge_dsc.study.run_study.run_trainings", stop)
    done = edge_dsc("study", textures, "--out", out, *ARGUMENTS)
    assert (done.code, done.err) == (130, "interrupted: whole epochs are kept, the same command goes on\n")


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["--arch", "dsc,nothing"], 2, "there is no network 'nothing'"),
        (["--arch", ","], 2, "the networks ''"),
        (["--seeds", "2", "--folds", "5"], 2, "a study goes over seeds or over folds"),
        (["--folds", "2"], 2, "--folds"),
        (["--margin", "nan"], 2, "nan is not a finite number"),
        (["--margin", "0"], 2, "a margin of 0 points"),
        (["--jobs", "200"], 2, "--jobs 200 on"),
        (["--recipe", "own"], 2, "--recipe"),
    ],
)
def test_what_it_refuses(
    textures: Path, tmp_path: Path, edge_dsc: Any, arguments: list[str], code: int, what: str
) -> None:
    done = edge_dsc("study", textures, "--out", tmp_path / "out", *arguments)
    assert done.code == code
    (line,) = done.err.splitlines()
    assert what in line
    assert not (tmp_path / "out").exists()


def test_another_margin_is_refused_once_figures_may_be_known(
    textures: Path, out: Path, edge_dsc: Any
) -> None:
    done = edge_dsc("study", textures, "--out", out, *ARGUMENTS, "--margin", "5")
    assert done.code == 2
    assert "holds a study with --margin 2 (go on with the same options" in done.err


def test_another_folder_of_images_is_refused(
    textures: Path, out: Path, tmp_path: Path, edge_dsc: Any
) -> None:
    import shutil

    other = Path(shutil.copytree(textures, tmp_path / "other"))
    next(other.rglob("*.png")).unlink()
    done = edge_dsc("study", other, "--out", out, *ARGUMENTS)
    assert done.code == 4
    assert "holds a study of other images" in done.err
