from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_dsc.infer.classify import ABSTAIN, Answer, OperatingPoint, decide_each
from edge_dsc.infer.rows import (
    DECISION,
    OUTSIDE,
    RowSink,
    check_rows_path,
    column_names,
    require_same_answers,
    skip_written,
    written_rows,
)
from edge_dsc.infer.source import Frame, SourceKind
from engines.errors import ArtefactError, EnvironmentProblem, UsageError

LABELS = ("dark", "light")
NAMES = ["a.png", 'b "1",\n\n2.png', "c.png"]
ANSWER = Answer(Path("a.png"), (0.25, 0.75))


def frame(*, seconds: float | None) -> Answer:
    moment = Frame(index=7, pixels=b"", captured=0.0, seconds=seconds, dropped=3)
    return Answer("cam", (0.25, 0.75), latency_ms=1.23456, age_ms=2.5, frame=moment)


def test_each_row_is_in_the_file_at_once(tmp_path: Path) -> None:
    for name, first in (("a.csv", "path,label,probability,p_dark,p_light,error\n"), ("a.jsonl", "")):
        out = tmp_path / name
        sink = RowSink(out, LABELS, SourceKind.FILES)
        assert out.read_text() == ""
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
        assert list(rows[kind]) == list(column_names(LABELS, kind))
    video, live = rows[SourceKind.VIDEO], rows[SourceKind.LIVE]
    assert (video["frame"], video["seconds"], video["latency_ms"]) == (7, 0.7, 1.235)
    assert (live["frame"], live["age_ms"], live["dropped"]) == (7, 2.5, 3)
    assert live["captured"].endswith("+00:00")


def test_appending_repeats_no_header_unless_the_file_is_empty(tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    for _ in range(2):
        sink = RowSink(out, LABELS, SourceKind.FILES, after=written_rows(out, LABELS))
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


@pytest.mark.parametrize("name", ["a\rb.png", "a\r\nb.png", "a\x1b[31mb", 'q"\r,', "a=1"])
def test_any_name_reads_back_as_one_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "a.csv"
    sink = RowSink(out, LABELS, SourceKind.FILES)
    sink.write(Answer(Path(name), (0.25, 0.75)))
    sink.close()
    with out.open(newline="") as stream:
        assert list(csv.reader(stream))[1:] == [[name, "light", "0.75", "0.25", "0.75", ""]]
    assert out.read_bytes().count(b"error\n") == 1 and out.read_bytes().endswith(b",\n")
    written = written_rows(out, LABELS).paths
    skip_written(iter([Path(name)]), written, out)
    assert list(written) == [name]
    RowSink(None, LABELS, SourceKind.FILES).write(Answer(Path(name), None, "bad\x1b"))
    shown = capsys.readouterr().out
    assert shown.count("\n") == 2 and shown.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", ["=cmd()", "+1.png", "-1.png", "@SUM(1)", "\tx", "\r"])
def test_no_cell_is_a_formula_and_the_path_still_names_its_file(tmp_path: Path, name: str) -> None:
    for suffix, path, label in ((".csv", f"./{name}", f"'{name}"), (".jsonl", name, name)):
        out, labels = tmp_path / f"a{suffix}", ("dark", name)
        sink = RowSink(out, labels, SourceKind.FILES)
        sink.write(Answer(Path(name), (0.25, 0.75)))
        sink.write(Answer(Path("x", name), None, name))
        sink.close()
        with out.open(newline="") as stream:
            rows = list(csv.DictReader(stream) if suffix == ".csv" else map(json.loads, stream))
        assert [(row["path"], row["label"] or "", row["error"] or "") for row in rows] == [
            (path, label, ""),
            (f"x/{name}", "", label),
        ]
        assert written_rows(out, labels).paths == [name, f"x/{name}"]


def test_other_suffixes_are_refused() -> None:
    for name, words in (("a.xls", r"ends in \.xls .*name it \.csv or \.jsonl"), ("a", "ends in nothing")):
        with pytest.raises(UsageError, match=words):
            check_rows_path(Path(name))
    check_rows_path(Path("A.CSV"))


def write(out: Path) -> bytes:
    sink = RowSink(out, LABELS, SourceKind.FILES)
    for name in NAMES:
        sink.write(Answer(Path(name), (0.25, 0.75)))
    sink.close()
    return out.read_bytes()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_wherever_it_was_killed_the_whole_rows_are_found(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"rows{suffix}"
    whole = write(out)
    lengths = []
    for size in range(len(whole) + 1):
        out.write_bytes(whole[:size])
        paths, whole_bytes, seen, _ = written_rows(out, LABELS)
        assert paths == NAMES[: len(paths)]
        assert whole_bytes <= seen == size and out.read_bytes() == whole[:size]
        lengths.append(len(paths))
    assert lengths[0] == 0 and lengths[-1] == 3 and lengths[-2] == 2
    assert lengths == sorted(lengths)


def test_the_half_row_is_cut_off_the_file(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    whole = write(out)
    out.write_bytes(whole[:-5])
    earlier = written_rows(out, LABELS)
    assert earlier.paths == NAMES[:2] and out.read_bytes() == whole[:-5]
    RowSink(out, LABELS, SourceKind.FILES, after=earlier).close()
    assert out.read_bytes() == whole[: -len(b"c.png,light,0.75,0.25,0.75,\n")]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_run_without_an_answer_leaves_the_old_rows(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"rows{suffix}"
    RowSink(out, LABELS, SourceKind.FILES).close()
    assert out.read_text() == ("path,label,probability,p_dark,p_light,error\n" if suffix == ".csv" else "")
    whole = write(out)
    RowSink(out, LABELS, SourceKind.FILES).close()
    assert out.read_bytes() == whole
    sink = RowSink(out, LABELS, SourceKind.FILES)
    sink.write(ANSWER)
    sink.close()
    assert out.read_bytes() == whole[: out.stat().st_size] and written_rows(out, LABELS).paths == ["a.png"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_rows_of_another_engine_are_known_by_their_probabilities(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"rows{suffix}"
    sink = RowSink(out, LABELS, SourceKind.FILES)
    sink.write(Answer(Path("bad.png"), None, "bad"))
    for name in "abcdef":
        sink.write(Answer(Path(name), (0.25, 0.75)))
    sink.close()
    earlier = written_rows(out, LABELS)
    assert earlier.sample == dict.fromkeys("abcd", (0.25, 0.75))
    same = [Answer(Path("a"), (0.25004, 0.74996)), Answer(Path("b"), None, "gone")]
    require_same_answers(same, earlier, out)
    other = [*same, Answer(Path("c"), (0.2498, 0.7502))]
    with pytest.raises(
        ArtefactError, match=r"or c changed since: a probability of 0\.750000 is 0\.750200 now"
    ):
        require_same_answers(other, earlier, out)
    with pytest.raises(ArtefactError, match="another engine wrote"):
        require_same_answers([Answer(Path("a"), (float("nan"), 0.75))], earlier, out)


def test_no_file_means_no_rows(tmp_path: Path) -> None:
    assert written_rows(tmp_path / "no.csv", LABELS) == ([], 0, 0, {})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "path,label,probability,p_cat,p_dog,error\nx,,,,,\n", "its columns are .*p_cat"),
        ("a.csv", "path,label,probability,p_dark,p_light,error\nx,y\n", "row 1 has 2 columns"),
        ("a.jsonl", '{"path": "x"}\n', "row 1 has other fields"),
        ("a.jsonl", "text\n", "Expecting value"),
        ("a.jsonl", "[]\n", "row 1 has other fields"),
        ("a.csv", "name,age\nAnna,30\nBert,40", "its columns are name,age"),
        ("a.csv", 'note\nhe said "hello\nline 2\n', "its columns are note"),
        ("a.csv", "one line of text", "no beginning"),
        ("a.jsonl", '{"a": 1}\n{"b": 2}', "row 1 has other fields"),
        ("a.jsonl", '{"path": "x"}', "no beginning"),
        ("a.jsonl", "one line of text", "no beginning"),
        ("a.csv", "path,label,probability,p_dark,p_light,error\nx,dark,1,one,0,\n", "could not convert"),
        (
            "a.jsonl",
            '{"path": "x", "label": "dark", "probability": 1, "p_dark": null, "p_light": 0, "error": null}\n',
            "NoneType",
        ),
    ],
)
def test_other_content_is_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ArtefactError, match=f"does not hold results of this engine: .*{words}"):
        written_rows(tmp_path / name, LABELS)
    assert (tmp_path / name).read_text() == content


def test_a_folder_is_no_file_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(EnvironmentProblem, match="Is a directory"):
        written_rows(tmp_path / "a.csv", LABELS)


def test_rows_must_be_the_beginning_of_the_source() -> None:
    paths = iter([Path("a"), None, Path("b"), Path("c")])
    skip_written(paths, ["a", "b"], Path("rows.csv"))
    assert list(paths) == [Path("c")]
    with pytest.raises(ArtefactError, match=r"row 2 of rows\.csv is x, the source has b there"):
        skip_written(iter([Path("a"), Path("b")]), ["a", "x"], Path("rows.csv"))
    with pytest.raises(ArtefactError, match="has 2 rows, the source only 1"):
        skip_written(iter([Path("a")]), ["a", "b"], Path("rows.csv"))


def test_two_runs_never_write_to_one_file(tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    first = RowSink(out, LABELS, SourceKind.FILES)
    first.write(ANSWER)
    for second in (
        lambda: RowSink(out, LABELS, SourceKind.FILES),
        lambda: written_rows(out, LABELS),
    ):
        with pytest.raises(EnvironmentProblem, match=r"another run writes to .*a\.csv"):
            second()
    first.close()
    assert out.read_text().count("\n") == 2
    earlier = written_rows(out, LABELS)
    for _ in range(2):
        sink = RowSink(out, LABELS, SourceKind.FILES, after=earlier)
        sink.write(ANSWER)
        sink.close()
        with pytest.raises(EnvironmentProblem, match="changed since its rows were read"):
            RowSink(out, LABELS, SourceKind.FILES, after=earlier)
        earlier = written_rows(out, LABELS)
    assert out.read_text().count("\n") == 4


@pytest.mark.parametrize("what", ["deleted", "replaced", "cut", "grown"])
def test_a_file_that_is_gone_or_cut_is_no_success(tmp_path: Path, what: str) -> None:
    out = tmp_path / "a.csv"
    sink = RowSink(out, LABELS, SourceKind.FILES)
    sink.write(ANSWER)
    if what == "cut":
        os.truncate(out, 3)
    elif what == "grown":
        out.write_text(out.read_text() + "x")
    else:
        out.unlink()
    if what == "replaced":
        out.write_text("other")
    sink.write(ANSWER)
    with pytest.raises(EnvironmentProblem, match=r"was deleted, replaced or changed while its 2 rows"):
        sink.close()
    sink.close()
    assert not out.exists() or b"\0" not in out.read_bytes()


def test_rows_replace_rows_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.csv"
    out.write_text("class,file,patient\nclear,a.png,p1\n")
    with pytest.raises(UsageError, match="is a table of patients, and would be replaced by rows"):
        RowSink(out, LABELS, SourceKind.FILES)
    assert out.read_text() == "class,file,patient\nclear,a.png,p1\n"
    write(tmp_path / "b.csv")
    write(tmp_path / "b.csv")
    found = out.stat()
    monkeypatch.setattr("edge_dsc.infer.rows.os.fstat", lambda _: found)
    out.write_text("a.png\nb.png\n")
    with pytest.raises(UsageError, match="is also the list that is read"):
        RowSink(out, LABELS, SourceKind.FILES)
    assert out.read_text() == "a.png\nb.png\n"


def test_pipes_and_devices_are_written_to_and_never_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*pipe\.csv: No such device or address"):
        RowSink(pipe, LABELS, SourceKind.FILES)
    with pytest.raises(ArtefactError, match="not a regular file"):
        written_rows(pipe, LABELS)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert write_to(pipe) == os.read(reader, 1000).count(b"\n") == 4
    os.close(reader)
    null = tmp_path / "null.csv"
    null.symlink_to("/dev/null")
    write_to(null)


def write_to(out: Path) -> int:
    sink = RowSink(out, LABELS, SourceKind.FILES)
    for _ in range(3):
        sink.write(ANSWER)
    sink.close()
    return 4


POINT = OperatingPoint(labels=LABELS, thresholds={LABELS[1]: 0.3}, abstain=0.6)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_decisions_have_a_column_and_rows_go_on_by_the_same_thresholds_alone(
    tmp_path: Path, suffix: str
) -> None:
    out, extra = tmp_path / f"a{suffix}", (DECISION, OUTSIDE)
    answers = [
        Answer("a.png", (0.69, 0.31)),
        Answer("b.png", (0.55, 0.2)),
        Answer("c.png", None, "no image"),
    ]
    maps = np.zeros((len(LABELS), 14, 14), np.float32)
    maps[1, 0, 0] = 1
    sink = RowSink(out, LABELS, SourceKind.FILES, extra=extra)
    for answer in decide_each((replace(one, maps=maps) for one in answers), POINT):
        sink.write(answer)
    sink.close()
    text = out.read_text()
    rows = (
        list(csv.DictReader(text.splitlines()))
        if suffix == ".csv"
        else [json.loads(line) for line in text.splitlines()]
    )
    assert list(rows[0])[:5] == ["path", "label", "probability", DECISION, OUTSIDE]
    assert [(row["label"] or None, row[DECISION] or None) for row in rows] == [
        (LABELS[0], LABELS[1]),
        (LABELS[0], ABSTAIN),
        (None, None),
    ]
    assert float(rows[0][OUTSIDE]) == 1.0
    assert written_rows(out, LABELS, extra, POINT).paths == ["a.png", "b.png", "c.png"]
    other = OperatingPoint(labels=LABELS, thresholds={LABELS[1]: 0.32}, abstain=0.6)
    with pytest.raises(ArtefactError, match="row 1 was decided by other thresholds"):
        written_rows(out, LABELS, extra, other)
    with pytest.raises(ArtefactError, match="does not hold results of this engine"):
        written_rows(out, LABELS)
