"""``doctor``: what is installed, which runtimes work here, and why the others do not."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

from edge_dsc import __version__
from engines.errors import EdgeDscError
from engines.packages import installed_version, load
from engines.runtimes import RUNTIME_NAMES, get_runtime
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


def examine() -> dict[str, Any]:
    """Look at this installation and this machine; never raises, imports little more than OpenCV.

    Returns:
        JSON-ready: ``edge_dsc``, ``python``, ``machine``, ``packages`` (version, or None where missing),
        ``opencv`` (GStreamer or why it does not import), ``runtimes`` (version, no_build, no_run).
    """
    return {
        "edge_dsc": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": {
            name: installed_version(name, *distributions) for name, distributions in _PACKAGES.items()
        },
        "opencv": _opencv(),
        "runtimes": {name: asdict(get_runtime(name).availability()) for name in RUNTIME_NAMES},
    }


def format_examination(found: dict[str, Any]) -> str:
    """Return the examination as text."""
    packages = [[name, version or "missing"] for name, version in found["packages"].items()]
    runtimes = [
        [name, r["version"] or "missing", r["no_build"] or "yes", r["no_run"] or "yes"]
        for name, r in found["runtimes"].items()
    ]
    return "\n".join(
        [
            f"edge-dsc {found['edge_dsc']}, Python {found['python']}, {found['machine']}",
            "",
            align_rows(["package", "version"], packages, numeric=False),
            "",
            f"OpenCV: {found['opencv']}",
            "",
            align_rows(["runtime", "version", "builds here", "runs here"], runtimes, numeric=False),
        ]
    )


def _opencv() -> str:
    try:
        cv2 = load("cv2")
    except EdgeDscError as error:
        return str(error)
    line = next((line for line in cv2.getBuildInformation().splitlines() if "GStreamer:" in line), "")
    has = line.partition(":")[2].strip().startswith("YES")
    without = "no GStreamer: CSI cameras need JetPack's own OpenCV"
    return f"{cv2.__version__}, " + ("with GStreamer" if has else without)
