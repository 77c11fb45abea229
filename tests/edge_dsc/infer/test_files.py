from __future__ import annotations

from pathlib import Path

import pytest

from edge_dsc.infer.source import expand_source
from engines.errors import BadInputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "b.png",
        "a.JPG",
        "sub/c.jpeg",
        "sub/deep/d.tiff",
        "notes.txt",
        ".hidden.png",
        ".cache/e.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def names(folder: Path, source: str) -> list[str]:
    return [str(path.relative_to(folder)) for path in expand_source(source)]


def test_a_folder_is_searched_recursively_in_a_stable_order(folder: Path) -> None:
    assert names(folder, str(folder)) == ["a.JPG", "b.png", "sub/c.jpeg", "sub/deep/d.tiff"]


def test_a_file_is_taken_whatever_its_name(folder: Path) -> None:
    assert names(folder, str(folder / "notes.txt")) == ["notes.txt"]


def test_globs(folder: Path) -> None:
    assert names(folder, f"{folder}/*.png") == ["b.png"]
    assert names(folder, f"{folder}/**/*") == ["a.JPG", "b.png", "sub/c.jpeg", "sub/deep/d.tiff"]


def test_links_in_a_circle_end(folder: Path) -> None:
    (folder / "sub" / "again").symlink_to(folder)
    assert len(expand_source(str(folder))) == 4


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"no file, folder or glob match '.*nowhere'"):
        expand_source(str(tmp_path / "nowhere"))
    for source in (str(tmp_path), str(tmp_path / "*.png")):
        with pytest.raises(BadInputError, match="no images in"):
            expand_source(source)
