"""``bench``: engines as subjects of a measurement: single requests, image files, piles of images."""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from bench.compare import control_subject
from bench.machine import Gpu, environment, first_gpu, gpu_at, read_state
from bench.measure import Opened, Subject, measure
from bench.plan import Plan
from bench.power import find_rails
from bench.report import Report
from bench.statistics import BUILD_OF
from edge_dsc.infer.served import ServedModel, open_model
from edge_dsc.infer.source import expand_source
from edge_dsc.latency.passes import add_pass, limits_pass, measure_ceilings, memory_pass, power_pass
from engines.errors import BadInputError, ImageError, UsageError
from engines.images import InputPixels, read_input, read_inputs, shape_input, usable_processors
from engines.record import EngineRecord
from engines.runtimes import (
    DEFAULT_OPTIONS,
    FINDINGS,
    Progress,
    Runner,
    RunnerOptions,
    answer_batches,
    get_runtime,
)
from engines.trt.cuda import find_gpu

FOLDER, OFFLINE = "folder", "offline"  # scenarios


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What a measurement of engines is like, beside its plan.

    Attributes:
        batch: Images a request.
        threads: CPU threads of one request, where the runtime uses any.
        control: Measure the first of several engines a second time: a difference is the machine's.
        power_seconds: Time of a power pass of each engine, and as long idle before it; 0 leaves it out.
        memory: Measure the peak of memory too, each engine in a process of its own; not of piles.
        limits: Measure the processor's ceilings and count the work of each engine that runs on it; not of piles.
        folder: Image files instead of pixels in memory: each request reads, decodes and resizes one.
        offline: Images of a pile that is there at once, instead of single requests.
        builds: Builds of each engine: itself, and others that its record's command makes.
        running: How engines of a GPU run; in the memory pass they run as they do by default, on the same GPU.
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
    running: RunnerOptions = DEFAULT_OPTIONS


def measure_engines(
    engines: Sequence[Path | ServedModel],
    plan: Plan,
    options: BenchOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Report:
    """Measure engines against each other: opened again and again, interleaved, each with the same input.

    The request that is timed begins with ``uint8 [batch, height, width, channels]`` in memory and ends with the
    probabilities in memory: decoding is left out, copies to and from a GPU are not. With a folder it begins
    with a file's name.

    Args:
        engines: Engine files, and models on servers, whose copy to the server and back is part of the request.
        plan: How long and in which order.
        options: What else; the defaults of :class:`BenchOptions`.
        progress: Called with (phase, done, total).

    Raises:
        UsageError: The batch is outside an engine's range; or something of a server is to be measured from here.
        ArtefactError: An engine is refused.
        EnvironmentProblem: A runtime does not work here.
        BadInputError: The folder holds no image that can be read.
    """
    chosen = options or BenchOptions()
    _refuse_from_afar(engines, chosen)
    named = dict(zip(subject_names(engines), engines, strict=True))
    records: dict[str, EngineRecord] = {}
    with ExitStack() as stack:
        subjects: list[Subject] = []
        for name, engine in named.items():
            for number, build in enumerate(_builds(engine, chosen, stack), start=1):
                label = name if number == 1 else f"{name} (build {number})"
                build_of = {BUILD_OF: name} if chosen.builds > 1 else {}
                # Opened to be looked at; each opening that is measured opens it anew.
                with _open(build, chosen) as runner:
                    records.setdefault(name, runner.record)
                    subjects += [
                        replace(subject, description={**subject.description, **build_of})
                        for subject in _subjects(label, runner, build, chosen)
                    ]
        here = {records[name].runtime for name, engine in named.items() if isinstance(engine, Path)}
        board = measured_board(here, chosen.running.device)
        controls = [control_subject(subjects[0])] if chosen.control and len(subjects) > 1 else []
        report = measure(
            [*subjects, *controls],
            plan,
            progress=progress,
            read_environment=functools.partial(environment, gpu=board),
            read_machine=functools.partial(read_state, gpu=board),
        )
        rails = find_rails(gpu=board) if chosen.power_seconds else ()
        if rails:
            report = add_pass(report, "power", power_pass(subjects, rails, seconds=chosen.power_seconds))
    if chosen.offline is not None:
        return report
    if chosen.limits:
        report = add_pass(report, "limits", _limits(named, records, chosen))
    if chosen.memory:
        memory = {
            name: memory_pass(
                engine, batch=chosen.batch, threads=chosen.threads, device=chosen.running.device
            )
            for name, engine in named.items()
            if isinstance(engine, Path)
        }
        report = add_pass(report, "memory", memory)
    return report


def measured_board(runtimes: Collection[str], device: int) -> Gpu | None:
    """Return the GPU that engines run on as NVML knows it: its order may be another than CUDA's.

    Args:
        runtimes: Names of the engines' runtimes; where all run on the processor, the first GPU is meant.
        device: Which GPU, as CUDA numbers them.

    Raises:
        EnvironmentProblem: There are GPUs, but not so many.
    """
    gpu = None if all(get_runtime(name).runs_on_cpu for name in runtimes) else find_gpu(device)[0]
    return gpu_at(gpu.bus_id) if gpu is not None and gpu.bus_id else first_gpu()


def _refuse_from_afar(engines: Sequence[Path | ServedModel], options: BenchOptions) -> None:
    """Refuse what would be measured of this machine where a server does the work."""
    served = next((engine for engine in engines if isinstance(engine, ServedModel)), None)
    asked = {
        "--power": options.power_seconds, "--memory": options.memory, "--limits": options.limits,
        "--builds": options.builds > 1,
    }  # fmt: skip
    given = [name for name, value in asked.items() if value]
    if served is not None and given:
        raise UsageError(
            f"{given[0]} measures this machine, and {served} runs on its server",
            remedy=f"leave {' and '.join(given)} out",
        )


def _builds(
    engine: Path | ServedModel, options: BenchOptions, stack: ExitStack
) -> Sequence[Path | ServedModel]:
    if not isinstance(engine, Path):
        return [engine]
    from edge_dsc.build.engine import rebuild_engine  # needs packages that measuring does without

    found = [engine]
    for _ in range(options.builds - 1):
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-dsc-build-"))
        found.append(rebuild_engine(engine, Path(folder), options.running.device))
    return found


def _open(engine: Path | ServedModel, options: BenchOptions, size: int | None = None) -> Runner:
    """Open an engine as it is measured: a request is one batch, waited for, or a pile in batches of a size."""
    running = replace(options.running, batch=size)
    if options.offline is None:
        running = replace(running, slots=running.slots or 1, batch=options.batch)
    return open_model(engine, threads=options.threads, options=running)


def _subjects(name: str, runner: Runner, engine: Path | ServedModel, options: BenchOptions) -> list[Subject]:
    description = _describe(runner, options)
    opener = functools.partial(_open, engine, options)
    if options.folder is not None:
        return [folder_subject(name, runner, opener, options.folder, description)]
    if options.offline is not None:
        return offline_subjects(name, runner, opener, options.offline, description)
    record = runner.record
    if not record.batch.smallest <= options.batch <= record.batch.largest:
        raise UsageError(
            f"{record.engine} takes batches of {record.batch.smallest} to {record.batch.largest}, "
            f"not {options.batch}",
            remedy="give another --batch, or build the engine for it",
        )
    with ExitStack() as look:
        staged = _stages(engine, input_noise(runner, options.batch), options, look) is not None

    def opened(stack: ExitStack) -> Opened:
        anew = stack.enter_context(opener())
        pixels = input_noise(anew, options.batch)
        stages = _stages(engine, pixels, options, stack) if staged else None
        return Opened(lambda: anew.run(pixels), stages)

    return [Subject(name=name, open=opened, description=description)]


def _describe(runner: Runner, options: BenchOptions) -> dict[str, Any]:
    record = runner.record
    found = {key: value for key, value in runner.description.items() if key in FINDINGS}
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
        "runs": {key: value for key, value in runner.description.items() if key not in FINDINGS},
        **({"found": found} if found else {}),
    }


def _stages(
    engine: Path | ServedModel,
    pixels: InputPixels,
    options: BenchOptions,
    stack: ExitStack,
) -> Callable[[], Mapping[str, int]] | None:
    """Return a request that reports its stages, through a runner of its own: timing them costs time.

    None where the runtime does not report any.
    """
    running = replace(options.running, slots=1, time_stages=True, batch=len(pixels))
    timed = stack.enter_context(open_model(engine, threads=options.threads, options=running))

    def stages() -> Mapping[str, int]:
        ticket = timed.submit(pixels)
        timed.collect(ticket)
        return ticket.stages_ns or {}

    if stages():
        return stages
    timed.close()
    return None


def folder_subject(
    name: str, runner: Runner, opener: Callable[[], Runner], folder: str, description: Mapping[str, object]
) -> Subject:
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
    files = expand_source(folder)
    paths = [image.path for image in read_inputs(files, contract) if not isinstance(image.pixels, ImageError)]
    if not paths:
        raise BadInputError(
            f"none of {len(files)} files is an image that can be read", remedy="give a folder of X-rays"
        )

    def opened(stack: ExitStack) -> Opened:
        runner = stack.enter_context(opener())
        measured, staged = itertools.cycle(paths), itertools.cycle(paths)

        def call() -> object:
            return runner.run(read_input(next(measured), contract)[None])

        def stages() -> dict[str, int]:
            path, start = next(staged), time.perf_counter_ns()
            pixels = read_input(path, contract)
            decoded = time.perf_counter_ns()
            runner.run(pixels[None])
            return {"decode": decoded - start, "execute": time.perf_counter_ns() - decoded}

        return Opened(call, stages)

    return Subject(name=name, open=opened, description={**description, "images": len(paths)})


def offline_subjects(
    name: str, runner: Runner, opener: Callable[[int], Runner], images: int, description: Mapping[str, object]
) -> list[Subject]:
    """Return subjects whose request is a pile of images that are all there: one for each batch and concurrency.

    Batches are the smallest, best and largest that the engine takes; as many threads as the machine has
    processors share the pile where the runner allows it. Where it has several slots, as on a GPU, the next batch is
    submitted before the one before it is collected, as ``infer`` does with a folder.

    Args:
        name: The engine's name.
        runner: The engine, open, to be asked what it takes.
        opener: Opens it anew, for batches of a size.
        images: Images in the pile.
        description: Of the engine.

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
    pile = input_noise(runner, images)
    subjects = []
    for size in sizes:
        # A rest that fills no batch is left out where the engine cannot take it; the pile is counted without it.
        whole = images if batch.smallest == 1 else images - images % size
        parts = [pile[first : min(first + size, whole)] for first in range(0, whole, size)]
        for count in counts:
            shared = {**description, "batch": whole, "engine_batch": size, "concurrency": count}
            pile_of = functools.partial(_open_pile, functools.partial(opener, size), parts, count)
            subjects.append(Subject(name=f"{name} b{size} c{count}", open=pile_of, description=shared))
    return subjects


def _open_pile(
    opener: Callable[[], Runner], parts: Sequence[InputPixels], count: int, stack: ExitStack
) -> Opened:
    runner = stack.enter_context(opener())
    if count == 1 and runner.slots == 1:  # nothing to overlap: without the cost of a ticket
        return Opened(lambda: [runner.run(part) for part in parts])
    if count == 1:
        return Opened(lambda: [answers for _, answers in answer_batches(runner, enumerate(parts))])
    pool = stack.enter_context(ThreadPoolExecutor(count, thread_name_prefix="offline"))
    return Opened(lambda: list(pool.map(runner.run, parts)))


def _limits(
    engines: Mapping[str, Path | ServedModel], records: Mapping[str, EngineRecord], options: BenchOptions
) -> dict[str, dict[str, float]]:
    """Only for engines on the processor: its ceilings say nothing of a GPU."""
    files = {name: engine for name, engine in engines.items() if isinstance(engine, Path)}
    here = [name for name in files if get_runtime(records[name].runtime).runs_on_cpu]
    if not here:
        return {}
    ceilings = measure_ceilings(options.threads)
    found = {name: limits_pass(files[name], records[name], ceilings, batch=options.batch) for name in here}
    return {name: limits for name, limits in found.items() if limits is not None}


def input_noise(runner: Runner, count: int) -> InputPixels:
    """Return noise of a fixed seed, ``[count, *contract.input_shape]`` of the contract's type.

    The time of these networks does not depend on what is in the picture.
    """
    contract = runner.record.contract
    shape = (count, contract.height, contract.width, contract.channels)
    return shape_input(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), contract)


def subject_names(engines: Sequence[Path | ServedModel]) -> list[str]:
    """Name engines by their file names, without the suffix where that is clear; by their paths where it is not."""
    stems = [engine.stem for engine in engines]
    return [
        stem if stems.count(stem) == 1 else str(engine) for engine, stem in zip(engines, stems, strict=True)
    ]


def default_report_path() -> Path:
    """Return a new file under ``runs/bench``, named after the time in UTC: two runs may begin in one second."""
    return Path("runs/bench") / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%fZ}.json"
