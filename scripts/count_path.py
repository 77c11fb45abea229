"""The way of one picture and of one build: the functions of ours that a command calls, and the files that they are in.

    python scripts/count_path.py infer ENGINE IMAGE
    python scripts/count_path.py build RUN DATA

``infer`` runs ``infer ENGINE IMAGE --out FILE.csv`` and prints every call of a Python function of ``edge_dsc``,
``calibration``, ``bench`` or ``engines``, in all threads, from ``infer_source`` to its end, indented below the caller.
``build`` does the same for ``build-engine --int8 --calib-data DATA`` on a copy of a run, and prints how often each
function is called. A generator counts once, however often it is resumed. Comprehensions, properties and what runs
while a module is imported are not counted, nor what no file of ours holds, such as the ``__init__`` of a dataclass.
The last lines give the calls in each package and in each file.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

from edge_dsc.build.calibrate import CalibrationRequest, run_calibration
from edge_dsc.build.engine import BuildRequest, build_engine
from edge_dsc.infer.inference import InferRequest, infer_source
from engines.record import Precision

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("edge_dsc", "calibration", "bench", "engines")
UNCOUNTED = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<module>"})


@dataclass(frozen=True)
class Call:
    """One call: the file and the function, and how many functions of ours were waiting for it."""

    file: str
    function: str
    depth: int


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("infer", "build"))
    parser.add_argument("target", type=Path, help="the engine, or the run folder")
    parser.add_argument("data", help="the image, or the folder of labelled images")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.command == "infer":
            request = InferRequest(engine=options.target, source=options.data, out=Path(folder, "rows.csv"))
            calls = calls_of(lambda: infer_source(request))
        else:
            for name in ("model.onnx", "split.json"):
                shutil.copy(options.target / name, folder)
            calls = calls_of(lambda: _build(Path(folder, "model.onnx"), Path(options.data)))
    if options.command == "infer":
        for number, call in enumerate(calls, start=1):
            print(f"{number:3} {'  ' * call.depth} {call.function}  ({call.file})")  # noqa: T201
    else:
        for (file, function), count in Counter((call.file, call.function) for call in calls).items():
            print(f"{count:5} {function}  ({file})")  # noqa: T201
    files = Counter(call.file for call in calls)
    packages = Counter(file.partition("/")[0] for file in files.elements())
    shares = ", ".join(f"{count} in {name}" for name, count in packages.most_common())
    print(f"{len(calls)} calls through {len(files)} files: {shares}")  # noqa: T201
    for file, count in files.most_common():
        print(f"{count:5} {file}")  # noqa: T201


def _build(model: Path, data: Path) -> None:
    calibrated = run_calibration(CalibrationRequest(model=model, data=data))
    request = BuildRequest(model=model, precision=Precision.INT8, runtime="onnxruntime")
    build_engine(request, calibrated=calibrated)


def calls_of(action: Callable[[], object]) -> list[Call]:
    """Run something and return its calls."""
    frames: dict[
        int, tuple[FrameType, int]
    ] = {}  # held, so that no later frame gets the number of a dead one

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or id(frame) in frames or _file_of(frame.f_code) is None:
            return
        above = [code for code in _callers(frame) if _file_of(code) is not None]
        if not any(code.co_name == "<module>" for code in above):
            counted = [code for code in above if code.co_name not in UNCOUNTED]
            frames[id(frame)] = (frame, len(counted))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    properties = _property_getters()
    return [
        Call(str(_file_of(frame.f_code)), getattr(frame.f_code, "co_qualname", frame.f_code.co_name), depth)
        for frame, depth in frames.values()
        if frame.f_code.co_name not in UNCOUNTED and frame.f_code not in properties
    ]


def _callers(frame: FrameType) -> list[CodeType]:
    found = []
    above = frame.f_back
    while above is not None:
        found.append(above.f_code)
        above = above.f_back
    return found


def _file_of(code: CodeType) -> str | None:
    """Return the file of a function, relative to the repository; None where it is none of ours."""
    path = Path(code.co_filename)
    if not path.is_relative_to(ROOT) or path.relative_to(ROOT).parts[0] not in PACKAGES:
        return None
    return str(path.relative_to(ROOT))


def _property_getters() -> set[CodeType]:
    ours = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] in PACKAGES]
    kinds = [kind for module in ours for kind in vars(module).values() if isinstance(kind, type)]
    members = [member for kind in kinds for member in vars(kind).values() if isinstance(member, property)]
    return {member.fget.__code__ for member in members if isinstance(member.fget, FunctionType)}


if __name__ == "__main__":
    main()
