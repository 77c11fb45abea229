from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from engines import packages
from engines.errors import EnvironmentProblem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.16.1.11", (10, 16, 1, 11)),
        ("8.6.1.post1", (8, 6, 1)),
        ("10.3.0", (10, 3, 0)),
        ("1.7.1+cu13", (1, 7, 1)),
        ("unknown", ()),
    ],
)
def test_versions_are_numbers(text: str, expected: tuple[int, ...]) -> None:
    assert packages.parse_version(text) == expected


def test_ten_is_later_than_eight() -> None:
    assert packages.parse_version("10.3") > packages.parse_version("8.6.1")


def test_an_installed_package() -> None:
    assert packages.is_installed("onnxruntime")
    assert packages.installed_version("onnxruntime", "onnxruntime") == version("onnxruntime")
    assert packages.installed_version("onnxruntime", "not-its-name", "onnxruntime") == version("onnxruntime")
    assert packages.installed_version("onnxruntime") == version("onnxruntime")  # asked of the package itself


def test_a_missing_package() -> None:
    assert not packages.is_installed("no_such_package")
    assert packages.installed_version("no_such_package", "onnxruntime") is None


def test_a_blocked_package_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert not packages.is_installed("onnxruntime")
    assert packages.installed_version("onnxruntime", "onnxruntime") is None


def test_a_missing_package_comes_with_its_remedy() -> None:
    with pytest.raises(EnvironmentProblem, match="cannot import no_such_package") as caught:
        packages.load("no_such_package")
    assert caught.value.remedy == "pip install no_such_package"


def test_ctrl_c_in_an_import_is_no_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pybind11 says it where the first lines of a compiled module are interrupted."""
    code = "try:\n    raise KeyboardInterrupt\nexcept KeyboardInterrupt as stop:\n"
    (tmp_path / "half_imported.py").write_text(
        code + "    raise ImportError('initialization failed') from stop\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        packages.load("half_imported")
