from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from msgspec.structs import replace

from bench.compare import compare_subjects, control_subject
from bench.measure import Subject, always_open, measure
from bench.plan import Plan
from bench.report import (
    MOST_EXACT,
    REPORT,
    Report,
    Storage,
    as_samples,
    compact_report,
    encode_samples,
    load_report,
    save_report,
)
from bench.statistics import summarise
from bench.tables import render_report
from engines.errors import ArtefactError
from engines.files import canonical_json, sha256_bytes

Make = Callable[..., Any]


@pytest.fixture
def saved(tmp_path: Path, subject: Callable[..., Any], report: Callable[..., Report]) -> Path:
    path = tmp_path / "report.json"
    save_report(
        path, report(subject("cnn", [[300, 310], [305]]), subject("dsc", [[100], [101]], error="gone"))
    )
    return path


def rewrite(path: Path, change: Callable[[dict[str, Any]], object], version: int = REPORT.version) -> None:
    """Change a report and seal it again, as a foreign tool with our seal would."""
    body = json.loads(path.read_text())
    for key in ("kind", "schema_version", "report_sha256"):
        del body[key]
    change(body)
    seal = sha256_bytes(canonical_json(body))
    document = {"kind": REPORT.name, "schema_version": version, **body, "report_sha256": seal}
    path.write_text(json.dumps(document))


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
        [Subject(name="a", open=always_open(lambda: None), description={"switches": {"spin": True}})],
        Plan(iterations=9, warmup_seconds=0),
    )
    save_report(tmp_path / "r.json", made)
    assert load_report(tmp_path / "r.json") == made


def test_the_document_says_what_it_is(saved: Path) -> None:
    document = json.loads(saved.read_text())
    assert list(document)[:2] == ["kind", "schema_version"]
    assert (document["kind"], document["schema_version"]) == ("edge-dsc/latency-report", 4)
    assert document["subjects"][0]["blocks"][0]["samples_ns"] == encode_samples(as_samples([300, 310]))


def make_version_3(body: dict[str, Any]) -> None:
    """As it was before turns were kept."""
    for subject in body["subjects"]:
        for block in subject["blocks"]:
            del block["turns_ns"]


def test_a_report_of_version_3_loads_without_turns(saved: Path) -> None:
    expected = load_report(saved)
    rewrite(saved, make_version_3, version=3)
    assert load_report(saved) == expected
    assert all(block.turns_ns is None for subject in expected.subjects for block in subject.blocks)


def make_version_2(body: dict[str, Any]) -> None:
    """As it was before engines were opened more than once: no openings, no turns."""
    make_version_3(body)
    del body["plan"]["openings"], body["plan"]["turn_seconds"]
    for subject in body["subjects"]:
        for block in subject["blocks"]:
            del block["opening"]


def opened_once(report: Report) -> Report:
    plan = replace(report.plan, openings=1, turn_seconds=None)
    subjects = [
        replace(subject, blocks=tuple(replace(block, opening=0) for block in subject.blocks))
        for subject in report.subjects
    ]
    return replace(report, plan=plan, subjects=tuple(subjects))


def test_a_report_of_version_2_loads_as_one_opening(saved: Path) -> None:
    expected = opened_once(load_report(saved))
    rewrite(saved, make_version_2, version=2)
    assert load_report(saved) == expected


def test_a_report_of_version_1_loads(saved: Path) -> None:
    """As the first release wrote it: no storage, states, controls, passes, stages, drops and rate."""

    def age(body: dict[str, Any]) -> None:
        make_version_2(body)
        del body["storage"], body["states"], body["plan"]["fps"]
        for subject in body["subjects"]:
            del subject["control_of"], subject["passes"]
            for block in subject["blocks"]:
                del block["stages_ns"], block["dropped"]

    expected = opened_once(load_report(saved))
    rewrite(saved, age, version=1)
    assert load_report(saved) == expected


def test_plain_lists_of_samples_load(saved: Path) -> None:
    def change(body: dict[str, Any]) -> None:
        body["subjects"][0]["blocks"][0]["samples_ns"] = [7, 8]

    rewrite(saved, change)
    assert list(load_report(saved).subjects[0].samples_ns) == [7, 8, 305]


def block(**fields: object) -> Callable[[Any], object]:
    return lambda body: body["subjects"][0]["blocks"][0].update(fields)


def subject_with(**fields: object) -> Callable[[Any], object]:
    return lambda body: body["subjects"][0].update(fields)


FIRST = r"\$\.subjects\[0\]"
BLOCK = FIRST + r"\.blocks\[0\]"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (block(samples_ns=[]), rf"there are no samples - at `{BLOCK}\.samples_ns`"),
        (block(samples_ns=[4, -1]), rf"sample -1 is negative - at `{BLOCK}\.samples_ns`"),
        (block(samples_ns="rubbish!"), rf"the packed samples are damaged.* - at `{BLOCK}\.samples_ns`"),
        (block(samples_ns=[1.5]), rf"sample 1.5 is not a whole number .* - at `{BLOCK}\.samples_ns`"),
        (block(samples_ns=None), rf"samples are NoneType, .* - at `{BLOCK}\.samples_ns`"),
        (block(round=-1), f"round is -1 - at `{BLOCK}`"),
        (block(opening=-1), f"opening is -1 - at `{BLOCK}`"),
        (block(round="1"), rf"Expected `int`, got `str` - at `{BLOCK}\.round`"),
        (block(refused=True), rf"Expected `int`, got `bool` - at `{BLOCK}\.refused`"),
        (block(stages_ns={"h2d": -1}), f"stage 'h2d' took -1.0 ns - at `{BLOCK}`"),
        (block(stages_ns={"h2d": "1"}), rf"Expected `float`, got `str` - at `{BLOCK}\.stages_ns"),
        (lambda body: body["subjects"][0]["blocks"][0].pop("samples_ns"), "required field `samples_ns`"),
        (block(colour="red"), f"unknown field `colour` - at `{BLOCK}`"),
        (subject_with(colour="red"), f"unknown field `colour` - at `{FIRST}`"),
        (subject_with(name=None), rf"Expected `str`, got `null` - at `{FIRST}\.name`"),
        (
            subject_with(warmup={"seconds": "2"}),
            rf"Expected `float`, got `str` - at `{FIRST}\.warmup\.seconds`",
        ),
        (subject_with(passes=[]), rf"Expected `object`, got `array` - at `{FIRST}\.passes`"),
        *(
            (
                lambda body, field=field, value=value: body.update(states=[{field: value}]),
                rf"`\$\.states\[0\]\.{field}",
            )
            for field, value in (
                ("throttle_events", {"a": 1}),
                ("cooling", 1.5),
                ("cooling", [[]]),
                ("ran_ns", ""),
                ("waited_ns", [5]),
            )
        ),
        (
            subject_with(description={"batch": "1"}),
            r"Expected `int`, got `str` - at `\$\.descriptions\[0\]\.batch",
        ),
        (
            subject_with(passes={"limits": {"bytes": 1}}),
            r"missing required field `.*` - at `\$\.passes\[0\]\.limits",
        ),
        (subject_with(passes={"power": {}}), r"Expected `array`, got `object` - at `\$\.passes\[0\]\.power"),
        (
            subject_with(passes={"memory": {"error": 5}}),
            r"Expected `str`, got `int` - at `\$\.passes\[0\]\.memory",
        ),
        (lambda body: body["subjects"].append(body["subjects"][0]), "two subjects have the same name"),
        (lambda body: body["subjects"].clear(), "it holds no measured subject"),
        (lambda body: body["subjects"][1].update(control_of="x"), "'dsc' controls 'x', which is not there"),
        (lambda body: body.pop("plan"), "required field `plan`"),
        (lambda body: body["plan"].update(seconds=-1), "the duration is -1 s"),
        (
            lambda body: body["plan"].update(seconds="long"),
            r"Expected `int \| float`, got `str` - at `\$\.plan\.s",
        ),
        (lambda body: body["plan"].update(pace=1), r"unknown field `pace` - at `\$\.plan`"),
        (lambda body: body["storage"].update(x=1), r"unknown field `x` - at `\$\.storage`"),
        (lambda body: body.update(subjects=None), r"Expected `array`, got `null` - at `\$\.subjects`"),
        (lambda body: body.update(environment=3), r"Expected `object`, got `int` - at `\$\.environment`"),
    ],
)
def test_impossible_reports_are_refused_by_the_field(
    saved: Path, change: Callable[[dict[str, Any]], object], text: str
) -> None:
    rewrite(saved, change)
    with pytest.raises(
        ArtefactError, match=rf"report\.json is no readable edge-dsc/latency-report: .*{text}"
    ) as caught:
        load_report(saved)
    assert str(saved) in caught.value.what
    assert caught.value.remedy == "make it again: edge-dsc bench ENGINE..."


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('"round": 1', '"round": 5', "was edited after it was made"),
        ('"cpu": "Cortex-A78AE"', '"cpu": "Cortex-X"', "was edited after it was made"),
        (
            '"schema_version": 4',
            '"schema_version": 5',
            "has schema version 5, this edge-dsc reads 1 and 2 and 3 and 4",
        ),
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


def lognormal(seed: int, blocks: int, count: int) -> list[list[int]]:
    return np.random.default_rng(seed).lognormal(np.log(5e5), 0.05, (blocks, count)).astype(int).tolist()


def test_a_report_of_ordinary_length_stays_as_it_is(subject: Make, report: Make) -> None:
    made = report(subject("a", lognormal(0, 6, 100)))
    assert compact_report(made) is made
    assert compact_report(made, most_exact=600) is made
    assert made.storage == Storage(in_order=True, significant_bits=None)
    assert MOST_EXACT == 1_000_000


def test_what_a_long_report_says_stays_within_the_rounding(subject: Make, report: Make) -> None:
    made = report(subject("a", lognormal(0, 20, 2000)), subject("b", lognormal(1, 20, 2000)))
    small = compact_report(made, most_exact=10)
    for exact, rounded in zip(made.subjects, small.subjects, strict=True):
        left, right = summarise(exact), summarise(rounded)
        assert left.count == right.count == 40_000
        assert right.median == pytest.approx(left.median, rel=1 / 4096)
        for percentile, found in left.tails.items():
            close = right.tails[percentile]
            assert found is not None and close is not None
            assert close.bound == pytest.approx(found.bound, rel=1 / 4096)
    assert compare_subjects(small, "a", "b").ratio.value == pytest.approx(
        compare_subjects(made, "a", "b").ratio.value, rel=1 / 2048
    )
    assert "* every call is kept, rounded to 12 significant bits (0.024 %)" in render_report(small)


def test_a_long_report_of_eight_engines_is_small(subject: Make, report: Make, tmp_path: Path) -> None:
    # A tenth of the blocks of eight engines of half a millisecond over 600 s; the page's 5 MiB are 512 KiB here.
    made = report(*(subject(f"e{index}", lognormal(index, 30, 4000)) for index in range(8)))
    small = compact_report(made, most_exact=100_000)
    save_report(tmp_path / "r.json", small)
    assert (tmp_path / "r.json").stat().st_size < 512 * 1024
    assert load_report(tmp_path / "r.json") == small


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

    first = Subject(
        name="a", open=always_open(lambda: None), description={"batch": 1, "switches": {"spin": True}}
    )
    subjects = [first, Subject(name="b", open=always_open(fails)), control_subject(first)]
    return measure(subjects, Plan(iterations=40, rounds=8, warmup_seconds=0.01))


def test_the_schema_is_of_the_version_that_is_written(schema: Any) -> None:
    assert schema.schema["properties"]["schema_version"] == {"const": REPORT.version}


def test_reports_as_they_are_written_fit(schema: Any, measured: Report, tmp_path: Path) -> None:
    memory = {"host_peak_bytes": 80 << 20, "host_before_bytes": 70 << 20, "device_bytes": None}
    first, second, control = measured.subjects
    passes = (
        replace(first, passes={"memory": memory}),
        replace(second, passes={"memory": {"error": "the process was killed by signal 9"}}),
        control,
    )
    for report in (
        measured,
        compact_report(measured, most_exact=0),
        replace(measured, interrupted=True),
        replace(measured, subjects=passes),
    ):
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
        lambda body: body["subjects"][0]["passes"].update(memory={"host_peak_bytes": "many"}),
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
def test_the_reports_kept_in_the_repository_load_and_fit(schema: Any, path: Path, tmp_path: Path) -> None:
    loaded = load_report(path)
    assert loaded.measured
    assert list(schema.iter_errors(written(loaded, tmp_path))) == []
