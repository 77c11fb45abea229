from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from edge_dsc.infer.classify import Answer
from edge_dsc.infer.rows import RowSink, column_names
from edge_dsc.infer.source import SourceKind
from edge_dsc.infer.video import Frame
from engines.errors import EnvironmentProblem, UsageError

LABELS = ("dark", "light")
ANSWER = Answer(Path("a.png"), (0.25, 0.75))


def frame(*, seconds: float | None) -> Answer:
    moment = Frame(index=7, pixels=None, captured=0.0, seconds=seconds, dropped=3)
    return Answer("cam", (0.25, 0.75), latency_ms=1.23456, age_ms=2.5, frame=moment)


def test_each_row_is_in_the_file_at_once(tmp_path: Path) -> None:
    for name, first in (("a.csv", "path,label,probability,p_dark,p_light,error\n"), ("a.jsonl", "")):
        out = tmp_path / name
        sink = RowSink(out, LABELS, SourceKind.FILES)
        assert out.read_text() == first
        sink.write(ANSWER)
        assert out.read_text().count("\n") == first.count("\n") + 1
        sink.write(Answer(Path("b,\n.png"), None, "bad"))
        sink.close()
    rows = list(csv.reader(io.StringIO((tmp_path / "a.csv").read_text(), newline="")))
    assert rows[1:] == [["a.png", "light", "0.75", "0.25", "0.75", ""], ["b,\n.png", "", "", "", "", "bad"]]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "path": "a.png", "label": "light", "probability": 0.75, "p_dark": 0.25, "p_light": 0.75, "error": None,
    }  # fmt: skip
    assert lines[1]["error"] == "bad"


def test_frames_have_columns_of_their_own(tmp_path: Path) -> None:
    rows = {}
    for kind, answer in ((SourceKind.VIDEO, frame(seconds=0.7)), (SourceKind.LIVE, frame(seconds=None))):
        out = tmp_path / f"{kind.value}.jsonl"
        sink = RowSink(out, LABELS, kind)
        sink.write(answer)
        sink.close()
        rows[kind] = json.loads(out.read_text())
        assert list(rows[kind]) == column_names(LABELS, kind)
    video, live = rows[SourceKind.VIDEO], rows[SourceKind.LIVE]
    assert (video["frame"], video["seconds"], video["latency_ms"]) == (7, 0.7, 1.235)
    assert (live["frame"], live["age_ms"], live["dropped"]) == (7, 2.5, 3)
    assert live["captured"].endswith("+00:00")


def test_appending_repeats_no_header_unless_the_file_is_empty(tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    for _ in range(2):
        sink = RowSink(out, LABELS, SourceKind.FILES, append=True)
        sink.write(ANSWER)
        sink.close()
    assert (
        out.read_text().splitlines()
        == ["path,label,probability,p_dark,p_light,error"] + ["a.png,light,0.75,0.25,0.75,"] * 2
    )


def test_a_full_disk_is_said_with_the_rows_that_are_whole(tmp_path: Path) -> None:
    out = tmp_path / "full.jsonl"
    out.symlink_to("/dev/full")
    sink = RowSink(out, LABELS, SourceKind.FILES)
    with pytest.raises(EnvironmentProblem, match=r"No space left on device.*free some space") as caught:
        sink.write(ANSWER)
    sink.close()
    assert caught.value.exit_code == 3


def test_a_name_that_is_no_utf8_survives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer(Path("caf\udce9.png"), (0.25, 0.75))
    sink = RowSink(tmp_path / "a.csv", LABELS, SourceKind.FILES)
    sink.write(answer)
    sink.close()
    assert b"caf\xe9.png" in (tmp_path / "a.csv").read_bytes()
    RowSink(None, LABELS, SourceKind.FILES).write(answer)
    assert "caf\\udce9.png" in capsys.readouterr().out


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.xls"):
        RowSink(tmp_path / "a.xls", LABELS, SourceKind.FILES)
