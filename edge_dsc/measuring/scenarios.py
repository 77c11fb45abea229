"""What one request is: pixels in memory, an image file, or a pile of images at once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from bench.measure import Subject
from edge_dsc.loop.folder import default_threads
from edge_dsc.sources import expand_source
from engines.errors import BadInputError, ImageError, UsageError
from engines.images import read_input
from engines.packages import load
from engines.runtimes import Runner

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
    counts = sorted({1, default_threads()}) if runner.thread_safe else [1]
    np = load("numpy")
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


def _pile_call(runner: Runner, parts: Sequence[object], count: int, stack: ExitStack) -> Callable[[], object]:
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
