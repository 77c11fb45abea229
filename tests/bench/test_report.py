from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.measure import Subject, measure
from bench.plan import Plan
from bench.report import KIND, SCHEMA_VERSION, Report, load_report, save_report
from bench.samples import as_samples, encode_samples
from engines.errors import ArtefactError
from engines.files import canonical_json, sha256_bytes, write_document


@pytest.fixture
def saved(tmp_path: Path, subject: Callable[..., Any], report: Callable[..., Report]) -> Path:
    path = tmp_path / "report.json"
    save_report(
        path, report(subject("cnn", [[300, 310], [305]]), subject("dsc", [[100], [101]], error="gone"))
    )
    return path


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a report and seal it again, as a foreign tool with our seal would."""
    body = json.loads(path.read_text())
    for key in ("kind", "schema_version", "report_sha256"):
        del body[key]
    change(body)
    write_document(path, KIND, SCHEMA_VERSION, {**body, "report_sha256": sha256_bytes(canonical_json(body))})


def test_what_was_derived_from_a_report_is_not_written(saved: Path, tmp_path: Path) -> None:
    loaded = load_report(saved)
    first = loaded.subjects[0]
    assert ([block.median_ns for block in first.blocks], list(first.ordered_ns)) == (
        [305.0, 305.0],
        [300, 305, 310],
    )
    save_report(tmp_path / "again.json", loaded)
    assert (tmp_path / "again.json").read_bytes() == saved.read_bytes()


def test_round_trip(saved: Path, subject: Callable[..., Any], report: Callable[..., Report]) -> None:
    loaded = load_report(saved)
    assert loaded == report(subject("cnn", [[300, 310], [305]]), subject("dsc", [[100], [101]], error="gone"))
    assert list(loaded.subjects[0].samples_ns) == [300, 310, 305]
    assert [found.name for found in loaded.failed] == ["dsc"]


def test_a_measured_report_comes_back_equal(tmp_path: Path) -> None:
    made = measure(
        [Subject(name="a", call=lambda: None, description={"switches": {"spin": True}})],
        Plan(iterations=9, warmup_seconds=0),
    )
    save_report(tmp_path / "r.json", made)
    assert load_report(tmp_path / "r.json") == made


def test_the_document_says_what_it_is(saved: Path) -> None:
    document = json.loads(saved.read_text())
    assert list(document)[:2] == ["kind", "schema_version"]
    assert (document["kind"], document["schema_version"]) == ("edge-dsc/latency-report", 2)
    assert document["subjects"][0]["blocks"][0]["samples_ns"] == encode_samples(as_samples([300, 310]))


def test_a_report_of_version_1_loads(saved: Path) -> None:
    """As the first release wrote it: no storage, controls and stages."""
    expected = load_report(saved)
    body = json.loads(saved.read_text())
    for key in ("kind", "schema_version", "report_sha256"):
        del body[key]
    del body["storage"], body["states"]
    for subject in body["subjects"]:
        del subject["control_of"], subject["passes"]
        for block in subject["blocks"]:
            del block["stages_ns"]
    write_document(saved, KIND, 1, {**body, "report_sha256": sha256_bytes(canonical_json(body))})
    assert load_report(saved) == expected


def test_plain_lists_of_samples_load(saved: Path) -> None:
    def change(body: dict[str, Any]) -> None:
        body["subjects"][0]["blocks"][0]["samples_ns"] = [7, 8]

    rewrite(saved, change)
    assert list(load_report(saved).subjects[0].samples_ns) == [7, 8, 305]


def _block(body: dict[str, Any], value: object) -> None:
    body["subjects"][0]["blocks"][0]["samples_ns"] = value


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda body: _block(body, []), "subject 'cnn': there are no samples"),
        (lambda body: _block(body, [4, -1]), "subject 'cnn': sample -1 is negative"),
        (lambda body: _block(body, "rubbish!"), "subject 'cnn': the packed samples are damaged"),
        (lambda body: _block(body, [1.5]), "subject 'cnn': sample 1.5 is not a whole number"),
        (lambda body: body["subjects"][0]["blocks"][0].pop("samples_ns"), "'samples_ns' is missing"),
        (lambda body: body["subjects"][0]["blocks"][0].update(round=-1), "round -1"),
        (
            lambda body: body["subjects"][0]["blocks"][0].update(stages_ns={"h2d": -1}),
            "stage 'h2d' took -1 ns",
        ),
        (lambda body: body["subjects"][0].update(colour="red"), "colour"),
        (lambda body: body["subjects"].append(body["subjects"][0]), "two subjects have the same name"),
        (lambda body: body["subjects"].clear(), "no measured subject"),
        (lambda body: body["subjects"][1].update(control_of="x"), "'dsc' controls 'x', which is not there"),
        (lambda body: body.pop("plan"), "'plan' is missing"),
        (lambda body: body.update(storage={"in_order": True, "x": 1}), "no readable latency report"),
        (lambda body: body["plan"].update(seconds=-1), "the duration is -1 s"),
        (lambda body: body["plan"].update(seconds="long"), "no readable latency report"),
        (lambda body: body.update(subjects=None), "no readable latency report"),
        (lambda body: body.update(environment=3), "no readable latency report"),
    ],
)
def test_impossible_reports_are_refused(
    saved: Path, change: Callable[[dict[str, Any]], None], text: str
) -> None:
    rewrite(saved, change)
    with pytest.raises(ArtefactError, match=text) as caught:
        load_report(saved)
    assert str(saved) in caught.value.what
    assert caught.value.remedy == "measure again: edge-dsc bench ENGINE..."


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('"round": 1', '"round": 5', "was edited after it was made"),
        ('"cpu": "Cortex-A78AE"', '"cpu": "Cortex-X"', "was edited after it was made"),
        ('"schema_version": 2', '"schema_version": 3', "has schema version 3, this edge-dsc reads 1 and 2"),
        ("edge-dsc/latency-report", "edge-dsc/engine-record", "is not an edge-dsc/latency-report document"),
        ('"cores": 6', '"cores": NaN', "NaN is not a JSON number"),
    ],
)
def test_edited_future_and_foreign_reports_are_refused(saved: Path, old: str, new: str, text: str) -> None:
    content = saved.read_text()
    assert old in content
    saved.write_text(content.replace(old, new, 1))
    with pytest.raises(ArtefactError, match=text):
        load_report(saved)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_files_that_are_no_report_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"r\.json"):
        load_report(path)


def test_truncated_and_missing_reports_are_refused(saved: Path) -> None:
    saved.write_text(saved.read_text()[:-40])
    with pytest.raises(ArtefactError, match="is not valid JSON"):
        load_report(saved)
    with pytest.raises(ArtefactError, match="cannot read"):
        load_report(saved.with_name("none.json"))
