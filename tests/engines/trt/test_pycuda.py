"""The runner on the real pycuda, above a driver without a GPU: what pycuda takes, gives and leaves behind.

Skipped where pycuda or a C compiler is missing. What it proves is the use of pycuda's interface and of the
driver's for graphs; nothing of a GPU or of TensorRT.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
DOUBLES = ROOT / "tests" / "doubles"
GRAPHS = ["CUDA graph", "enqueue (no CUDA graph: as asked)", "CUDA graph", "CUDA graph of the execution"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1 with every function that pycuda links."""
    found = importlib.util.find_spec("pycuda")
    compiler, symbols = shutil.which("cc"), shutil.which("nm")
    if found is None or found.submodule_search_locations is None or not compiler or not symbols:
        pytest.skip("needs pycuda and a C compiler")
    extension = next(Path(found.submodule_search_locations[0]).glob("_driver*.so"))
    listed = subprocess.run(
        [symbols, "-D", "--undefined-only", extension], capture_output=True, text=True, check=True
    )
    wanted = set(re.findall(r"\bcu(?:rand)?[A-Z]\w*", listed.stdout))
    source = (DOUBLES / "libcuda.c").read_text()
    rest = wanted - set(re.findall(r"\bcu[A-Z]\w*(?=\()", source))
    folder = tmp_path_factory.mktemp("libcuda")
    code = folder / "libcuda.c"
    code.write_text(source + "".join(f"R {name}(void) {{ return 801; }}\n" for name in sorted(rest)))
    out = folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", out, code]
    subprocess.run(command, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("release", "integrated"), [("10.3", False), ("10.3", True), ("rtx", False)], indirect=["release"]
)
def test_the_loop_on_the_real_pycuda(
    library: Path, release: str, plan: bytes, record: Any, small_model: Path, tmp_path: Path, integrated: bool
) -> None:
    given = tmp_path / "given.pickle"
    given.write_bytes(pickle.dumps((plan, record, small_model.read_bytes())))
    paths = [str(ROOT), str(DOUBLES), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library), "PYTHONPATH": os.pathsep.join(paths)}
    if integrated:
        environment["STUB_INTEGRATED"] = "1"
    done = subprocess.run(
        [sys.executable, DOUBLES / "drive_pycuda.py", given, release],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("words") == [*GRAPHS, "CUDA graph", "CUDA graph", "CUDA graph"]
    assert (found.pop("devices"), found.pop("fed")) == (["0", "1"], 1)
    assert "cannot open dsc.engine: cuDeviceGet failed: " in found.pop("refused")
    assert found == {"stages": ["d2h", "execute", "h2d"], "live": 0, "bad": 0, "depth": 0, "references": 0}
    assert "Warning" not in done.stderr
