"""What must hold for the project as a whole: layers, style, types, and what is loaded when."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = ("numpy", "cv2", "onnx")  # at the top of the modules that need them, but not for a list of commands
HEAVY = (
    "scipy",
    "onnxruntime",
    "tensorflow",
    "keras",
    "tf2onnx",
    "matplotlib",
    "tensorrt",
    "tensorrt_rtx",
    "pycuda",
    "pydicom",
)
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def tool(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_imports_go_down_only() -> None:
    done = python(
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 2 kept, 0 broken" in done.stdout


def test_ruff_finds_nothing() -> None:
    tool("ruff", "check", ".")


def test_ruff_formats_nothing() -> None:
    tool("ruff", "format", "--check", ".")


def test_mypy_finds_nothing() -> None:
    tool("mypy")


def test_no_module_of_ours_loads_a_heavy_package() -> None:
    code = """
import importlib, pkgutil
for name in ("engines", "calibration", "bench", "edge_dsc"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        importlib.import_module(module.name)
"""
    done = python(f"BLOCKED = {HEAVY!r}{BLOCKER}{code}")
    assert done.returncode == 0, done.stderr


def test_help_works_with_every_heavy_package_missing() -> None:
    code = """
from edge_dsc.cli import COMMANDS, overview
print(overview())
from edge_dsc.cli.app import app
for command in COMMANDS:
    try:
        app([command, "--help"], prog_name="edge-dsc")
    except SystemExit as stop:
        assert stop.code == 0, (command, stop.code)
"""
    done = python(f"BLOCKED = {HEAVY + BASE!r}{BLOCKER}{code}")
    assert done.returncode == 0, done.stderr
    from edge_dsc.cli import COMMANDS

    for name in COMMANDS:
        assert f"Usage: edge-dsc {name}" in done.stdout
        assert f"\n  {name} " in done.stdout
    assert "not a medical device" in done.stdout


def test_the_list_of_commands_is_answered_without_typer() -> None:
    code = "import sys; from edge_dsc.cli import main; sys.argv = ['edge-dsc', '--help']\ntry: main()\n"
    code += "except SystemExit as stop: assert stop.code == 0\nassert 'typer' not in sys.modules"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: edge-dsc COMMAND")


PACKAGES = ("engines", "calibration", "bench", "edge_dsc")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_the_house_has_few_rooms() -> None:
    others = [*(ROOT / "scripts").glob("*.py"), *ROOT.glob("*.py")]
    assert len(MODULES) + len(others) <= 115


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in MODULES}), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_a_folder_reads_like_a_table_of_contents(folder: Path) -> None:
    names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(("__", "."))}
    assert len(names) <= 13, sorted(names)


def test_no_name_is_used_for_two_modules_that_a_reader_could_mix_up() -> None:
    seen: dict[str, Path] = {}
    for path in MODULES:
        name = path.parent.name if path.name == "__init__.py" else path.stem
        assert name == "__main__" or name not in seen, f"{path} and {seen[name]}"
        seen[name] = path


def test_functions_stay_small() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and path.parent.name != "cli":
                lines = _own_lines(node)
                assert lines <= 60, f"{path}:{node.lineno} {node.name} has {lines} lines"


def _own_lines(function: ast.FunctionDef) -> int:
    """Count a function's lines without its docstring and without classes that are made inside it."""
    lines = (function.end_lineno or 0) - function.lineno
    lines -= (ast.get_docstring(function, clean=False) or "").count("\n")
    for node in function.body:
        if isinstance(node, ast.ClassDef):
            lines -= (node.end_lineno or 0) - node.lineno
    return lines
