"""Passes of their own beside the latencies: power and memory of each engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.measure import Subject
from bench.power import Rail, measure_power
from bench.report import Report

_CALLS = 50
# Runs in a process of its own: the high-water mark of memory belongs to a process and never falls.
_PROBE = """
import json, sys
from pathlib import Path
def peak():
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024
from bench.machine import first_gpu
from edge_dsc.latency.subjects import input_noise
from engines.runtimes import open_engine
gpu = first_gpu()
before, device = peak(), gpu and gpu.memory_used()
with open_engine(Path(sys.argv[1]), threads=int(sys.argv[3])) as runner:
    pixels = input_noise(runner, int(sys.argv[2]))
    for _ in range(int(sys.argv[4])):
        runner.run(pixels)
    grown = None if device is None else max(0, gpu.memory_used() - device)
print(json.dumps({"host_peak_bytes": peak(), "host_before_bytes": before, "device_bytes": grown}))
"""


def add_pass(report: Report, name: str, found: Mapping[str, Any]) -> Report:
    """Return the report with what a pass found, by the subject's name."""
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
        Subject's name -> one entry a rail: its name, watts idle and busy, joules of a request, calls and seconds.
    """
    return {
        subject.name: [
            {**vars(power), "joules": power.joules}
            for power in measure_power(subject.call, rails, seconds=seconds)
        ]
        for subject in subjects
    }


def memory_pass(engine: Path, *, batch: int, threads: int) -> dict[str, int | None] | None:
    """Return the memory of a process that only runs this engine, bytes; None where it is not told.

    Returns:
        ``host_peak_bytes``; ``host_before_bytes``: Python and the packages before the engine was opened; and
        ``device_bytes``: what opening and running it added to the used memory of the first GPU that NVML knows,
        which holds what other processes do meanwhile; None without one. A Jetson's GPU uses the host's memory.
    """
    command = [sys.executable, "-c", _PROBE, str(engine), str(batch), str(threads), str(_CALLS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    return dict(json.loads(done.stdout.splitlines()[-1]))
