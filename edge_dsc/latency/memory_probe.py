"""The program behind the memory pass: run one engine and print its memory as JSON; it has a process of its own.

python -m edge_dsc.latency.memory_probe ENGINE BATCH THREADS

The high-water mark of memory belongs to a process and never falls.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.machine import first_gpu
from edge_dsc.latency.subjects import input_noise
from engines.errors import EdgeDscError
from engines.runtimes import RunnerOptions, open_engine

_CALLS = 50


def probe(engine: Path, batch: int, threads: int) -> dict[str, int | None]:
    """Open an engine, run it some times, and return what :func:`edge_dsc.latency.passes.memory_pass` does."""
    gpu = first_gpu()
    before, device_before = _peak_bytes(), gpu.memory_used() if gpu else None
    with open_engine(engine, threads=threads, options=RunnerOptions(slots=1, batch=batch)) as runner:
        pixels = input_noise(runner, batch)
        for _ in range(_CALLS):
            runner.run(pixels)
        device_after = gpu.memory_used() if gpu else None
    known = device_before is not None and device_after is not None
    return {
        "host_peak_bytes": _peak_bytes(),
        "host_before_bytes": before,
        "device_bytes": max(0, (device_after or 0) - (device_before or 0)) if known else None,
    }


def _peak_bytes() -> int:
    """Return the most memory that this process had resident so far (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main() -> None:
    """Print one line of JSON; on an error of ours one line that says it, and its exit code."""
    engine, batch, threads = sys.argv[1:]
    try:
        found = probe(Path(engine), int(batch), int(threads))
    except EdgeDscError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
