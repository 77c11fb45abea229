"""The way of one picture: the functions of ours that ``infer`` calls for it, and the files that they are in.

    python scripts/count_path.py ENGINE IMAGE

Runs ``infer ENGINE IMAGE --out FILE.csv`` and prints every call of a Python function of ``edge_dsc``, ``calibration``,
``bench`` or ``engines``, in all threads, from ``infer_source`` to its end, indented below the caller. A generator
counts once, however often it is resumed. Comprehensions, properties and what runs while a module is imported are not
counted, nor what no file of ours holds, such as the ``__init__`` that ``dataclass`` writes. The last lines give the
calls in each package and in each file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

from edge_dsc.infer.inference import InferRequest, infer_source

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
    parser.add_argument("engine", type=Path)
    parser.add_argument("image")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        request = InferRequest(engine=options.engine, source=options.image, out=Path(folder, "rows.csv"))
        calls = calls_of(request)
    for number, call in enumerate(calls, start=1):
        print(f"{number:3} {'  ' * call.depth} {call.function}  ({call.file})")  # noqa: T201
    files = Counter(call.file for call in calls)
    packages = Counter(file.partition("/")[0] for file in files.elements())
    shares = ", ".join(f"{count} in {name}" for name, count in packages.most_common())
    print(f"{len(calls)} calls through {len(files)} files: {shares}")  # noqa: T201
    for file, count in files.most_common():
        print(f"{count:3} {file}")  # noqa: T201


def calls_of(request: InferRequest) -> list[Call]:
    """Run ``infer_source`` and return its calls."""
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
        infer_source(request)
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
