"""Resident memory of the loop over many frames, from a source that is always ready and an engine that does nothing.

    python scripts/memory_flat.py [--frames 100000]

Every frame goes the way of a camera's: preprocessing by the contract, the engine's place, CSV row by row, and a
board for the live page. Memory is read after a tenth of the frames and at the end. Exit 1 if it grew by
20 MiB or more, or if a frame was lost or answered twice.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from turns import script_parser

from edge_dsc.infer.classify import Answer, answer_group, prepare_picture
from edge_dsc.infer.live_page import Board, TimeHistogram
from edge_dsc.infer.rows import RowSink
from edge_dsc.infer.source import Frame, SourceKind
from engines.contract import ModelContract
from engines.record import BatchRange

LIMIT_MIB = 20.0


class IdleRunner:
    """Answers at once."""

    def __init__(self, contract: ModelContract) -> None:
        self.record: Any = SimpleNamespace(contract=contract, batch=BatchRange())
        self.thread_safe, self.together = True, 1

    def run(self, batch: Any) -> Any:
        """Answer every image alike."""
        return np.full((len(batch), 2), 0.5, np.float32)


def main() -> None:
    """Measure, print, and say by the exit code whether it holds."""
    parser = script_parser(__doc__)
    parser.add_argument("--frames", type=int, default=100_000)
    frames = parser.parse_args().frames
    contract = ModelContract(labels=("dark", "light"), architecture="dsc")
    board, latency = Board("idle", "frames", contract.labels), TimeHistogram()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.csv")
        rows = RowSink(out, contract.labels, SourceKind.LIVE)
        start = early = 0.0
        start = time.perf_counter()
        for number, answer in enumerate(_answers(frames, contract), start=1):
            rows.write(answer)
            board.put(answer)
            latency.add(answer.latency_ms)
            if number == frames // 10:
                early = resident_mib()
        growth, seconds = resident_mib() - early, time.perf_counter() - start
        rows.close()
        with out.open(newline="") as stream:
            seen = [int(row["frame"]) for row in csv.DictReader(stream)]
    whole = seen == list(range(frames))
    print(f"{frames} frames in {seconds:.1f} s: resident memory grew by {growth:.2f} MiB")  # noqa: T201
    print(f"every frame has exactly one row: {whole}")  # noqa: T201
    sys.exit(0 if growth < LIMIT_MIB and whole else 1)


def _answers(frames: int, contract: ModelContract) -> Iterator[Answer]:
    runner: Any = IdleRunner(contract)
    for index in range(frames):
        pixels = np.full((224, 224), index % 256, np.uint8)  # a picture of its own for each frame
        frame = Frame(index=index, pixels=pixels, captured=time.monotonic())
        yield from answer_group(
            [prepare_picture(frame, contract, source="camera", keep_picture=True)], runner
        )


def resident_mib() -> float:
    """Return the resident memory of this process, MiB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmRSS in /proc/self/status")


if __name__ == "__main__":
    main()
