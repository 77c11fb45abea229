"""``doctor``: what is installed, what imports, which runtimes work here, why the others do not, and what to do."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

import edge_dsc
from engines.packages import import_problem
from engines.text_table import align_rows

if TYPE_CHECKING:  # it needs msgspec, which may be what is broken
    from engines.runtimes import Availability

# Distribution names by import name; several distributions give the same import.
_BASE = {
    "numpy": ("numpy",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "cv2": ("opencv-python-headless", "opencv-python", "opencv-contrib-python"),
    "scipy": ("scipy",),
    "matplotlib": ("matplotlib",),
    "msgspec": ("msgspec",),
    "jinja2": ("jinja2",),
    "prometheus_client": ("prometheus-client",),
    "pynvml": ("nvidia-ml-py",),
    "rich": ("rich",),
    "typer": ("typer",),
}
_OPTIONAL = {
    "pydicom": ("pydicom",),
    "gdcm": ("python-gdcm",),
    "tensorflow": ("tensorflow",),
    "tf2onnx": ("tf2onnx",),
    "openvino": ("openvino",),
    "ray": ("ray",),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx",),
    "pycuda": ("pycuda",),
    "tritonclient": ("tritonclient",),
}
_PACKAGES = {**_BASE, **_OPTIONAL}
_WHOLE = {
    "pycuda": "pycuda.driver",
    "tritonclient": "tritonclient.grpc",
}  # the part that needs the machine, or more
_OURS = ("calibration", "bench", "engines")
_LIMIT_S = 60  # TensorFlow takes 3 s on a laptop, and far longer from an SD card
_NO_END = "no end after"
_NUMPY_1 = "it was built for NumPy 1, but NumPy 2 is installed"
_REMEDIES = {  # by what a problem contains
    _NO_END: "ask again when the machine is idle; python -X importtime -c 'import {name}' shows where it hangs",
    _NUMPY_1: "pip install 'numpy<2'",
    "libnvinfer": "TensorRT's own libraries are missing: on a Jetson sudo apt install nvidia-jetpack, elsewhere "
    "pip install 'edge-dsc[tensorrt]'",
    "libcuda.so": "there is no NVIDIA driver here; TensorRT engines run only where there is one",
}
_L4T_RELEASE = Path("/etc/nv_tegra_release")
_NVCC_PATH = "export PATH=/usr/local/cuda/bin:$PATH"

# Isolated, so that nothing is imported from the working folder. It answers with two lines: the version, before the
# import, and what came of that; the package's own words go to standard error.
_CHILD = """
import importlib, importlib.util, importlib.metadata, json, os, sys
root, name, distributions, path = json.loads(sys.argv[1])
sys.path[:0] = path
sys.modules["openvino_telemetry"] = None  # as engines/__init__.py does: OpenVINO reports its own import
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
def answer(value):
    print(json.dumps(value), file=answers, flush=True)
def find_version():
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            pass
spec = importlib.util.find_spec(root)
if spec is None or spec.origin is None:
    answer(None)
else:
    answer(find_version() or "unknown")
    try:
        module = importlib.import_module(name)
        version = str(getattr(module, "__version__", ""))
        build = module.getBuildInformation() if name == "cv2" else ""
        answer([None, version, build])
    except BaseException as error:
        answer([f"{type(error).__name__}: {error}", "", ""])
os._exit(0)
"""


@dataclass(frozen=True, kw_only=True)
class Package:
    """An import package, as a process of its own found it.

    Attributes:
        version: Its version; ``unknown`` where nothing tells it, None where it is missing.
        problem: Why it does not import although it is there, in one line; None where it does.
        note: What else is worth knowing: whether OpenCV has GStreamer.
    """

    version: str | None
    problem: str | None = None
    note: str | None = None

    @property
    def usable(self) -> bool:
        """Whether it imports."""
        return self.version is not None and self.problem is None


@dataclass(frozen=True, kw_only=True)
class Examination:
    """This installation and this machine.

    Attributes:
        edge_dsc: Version of edge-dsc.
        python: Version of Python.
        machine: Operating system and processor architecture.
        l4t: Release of Jetson Linux such as ``36.4.3``; None on other machines.
        nvcc: Path of CUDA's compiler, with which pip builds pycuda; None where it is not on PATH.
        ort_disable_telemetry: The variable of that name, which keeps ONNX Runtime from calling home at ``1``.
        packages: By import name.
        in_the_way: One line for each top-level package of ours that another distribution brings too.
        runtimes: What each runtime can do here; empty where not even that can be asked.
        to_do: What to do about it all; empty where nothing is needed.
    """

    edge_dsc: str
    python: str
    machine: str
    l4t: str | None
    nvcc: str | None
    ort_disable_telemetry: str | None
    packages: dict[str, Package]
    in_the_way: tuple[str, ...]
    runtimes: dict[str, Availability]
    to_do: tuple[str, ...]


def examine() -> Examination:
    """Look at this installation and this machine; never raises, and imports each package in a process of its own."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        packages = dict(zip(_PACKAGES, pool.map(probe, _PACKAGES), strict=True))
    found = Examination(
        edge_dsc=edge_dsc.__version__,
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        l4t=_read_l4t(),
        nvcc=shutil.which("nvcc"),
        ort_disable_telemetry=os.environ.get("ORT_DISABLE_TELEMETRY"),
        packages=packages,
        in_the_way=_find_in_the_way(),
        runtimes=_ask_runtimes(packages),
        to_do=(),
    )
    return replace(found, to_do=tuple(_list_to_do(found)))


def format_examination(found: Examination) -> str:
    """Return the examination as text."""
    packages = [
        [name, package.version or "missing", _describe(name, package)]
        for name, package in found.packages.items()
    ]
    runtimes = [
        [name, can.version or "missing", can.no_build or "yes", can.no_run or "yes"]
        for name, can in found.runtimes.items()
    ]
    return "\n".join(
        [
            f"edge-dsc {found.edge_dsc}, Python {found.python}, {found.machine}",
            f"Jetson Linux (L4T): {found.l4t or 'no, this is no Jetson'}",
            f"nvcc: {found.nvcc or 'not on PATH'}",
            f"ORT_DISABLE_TELEMETRY: {found.ort_disable_telemetry or 'not set'}",
            "",
            align_rows(["package", "version", "imports"], packages, numeric=False),
            "",
            align_rows(["runtime", "version", "builds here", "runs here"], runtimes, numeric=False),
            "",
            *(f"To do: {line}" for line in found.to_do or ("nothing",)),
        ]
    )


def probe(name: str) -> Package:
    """Import a package in a process of its own, which may print, raise, hang or abort as it likes."""
    order = json.dumps([name, _WHOLE.get(name, name), _PACKAGES[name], _search_path()])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD, order],
            env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
            stdin=subprocess.DEVNULL, capture_output=True, timeout=_LIMIT_S, check=False,
        )  # fmt: skip
        out, printed, end = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        out, printed, end = error.stdout or b"", error.stderr or b"", None
    except OSError as error:
        return Package(version="unknown", problem=f"no process could be started: {error}")
    version, *rest = [json.loads(line) for line in out.splitlines()] or ["unknown"]
    if version is None:
        return Package(version=None)
    problem, own_version, build = rest[0] if rest else (_describe_end(end), "", "")
    if problem and b"compiled using NumPy 1.x" in printed:
        problem = _NUMPY_1
    return Package(
        version=own_version or version if version == "unknown" else version,
        problem=_one_line(problem) if problem else None,
        note=_describe_gstreamer(build) if build else None,
    )


def _search_path() -> list[str]:
    """Return where this process imports from, except the working folder."""
    here = Path.cwd()
    return [entry for entry in sys.path if entry and Path(entry) != here]


def _describe_end(code: int | None) -> str:
    """Say in words how a process ended that did not answer."""
    if code is None:
        return f"{_NO_END} {_LIMIT_S} s"
    if code < 0:
        return f"the process died of {signal.Signals(-code).name}"
    return f"the process ended with {code}"


def _one_line(text: str) -> str:
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())[:300]


def _describe_gstreamer(build: str) -> str:
    line = next((line for line in build.splitlines() if "GStreamer:" in line), "")
    has = line.partition(":")[2].strip().startswith("YES")
    return "with GStreamer" if has else "no GStreamer: CSI cameras need JetPack's own OpenCV"


def _describe(name: str, package: Package) -> str:
    if package.version is None:
        return _remedy(name, "")
    if package.problem:
        return f"installed, does not import: {package.problem}"
    return "yes" + (f", {package.note}" if package.note else "")


def _remedy(name: str, problem: str) -> str:
    known = (remedy for sign, remedy in _REMEDIES.items() if sign in problem)
    return next(known, "").format(name=name) or import_problem(ImportError(problem), name).remedy


def _read_l4t() -> str | None:
    """Return the release of Jetson Linux from ``# R36 (release), REVISION: 4.3, ...``."""
    try:
        text = _L4T_RELEASE.read_text(errors="replace")
    except OSError:
        return None
    match = re.search(r"R(\d+).*?REVISION: ([\d.]+)", text)
    return f"{match[1]}.{match[2]}" if match else "unknown"


def _find_in_the_way() -> tuple[str, ...]:
    """Name whoever else brings a top-level package of our name, in our place or before it."""
    lines = []
    for name in _OURS:
        spec = PathFinder.find_spec(name)
        where = Path(spec.origin).resolve() if spec and spec.origin else None
        if where and not where.is_relative_to(edge_dsc.IMPORTED_FROM):
            lines.append(f"import {name} finds {where}, which is not edge-dsc's")
    for distribution in distributions():
        other = distribution.metadata["Name"] or "a distribution without a name"
        if other.lower().replace("_", "-") != "edge-dsc":
            record = distribution.read_text("RECORD") or ""
            roots = {*re.findall(r"^(\w+)/", record, re.MULTILINE)}
            roots.update((distribution.read_text("top_level.txt") or "").split())
            lines += [f"{other} brings a package {name}, as edge-dsc does" for name in _OURS if name in roots]
    return tuple(_one_line(line) for line in lines)


def _ask_runtimes(packages: Mapping[str, Package]) -> dict[str, Availability]:
    """Ask each runtime, or say for it why its package does not import: then it would not survive the question."""
    try:
        from engines.runtimes import RUNTIME_NAMES, Availability, get_runtime
    except ImportError:
        return {}
    found = {}
    for name in RUNTIME_NAMES:
        package = packages[name.replace("-", "_")]
        if package.problem:
            found[name] = Availability(package.version, package.problem, package.problem)
            continue
        on_gpu = False
        try:
            runtime = get_runtime(name)
            can, on_gpu = runtime.availability(), not runtime.runs_on_cpu
        except Exception as error:  # noqa: BLE001 - drivers fail in their own ways
            reason = _one_line(f"{type(error).__name__}: {error}")
            can = Availability(package.version, reason, reason)
        driver = packages["pycuda"].problem
        if on_gpu and can.no_run is None and driver:
            can = replace(can, no_run=f"pycuda: {driver}")
        found[name] = can
    return found


def _list_to_do(found: Examination) -> list[str]:
    lines = [
        f"{name}: {_remedy(name, package.problem or '')}"
        for name, package in found.packages.items()
        if package.problem or (package.version is None and name in _BASE)
    ]
    lines += [f"{line}: install edge-dsc into a virtual environment without it" for line in found.in_the_way]
    if found.l4t and not found.packages["pycuda"].usable:
        lines.append("pycuda: " + ("" if found.nvcc else f"{_NVCC_PATH}, then ") + "pip install pycuda")
    if found.l4t and found.packages["tensorrt"].version is None:
        lines.append(f"tensorrt: {_remedy('tensorrt', '')}")
    if found.ort_disable_telemetry != "1":
        lines.append("ONNX Runtime may call home: export ORT_DISABLE_TELEMETRY=1")
    return lines
