"""What doctor says of packages that are broken: one line each, and it goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edge_dsc.doctor import examine, format_examination

NUMPY_1 = """
import sys
sys.stderr.write("\\nA module that was compiled using NumPy 1.x cannot be run in\\nNumPy 2.4.6 as it may crash.\\n")
raise {error}
"""


@pytest.fixture
def broken_opencv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cv2 that is found before the one installed; the test writes it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    return tmp_path / "cv2.py"


@pytest.mark.parametrize(
    "error",
    ["ImportError('numpy.core.multiarray failed to import')", "AttributeError('_ARRAY_API not found')"],
)
def test_opencv_built_for_numpy_1(broken_opencv: Path, error: str, capfd: pytest.CaptureFixture[str]) -> None:
    broken_opencv.write_text(NUMPY_1.format(error=error))
    found = examine()
    assert found.opencv == "it was built for NumPy 1, but NumPy 2 is installed (pip install 'numpy<2')"
    assert f"\nOpenCV: {found.opencv}\n" in format_examination(found)
    assert capfd.readouterr() == ("", "")


def test_opencv_that_does_not_import(broken_opencv: Path) -> None:
    broken_opencv.write_text("raise ImportError('libGL.so.1: cannot open\\nshared object file')")
    found = examine().opencv
    assert found.startswith(
        "cannot import cv2: libGL.so.1: cannot open shared object file (pip install opencv-"
    )
    broken_opencv.write_text("raise SystemError('initialization failed')")
    assert examine().opencv == "SystemError: initialization failed"


def test_a_runtime_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("libnvinfer.so.10: wrong ELF class")

    monkeypatch.setattr("engines.ort.OnnxRuntime.availability", lambda _: fail())
    found = examine().runtimes["onnxruntime"]
    assert found.version is None
    assert found.no_build == found.no_run == "OSError: libnvinfer.so.10: wrong ELF class"
