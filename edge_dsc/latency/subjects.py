"""``bench``: engines as subjects of a measurement: single requests, image files, piles of images."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from bench.compare import control_subject
from bench.measure import Subject, measure
from bench.plan import Plan
from bench.power import find_rails
from bench.report import Report
from bench.statistics import BUILD_OF
from edge_dsc.infer.source import expand_source
from edge_dsc.latency.limits import limits_pass, measure_ceilings
from edge_dsc.latency.passes import add_pass, memory_pass, power_pass
from engines.errors import BadInputError, ImageError, UsageError
from engines.images import read_input, usable_processors
from engines.record import load_record
from engines.runtimes import Array, Progress, Runner, RunnerOptions, get_runtime, open_engine

FOLDER, OFFLINE = "folder", "offline"
Describe = Callable[[Runner, int], Mapping[str, object]]


def folder_subject(name: str, runner: Runner, folder: str, description: Mapping[str, object]) -> Subject:
    """Return a subject whose request is one image file: read, decoded, resized and classified.

    The files are gone through again and again, in order; each is read once before, so that they come from the
    system's cache as they do from a camera's memory. Files that cannot be read are left out and counted.

    Raises:
        BadInputError: There is no image that can be read.
        UsageError: The engine takes no single image.
    """
    if runner.record.batch.smallest > 1:
        raise UsageError(
            f"{runner.record.engine} takes no single image", remedy="build it with --batch 1:1:N"
        )
    contract = runner.record.contract
    paths = _readable(expand_source(folder), runner)
    files, staged = itertools.cycle(paths), itertools.cycle(paths)

    def call() -> object:
        return runner.run(read_input(next(files), contract)[None])

    def stages() -> dict[str, int]:
        path, start = next(staged), time.perf_counter_ns()
        pixels = read_input(path, contract)
        decoded = time.perf_counter_ns()
        runner.run(pixels[None])
        return {"decode": decoded - start, "execute": time.perf_counter_ns() - decoded}

    return Subject(name=name, call=call, description={**description, "images": len(paths)}, stages=stages)


def offline_subjects(
    name: str, runner: Runner, images: int, description: Mapping[str, object], stack: ExitStack
) -> list[Subject]:
    """Return subjects whose request is a pile of images that are all there: one for each batch and concurrency.

    Batches are the smallest, best and largest that the engine takes; as many threads as the machine has
    processors share the pile where the runner allows it.

    Args:
        name: The engine's name.
        runner: The engine.
        images: Images in the pile.
        description: Of the engine.
        stack: Keeps the threads until the measurement is over.

    Raises:
        UsageError: The pile is smaller than the smallest batch.
    """
    batch = runner.record.batch
    sizes = [size for size in sorted({batch.smallest, batch.best, batch.largest}) if size <= images]
    if not sizes:
        raise UsageError(
            f"a pile of {images} is below the smallest batch, {batch.smallest}",
            remedy="give a larger --offline",
        )
    counts = sorted({1, usable_processors()}) if runner.thread_safe else [1]
    shape = (images, *runner.record.contract.input_shape)
    pile = np.random.default_rng(0).integers(0, 256, shape, "uint8")
    subjects = []
    for size in sizes:
        # A rest that fills no batch is left out where the engine cannot take it; the pile is counted without it.
        whole = images if batch.smallest == 1 else images - images % size
        parts = [pile[first : min(first + size, whole)] for first in range(0, whole, size)]
        for count in counts:
            call = _pile_call(runner, parts, count, stack)
            told = {**description, "batch": whole, "engine_batch": size, "concurrency": count}
            subjects.append(Subject(name=f"{name} b{size} c{count}", call=call, description=told))
    return subjects


def _pile_call(runner: Runner, parts: Sequence[Array], count: int, stack: ExitStack) -> Callable[[], object]:
    if count == 1:
        return lambda: [runner.run(part) for part in parts]
    pool = stack.enter_context(ThreadPoolExecutor(count, thread_name_prefix="offline"))
    return lambda: list(pool.map(runner.run, parts))


def _readable(paths: Sequence[Path], runner: Runner) -> list[Path]:
    found = []
    for path in paths:
        try:
            read_input(path, runner.record.contract)
        except ImageError:
            continue
        found.append(path)
    if not found:
        raise BadInputError(
            f"none of {len(paths)} files is an image that can be read", remedy="give a folder of X-rays"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What a measurement of engines is like, beside its plan.

    Attributes:
        batch: Images a request.
        threads: CPU threads of one request, where the runtime uses any.
        control: Measure the first of several engines a second time: a difference is the machine's.
        power_seconds: Time of a power pass of each engine, and as long idle before it; 0 leaves it out.
        memory: Measure the peak of memory too, each engine in a process of its own.
        limits: Measure the processor's ceilings and count the work of each engine that runs on it.
        folder: Image files instead of pixels in memory: each request reads, decodes and resizes one.
        offline: Images of a pile that is there at once, instead of single requests.
        builds: Builds of each engine: itself, and the others made anew as its record says.
    """

    batch: int = 1
    threads: int = 1
    control: bool = True
    power_seconds: float = 0.0
    memory: bool = False
    limits: bool = False
    folder: str | None = None
    offline: int | None = None
    builds: int = 1


def measure_engines(
    engines: Sequence[Path],
    plan: Plan,
    options: BenchOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Report:
    """Measure engines against each other: interleaved, each with the same input.

    The request that is timed begins with ``uint8 [batch, height, width, 1]`` in memory and ends with the
    probabilities in memory: decoding is left out, copies to and from a GPU are not. With a folder it begins
    with a file's name.

    Args:
        engines: Engine files.
        plan: How long and in which order.
        options: What else; the defaults of :class:`BenchOptions`.
        progress: Called with (phase, done, total).

    Raises:
        UsageError: The batch is outside an engine's range.
        ArtefactError: An engine is refused.
        EnvironmentProblem: A runtime does not work here.
        BadInputError: The folder holds no image that can be read.
    """
    chosen = options or BenchOptions()
    names = subject_names(engines)
    with contextlib.ExitStack() as stack:
        subjects = []
        for name, engine in zip(names, engines, strict=True):
            for number, build in enumerate(_builds(engine, chosen.builds, stack), start=1):
                runner = stack.enter_context(open_engine(build, threads=chosen.threads))
                label = name if number == 1 else f"{name} (build {number})"
                told = {BUILD_OF: name} if chosen.builds > 1 else {}
                subjects += [
                    replace(subject, description={**subject.description, **told})
                    for subject in _subjects(label, runner, build, chosen, stack)
                ]
        controls = [control_subject(subjects[0])] if chosen.control and len(subjects) > 1 else []
        report = measure([*subjects, *controls], plan, progress=progress)
        rails = find_rails() if chosen.power_seconds else ()
        if rails:
            report = add_pass(report, "power", power_pass(subjects, rails, seconds=chosen.power_seconds))
    if chosen.limits:
        report = add_pass(report, "limits", _limits(names, engines, chosen))
    if chosen.memory:
        found = {
            name: memory_pass(engine, batch=chosen.batch, threads=chosen.threads)
            for name, engine in zip(names, engines, strict=True)
        }
        report = add_pass(report, "memory", {name: memory for name, memory in found.items() if memory})
    return report


def _builds(engine: Path, count: int, stack: contextlib.ExitStack) -> list[Path]:
    from edge_dsc.build.engine import rebuild_engine  # needs packages that measuring does without

    found = [engine]
    for _ in range(count - 1):
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-dsc-build-"))
        found.append(rebuild_engine(engine, Path(folder)))
    return found


def _subjects(
    name: str, runner: Runner, engine: Path, options: BenchOptions, stack: contextlib.ExitStack
) -> list[Subject]:
    description = _describe(runner, options)
    if options.folder is not None:
        return [folder_subject(name, runner, options.folder, description)]
    if options.offline is not None:
        return offline_subjects(name, runner, options.offline, description, stack)
    record = runner.record
    if not record.batch.smallest <= options.batch <= record.batch.largest:
        raise UsageError(
            f"{record.engine} takes batches of {record.batch.smallest} to {record.batch.largest}, "
            f"not {options.batch}",
            remedy="give another --batch, or build the engine for it",
        )
    pixels = input_noise(runner, options.batch)
    stages = _stages(engine, pixels, options, stack)
    return [Subject(name=name, call=lambda: runner.run(pixels), description=description, stages=stages)]


def _stages(
    engine: Path, pixels: Array, options: BenchOptions, stack: contextlib.ExitStack
) -> Callable[[], Mapping[str, int]] | None:
    """Return a request that tells its stages, by a runner of its own: timing them costs time; None where none does."""
    timed = stack.enter_context(
        open_engine(engine, threads=options.threads, options=RunnerOptions(slots=1, time_stages=True))
    )

    def stages() -> Mapping[str, int]:
        ticket = timed.submit(pixels)
        timed.collect(ticket)
        return ticket.stages_ns or {}

    if stages():
        return stages
    timed.close()
    return None


def _describe(runner: Runner, options: BenchOptions) -> dict[str, Any]:
    record = runner.record
    return {
        "architecture": record.contract.architecture,
        "precision": record.precision.value,
        "runtime": record.runtime,
        "runtime_version": record.runtime_version,
        "engine_sha256": record.engine_sha256,
        "onnx_sha256": record.onnx_sha256,
        "layers": dict(record.layers),
        "batch": options.batch,
        "threads": options.threads,
        "switches": {"transfers": True},
        "runs": dict(runner.description),
    }


def _limits(names: Sequence[str], engines: Sequence[Path], options: BenchOptions) -> dict[str, Any]:
    """Only for engines on the processor: its ceilings say nothing of a GPU."""
    records = {name: (engine, load_record(engine)) for name, engine in zip(names, engines, strict=True)}
    here = {name: pair for name, pair in records.items() if get_runtime(pair[1].runtime).runs_on_cpu}
    if not here:
        return {}
    ceilings = measure_ceilings(options.threads)
    found = {
        name: limits_pass(engine, record, ceilings, batch=options.batch)
        for name, (engine, record) in here.items()
    }
    return {name: limits for name, limits in found.items() if limits}


def input_noise(runner: Runner, batch: int) -> Array:
    """Return noise of a fixed seed, ``uint8 [batch, height, width, 1]``.

    The time of these networks does not depend on what is in the picture.
    """
    shape = (batch, *runner.record.contract.input_shape)
    return np.random.default_rng(0).integers(0, 256, shape, "uint8")


def subject_names(engines: Sequence[Path]) -> list[str]:
    """Name engines by their file names, without the suffix where that is clear; by their paths where it is not."""
    stems = [engine.stem for engine in engines]
    return [
        stem if stems.count(stem) == 1 else str(engine) for engine, stem in zip(engines, stems, strict=True)
    ]


def default_report_path() -> Path:
    """Return a new file under ``runs/bench``, named after the time in UTC."""
    return Path("runs/bench") / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}.json"
