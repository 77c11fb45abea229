from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from bench.compare import Comparison, Rules
from bench.fleet import Fleet, compare_files, compare_fleet
from bench.report import Report, save_report
from bench.statistics import Verdict
from bench.tables import fleet_tables, render_comparison
from engines.errors import NotComparableError, UsageError

Make = Callable[..., Any]


def steady(value: int, count: int = 10) -> list[list[int]]:
    return [[value] * 3] * count


@pytest.fixture
def fleet(subject: Make, report: Make) -> dict[str, Report]:
    nano = {"machine": "x", "jetson": "Jetson Orin Nano", "cpu": "A78AE"}
    control = replace(subject("cnn (control)", steady(3_100_000)), control_of="cnn")
    return {
        "nano": report(
            subject("cnn", steady(3_000_000)), subject("dsc", steady(1_000_000)), environment=nano
        ),
        "nano2": report(subject("cnn", steady(3_000_000)), control, environment=nano),
        "rtx": report(
            subject("dsc", steady(250_000)),
            subject("tiny", steady(100_000)),
            subject("cnn", steady(200_000)),
            environment={"gpu": "RTX 4090", "machine": "PC"},
            interrupted=True,
        ),
        "blank": report(subject("dsc", steady(5_000_000)), subject("bad", [], error="gone"), environment={}),
    }


def test_a_matrix_of_devices_and_engines(fleet: dict[str, Report]) -> None:
    found = compare_fleet(fleet)
    assert found.engines == ("cnn", "dsc", "tiny")
    names = ["Jetson Orin Nano (nano)", "Jetson Orin Nano (nano2)", "RTX 4090", "unknown machine"]
    assert [device.name for device in found.devices] == names
    medians, ratios = fleet_tables(found)
    assert medians.header == ("device", "cnn", "dsc", "tiny")
    assert [row[1:] for row in medians.rows] == [
        ("3.000", "1.000", "-"),
        ("3.000", "-", "-"),
        ("0.200", "0.250", "0.100"),
        ("-", "5.000", "-"),
    ]
    assert ratios.title == "Ratio to cnn on the same device, 95 % interval"
    assert [row[1:] for row in ratios.rows] == [
        ("0.333 (0.333 to 0.333) faster", "-"),
        ("-", "-"),
        ("1.250 (1.250 to 1.250) slower", "0.500 (0.500 to 0.500) faster"),
        ("-", "-"),
    ]
    assert found.devices[2].ratios["tiny"].verdict is Verdict.FASTER


def test_a_slight_difference_on_one_device_is_named(subject: Make, report: Make) -> None:
    made = report(subject("cnn", steady(1000)), subject("dsc", steady(1010)))
    _, ratios = fleet_tables(compare_fleet(dict.fromkeys("abc", made)))
    assert {row[1] for row in ratios.rows} == {"1.010 (1.010 to 1.010) slightly slower"}


def test_what_makes_a_device_unfirm_is_named_with_it(fleet: dict[str, Report]) -> None:
    found = compare_fleet(fleet)
    lines = render_comparison(found).splitlines()
    assert "* RTX 4090: the measurement was interrupted" in lines
    assert "* unknown machine: bad failed: gone" in lines
    (control,) = found.controls
    assert control.differs
    assert sum("differs from itself" in line for line in lines) == 1


def test_one_engine_alone_has_no_ratios(fleet: dict[str, Report]) -> None:
    made = compare_fleet({"nano2": fleet["nano2"]})
    assert len(fleet_tables(made)) == 1
    assert render_comparison(made, markdown=True).startswith("### Median latency, ms: device by engine\n")


def test_machines_may_differ_but_not_how_an_engine_was_measured(
    fleet: dict[str, Report], subject: Make, report: Make
) -> None:
    eight = report(subject("dsc", steady(1), description={"batch": 8, "threads": 1}))
    with pytest.raises(NotComparableError, match="eight: dsc: not comparable: batch is 1 and 8") as caught:
        compare_fleet({**fleet, "eight": eight})
    assert caught.value.remedy.endswith("--allow batch")
    assert compare_fleet({**fleet, "eight": eight}, Rules(allow={"batch"})).allowed == ("batch",)
    plan = replace(fleet["nano"].plan, scenario="offline")
    with pytest.raises(NotComparableError, match="off: not comparable: scenario is 'single-stream' and"):
        compare_fleet({**fleet, "off": replace(fleet["nano"], plan=plan)})


def test_engines_of_one_device_that_cannot_be_compared_are_noted(subject: Make, report: Make) -> None:
    made = report(
        subject("a", steady(10)), subject("b", steady(10), description={"batch": 2}), subject("c", [[1]])
    )
    cautions = compare_fleet({"r": made}).devices[0].cautions
    assert "b: not comparable: batch is 1 and 2; threads is 1 and None" in cautions
    # What may differ between machines may still not differ between the engines of one.
    assert compare_fleet({"r": made}, Rules(allow={"batch", "threads"})).devices[0].cautions == cautions
    assert "c: 1 blocks are too few for an interval, 5 are needed" in cautions


def test_the_number_of_files_decides_what_is_compared_with_what(
    fleet: dict[str, Report], tmp_path: Path
) -> None:
    files = [tmp_path / name / "report.json" for name in ("nano", "rtx", "blank")]
    for path in files:
        save_report(path, fleet[path.parent.name])

    def compare(*reports: Path, margin: float = 0.03) -> Comparison | Fleet:
        return compare_files(reports, allow={"machine", "cpu", "gpu"}, margin=margin)

    one, two, many = compare(files[0]), compare(*files[:2]), compare(*files)
    assert isinstance(one, Comparison) and isinstance(two, Comparison) and isinstance(many, Fleet)
    assert [(row.baseline, row.candidate, row.paired is not None) for row in one.rows] == [
        ("cnn", "dsc", True)
    ]
    assert [(row.candidate, row.ratio.value) for row in two.rows] == [("cnn", 200 / 3000), ("dsc", 0.25)]
    assert [device.source for device in many.devices] == [str(path) for path in files]
    with pytest.raises(UsageError, match=r"report\.json is given twice"):
        compare(*files, files[0])
    for key in ("nonsense", "", "nonsense.cpu"):
        with pytest.raises(UsageError, match=f"--allow '{key}' is no condition .conditions are machine, "):
            compare_files(files, allow={"cpu", key}, margin=0.03)
    for margin, words in ((-0.01, "the margin is -1 %"), (1.0, "the margin is 100 %")):
        with pytest.raises(UsageError, match=words):
            compare(files[0], margin=margin)
