"""What doctor says of packages that are broken: one line each, and it goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import edge_dsc
from edge_dsc.checks import doctor
from edge_dsc.checks.doctor import Package, examine, format_examination, probe

NUMPY_1 = """
import sys
sys.stderr.write("\\nA module that was compiled using NumPy 1.x cannot be run in\\nNumPy 2.4.6 as it may crash.\\n")
raise {error}
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages are found before those installed."""
    folder = tmp_path / "broken"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package but OpenCV and those that the runtimes name, none of which is imported."""
    packages = dict.fromkeys(("cv2", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "pycuda"), ())
    monkeypatch.setattr(doctor, "_PACKAGES", {**packages, "cv2": ("opencv-python",)})
    missing = Package(version=None)
    monkeypatch.setattr(doctor, "probe", lambda name: probe(name) if name == "cv2" else missing)


@pytest.mark.parametrize(
    "error",
    ["ImportError('numpy.core.multiarray failed to import')", "AttributeError('_ARRAY_API not found')"],
)
@pytest.mark.usefixtures("few")
def test_opencv_built_for_numpy_1(broken: Path, error: str, capfd: pytest.CaptureFixture[str]) -> None:
    (broken / "cv2.py").write_text(NUMPY_1.format(error=error))
    found = examine()
    assert found.packages["cv2"].problem == "it was built for NumPy 1, but NumPy 2 is installed"
    text = format_examination(found)
    assert "installed, does not import: it was built for NumPy 1, but NumPy 2 is installed\n" in text
    assert "\nTo do: cv2: pip install 'numpy<2'" in text
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (
            "raise ImportError('libGL.so.1: cannot open\\nshared object file')",
            "ImportError: libGL.so.1: cannot open shared object file",
        ),
        ("raise SystemError('initialization \\x1b[31mfailed')", "SystemError: initialization [31mfailed"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import os; os.abort()", "the process died of SIGABRT"),
        ("import os; os._exit(7)", "the process ended with 7"),
        ("import os; os.close(1); os.close(2); print('lost', flush=True)", "OSError: [Errno 9] Bad file descriptor"),
    ],
)  # fmt: skip
def test_a_package_may_raise_or_abort(broken: Path, code: str, problem: str) -> None:
    (broken / "scipy.py").write_text(code)
    assert probe("scipy").problem == problem


def test_a_package_may_hang(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LIMIT_S", 0.3)
    (broken / "scipy.py").write_text("import threading; threading.Event().wait()")
    found = probe("scipy")
    assert found.problem == "no end after 0.3 s"
    monkeypatch.setattr(doctor, "probe", {"scipy": found}.get)
    monkeypatch.setattr(doctor, "_PACKAGES", {"scipy": ("scipy",)})
    monkeypatch.setattr(doctor, "_ask_runtimes", lambda packages: {})
    (to_do,) = (line for line in examine().to_do if line.startswith("scipy: "))
    assert "when the machine is idle" in to_do and "import scipy" in to_do


def test_what_a_package_prints_is_not_taken_for_its_answer(broken: Path) -> None:
    (broken / "scipy.py").write_text("print('null', flush=True); __version__ = '0'")
    assert probe("scipy").usable


def test_nothing_is_imported_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "msgspec"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger was run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    assert probe("msgspec").usable


def test_onnx_runtime_is_imported_with_its_telemetry_off(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    (broken / "onnxruntime.py").write_text("import os; assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'")
    assert probe("onnxruntime").usable


def test_a_folder_that_was_left_behind_is_no_package(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor._PACKAGES, "left_behind", ())
    (broken / "left_behind").mkdir()
    assert probe("left_behind") == Package(version=None)


@pytest.mark.usefixtures("few")
def test_tensorrt_without_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "ImportError: libnvinfer.so.10: cannot open shared object file: No such file or directory"
    there = {"tensorrt": Package(version="10.3.0", problem=reason)}
    monkeypatch.setattr(doctor, "probe", lambda name: there.get(name, Package(version="1")))
    found = examine()
    assert found.runtimes["tensorrt"].no_build == found.runtimes["tensorrt"].no_run == reason
    assert found.to_do[0].startswith("tensorrt: TensorRT's own libraries are missing: on a Jetson sudo apt")


@pytest.mark.usefixtures("few")
def test_a_jetson(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (broken / "cv2.py").write_text(
        "def getBuildInformation(): return '    GStreamer:      YES (1.20.3)'\n__version__ = '4.5.4'"
    )
    release = broken / "nv_tegra_release"
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    monkeypatch.setattr(doctor, "_L4T_RELEASE", release)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")
    found = examine()
    assert (found.l4t, found.nvcc) == ("36.4.3", None)
    assert found.packages["cv2"].note == "with GStreamer"
    assert "pycuda: export PATH=/usr/local/cuda/bin:$PATH, then pip install pycuda" in found.to_do
    assert "\nORT_DISABLE_TELEMETRY: 1\n" in format_examination(found)


@pytest.mark.usefixtures("few")
def test_packages_that_lie_beside_this_one_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(edge_dsc.__file__).parents[1])  # as an installed one is found
    assert examine().in_the_way == ()


@pytest.mark.usefixtures("few")
def test_another_distribution_in_the_way(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (broken / "bench.py").write_text("")
    info = broken / "frappe_bench-5.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: frappe-bench\nVersion: 5.0\n")
    (info / "RECORD").write_text("bench/__init__.py,,\nbench/app.py,,\n")
    found = examine()
    assert f"import bench finds {broken / 'bench.py'}, which is not edge-dsc's" in found.in_the_way
    assert "frappe-bench brings a package bench, as edge-dsc does" in found.in_the_way
    assert "edge-dsc brings a package bench, as edge-dsc does" not in found.in_the_way
    assert any("a virtual environment without it" in line for line in found.to_do)


@pytest.mark.usefixtures("few")
def test_a_runtime_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("libnvinfer.so.10: wrong ELF class")

    monkeypatch.setattr("engines.cpu.ort.OnnxRuntime.availability", lambda _: fail())
    found = examine().runtimes["onnxruntime"]
    assert found.version is None
    assert found.no_build == found.no_run == "OSError: libnvinfer.so.10: wrong ELF class"


@pytest.mark.slow
def test_looking_at_openvino_sends_nothing_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its telemetry keeps an identifier below the home folder as soon as it has something to send."""
    pytest.importorskip("openvino")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    assert doctor.probe("openvino").usable
    assert list(tmp_path.iterdir()) == []
