"""Heavy packages, imported where they are used; a missing one becomes "what to install and why"."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from types import ModuleType

from engines.errors import EnvironmentProblem

_TRAIN = "pip install 'edge-dsc[train]'"
_BASE = "pip install edge-dsc"
_REMEDIES = {
    "numpy": _BASE,
    "onnx": _BASE,
    "onnxruntime": _BASE,
    "msgspec": _BASE,
    "jinja2": _BASE,
    "pynvml": _BASE,
    "prometheus_client": f"the metrics of --serve need prometheus-client: {_BASE}",
    "openvino": "pip install 'edge-dsc[openvino]'",
    "ray": "classifying an archive needs Ray: pip install 'edge-dsc[ray]'",
    "scipy": f"the statistics of latency reports need SciPy: {_BASE}",
    "cv2": "pip install opencv-python-headless; on a Jetson use JetPack's OpenCV (apt install python3-opencv)",
    "pydicom": "reading DICOM files needs pydicom: pip install 'edge-dsc[dicom]'",
    "gdcm": "compressed DICOM files need GDCM: pip install 'edge-dsc[dicom]'",
    "tensorflow": f"training and export need TensorFlow: {_TRAIN}",
    "keras": f"training and export need Keras: {_TRAIN}",
    "tf2onnx": f"export needs tf2onnx: {_TRAIN}",
    "matplotlib": f"pictures and plots need matplotlib: {_BASE}",
    "tensorrt": "on a Jetson TensorRT comes with JetPack (create the venv with --system-site-packages); "
    "elsewhere pip install 'edge-dsc[tensorrt]'",
    "tensorrt_rtx": "pip install 'edge-dsc[rtx]' (x86-64 Linux and Windows)",
    "nvidia": "decoding JPEGs on the GPU needs nvImageCodec: pip install 'nvidia-nvimgcodec-cu12[nvjpeg]' (cu13 for "
    "CUDA 13; nvidia-nvimgcodec-tegra-cu12 on a Jetson)",
    "tritonclient": "Triton's client and the form of its configuration: pip install 'edge-dsc[triton]'",
    "triton_python_backend_utils": "only Triton's Python backend has it",
    "pycuda": "running TensorRT engines needs pycuda and a CUDA driver: pip install pycuda",
}


def load(name: str) -> ModuleType:
    """Import a heavy package by its import name, submodules included (``pycuda.driver``).

    Raises:
        EnvironmentProblem: The package is missing or does not import here; the remedy says how to get it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise import_problem(error, name) from error


def import_problem(error: ImportError, name: str | None = None) -> EnvironmentProblem:
    """Turn a failed import into what to install and why.

    Args:
        error: As Python raised it, at the top of a module or in :func:`load`.
        name: The import name, where it is known better than the error says.

    Raises:
        KeyboardInterrupt: That was the cause: a compiled module whose first lines Ctrl-C ends fails to import.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        cause = cause.__cause__ or cause.__context__
    reason = " ".join(str(error).split())
    quoted = re.search(r"'([\w.]+)'", reason)
    name = name or error.name or (quoted[1] if quoted else reason)
    root = name.split(".", 1)[0]
    return EnvironmentProblem(
        f"cannot import {name}: {reason}", remedy=_REMEDIES.get(root, f"pip install {root}")
    )


def is_installed(name: str) -> bool:
    """Say whether an import package is there, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def installed_version(name: str, *distributions: str) -> str | None:
    """Return the version of an import package, or None where it is missing or does not import.

    Args:
        name: Its import name; it is imported only where no distribution tells the version.
        distributions: Names under which it may have been installed.
    """
    if not is_installed(name):
        return None
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        return str(load(name).__version__)
    except EnvironmentProblem:
        return None


def parse_version(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: ``"10.16.1.11"`` gives ``(10, 16, 1, 11)``."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
