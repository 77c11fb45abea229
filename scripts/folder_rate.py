"""Images per second of the folder loop against a naive loop, in one process.

    python scripts/folder_rate.py ENGINE FOLDER [--rounds 5]

The naive loop is what a first script does: ``cv2.imread`` in colour, one area resize, colour to grey, one
ONNX Runtime session with its defaults, one run an image. ``decode alone`` is the ceiling: the same threads
decode and resize and run nothing. The three take turns, each round in another order; ratios are taken within a round.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import cv2
from turns import script_parser, time_in_turns

from edge_dsc.infer.classify import Prepared, classify_files, ordered_map, prepare_picture
from edge_dsc.infer.source import expand_source
from engines.images import usable_processors
from engines.packages import load
from engines.runtimes import open_engine

# The workers of the naive session spin for a while after its last run, on the cores and the account of whoever is next.
SETTLE_S = 0.3


def main() -> None:
    """Measure and print."""
    parser = script_parser(__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    paths = expand_source(options.folder)
    threads = usable_processors()
    session = load("onnxruntime").InferenceSession(str(options.engine), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def naive() -> None:
        for path in paths:
            pixels = cv2.imread(str(path))
            assert pixels is not None, path
            pixels = cv2.resize(pixels, (224, 224), interpolation=cv2.INTER_AREA)
            grey = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
            session.run(None, {name: grey[None, :, :, None]})

    with open_engine(options.engine) as runner:

        def loop() -> None:
            for answer in classify_files(paths, runner, threads=threads):
                assert answer.error is None, answer.error

        def prepare(group: list[Path]) -> list[Prepared]:
            return [prepare_picture(path, runner.record.contract) for path in group]

        def decode() -> None:
            for picture in ordered_map(prepare, paths, threads=threads):
                assert picture is not None and not isinstance(picture.pixels, Exception), picture

        calls = {"naive": naive, "loop": loop, "decode alone": decode}
        rounds = time_in_turns(calls, options.rounds, prepare=_settle)
    print(f"{len(paths)} images, {threads} threads, median of {options.rounds} rounds")  # noqa: T201
    for label, seen in rounds.items():
        rate = statistics.median(len(paths) / wall for wall, _ in seen)
        cpu_ms = statistics.median(1e3 * cpu / len(paths) for _, cpu in seen)
        print(f"{label:>14}: {rate:7.1f} images/s, {cpu_ms:6.2f} ms of processor time an image")  # noqa: T201
    for label, other in (("loop", "naive"), ("loop", "decode alone")):
        pairs = [b / a for (a, _), (b, _) in zip(rounds[label], rounds[other], strict=True)]
        cpu = [b / a for (_, a), (_, b) in zip(rounds[label], rounds[other], strict=True)]
        print(  # noqa: T201
            f"{label} against {other}: {statistics.median(pairs):.2f} times its rate, "
            f"{statistics.median(cpu):.2f} times by processor time (medians of the rounds' ratios)"
        )


def _settle() -> tuple[()]:
    time.sleep(SETTLE_S)
    return ()


if __name__ == "__main__":
    main()
