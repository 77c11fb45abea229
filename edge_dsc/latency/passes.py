"""Passes of their own beside the latencies: power and memory of each engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench.measure import Subject
from bench.power import Rail, measure_power
from bench.report import Report

_ROOT = Path(__file__).resolve().parents[2]  # the folder that this edge_dsc is imported from


def add_pass(report: Report, name: str, found: Mapping[str, Any]) -> Report:
    """Return the report with what a pass found, by the subject's name."""
    replace = msgspec.structs.replace
    subjects = tuple(
        replace(subject, passes={**subject.passes, name: found[subject.name]})
        if subject.name in found
        else subject
        for subject in report.subjects
    )
    return replace(report, subjects=subjects)


def power_pass(
    subjects: Sequence[Subject], rails: Sequence[Rail], *, seconds: float
) -> dict[str, list[dict[str, Any]]]:
    """Measure the power of each subject, one after the other.

    Returns:
        Subject's name -> one entry per rail: its name, watts idle and busy, joules of a request, calls and seconds.
    """
    return {
        subject.name: [
            {**vars(power), "joules": power.joules}
            for power in measure_power(subject.call, rails, seconds=seconds)
        ]
        for subject in subjects
    }


def memory_pass(engine: Path, *, batch: int, threads: int) -> dict[str, Any]:
    """Return the memory of a process that only runs this engine, bytes.

    Returns:
        ``host_peak_bytes``; ``host_before_bytes``: Python and the packages before the engine was opened; and
        ``device_bytes``: what opening and running it added to the used memory of the first GPU that NVML knows,
        which holds what other processes do meanwhile; None without one. A Jetson's GPU uses the host's memory.
        Where the process failed, ``error`` alone: why.
    """
    arguments = [str(engine.absolute()), str(batch), str(threads)]
    done = subprocess.run(
        [sys.executable, "-m", "edge_dsc.latency.memory_probe", *arguments],
        cwd=_ROOT,  # python -m imports from the current folder first: the user's may hold a json.py or a bench.py
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {"error": _reason(done)}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Say why a process failed: its signal, else the last line that it wrote."""
    if done.returncode < 0:
        return f"the process was killed by signal {-done.returncode}"
    lines = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
    return lines[-1]


def memory_problems(report: Report) -> tuple[str, ...]:
    """Say of which engines the memory pass of a report has no figures, and why."""
    found = {
        subject.name: subject.passes["memory"] for subject in report.subjects if "memory" in subject.passes
    }
    if not found:
        return ("single requests are measured, not piles",)
    return tuple(f"{name}: {memory['error']}" for name, memory in found.items() if "error" in memory)
