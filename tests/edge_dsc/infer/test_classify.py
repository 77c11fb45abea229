from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_dsc.infer.classify import Answer, Prepared, classify, classify_files, prepare_picture
from edge_dsc.infer.source import Frame
from engines.contract import ModelContract
from engines.errors import EnvironmentProblem, ImageError
from engines.images import read_input
from engines.record import BatchRange
from engines.runtimes import Ticket

CONTRACT = ModelContract(labels=("dark", "light"), architecture="dsc")
BAD = 255


class Brightness:
    """A runner that calls an image as light as its first pixel, out of 250; it notes what happens."""

    def __init__(
        self,
        batch: BatchRange = BatchRange(1, 2, 2),  # noqa: B008 - frozen
        *,
        thread_safe: bool = False,
        slots: int = 2,
        fails_at: int = -1,
    ) -> None:
        self.record: Any = type("Record", (), {"contract": CONTRACT, "batch": batch})()
        self.thread_safe, self.slots, self.fails_at = thread_safe, slots, fails_at
        self.log: list[str] = []
        self.threads: set[int] = set()
        self.open = 0

    def run(self, batch: np.ndarray) -> np.ndarray:
        self.threads.add(threading.get_ident())
        values = batch[:, 0, 0, 0].tolist()
        self.log.append(f"run {values}")
        if self.fails_at in values:
            raise EnvironmentProblem("the GPU is gone", remedy="none")
        return np.array([[1 - value / 250, value / 250] for value in values])

    def submit(self, batch: np.ndarray) -> Ticket:
        assert self.open < self.slots
        self.open += 1
        return Ticket(self, batch.copy())

    def collect(self, ticket: Ticket) -> np.ndarray:
        batch: Any = ticket.take(self)
        self.open -= 1
        return self.run(batch)


def prepare(value: int) -> Prepared:
    """A picture of one grey value; 255 is a damaged one."""
    if value == BAD:
        return Prepared("bad", ImageError("truncated", remedy="none"), 0.0)
    return Prepared(str(value), np.full((2, 2, 1), value, np.uint8), 0.0)


def values_of(answers: Iterator[Answer]) -> list[int | None]:
    return [answer.probabilities and round(answer.probabilities[1] * 250) for answer in answers]


def each_way() -> list[Any]:
    return [
        pytest.param(lambda **options: Brightness(thread_safe=True, **options), 1, id="one thread"),
        pytest.param(lambda **options: Brightness(thread_safe=True, **options), 3, id="three threads"),
        pytest.param(lambda **options: Brightness(**options), 3, id="batches"),
        pytest.param(lambda **options: Brightness(**options), 0, id="one by one"),
    ]


@pytest.mark.parametrize(("make", "threads"), each_way())
@pytest.mark.parametrize("count", [0, 1, 4, 5, 100])
def test_every_item_has_its_answer_in_order(make: Callable[..., Any], threads: int, count: int) -> None:
    items = [BAD if index % 7 == 3 else index for index in range(count)]
    answers = list(classify(items, prepare, make(), threads=threads))
    assert values_of(iter(answers)) == [None if item == BAD else item for item in items]
    assert [answer.error is not None for answer in answers] == [item == BAD for item in items]


@pytest.mark.parametrize(("make", "threads"), each_way())
def test_a_bounded_number_of_items_is_taken_ahead(make: Callable[..., Any], threads: int) -> None:
    source = iter(range(5000))
    answers = classify((index % 200 for index in source), prepare, make(), threads=threads)
    for _ in range(500):
        next(answers)
    answers.close()
    assert 500 <= next(source) <= 500 + 10 * max(threads, 1)


@pytest.mark.parametrize(("make", "threads"), each_way())
def test_a_silent_source_gets_all_its_answers_before_it_is_asked_again(
    make: Callable[..., Any], threads: int
) -> None:
    taken: list[int | None] = []

    def source() -> Iterator[int | None]:
        for item in (1, 2, 3, None, None, 4, None):
            taken.append(item)
            yield item

    runner = make()
    answers = classify(source(), prepare, runner, threads=threads)
    assert values_of(itertools.islice(answers, 3)) == [1, 2, 3]
    assert len(taken) <= 4 and runner.open == 0
    assert values_of(answers) == [4]


@pytest.mark.parametrize(("make", "threads"), each_way())
def test_a_failing_runner_ends_it_with_its_error(make: Callable[..., Any], threads: int) -> None:
    runner = make(fails_at=3)
    with pytest.raises(EnvironmentProblem, match="the GPU is gone"):
        list(classify(range(20), prepare, runner, threads=threads))
    assert runner.open == 0


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_in_preparing_comes_at_its_place(threads: int) -> None:
    def divide(value: int) -> Prepared:
        return prepare(12 // value)

    answers = classify([3, 2, 1, 1, 0, 1], divide, Brightness(thread_safe=True), threads=threads)
    assert values_of(itertools.islice(answers, 4)) == [4, 6, 12, 12]
    with pytest.raises(ZeroDivisionError):
        next(answers)


def test_a_thread_safe_runner_runs_where_the_pictures_are_prepared() -> None:
    runner = Brightness(BatchRange(1, 8, 8), thread_safe=True)
    assert len(list(classify(range(21), prepare, runner, threads=3))) == 21
    assert sorted(runner.log) == sorted(f"run [{value}]" for value in range(21))
    assert threading.get_ident() not in runner.threads


def test_any_other_runner_gets_batches_in_its_own_thread() -> None:
    runner = Brightness(BatchRange(1, 3, 8))
    list(classify([1, 2, BAD, 4, 5, 6, 7], prepare, runner, threads=3))
    assert runner.log == ["run [1, 2]", "run [4, 5, 6]", "run [7]"]
    assert runner.threads == {threading.get_ident()}


def test_as_many_batches_are_in_flight_as_there_are_slots() -> None:
    runner = Brightness(slots=3)
    answers = classify(range(20), prepare, runner, threads=1)
    next(answers)
    assert runner.open == 3
    answers.close()
    assert runner.open == 0


def test_batches_without_a_good_picture_keep_their_place() -> None:
    items = [BAD] * 4 + [5, 6] + [BAD] * 3 + [7]
    assert values_of(classify(items, prepare, Brightness(), threads=2)) == [
        *([None] * 4), 5, 6, None, None, None, 7,
    ]  # fmt: skip


@pytest.mark.parametrize("thread_safe", [False, True])
def test_a_batch_below_the_profile_is_filled_with_its_last_picture(thread_safe: bool) -> None:
    runner = Brightness(BatchRange(3, 3, 3), thread_safe=thread_safe)
    assert values_of(classify([1, 2, 3, 4], prepare, runner, threads=1)) == [1, 2, 3, 4]
    assert runner.log == ["run [1, 2, 3]", "run [4, 4, 4]"]


def test_without_threads_an_item_is_answered_before_the_next_is_taken() -> None:
    taken: list[int] = []

    def camera() -> Iterator[int]:
        for index in range(3):
            taken.append(index)
            yield index

    answers = classify(camera(), prepare, Brightness(thread_safe=True), threads=0)
    assert [(next(answers).path, len(taken)) for _ in range(3)] == [("0", 1), ("1", 2), ("2", 3)]


def frame(pixels: Any, seconds: float | None = None) -> Frame:
    return Frame(index=7, pixels=pixels, captured=0.0, seconds=seconds)


def test_an_image_file_becomes_the_input_of_every_other_stage(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (300, 500), dtype=np.uint8))
    found = prepare_picture(path, CONTRACT, keep_picture=True)
    assert isinstance(found.pixels, np.ndarray) and (found.pixels == read_input(path, CONTRACT)).all()
    assert found.path == path and found.frame is None and found.seconds > 0
    assert found.picture is not None and found.picture.shape == (300, 500)
    assert prepare_picture(path, CONTRACT).picture is None


def test_a_frame_is_prepared_as_a_file_of_the_same_pixels_is(jpeg: Any, tmp_path: Path) -> None:
    data = jpeg(90, 300, 500)
    (tmp_path / "a.jpg").write_bytes(data)
    wanted = read_input(tmp_path / "a.jpg", CONTRACT)
    colour = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    for pixels in (data, colour, colour[:, :, 0]):
        found = prepare_picture(frame(pixels), CONTRACT, source="cam")
        assert isinstance(found.pixels, np.ndarray) and (found.pixels == wanted).all()
        assert (found.path, found.picture) == ("cam", None)
    kept = prepare_picture(frame(colour), CONTRACT, source="cam", keep_picture=True)
    assert kept.picture is colour


def test_a_frame_that_waits_holds_no_picture_that_nobody_draws() -> None:
    found = prepare_picture(frame(np.zeros((64, 64), np.uint8)), CONTRACT, source="cam")
    assert found.frame == frame(b"") and found.frame is not None and found.frame.pixels == b""


def test_a_damaged_picture_becomes_an_error_with_its_name(tmp_path: Path) -> None:
    missing = prepare_picture(tmp_path / "no.png", CONTRACT)
    assert isinstance(missing.pixels, ImageError) and "no.png does not exist" in str(missing.pixels)
    torn = prepare_picture(frame(b"\xff\xd8 torn"), CONTRACT, source="cam", keep_picture=True)
    assert isinstance(torn.pixels, ImageError) and "frame 7 of cam is " in str(torn.pixels)
    assert torn.picture is None and torn.frame is not None


@pytest.mark.parametrize("threads", [0, 2])
def test_only_frames_of_a_camera_have_an_age(threads: int) -> None:
    pixels = np.full((64, 64), 50, np.uint8)
    ready = functools.partial(prepare_picture, contract=CONTRACT, source="cam")
    items = [frame(pixels), frame(pixels, seconds=0.5)]
    live, video = classify(items, ready, Brightness(thread_safe=True), threads=threads)
    assert live.age_ms is not None and live.age_ms > live.latency_ms > 0
    assert video.age_ms is None and video.latency_ms > 0


def test_files_are_answered_under_their_paths(tmp_path: Path) -> None:
    paths = [tmp_path / f"{value}.png" for value in (0, 100, 250)]
    for path in paths[:2]:
        cv2.imwrite(str(path), np.full((64, 64), int(path.stem), np.uint8))
    answers = list(classify_files(paths, Brightness(), threads=2))
    assert [answer.path for answer in answers] == paths
    assert [answer.probabilities for answer in answers] == [(1.0, 0.0), (0.6, 0.4), None]
    assert [answer.top for answer in answers] == [0, 0, None]
    assert "250.png does not exist" in str(answers[2].error)
