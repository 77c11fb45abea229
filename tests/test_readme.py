"""The README and the pages under docs name only what exists: the program takes every command line in them."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from packaging.requirements import Requirement

from edge_dsc.cli import COMMANDS
from edge_dsc.cli.app import CommandGroup, app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_COMMAND = re.compile(r"^(?: *\$ |~/edge/bin/|.*&& \.venv/bin/)edge-dsc +(.*)", re.MULTILINE)


def command_lines(page: Path) -> set[str]:
    return set(_COMMAND.findall(page.read_text().replace("\\\n", " ")))


LINES = sorted(set().union(*map(command_lines, PAGES)))


def test_the_readme_shows_every_command() -> None:
    assert {shlex.split(line)[0] for line in command_lines(ROOT / "README.md")} == set(COMMANDS)


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_is_taken(line: str) -> None:
    """Arguments, options and their values; without running it."""
    name, *words = shlex.split(line.removesuffix(" ..."), comments=True)
    command = typer.main.get_command(app)
    while isinstance(command, CommandGroup):
        command = command.load_command(name)
        if isinstance(command, CommandGroup):
            name, *words = words
    command.make_context(name, words)


def test_an_engine_is_built_before_it_is_used() -> None:
    built: set[tuple[str, str]] = set()
    for line in _COMMAND.findall(README):
        if line.startswith("build-engine"):
            precision, runtime = (
                re.search(pattern, line) for pattern in (r"--(fp16|int8)", r"--backend (\S+)")
            )
            built.add((precision[1] if precision else "fp32", runtime[1] if runtime else "onnxruntime"))
        assert built.issuperset(re.findall(r"dsc-(\w+)\.([a-z-]+)\.engine", line)), line
    assert len(built) == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" not in target:
            file, _, heading = target.partition("#")
            there = page.parent / file if file else page
            assert there.exists(), target
            assert not heading or heading in headings(there), target


def headings(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_test_command_is_what_ci_runs() -> None:
    command = next(line for line in README.splitlines() if line.endswith("-m pytest"))
    assert command in (ROOT / ".ci" / "run").read_text()


def test_it_says_what_it_is_not() -> None:
    assert "not a medical device" in README


def test_an_old_setuptools_is_refused(tmp_path: Path) -> None:
    """As Ubuntu 22.04's pip may bring it, which would install "UNKNOWN-0.0.0" and call that a success."""
    (tmp_path / "setuptools.py").write_text(
        "__version__ = '59.6.0'\ndef setup(): print('installed UNKNOWN')\n"
    )
    code = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "not 59.6.0: python -m pip install -U pip setuptools" in done.stderr


def pins(name: str) -> dict[str, str]:
    """The versions in a file of constraints; of one that depends on Python that of the newest."""
    lines = (ROOT / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in found}


def needs(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for; what is installed may be older."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def test_the_constraints_for_a_jetson_pin_every_package_within_its_bounds() -> None:
    pinned = pins("constraints-jetson.txt")
    assert pinned["numpy"] == "1.26.4"
    for need in needs("dicom"):
        assert need.specifier.contains(pinned[need.name]), need


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    lower = {
        need.name: bound.version
        for need in needs("dicom")
        for bound in need.specifier
        if bound.operator == ">="
    }
    assert pins("constraints-lowest.txt") == lower
