"""What a study adds to a recipe: how it is said, what a training is asked for then, where its rows stand."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from made_study import leave_answers

from edge_dsc.study.findings import REPORT, conclude, finished, make_report, rows_of
from edge_dsc.study.trainings import (
    STUDY,
    STUDY_FILE,
    Setting,
    StudyOptions,
    Training,
    load_study,
    open_study,
)
from edge_dsc.study.variants import add_variant, parse_variant, variant_folder, variant_title
from edge_dsc.training.recipes import Ingredients, TrainOptions
from engines.errors import ArtefactError, UsageError
from engines.files import canonical_json, sha256_bytes

ASKED = TrainOptions(data=Path("xrays"), out=Path("run"))


def test_numbers_and_paths_are_said_as_train_says_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = parse_variant(" mixup=0.20, last ,synthetic=made-{n},synthetic-share=0.25")
    assert kept == f"mixup=0.2,last,synthetic={tmp_path}/made-{{n}},synthetic-share=0.25"
    assert variant_title(kept) == "mixup=0.2 last synthetic=made-{n} synthetic-share=0.25"
    assert variant_folder(kept) == "mixup=0.2_last_synthetic=made-_n_synthetic-share=0.25"
    asked = add_variant(ASKED, kept, 3)
    assert asked == replace(
        ASKED,
        ingredients=Ingredients(mixup=0.2),
        last=True,
        synthetic=tmp_path / "made-3",
        synthetic_share=0.25,
    )


def test_teachers_bring_their_share_and_their_temperature() -> None:
    asked = add_variant(ASKED, parse_variant("teacher=/a/seed{n},teacher=/b,temperature=3"), 1)
    assert asked.teachers == (Path("/a/seed1"), Path("/b"))
    assert asked.ingredients == Ingredients(distillation=0.5, temperature=3.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "mixup",
        "mixup=",
        "mixup=nan",
        "mixup=1,mixup=2",
        "last=1",
        "synthetic=",
        "rotation=3",
        "seed=4",
    ],
)
def test_what_no_recipe_takes_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--with"):
        parse_variant(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("synthetic-share=0.3", "of nothing"),
        ("temperature=2", "is for --teacher"),
        ("erasing=2", "--erasing 2"),
    ],
)
def test_what_makes_no_sense_together_is_refused_before_anything_is_trained(
    options: StudyOptions, text: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said), open_study(replace(options, variants=(text,))):
        pass
    assert not (options.out / STUDY_FILE).exists()


def test_each_is_a_row_more_of_every_network(options: StudyOptions) -> None:
    asked = replace(options, augmentation=(True,), seeds=1, variants=("mixup=0.2", "erasing=0.25,last"))
    with open_study(asked) as study:
        assert [one.folder for one in study.trainings] == [
            "cnn-augmented-seed0", "dsc-augmented-seed0",
            "cnn-augmented-mixup=0.2-seed0", "dsc-augmented-mixup=0.2-seed0",
            "cnn-augmented-erasing=0.25_last-seed0", "dsc-augmented-erasing=0.25_last-seed0",
        ]  # fmt: skip
        assert study.trainings[-1].title == "dsc aug. + erasing=0.25 last, seed 0"
        plain, last = (study.train_options(study.trainings[at]) for at in (0, -1))
        assert (plain.ingredients, plain.last) == (Ingredients(), False)
        assert (last.ingredients, last.last, last.augmentation) == (Ingredients(erasing=0.25), True, True)
        assert last.out == options.out / "dsc-augmented-erasing=0.25_last-seed0"


def test_the_papers_rows_come_first_so_that_they_can_teach(options: StudyOptions) -> None:
    with open_study(replace(options, networks=("dsc",), seeds=1, variants=("last",))) as study:
        assert [one.title for one in study.settings] == ["dsc", "dsc aug.", "dsc + last", "dsc aug. + last"]


def test_two_of_one_name_are_refused(options: StudyOptions) -> None:
    asked = replace(options, variants=("synthetic=/a/made", "synthetic=/b/made"))
    with pytest.raises(UsageError, match="have the same name"), open_study(asked):
        pass


@pytest.mark.parametrize("what", ["synthetic", "teacher"])
def test_what_is_not_there_is_refused_before_anything_is_trained(
    options: StudyOptions, tmp_path: Path, what: str
) -> None:
    asked = replace(options, variants=(f"{what}={tmp_path}/none-{{n}}",))
    with pytest.raises(ArtefactError, match="none-0"), open_study(asked):
        pass
    assert not (options.out / STUDY_FILE).exists()


def test_a_network_of_the_study_may_teach_before_it_is_trained(options: StudyOptions) -> None:
    teacher = options.out / ".." / options.out.name / "cnn-plain-seed{n}"
    with open_study(replace(options, variants=(f"teacher={teacher}",))) as study:
        asked = study.train_options(study.trainings[-1])
        assert asked.teachers == (options.out / "cnn-plain-seed1",)


def test_other_variants_are_another_study(options: StudyOptions) -> None:
    with open_study(replace(options, variants=("mixup=0.2", "last"))):
        pass
    with (
        pytest.raises(UsageError, match=r"holds a study with --with mixup=0\.2 --with last "),
        open_study(options),
    ):
        pass


def test_a_study_of_version_1_goes_on(options: StudyOptions) -> None:
    with open_study(options) as begun:
        pass
    file = options.out / STUDY_FILE
    body = STUDY.to_builtins(begun.plan)
    del body["variants"]
    sealed = {"study_sha256": sha256_bytes(canonical_json(body))}
    file.write_text(json.dumps({"kind": STUDY.name, "schema_version": 1, **body, **sealed}))
    assert load_study(options.out).plan == begun.plan
    with open_study(options):
        pass


def test_a_variant_is_held_against_the_same_without_it(options: StudyOptions, tmp_path: Path) -> None:
    wrong = {("cnn", ""): [0, 1], ("dsc", ""): [0, 1, 2], ("cnn", "last"): [0], ("dsc", "last"): [2]}
    asked = replace(options, augmentation=(False,), variants=("last",))
    with open_study(asked) as study:
        for training in study.trainings:
            leave_answers(study, training, wrong[training.setting.network, training.setting.variant])
        done = conclude(study, {}, bench=None, progress=lambda phase, count, total: None)
    report, page = done.report, done.files["page"].read_text(encoding="utf-8")
    assert all(
        f">{name}<" in page for name in ("dsc + last against cnn + last", "+ last (cnn)", "+ last (dsc)")
    )
    assert [(one.reference, one.candidate) for one in report.differences] == [
        ("cnn", "dsc"), ("cnn + last", "dsc + last"), ("cnn", "cnn + last"), ("dsc", "dsc + last"),
    ]  # fmt: skip
    assert [round(12 * one.accuracy.difference) for one in report.differences] == [-1, 0, 1, 2]
    assert [one.difference.candidate for one in report.verdicts] == [
        "dsc"
    ]  # the paper's claim has no ingredients
    assert [(one.setting, one.published is None) for one in report.networks] == [
        (Setting("cnn", False), False), (Setting("dsc", False), False),
        (Setting("cnn", False, "last"), True), (Setting("dsc", False, "last"), True),
    ]  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(rows_of(report))))
    assert {(row["network"], row["variant"]) for row in rows} == set(wrong)
    REPORT.save(tmp_path / "report.json", report)
    assert REPORT.load(tmp_path / "report.json") == report


def test_a_report_of_version_1_is_read(options: StudyOptions, tmp_path: Path) -> None:
    with open_study(replace(options, augmentation=(False,))) as study:
        for training in study.trainings:
            leave_answers(study, training, [0])
        report = make_report(study, finished(study), {})
    body = REPORT.to_builtins(report)
    del body["plan"]["variants"]
    for network in body["networks"]:
        del network["variant"]
    sealed = {"report_sha256": sha256_bytes(canonical_json(body))}
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"kind": REPORT.name, "schema_version": 1, **body, **sealed}))
    assert REPORT.load(file) == report


def test_a_variant_of_a_training_is_in_its_title_and_its_folder() -> None:
    training = Training(Setting("dsc", True, "synthetic=/far/away/made-{n}"), seed=2)
    assert training.title == "dsc aug. + synthetic=made-{n}, seed 2"
    assert training.folder == "dsc-augmented-synthetic=made-_n_-seed2"
