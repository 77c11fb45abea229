"""A 720p camera frame from capture to answer: this loop against the naive colour path, in one process.

    python scripts/camera_path.py ENGINE [--frames 400] [--fps 30] [--seconds 10]

The naive path is what a first script does with the paper's network: BGR to RGB, one area resize in colour, float32 /
255, the Keras network converted as it is (three channels, NHWC), one ONNX Runtime session with its defaults. Its
weights are random: that costs the same. The two take turns, frame by frame; wall and processor time are medians.

``the loop adds`` compares the whole way through the loop (frames in, rows out) with the sum of its stages, each
timed alone, from a source that is always ready. ``age`` is that of a camera of --fps for --seconds: how long after
its capture a frame's answer is there, by thirds of the time, so that a growing one shows. With --busy MS the engine
takes that much longer for each frame, so that the source is faster than the engine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from turns import script_parser, time_in_turns

from edge_dsc.infer.camera import LiveSource
from edge_dsc.infer.classify import answer_group, prepare_picture
from edge_dsc.infer.rows import RowSink
from edge_dsc.infer.source import Frame, SourceKind, parse_source
from edge_dsc.infer.stop import Stop
from edge_dsc.networks import load_keras
from engines.packages import load
from engines.runtimes import Runner, open_engine

SPEC = parse_source("v4l2://0")


def main() -> None:
    """Measure and print."""
    parser = script_parser(__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--fps", type=float, default=30.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--busy", type=float, default=0.0, metavar="MS")
    options = parser.parse_args()
    noise = np.random.default_rng(0).integers(0, 256, (720, 1280, 1), dtype=np.uint8)
    grey = cv2.GaussianBlur(noise, (0, 0), 9)[:, :, None]
    picture = np.ascontiguousarray(grey.repeat(3, axis=2), dtype=np.uint8)
    naive = naive_path()
    with open_engine(options.engine) as runner:

        def ours(pixels: Any) -> None:
            answer_group([prepare_picture(_frame(pixels), runner.record.contract, source="camera")], runner)

        seen = _in_turns({"naive": naive, "ours": ours}, picture, options.frames)
        for name, (wall, cpu) in seen.items():
            print(f"{name:>6}: {wall:6.3f} ms from capture to answer, {cpu:6.3f} ms of processor time")  # noqa: T201
        wall, cpu = (seen["ours"][i] / seen["naive"][i] for i in (0, 1))
        print(f"ours takes {wall:.2f} of the naive path's time, {cpu:.2f} of its processor time")  # noqa: T201
        stages, looped = _loop_cost(runner, picture, options.frames)
        for what, index in (("wall", 0), ("processor", 1)):
            added = looped[index] / stages[index] - 1
            print(  # noqa: T201
                f"{what} time: stages {stages[index]:.3f} ms, loop {looped[index]:.3f} ms, "
                f"the loop adds {added:.1%}"
            )
        _print_ages(runner, picture, options)


def naive_path() -> Callable[[Any], None]:
    """Return the first script's way from a frame to an answer."""
    keras = load_keras()
    layers = keras.layers
    image = layers.Input((224, 224, 3), name="image")
    x = layers.Conv2D(32, 1, use_bias=False)(image)
    x = layers.DepthwiseConv2D(3, padding="same", activation="relu")(x)
    for _ in range(3):
        x = layers.SeparableConv2D(32, 3, padding="same")(layers.MaxPooling2D()(x))
        x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Dense(64, activation="relu")(layers.Flatten()(layers.MaxPooling2D()(x)))
    network = keras.Model(image, layers.Dense(3, activation="softmax", name="probabilities")(x))
    tensorflow = load("tensorflow")
    signature = [tensorflow.TensorSpec((None, 224, 224, 3), tensorflow.float32, name="image")]
    model, _ = load("tf2onnx").convert.from_keras(network, input_signature=signature, opset=18)
    session = load("onnxruntime").InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )

    def run(frame: NDArray[np.uint8]) -> None:
        pixels = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), (224, 224), interpolation=cv2.INTER_AREA)
        session.run(None, {"image": pixels.astype(np.float32)[None] / 255})

    return run


def _in_turns(
    paths: dict[str, Callable[[Any], None]], picture: NDArray[np.uint8], frames: int
) -> dict[str, tuple[float, float]]:
    """Return the medians of wall and processor time of each way, ms; a camera's buffer is new each time."""
    found = time_in_turns(paths, frames, warm_up=20, prepare=lambda: (picture.copy(),))
    return {
        name: (
            1e3 * statistics.median(times.wall for times in seen),
            1e3 * statistics.median(times.processor for times in seen),
        )
        for name, seen in found.items()
    }


def _loop_cost(runner: Runner, picture: NDArray[np.uint8], frames: int) -> list[tuple[float, float]]:
    """Return the stages' sum and the whole loop's time a frame: medians of wall and processor time, ms."""
    contract = runner.record.contract
    with tempfile.TemporaryDirectory() as folder:
        rows = RowSink(Path(folder, "rows.csv"), contract.labels, SourceKind.LIVE)

        def stages(pixels: Any) -> None:
            inputs: Any = prepare_picture(_frame(pixels), contract, source="camera").pixels
            runner.run(inputs[None])

        def loop(pixels: Any) -> None:
            for answer in answer_group([prepare_picture(_frame(pixels), contract, source="camera")], runner):
                rows.write(answer)

        seen = _in_turns({"stages": stages, "loop": loop}, picture, frames)
        rows.close()
    return [seen["stages"], seen["loop"]]


def _frame(pixels: NDArray[np.uint8]) -> Frame:
    return Frame(index=0, pixels=pixels, captured=time.monotonic())


class _Camera:
    """Gives a new 720p frame on every beat."""

    def __init__(self, picture: NDArray[np.uint8], fps: float) -> None:
        self._picture, self._period = picture, 1 / fps
        self._next = time.monotonic()

    def read(self) -> NDArray[np.uint8]:
        self._next = max(self._next + self._period, time.monotonic() - self._period)
        time.sleep(max(0.0, self._next - time.monotonic()))
        frame: NDArray[np.uint8] = self._picture.copy()
        return frame

    def release(self) -> None:
        """Do nothing."""


def _print_ages(runner: Runner, picture: NDArray[np.uint8], options: argparse.Namespace) -> None:
    contract = runner.record.contract
    source = LiveSource(SPEC, open_source=lambda spec: _Camera(picture, options.fps))
    ages = []
    began = time.monotonic()
    for frame in _until(source.items(Stop()), began + options.seconds):
        time.sleep(options.busy / 1e3)
        answer = answer_group([prepare_picture(frame, contract, source="camera")], runner)[0]
        ages.append((frame.captured - began, answer.age_ms or 0.0))
    source.close()
    thirds = [
        statistics.median([age for at, age in ages if third <= 3 * at / options.seconds < third + 1] or [0.0])
        for third in range(3)
    ]
    print(  # noqa: T201
        f"camera of {options.fps:g} frames/s for {options.seconds:g} s: {len(ages)} answers, "
        f"{source.dropped} dropped, age {' / '.join(f'{age:.2f}' for age in thirds)} ms by thirds, "
        f"{max(age for _, age in ages):.1f} ms at most"
    )


def _until(frames: Iterator[Frame], end: float) -> Iterator[Frame]:
    for frame in frames:
        if time.monotonic() >= end:
            return
        yield frame


if __name__ == "__main__":
    main()
