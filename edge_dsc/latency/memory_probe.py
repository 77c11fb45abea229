"""The program behind the memory pass: run one engine and print its memory as JSON; it has a process of its own.

python -m edge_dsc.latency.memory_probe ENGINE BATCH THREADS DEVICE

The high-water mark of memory belongs to a process and never falls.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from edge_dsc.latency.subjects import input_noise, measured_board
from engines.errors import EdgeDscError
from engines.record import peek_record
from engines.runtimes import RunnerOptions, open_engine

_CALLS = 50


def probe(engine: Path, batch: int, threads: int, device: int) -> dict[str, int | None]:
    """Open an engine, run it some times, and return what :func:`edge_dsc.latency.passes.memory_pass` does."""
    gpu = measured_board([peek_record(engine).runtime], device)
    before, device_before = _peak_bytes(), gpu.memory_used() if gpu else None
    options = RunnerOptions(slots=1, batch=batch, device=device)
    with open_engine(engine, threads=threads, options=options) as runner:
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
    engine, *numbers = sys.argv[1:]
    try:
        found = probe(Path(engine), *map(int, numbers))
    except EdgeDscError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
