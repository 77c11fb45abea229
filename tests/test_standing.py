"""What must hold for the project as a whole: layers, style, types, and what is loaded when."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from edge_dsc.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engines", "calibration", "bench", "edge_dsc")
# In every installation and at the top of the modules that need them, but not for help.
BASE = ("numpy", "cv2", "onnx", "msgspec", "jinja2", "rich")
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
    "pynvml",
    "nvidia",
    "openvino",
    "prometheus_client",
    "pyarrow",
    "ray",
    "tritonclient",
)
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


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


@pytest.mark.slow
def test_mypy_finds_every_planted_mistake_and_nothing_else() -> None:
    """A marked line of tests/planted names the codes that mypy must give it.

    One run for both, for two at once would share a cache. The wrong arrays there are parameters: of one that is made
    within the call, such as ``np.zeros(8, np.float32)``, numpy's overloads say that it may be any array.
    """
    planted = sorted((ROOT / "tests" / "planted").glob("*.py"))
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", "--no-pretty"]
    done = subprocess.run(
        [*command, *PACKAGES, "scripts", *(str(path.relative_to(ROOT)) for path in planted)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = Counter()
    for line in done.stdout.splitlines():
        match = re.fullmatch(r"tests/planted/(\w+)\.py:(\d+): error: .*\[([\w-]+)\]", line)
        assert match, line
        found[match[1], int(match[2]), match[3]] += 1
    expected = Counter(
        (path.stem, number, code)
        for path in planted
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for code in re.findall(r"[\w-]+", line.partition("# mistake:")[2])
    )
    assert found == expected, done.stdout + done.stderr


@pytest.mark.slow
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


def test_help_needs_typer_and_nothing_else() -> None:
    code = """
from edge_dsc.cli import COMMANDS
from edge_dsc.cli.app import app
for arguments in ["--help"], ["--version"], *([command, "--help"] for command in COMMANDS):
    try:
        app(arguments, prog_name="edge-dsc")
    except SystemExit as stop:
        assert stop.code == 0, (arguments, stop.code)
"""
    done = python(f"BLOCKED = {(*HEAVY, *BASE)!r}{BLOCKER}{code}")
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"Usage: edge-dsc {name}" in done.stdout
        assert f"\n  {name} " in done.stdout
    assert "not a medical device" in done.stdout


MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_the_house_has_few_rooms() -> None:
    others = [*(ROOT / "scripts").glob("*.py"), *ROOT.glob("*.py")]
    assert len(MODULES) + len(others) <= 161


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in MODULES}), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_a_folder_reads_like_a_table_of_contents(folder: Path) -> None:
    names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(("__", "."))}
    names.discard("py.typed")
    assert len(names) <= 12, sorted(names)


def test_no_name_is_used_for_two_modules_that_a_reader_could_mix_up() -> None:
    seen: dict[str, Path] = {}
    for path in MODULES:
        name = path.parent.name if path.name == "__init__.py" else path.stem
        assert name == "__main__" or name not in seen, f"{path} and {seen[name]}"
        seen[name] = path


def test_functions_stay_small() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = own_lines(node)
                assert lines <= 60, f"{path}:{node.lineno} {node.name} has {lines} lines"


def own_lines(function: ast.FunctionDef) -> int:
    """Count the lines of a function's body without its docstring and without classes that are made inside it."""
    body = function.body[ast.get_docstring(function) is not None :]
    classes = sum(span(node) for node in body if isinstance(node, ast.ClassDef))
    return (function.end_lineno or 0) - body[0].lineno + 1 - classes if body else 0


def span(node: ast.stmt) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(r"^\w+(: TypeAlias)? = (typing\.)?Any\b", id="a name for Any"),
        pytest.param(r"\bload\(\"(numpy|cv2|onnx)\b", id="a base package loaded as if it were heavy"),
    ],
)
def test_types_say_what_a_thing_is(pattern: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in MODULES
        for match in re.finditer(pattern, path.read_text(), re.MULTILINE)
    ]
    assert found == []
