"""``bench``: engines as subjects of a measurement, one request each from pixels in memory to probabilities."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.control import control_subject
from bench.measure import Subject, measure
from bench.plan import Plan
from bench.power import find_rails
from bench.report import Report
from edge_dsc.limits import limits_pass, measure_ceilings
from edge_dsc.passes import add_pass, memory_pass, power_pass
from engines.errors import UsageError
from engines.packages import load
from engines.record import load_record
from engines.runtimes import Array, Progress, Runner, open_engine


def measure_engines(
    engines: Sequence[Path],
    plan: Plan,
    *,
    batch: int = 1,
    threads: int = 1,
    control: bool = True,
    power_seconds: float = 0.0,
    memory: bool = False,
    limits: bool = False,
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
        power_seconds: Time of a power pass of each engine, and as long idle before it; 0 leaves it out.
        memory: Measure the peak of memory too, each engine in a process of its own.
        limits: Measure the processor's ceilings and count the work of each engine that runs on it.
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
        report = measure(subjects, plan, progress=progress)
        if power_seconds:
            rails = find_rails()
            if rails:
                found = power_pass(subjects[: len(names)], rails, seconds=power_seconds)
                report = add_pass(report, "power", found)
    if limits:
        report = add_pass(report, "limits", _limits(names, engines, batch, threads))
    if memory:
        probed = {
            name: memory_pass(engine, batch=batch, threads=threads)
            for name, engine in zip(names, engines, strict=True)
        }
        report = add_pass(report, "memory", {name: found for name, found in probed.items() if found})
    return report


def _limits(names: Sequence[str], engines: Sequence[Path], batch: int, threads: int) -> dict[str, Any]:
    """Only for engines on the processor: its ceilings say nothing of a GPU."""
    records = {name: (engine, load_record(engine)) for name, engine in zip(names, engines, strict=True)}
    here = {name: pair for name, pair in records.items() if pair[1].runtime == "onnxruntime"}
    if not here:
        return {}
    ceilings = measure_ceilings(threads)
    found = {
        name: limits_pass(engine, record, ceilings, batch=batch) for name, (engine, record) in here.items()
    }
    return {name: limits for name, limits in found.items() if limits}


def _subject(name: str, runner: Runner, batch: int, threads: int) -> Subject:
    record = runner.record
    if not record.batch.smallest <= batch <= record.batch.largest:
        raise UsageError(
            f"{record.engine} takes batches of {record.batch.smallest} to {record.batch.largest}, not {batch}",
            remedy="give another --batch, or build the engine for it",
        )
    pixels = input_noise(runner, batch)
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


def input_noise(runner: Runner, batch: int) -> Array:
    """Return noise of a fixed seed, ``uint8 [batch, height, width, 1]``.

    The time of these networks does not depend on what is in the picture.
    """
    shape = (batch, *runner.record.contract.input_shape)
    return load("numpy").random.default_rng(0).integers(0, 256, shape, "uint8")


def subject_names(engines: Sequence[Path]) -> list[str]:
    """Name engines by their file names, without the suffix where that is clear; by their paths where it is not."""
    stems = [engine.stem for engine in engines]
    return [
        stem if stems.count(stem) == 1 else str(engine) for engine, stem in zip(engines, stems, strict=True)
    ]


def default_report_path() -> Path:
    """Return a new file under ``runs/bench``, named after the time in UTC."""
    return Path("runs/bench") / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}.json"
