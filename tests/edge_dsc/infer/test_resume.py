from __future__ import annotations

from pathlib import Path

import pytest

from edge_dsc.infer.classify import Answer
from edge_dsc.infer.rows import RowSink, cut_half_row, skip_written, written_paths
from edge_dsc.infer.source import SourceKind
from engines.errors import ArtefactError, EnvironmentProblem

LABELS = ("dark", "light")
NAMES = ["a.png", 'b "1",\n\n2.png', "c.png"]


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
        paths = written_paths(out, LABELS)
        assert paths == NAMES[: len(paths)]
        assert whole.startswith(out.read_bytes())
        lengths.append(len(paths))
    assert lengths[0] == 0 and lengths[-1] == 3 and lengths[-2] == 2
    assert lengths == sorted(lengths)


def test_the_half_row_is_cut_off_the_file(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    whole = write(out)
    out.write_bytes(whole[:-5])
    assert cut_half_row(out) == len(b"c.png,light,0.75,0.25,0.75,\n") - 5
    assert out.read_bytes() == whole[: -len(b"c.png,light,0.75,0.25,0.75,\n")]


def test_no_file_means_no_rows(tmp_path: Path) -> None:
    assert written_paths(tmp_path / "no.csv", LABELS) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "path,label,probability,p_cat,p_dog,error\nx,,,,,\n", "its columns are .*p_cat"),
        ("a.csv", "path,label,probability,p_dark,p_light,error\nx,y\n", "row 1 has 2 columns"),
        ("a.jsonl", '{"path": "x"}\n', "row 1 has other fields"),
        ("a.jsonl", "text\n", "Expecting value"),
        ("a.jsonl", "[]\n", "row 1 has other fields"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ArtefactError, match=f"does not hold results of this engine: .*{words}"):
        written_paths(tmp_path / name, LABELS)


def test_a_folder_is_no_file_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(EnvironmentProblem, match="Is a directory"):
        written_paths(tmp_path / "a.csv", LABELS)


def test_rows_must_be_the_beginning_of_the_source() -> None:
    paths = iter([Path("a"), None, Path("b"), Path("c")])
    skip_written(paths, ["a", "b"], Path("rows.csv"))
    assert list(paths) == [Path("c")]
    with pytest.raises(ArtefactError, match=r"row 2 of rows\.csv is x, the source has b there"):
        skip_written(iter([Path("a"), Path("b")]), ["a", "x"], Path("rows.csv"))
    with pytest.raises(ArtefactError, match="has 2 rows, the source only 1"):
        skip_written(iter([Path("a")]), ["a", "b"], Path("rows.csv"))
