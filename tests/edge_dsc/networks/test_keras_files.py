from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from edge_dsc.networks.keras_files import load_function
from engines.errors import BadInputError, UsageError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_function_of_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "nets.py", "def build(classes, size):\n    return classes * size\n")
    assert load_function(f"{file}:build")(3, 5) == 15
    assert "nets" not in sys.modules


def test_a_function_of_an_installed_module() -> None:
    assert load_function("os.path:join") is os.path.join


@pytest.mark.parametrize("text", ["build", "nets:", ":build", "nets:a b", "nets:1"])
def test_what_names_no_function(text: str) -> None:
    with pytest.raises(UsageError, match=r"names no function \(write module:function or FILE\.py:function\)"):
        load_function(text)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "import no_such_package\n",
            "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'",
        ),
        ("def build(:\n", "cannot be imported: SyntaxError"),
        ("raise RuntimeError('first line\\nsecond')\n", "cannot be imported: RuntimeError: first line \\("),
        ("build = 3\n", "has no function build"),
        ("", "has no function build"),
    ],
)
def test_a_file_that_gives_no_function(tmp_path: Path, code: str, words: str) -> None:
    file = write(tmp_path / "nets.py", code)
    with pytest.raises(BadInputError, match=words):
        load_function(f"{file}:build")


def test_there_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"cannot be imported: ImportError: there is no file .*gone\.py"):
        load_function(f"{tmp_path / 'gone.py'}:build")


def test_nothing_comes_from_the_working_folder_by_accident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``python -m edge_dsc`` puts the working folder on the path; PYTHONPATH is the person's own word."""
    write(tmp_path / "stray_network.py", "raise SystemExit('it ran')\n")
    monkeypatch.chdir(tmp_path)
    for entry in ("", str(tmp_path)):
        monkeypatch.setattr(sys, "path", [entry, *sys.path])
        with pytest.raises(BadInputError, match=r"No module named 'stray_network'.*name its file"):
            load_function("stray_network:build")
    assert sys.path[0] == str(tmp_path)  # as it was
    write(tmp_path / "stray_network.py", "def build(classes, size): return 'asked for'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert load_function("stray_network:build")(1, 2) == "asked for"
    monkeypatch.delitem(sys.modules, "stray_network")
