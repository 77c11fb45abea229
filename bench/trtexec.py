"""Times that NVIDIA's trtexec exported, as a latency report."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.machine import environment
from bench.plan import Plan
from bench.report import BlockSamples, Report, SubjectReport, as_samples
from engines.errors import BadInputError
from engines.files import read_regular, sha256_file

SCENARIO = "trtexec"
_BLOCKS = 60
# Stage -> its name in the file. TensorRT 8.2 renamed what was inMs and outMs.
_STAGES = {"h2d": ("h2dMs", "inMs"), "execute": ("computeMs",), "d2h": ("d2hMs", "outMs")}
_STARTS = ("startEnqMs", "startH2dMs", "startInMs", "startComputeMs")
_LONGEST_MS = 1e10  # 115 days
_REMEDY = "export it again: trtexec --loadEngine=ENGINE --exportTimes=TIMES.json"


def import_trtexec(
    path: Path, *, name: str | None = None, batch: int = 1, this_machine: bool = False
) -> Report:
    """Read the JSON of ``trtexec --exportTimes``.

    Its ``latencyMs`` is the sum of transfer, compute and transfer by the GPU's clock, not the time that a caller
    waits, and trtexec may keep several requests in flight. So the report's scenario is ``trtexec``, and
    ``compare`` refuses to hold it against a single stream unless that is allowed.

    Args:
        path: The file.
        name: Name of the engine; the file's by default.
        batch: Images a request, which the file does not tell.
        this_machine: Whether the times were taken here, so that this machine is the report's.

    Raises:
        BadInputError: Missing, no JSON, not of trtexec, empty, or with times that cannot be.

    Source:
        ``exportJSONTrace`` in samples/common/sampleReporting.cpp of TensorRT 8.0 to 10.
    """
    entries = _entries(path)
    latencies = [_nanoseconds(path, index, entry, ("latencyMs",)) for index, entry in enumerate(entries)]
    stages = {
        stage: [_nanoseconds(path, index, entry, names) for index, entry in enumerate(entries)]
        for stage, names in _STAGES.items()
        if any(known in entries[0] for known in names)
    }
    starts = [_nanoseconds(path, index, entry, _STARTS) for index, entry in enumerate(entries)]
    blocks = _blocks(latencies, stages, starts)
    machine = environment() if this_machine else {}
    subject = SubjectReport(
        name=name or path.stem,
        description={
            "batch": batch,
            "runtime": "tensorrt",
            "imported_from": path.name,
            "imported_sha256": sha256_file(path),
            "switches": {"transfers": any(stages.get("h2d", ())) or any(stages.get("d2h", ()))},
        },
        blocks=blocks,
    )
    plan = Plan(
        name=SCENARIO,
        iterations=len(latencies),
        rounds=len(blocks),
        openings=1,
        turn_seconds=None,
        warmup_seconds=0,
        lead_in=0,
        scenario=SCENARIO,
    )
    return Report(
        subjects=(subject,),
        plan=plan,
        environment=machine,
        environment_end=machine,
        created=datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).isoformat(timespec="seconds"),
    )


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(read_regular(path).decode())
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}", remedy=_REMEDY) from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is not valid JSON: {error}", remedy=_REMEDY) from error
    fits = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    if not fits or not entries or "latencyMs" not in entries[0]:
        raise BadInputError(f"{path} holds no times of trtexec", remedy=_REMEDY)
    return list(entries)


def _nanoseconds(path: Path, index: int, entry: Mapping[str, Any], names: tuple[str, ...]) -> int:
    value = next((entry[name] for name in names if name in entry), None)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LONGEST_MS:
        raise BadInputError(f"{path}: {names[0]} of entry {index} is {value!r}", remedy=_REMEDY)
    return round(value * 1e6)


def _blocks(
    latencies: list[int], stages: Mapping[str, list[int]], starts: list[int]
) -> tuple[BlockSamples, ...]:
    """Cut the run into equal stretches: their medians show the drift."""
    count = min(_BLOCKS, len(latencies))
    edges = [index * len(latencies) // count for index in range(count + 1)]
    return tuple(
        BlockSamples(
            opening=0,
            round=index,
            start_ns=starts[first] - starts[0],
            samples_ns=as_samples(latencies[first:last]),
            stages_ns={stage: float(statistics.median(times[first:last])) for stage, times in stages.items()},
        )
        for index, (first, last) in enumerate(pairwise(edges))
    )
