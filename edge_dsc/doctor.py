"""``doctor``: what is installed, which runtimes work here, and why the others do not."""

from __future__ import annotations

import contextlib
import io
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from edge_dsc import __version__
from engines.errors import EdgeDscError
from engines.packages import installed_version, load
from engines.runtimes import RUNTIME_NAMES, Availability, get_runtime
from engines.text_table import align_rows

# Distribution names by import name; several distributions give the same import.
_PACKAGES = {
    "numpy": ("numpy",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "cv2": ("opencv-python-headless", "opencv-python", "opencv-contrib-python"),
    "typer": ("typer",),
    "pydicom": ("pydicom",),
    "tensorflow": ("tensorflow",),
    "tf2onnx": ("tf2onnx",),
    "matplotlib": ("matplotlib",),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx",),
    "pycuda": ("pycuda",),
}
_Found = TypeVar("_Found")


@dataclass(frozen=True, kw_only=True)
class Examination:
    """This installation and this machine.

    Attributes:
        edge_dsc: Version of edge-dsc.
        python: Version of Python.
        machine: Operating system and processor architecture.
        packages: Version by import name; None where a package is missing or broken.
        opencv: OpenCV's version and whether it has GStreamer, or why it does not import. One line.
        runtimes: What each runtime can do here.
    """

    edge_dsc: str
    python: str
    machine: str
    packages: dict[str, str | None]
    opencv: str
    runtimes: dict[str, Availability]


def examine() -> Examination:
    """Look at this installation and this machine; never raises, imports little more than OpenCV."""
    # First: NumPy explains a failed import of OpenCV only once.
    opencv = _attempt(_describe_opencv)
    return Examination(
        edge_dsc=__version__,
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        packages={name: _version(name, distributions) for name, distributions in _PACKAGES.items()},
        opencv=str(opencv),
        runtimes={name: _availability(name) for name in RUNTIME_NAMES},
    )


def format_examination(found: Examination) -> str:
    """Return the examination as text."""
    packages = [[name, version or "missing"] for name, version in found.packages.items()]
    runtimes = [
        [name, can.version or "missing", can.no_build or "yes", can.no_run or "yes"]
        for name, can in found.runtimes.items()
    ]
    return "\n".join(
        [
            f"edge-dsc {found.edge_dsc}, Python {found.python}, {found.machine}",
            "",
            align_rows(["package", "version"], packages, numeric=False),
            "",
            f"OpenCV: {found.opencv}",
            "",
            align_rows(["runtime", "version", "builds here", "runs here"], runtimes, numeric=False),
        ]
    )


def _version(name: str, distributions: tuple[str, ...]) -> str | None:
    found = _attempt(lambda: installed_version(name, *distributions))
    return None if isinstance(found, _Failure) else found


def _availability(name: str) -> Availability:
    found = _attempt(lambda: get_runtime(name).availability())
    if isinstance(found, _Failure):
        return Availability(version=None, no_build=str(found), no_run=str(found))
    return found


def _describe_opencv() -> str:
    cv2 = load("cv2")
    line = next((line for line in cv2.getBuildInformation().splitlines() if "GStreamer:" in line), "")
    has = line.partition(":")[2].strip().startswith("YES")
    without = "no GStreamer: CSI cameras need JetPack's own OpenCV"
    return f"{cv2.__version__}, " + ("with GStreamer" if has else without)


class _Failure(str):
    """Why something could not be looked at, in one line."""

    __slots__ = ()


def _attempt(look: Callable[[], _Found]) -> _Found | _Failure:
    """Return what ``look`` returns, or its failure; whatever a package prints on the way is not shown."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return look()
    except Exception as error:  # noqa: BLE001 - a broken package may raise anything while it is imported
        text = " ".join(str(error).split())[:300]
        if "compiled using NumPy 1.x" in printed.getvalue():
            return _Failure("it was built for NumPy 1, but NumPy 2 is installed (pip install 'numpy<2')")
        return _Failure(text if isinstance(error, EdgeDscError) else f"{type(error).__name__}: {text}")
