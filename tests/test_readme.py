"""The README and the pages under docs name only what exists: the program takes every command line in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

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
