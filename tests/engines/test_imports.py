from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = (
    "numpy",
    "onnx",
    "onnxruntime",
    "cv2",
    "tensorflow",
    "keras",
    "tf2onnx",
    "matplotlib",
    "tensorrt",
    "tensorrt_rtx",
    "pycuda",
)
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "engines").rglob("*.py")
    if path.name != "__init__.py"
)


def test_no_module_imports_a_heavy_package_when_it_is_imported() -> None:
    lines = [
        "import importlib, sys",
        f"sys.path.insert(0, {str(ROOT)!r})",
        f"for name in {MODULES!r}:",
        "    importlib.import_module(name)",
        f"    heavy = sorted(set({HEAVY!r}) & set(sys.modules))",
        "    assert not heavy, f'{name} imports {heavy}'",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "engines.trt.run" in MODULES
