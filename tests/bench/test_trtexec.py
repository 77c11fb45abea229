from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.report import load_report, save_report
from bench.tables import has_stages, stage_table
from bench.trtexec import import_trtexec
from engines.errors import BadInputError


def entry(index: int, latency: float) -> dict[str, float]:
    """As TensorRT 8.2 and later write it."""
    start = 10.0 * index
    times = {"startEnqMs": start, "endEnqMs": start + 0.1, "startH2dMs": start, "endH2dMs": start + 0.25}
    times |= {"startComputeMs": start + 0.25, "endComputeMs": start + latency - 0.125}
    times |= {"startD2hMs": start + latency - 0.125, "endD2hMs": start + latency}
    return {**times, "h2dMs": 0.25, "computeMs": latency - 0.375, "d2hMs": 0.125, "latencyMs": latency}


@pytest.fixture
def times(tmp_path: Path) -> Path:
    path = tmp_path / "dsc-int8.json"
    path.write_text(json.dumps([entry(index, 1.5 + index / 1000) for index in range(120)]))
    return path


def test_times_become_a_report(times: Path, tmp_path: Path) -> None:
    report = import_trtexec(times, batch=8)
    (subject,) = report.subjects
    assert (subject.name, subject.description["batch"]) == ("dsc-int8", 8)
    assert subject.description["switches"] == {"transfers": True}
    assert list(subject.samples_ns) == [1_500_000 + 1000 * index for index in range(120)]
    assert len(subject.blocks) == 60
    assert subject.blocks[1].start_ns == 20_000_000
    assert subject.blocks[0].stages_ns == {"h2d": 250_000, "execute": 1_125_500, "d2h": 125_000}
    assert (report.plan.scenario, report.plan.iterations, report.environment) == ("trtexec", 120, {})
    save_report(tmp_path / "r.json", report)
    assert load_report(tmp_path / "r.json") == report


def test_stages_are_a_table(times: Path) -> None:
    report = import_trtexec(times, name="x")
    assert has_stages(report)
    table = stage_table(report)
    assert table.header == ("engine", "h2d", "execute", "d2h")
    assert table.rows == (("x", "0.250", "1.185", "0.125"),)


def test_the_names_of_older_releases_are_known(tmp_path: Path) -> None:
    old = {"startInMs": 5, "startComputeMs": 6, "inMs": 0, "computeMs": 2, "outMs": 0, "latencyMs": 2}
    (tmp_path / "old.json").write_text(json.dumps([old] * 3))
    (subject,) = import_trtexec(tmp_path / "old.json").subjects
    assert subject.blocks[0].stages_ns == {"h2d": 0, "execute": 2_000_000, "d2h": 0}
    assert subject.description["switches"] == {"transfers": False}


def test_the_machine_is_this_one_only_when_told(times: Path) -> None:
    assert import_trtexec(times, this_machine=True).environment["cores"] >= 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not valid JSON"),
        ("[{", "is not valid JSON"),
        ("{}", "holds no times of trtexec"),
        ("[]", "holds no times of trtexec"),
        ("[1]", "holds no times of trtexec"),
        ('[{"name": "layer", "timeMs": 1}]', "holds no times of trtexec"),
        ('[{"latencyMs": -1, "startEnqMs": 0}]', "latencyMs of entry 0 is -1"),
        ('[{"latencyMs": NaN, "startEnqMs": 0}]', "latencyMs of entry 0 is nan"),
        ('[{"latencyMs": 1, "startEnqMs": 0}, {"startEnqMs": 0}]', "latencyMs of entry 1 is None"),
        ('[{"latencyMs": "1", "startEnqMs": 0}]', "latencyMs of entry 0 is '1'"),
        ('[{"latencyMs": 1e300, "startEnqMs": 0}]', "latencyMs of entry 0 is 1e"),
        (f'[{{"latencyMs": 1{"0" * 400}, "startEnqMs": 0}}]', "latencyMs of entry 0 is 1000"),
        ('[{"latencyMs": 1}]', "startEnqMs of entry 0 is None"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, words: str) -> None:
    path: Any = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(BadInputError, match=words) as caught:
        import_trtexec(path)
    assert "trtexec --loadEngine=ENGINE --exportTimes" in caught.value.remedy
    with pytest.raises(BadInputError, match="cannot read"):
        import_trtexec(tmp_path / "none.json")
