"""Images per second of the folder loop against a naive loop, in one process.

    python bench/scripts/folder_rate.py ENGINE FOLDER [--rounds 5]

The naive loop is what a first script does: ``cv2.imread`` in colour, one area resize, colour to grey, one
ONNX Runtime session with its defaults, one run an image. ``decode alone`` is the ceiling: the same threads
decode and resize and run nothing. The three take turns, each round in another order, and every figure is the median
over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import onnxruntime

from edge_dsc.folder_loop import classify_files, default_threads, read_files
from edge_dsc.sources import expand_source
from engines.runtimes import open_engine


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", type=Path)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    paths = expand_source(options.folder)
    threads = default_threads()
    session = onnxruntime.InferenceSession(str(options.engine), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def naive() -> None:
        for path in paths:
            pixels = cv2.resize(cv2.imread(str(path)), (224, 224), interpolation=cv2.INTER_AREA)
            grey = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
            session.run(None, {name: grey[None, :, :, None]})

    with open_engine(options.engine) as runner:

        def loop() -> None:
            for answer in classify_files(paths, runner, threads=threads):
                assert answer.error is None, answer.error

        def decode() -> None:
            for _, pixels in read_files(paths, runner.record.contract, threads=threads):
                assert not isinstance(pixels, Exception), pixels

        rates = _rates({"naive": naive, "loop": loop, "decode alone": decode}, len(paths), options.rounds)
    print(f"{len(paths)} images, {threads} threads, median of {options.rounds} rounds")  # noqa: T201
    for label, rate in rates.items():
        print(f"{label:>14}: {rate:7.1f} images/s, {rate / rates['naive']:.2f} times naive")  # noqa: T201


def _rates(subjects: dict[str, Callable[[], None]], images: int, rounds: int) -> dict[str, float]:
    names = list(subjects)
    seconds: dict[str, list[float]] = {label: [] for label in names}
    for label in names:
        subjects[label]()
    for index in range(rounds):
        for label in names[index % 3 :] + names[: index % 3]:
            start = time.perf_counter()
            subjects[label]()
            seconds[label].append(time.perf_counter() - start)
    return {label: images / statistics.median(values) for label, values in seconds.items()}


if __name__ == "__main__":
    main()
