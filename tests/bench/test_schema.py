"""The published description of the report against reports as they are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from bench.compare import control_subject
from bench.measure import Subject, measure
from bench.plan import Plan
from bench.report import SCHEMA_VERSION, Report, compact_report, load_report, save_report


@pytest.fixture(scope="module")
def schema() -> Any:
    text = resources.files("bench").joinpath("latency-report.schema.json").read_text(encoding="utf-8")
    found = json.loads(text)
    Draft202012Validator.check_schema(found)
    return Draft202012Validator(found)


def written(report: Report, folder: Path) -> Any:
    save_report(folder / "r.json", report)
    return json.loads((folder / "r.json").read_text())


@pytest.fixture
def measured() -> Report:
    def fails() -> None:
        raise RuntimeError("gone")

    first = Subject(name="a", call=lambda: None, description={"batch": 1, "switches": {"spin": True}})
    subjects = [first, Subject(name="b", call=fails), control_subject(first)]
    return measure(subjects, Plan(iterations=40, rounds=8, warmup_seconds=0.01))


def test_the_schema_is_of_the_version_that_is_written(schema: Any) -> None:
    assert schema.schema["properties"]["schema_version"] == {"const": SCHEMA_VERSION}


def test_reports_as_they_are_written_fit(schema: Any, measured: Report, tmp_path: Path) -> None:
    for report in (measured, compact_report(measured, most_exact=0), replace(measured, interrupted=True)):
        assert list(schema.iter_errors(written(report, tmp_path))) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda body: body.pop("storage"),
        lambda body: body.update(colour="red"),
        lambda body: body.update(schema_version=1),
        lambda body: body["plan"].update(seconds=0),
        lambda body: body["subjects"].clear(),
        lambda body: body["subjects"][0].pop("control_of"),
        lambda body: body["subjects"][0]["blocks"][0].update(samples_ns=[-1]),
        lambda body: body["subjects"][0]["blocks"][0].update(samples_ns="no base64!"),
        lambda body: body["subjects"][0]["blocks"][0].update(round=-1),
    ],
)
def test_what_is_no_report_does_not_fit(
    schema: Any, measured: Report, tmp_path: Path, spoil: Callable[[Any], object]
) -> None:
    body = written(measured, tmp_path)
    spoil(body)
    assert list(schema.iter_errors(body))


KEPT = sorted((Path(__file__).resolve().parents[2] / "docs/reports").glob("*.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_the_reports_kept_in_the_repository_load_and_fit(schema: Any, path: Path) -> None:
    assert list(schema.iter_errors(json.loads(path.read_text()))) == []
    assert load_report(path).measured
