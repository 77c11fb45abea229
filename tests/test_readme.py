"""The README names only what exists: every command line in it is one that the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from edge_dsc.cli import COMMANDS
from edge_dsc.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
LINES = sorted(
    {
        match.group(1).removesuffix("\\")
        for line in README.splitlines()
        if (match := re.match(r"(?: *\$ |~/edge/bin/|.*&& \.venv/bin/)(edge-dsc .*)", line))
    }
)


def test_it_has_commands() -> None:
    assert {shlex.split(line)[1] for line in LINES} == set(COMMANDS)


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_is_taken(line: str) -> None:
    name, *words = shlex.split(line.removesuffix(" ..."), comments=True)[1:]
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"{name} has no {word}"


def test_the_test_command_is_what_ci_runs() -> None:
    command = next(line for line in README.splitlines() if line.endswith("-m pytest"))
    assert command in (ROOT / ".ci" / "run").read_text()


def test_it_says_what_it_is_not() -> None:
    assert "not a medical device" in README
