"""``bench``: engines as subjects of a measurement, one request each from pixels in memory to probabilities."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from bench.control import control_subject
from bench.measure import Subject, measure
from bench.plan import Plan
from bench.report import Report
from engines.errors import UsageError
from engines.packages import load
from engines.runtimes import Progress, Runner, open_engine


def measure_engines(
    engines: Sequence[Path],
    plan: Plan,
    *,
    batch: int = 1,
    threads: int = 1,
    control: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Measure engines against each other: interleaved, each with the same input.

    The request that is timed begins with ``uint8 [batch, height, width, 1]`` in memory and ends with the
    probabilities in memory: decoding is left out, copies to and from a GPU are not.

    Args:
        engines: Engine files.
        plan: How long and in which order.
        batch: Images a request.
        threads: CPU threads of one request, where the runtime uses any.
        control: Measure the first of several engines a second time: a difference is the machine's.
        progress: Called with (phase, done, total).

    Raises:
        UsageError: The batch is outside an engine's range.
        ArtefactError: An engine is refused.
        EnvironmentProblem: A runtime does not work here.
    """
    names = subject_names(engines)
    with contextlib.ExitStack() as stack:
        runners = [stack.enter_context(open_engine(engine, threads=threads)) for engine in engines]
        subjects = [
            _subject(name, runner, batch, threads) for name, runner in zip(names, runners, strict=True)
        ]
        if control and len(subjects) > 1:
            subjects.append(control_subject(subjects[0]))
        return measure(subjects, plan, progress=progress)


def _subject(name: str, runner: Runner, batch: int, threads: int) -> Subject:
    record = runner.record
    if not record.batch.smallest <= batch <= record.batch.largest:
        raise UsageError(
            f"{record.engine} takes batches of {record.batch.smallest} to {record.batch.largest}, not {batch}",
            remedy="give another --batch, or build the engine for it",
        )
    # Noise of a fixed seed: the time of these networks does not depend on what is in the picture.
    pixels = (
        load("numpy").random.default_rng(0).integers(0, 256, (batch, *record.contract.input_shape), "uint8")
    )
    description = {
        "architecture": record.contract.architecture,
        "precision": record.precision.value,
        "runtime": record.runtime,
        "runtime_version": record.runtime_version,
        "engine_sha256": record.engine_sha256,
        "onnx_sha256": record.onnx_sha256,
        "layers": dict(record.layers),
        "batch": batch,
        "threads": threads,
        "switches": {"transfers": True},
    }
    return Subject(name=name, call=lambda: runner.run(pixels), description=description)


def subject_names(engines: Sequence[Path]) -> list[str]:
    """Name engines by their file names, without the suffix where that is clear; by their paths where it is not."""
    stems = [engine.stem for engine in engines]
    return [
        stem if stems.count(stem) == 1 else str(engine) for engine, stem in zip(engines, stems, strict=True)
    ]


def default_report_path() -> Path:
    """Return a new file under ``runs/bench``, named after the time in UTC."""
    return Path("runs/bench") / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}.json"
