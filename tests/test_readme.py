"""The README and the pages under docs name only what exists: the program takes every command line in them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.metadata import requires
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
    group = typer.main.get_command(app)
    assert isinstance(group, CommandGroup)
    group.load_command(name).make_context(name, words)


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


def test_the_constraints_for_a_jetson_pin_every_base_package_within_its_bounds() -> None:
    lines = (ROOT / "constraints-jetson.txt").read_text().splitlines()
    pins = {pin.name: pin for pin in (Requirement(line) for line in lines if not line.startswith("#"))}
    assert str(pins["numpy"].specifier) == "==1.26.4"
    for need in map(Requirement, requires("edge-dsc") or ()):
        if need.marker is None or "extra" not in str(need.marker):
            (pin,) = pins[need.name].specifier
            assert need.specifier.contains(pin.version), need
