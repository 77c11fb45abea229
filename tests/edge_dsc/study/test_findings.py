"""From made answers to the paper's table, the verdict, and the files that a study leaves."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator
from made_study import leave_answers

from edge_dsc.study.findings import (
    LATENCY_FILE,
    PUBLISHED,
    REPORT,
    REPORT_FILE,
    StudyReport,
    conclude,
    finished,
    make_report,
    problem_of,
    render_study,
    rows_of,
    study_tables,
    verdict_words,
)
from edge_dsc.study.run_study import Problem
from edge_dsc.study.trainings import Setting, Study, StudyOptions, Training, open_study
from edge_dsc.study.verdict import Spread
from edge_dsc.training.run_folder import save_training_record
from engines.errors import EnvironmentProblem, UnstableError

# Wrong answers of twelve, by network without augmentation and seed; with augmentation none is wrong.
WRONG = {"cnn": ([0, 1], [0, 1, 2]), "dsc": ([0, 1, 2], [0, 1, 2, 3])}
DIVERGED = Problem(exit_code=7, what="training diverged: the loss is nan", remedy="another seed")


def ignore(phase: str, done: int, total: int) -> None:
    pass


def leave_all(study: Study, leave_out: Sequence[str] = ()) -> None:
    for training in study.trainings:
        setting = training.setting
        if training.title not in leave_out:
            leave_answers(
                study, training, [] if setting.augmentation else WRONG[setting.network][training.seed]
            )


@pytest.fixture
def report(study: Study) -> StudyReport:
    leave_all(study)
    return make_report(study, finished(study), {}, notes=["latency was not measured: bench was left out"])


def table(report: StudyReport, title: str) -> tuple[tuple[str, ...], ...]:
    return next(one.rows for one in study_tables(report) if one.title.startswith(title))


def test_the_published_figures_are_the_papers() -> None:
    """The paper's Table 2, accuracy, loss, precision, recall, F1."""
    text = """
    cnn 0 72.96 12.43 77.67 74.67 75.33
    dsc 0 71.07 11.55 77.67 70.00 70.00
    cnn 1 74.55 11.37 79.56 77.67 78.33
    dsc 1 73.97 10.54 79.56 75.67 78.33
    resnet50v2 0 63.74 21.88 68.67 63.00 62.33
    inceptionv3 0 54.32 35.44 57.00 54.00 47.33
    resnet50v2 1 66.64 22.77 70.33 65.00 66.67
    inceptionv3 1 56.41 33.41 63.00 57.00 53.00
    """
    found = {
        (name, on): [f"{value:.2f}" for value in (one.accuracy, one.loss, one.precision, one.recall, one.f1)]
        for (name, on), one in PUBLISHED.items()
    }
    rows = [line.split() for line in text.strip().splitlines()]
    assert found == {(row[0], row[1] == "1"): row[2:] for row in rows}


def test_every_network_over_its_seeds(report: StudyReport) -> None:
    plain, dsc, augmented, _ = report.networks
    assert (plain.network, plain.augmentation, plain.trainings) == ("cnn", False, (0, 1))
    # Only evaluation and test judge: twelve images, of six patients, in each of two seeds.
    assert (plain.quality.rows, plain.quality.images, plain.quality.patients) == (24, 12, 6)
    assert plain.quality.accuracy == Spread.of([10 / 12, 9 / 12])
    assert plain.quality.pooled_accuracy.value == pytest.approx(19 / 24)
    assert augmented.quality.accuracy == Spread.of([1.0, 1.0])
    assert plain.published == PUBLISHED["cnn", False]
    assert {found.images for found in dsc.quality.per_class.values()} == {8}


def test_engines_are_held_against_fp32(report: StudyReport) -> None:
    (fp32, int8), (_, augmented) = report.networks[0].engines, report.networks[2].engines
    assert fp32.agreement == Spread.of([1.0, 1.0])
    assert fp32.accuracy == report.networks[0].quality.accuracy
    # INT8 is wrong on image 0, on which FP32 is right only with augmentation.
    assert (int8.agreement, int8.accuracy) == (Spread.of([1.0, 1.0]), fp32.accuracy)
    assert augmented.agreement == augmented.accuracy == Spread.of([11 / 12, 11 / 12])
    assert (int8.engine_bytes, int8.median_ms) == (420_000, None)


def test_confusion_of_three_sides(report: StudyReport) -> None:
    found = report.networks[0].confusion
    assert list(found) == ["training", "validation", "testing"]
    assert found["training"] == found["validation"] == ((2, 0, 0), (0, 2, 0), (0, 0, 2))
    # Image 0 is wrong in both seeds, and so is image 1; image 2 in one.
    assert found["testing"] == ((6, 2, 0), (0, 6, 2), (1, 0, 7))


def test_networks_are_held_against_cnn_and_against_themselves(report: StudyReport) -> None:
    assert [(one.reference, one.candidate) for one in report.differences] == [
        ("cnn", "dsc"), ("cnn aug.", "dsc aug."), ("cnn", "cnn aug."), ("dsc", "dsc aug."),
    ]  # fmt: skip
    first = report.differences[0]
    assert (first.lost, first.won, first.rows) == (2, 0, 24)
    assert first.by_training == pytest.approx((-1 / 12, -1 / 12))


def test_the_verdicts_are_of_dsc_against_cnn(report: StudyReport) -> None:
    assert [one.difference.candidate for one in report.verdicts] == ["dsc", "dsc aug."]
    assert [one.answer for one in report.verdicts] == ["not decided", "not decided"]
    assert {one.margin for one in report.verdicts} == {2.0}
    first = verdict_words(report.verdicts[0])
    assert first.startswith(
        "Is dsc not inferior to cnn by more than 2 points? Not decided: the difference of accuracy is -8.33 points, "
    )
    assert "over 24 pairs of answers on 12 images of 6 patients." in first
    assert "images would decide it with a chance of 80 %" in first
    assert first.endswith(
        "This is of these trainings: fewer than three do not say how others would come out."
    )


def test_the_papers_table_has_the_published_figures_beside_ours(report: StudyReport) -> None:
    rows = table(report, "The paper's Table 2")
    assert [row[0] for row in rows] == [
        "cnn", "  published: Model-1", "dsc", "  published: Model-2",
        "cnn aug.", "  published: Model-1 Aug.", "dsc aug.", "  published: Model-2 Aug.",
    ]  # fmt: skip
    assert rows[0][1] == "79.17 ± 5.89"
    assert rows[1][1:] == ("72.96", "", "(12.43 %)", "77.67", "74.67", "75.33")
    notes = next(one.notes for one in study_tables(report) if one.title.startswith("The paper's"))
    assert any("the paper's own images" in note and "not comparable" in note for note in notes)


def test_the_other_tables(report: StudyReport) -> None:
    assert table(report, "Size")[1] == ("dsc", "4,640", "406,307", "36.5 M", "1,600")
    assert len(table(report, "Each class")) == 12
    assert table(report, "Engines")[1][:5] == (
        "cnn: onnxruntime int8", "420", "79.17 ± 5.89", "100.00 ± 0.00", "",
    )  # fmt: skip
    assert table(report, "Trainings")[0] == (
        "cnn, seed 0",
        "12",
        "83.33",
        "0.832",
        "3",
        "2",
        "cnn-plain-seed0",
    )
    engines = next(one for one in study_tables(report) if one.title == "Engines")
    assert engines.notes[-2:] == ("INT8 is slower here", "latency was not measured: bench was left out")


def test_the_schema_is_of_what_is_written(report: StudyReport) -> None:
    """The file is what the classes say: json.dumps(REPORT.json_schema(), indent=1) and a newline."""
    kept = resources.files("edge_dsc.study").joinpath("study-report.schema.json").read_text(encoding="utf-8")
    schema = json.loads(kept)
    assert schema == REPORT.json_schema()
    Draft202012Validator.check_schema(schema)
    written = json.loads(REPORT.dumps(report))
    check = Draft202012Validator(schema)
    assert list(check.iter_errors(written)) == []
    for wrong in ({**written, "more": 1}, {**written, "schema_version": 1}, {**written, "networks": None}):
        assert list(check.iter_errors(wrong))


def test_rows_for_other_programs(report: StudyReport) -> None:
    rows = list(csv.DictReader(io.StringIO(rows_of(report))))
    assert len(rows) == 4 * 2 * 2  # networks, engines, seeds
    assert rows[0] == {
        "network": "cnn", "augmentation": "0", "variant": "", "training": "0",
        "runtime": "onnxruntime", "precision": "fp32",
        "accuracy": "0.833333", "agreement_with_fp32": "1.000000", "engine_bytes": "1600000",
        "parameters": "406307", "multiply_adds": "36453056",
    }  # fmt: skip


@pytest.mark.slow
def test_the_files_that_it_leaves(study: Study) -> None:
    leave_all(study)
    result = conclude(study, {}, bench=None, progress=ignore)
    assert REPORT.load(study.folder / REPORT_FILE) == result.report
    text = (study.folder / "study.md").read_text()
    assert text.startswith("# Study of cnn, dsc over 2 seeds, recipe paper\n")
    assert all(f"### {one.title}" in text for one in study_tables(result.report))
    page = (study.folder / "study.html").read_text()
    assert page.count("data:image/png;base64,") == 5  # the curves, and a confusion of each network
    assert (
        page.count("<svg") - page.count('<svg viewBox="0 0 30 10"') == 1 + 4 * 2
    )  # differences; ROC, reliability
    assert page.count('<svg viewBox="0 0 30 10"') == 4 * 3  # a swatch for each class
    assert verdict_words(result.report.verdicts[0]) in page.replace("&#39;", "'")
    assert {path.name for path in study.folder.glob("*.png")} == {
        "curves.png", "confusion-cnn-plain.png", "confusion-dsc-plain.png",
        "confusion-cnn-augmented.png", "confusion-dsc-augmented.png",
    }  # fmt: skip
    assert not (study.folder / LATENCY_FILE).exists()
    assert result.problem is None


def test_one_that_diverged_is_told_and_the_rest_is_reported(study: Study) -> None:
    leave_all(study, ["dsc, seed 1"])
    failed = {next(one for one in study.trainings if one.title == "dsc, seed 1"): DIVERGED}
    report = make_report(study, finished(study), failed)
    assert table(report, "Trainings")[-1] == (
        "dsc, seed 1", "", "failed", "", "", "", "exit code 7: training diverged: the loss is nan",
    )  # fmt: skip
    # Only the seed that both have is a pair.
    assert report.differences[0].by_training == pytest.approx((-1 / 12,))
    problem = problem_of(failed, 8)
    assert isinstance(problem, UnstableError)
    assert str(problem).startswith(
        "1 of 8 trainings failed, the report is of the others: dsc, seed 1: training"
    )


def test_a_failure_that_is_no_divergence_decides_the_exit_code(study: Study) -> None:
    killed = Problem(exit_code=3, what="killed", remedy="go on")
    one, other, *_ = study.trainings
    assert isinstance(problem_of({one: DIVERGED, other: killed}, 8), EnvironmentProblem)
    assert problem_of({}, 8) is None


def test_a_study_in_which_all_failed_has_no_report(study: Study) -> None:
    with pytest.raises(UnstableError, match="no training went to its end; cnn, seed 0: training diverged"):
        conclude(study, dict.fromkeys(study.trainings, DIVERGED), bench=None, progress=ignore)
    assert not (study.folder / REPORT_FILE).exists()


@pytest.mark.slow
def test_one_network_alone_has_no_verdict(options: StudyOptions) -> None:
    with open_study(replace(options, networks=("dsc",), augmentation=(True,), seeds=1)) as study:
        leave_all(study)
        report = conclude(study, {}, bench=None, progress=ignore).report
    assert report.verdicts == report.differences == ()
    assert "There is no verdict: it needs cnn and dsc." in (study.folder / "study.html").read_text()
    assert "Differences" not in render_study(report)


def test_folds_are_named_as_such(options: StudyOptions) -> None:
    with open_study(replace(options, seeds=None, folds=3, networks=("dsc",), augmentation=(False,))) as study:
        for training in study.trainings:
            leave_answers(study, training, [0])
        report = make_report(study, finished(study), {})
    assert report.networks[0].trainings == (1, 2, 3)
    assert "standard deviation over the folds" in render_study(report)


def test_what_it_says_is_json(report: StudyReport) -> None:
    document: Mapping[str, Any] = REPORT.to_builtins(report)
    assert json.loads(json.dumps(document, allow_nan=False))["plan"]["margin"] == 2.0


def test_a_title_in_the_curves_is_the_setting() -> None:
    assert Training(Setting("a, b.keras", True), seed=3).title.rpartition(", ")[0] == "a--b.keras aug."


def test_a_note_of_every_training_stands_once_for_its_network(study: Study) -> None:
    for training in study.trainings:
        leave_answers(
            study, training, [], notes=(f"fp16 left out of {training.folder}: it runs nowhere here",)
        )
    said = make_report(study, finished(study), {}).notes
    assert said == tuple(f"fp16 left out of {name}: it runs nowhere here" for name in ("cnn", "dsc"))


def test_images_that_no_training_could_read_are_told(study: Study) -> None:
    leave_all(study)
    bad = (("a/zero.jpg", "x/a/zero.jpg is empty (0 bytes)"), ("b/text.png", "x/b/text.png is no image"))
    for training in study.trainings[:2]:  # both of seed 0 met the same two
        record = study.trained(training)
        assert record is not None
        save_training_record(study.run_folder(training), msgspec.structs.replace(record, skipped=bad))
    said = make_report(study, finished(study), {}).notes
    assert said == (
        "2 images were left out of the data, the first: x/a/zero.jpg is empty (0 bytes)",
        "INT8 is slower here",
    )
