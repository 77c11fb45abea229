from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from edge_dsc.infer.classify import (
    ABSTAIN,
    Answer,
    OperatingPoint,
    Prepared,
    calibrate_probabilities,
    classify,
    classify_files,
    decide_each,
    prepare_picture,
)
from edge_dsc.infer.source import Frame
from engines.contract import ModelContract
from engines.errors import EnvironmentProblem, ImageError, UsageError
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
        together: int = 1,
        fails_at: int = -1,
    ) -> None:
        self.record: Any = type("Record", (), {"contract": CONTRACT, "batch": batch})()
        self.thread_safe, self.slots, self.fails_at = thread_safe, slots, fails_at
        self.together = together
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
        pytest.param(
            lambda **options: Brightness(thread_safe=True, together=3, **options), 2, id="together in threads"
        ),
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


def test_a_runner_whose_calls_cost_much_gets_several_pictures_in_each() -> None:
    runner = Brightness(BatchRange(1, 6, 8), thread_safe=True, together=6)
    items = [0, 1, 2, BAD, 4, 5, 6, None, 8, 9, 10, 11, 12, 13, 14, BAD, 16]
    answers = values_of(classify(items, prepare, runner, threads=2))
    assert answers == [None if item == BAD else item for item in items if item is not None]
    assert sorted(runner.log) == [
        "run [0, 1, 2, 4, 5]",  # one of the six is damaged
        "run [14, 16]",
        "run [6]",  # what is at hand when the source is silent
        "run [8, 9, 10, 11, 12, 13]",
    ]


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


def test_probabilities_are_those_of_the_logits_over_the_temperature() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (50, 3))

    def softmax(values: np.ndarray) -> np.ndarray:
        shares = np.exp(values - values.max(axis=1, keepdims=True))
        return shares / shares.sum(axis=1, keepdims=True)

    for temperature in (0.4, 1.7):
        found = calibrate_probabilities(softmax(logits).astype(np.float32), temperature)
        assert np.abs(found - softmax(logits / temperature)).max() < 1e-6
        assert (found.argmax(axis=1) == logits.argmax(axis=1)).all()
    shares = np.array([[1.0, 0.0]], np.float32)
    assert calibrate_probabilities(shares, 1.0) is shares
    assert np.isfinite(calibrate_probabilities(shares, 50.0)).all()


@pytest.mark.parametrize("thread_safe", [True, False])
@pytest.mark.parametrize("threads", [0, 2])
def test_every_way_of_an_answer_has_the_temperature(thread_safe: bool, threads: int) -> None:
    batch = BatchRange(1, 1, 2) if thread_safe else BatchRange(1, 2, 2)
    runner = Brightness(batch, thread_safe=thread_safe)
    runner.record.contract = msgspec.structs.replace(CONTRACT, temperature=2.0)
    (answer,) = classify([50], prepare, runner, threads=threads)  # 0.2 light, 0.8 dark
    assert answer.probabilities == pytest.approx((2 / 3, 1 / 3))


POINT = OperatingPoint(labels=("a", "b", "c"), thresholds={"a": 0.3, "b": 0.2}, abstain=0.5)


@pytest.mark.parametrize(
    ("probabilities", "decision"),
    [
        ((0.31, 0.1, 0.59), "a"),  # however probable another is
        ((0.36, 0.3, 0.34), "b"),  # 1.5 times its own threshold, against 1.2
        ((0.29, 0.19, 0.52), "c"),
        ((0.29, 0.22, 0.49), "b"),
        ((0.29, 0.199, 0.49), ABSTAIN),
        ((0.2999999, 0.1, 0.6), "a"),  # 0.3 to the six digits of a row
    ],
)
def test_what_an_operating_point_calls(probabilities: tuple[float, ...], decision: str) -> None:
    assert POINT.decide(probabilities) == decision
    (answer,) = decide_each((one for one in [Answer("x", probabilities)]), POINT)
    assert answer.decision == decision
    called = answer.called(POINT.labels)
    shown = max(probabilities) if decision == ABSTAIN else probabilities["abc".index(decision)]
    assert called == (decision, shown)


def test_a_class_with_a_threshold_is_called_above_it_alone() -> None:
    point = OperatingPoint(labels=("a", "b"), thresholds={"a": 0.9})
    assert [point.decide(each) for each in ((0.95, 0.05), (0.8, 0.2))] == ["a", "b"]
    both = OperatingPoint(labels=("a", "b"), thresholds={"a": 0.9, "b": 0.9})
    assert both.decide((0.6, 0.4)) == ABSTAIN


def test_without_a_point_answers_stay_as_they_are() -> None:
    assert OperatingPoint.asked(("a", "b"), {}, None) is None
    answers = [Answer("x", (0.4, 0.6)), Answer("y", None, "bad")]
    assert list(decide_each((one for one in answers), None)) == answers
    decided = list(decide_each((one for one in answers), OperatingPoint.asked(("a", "b"), {}, 0.0)))
    assert [answer.decision for answer in decided] == ["b", None]
    assert answers[0].called(("a", "b")) == ("b", 0.6) and answers[1].called(("a", "b")) is None


@pytest.mark.parametrize(
    ("labels", "thresholds", "abstain", "said"),
    [
        (("a", "b"), {"c": 0.5}, 0.0, "there is no class 'c' to set a threshold for (name one of a, b)"),
        (("a", "b"), {"a": 0.0}, 0.0, "0 is no probability to decide by"),
        (("a", "b"), {"a": 1.5}, 0.0, "1.5 is no probability to decide by"),
        (("a", "b"), {}, 2.0, "2 is no probability to decide by"),
        (("a", "abstain"), {"a": 0.5}, 0.0, "a class is called 'abstain'"),
    ],
)
def test_a_point_that_decides_nothing_is_refused(
    labels: tuple[str, ...], thresholds: dict[str, float], abstain: float, said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        OperatingPoint(labels=labels, thresholds=thresholds, abstain=abstain)
    assert said in str(caught.value)


def test_maps_come_with_the_answers_of_good_pictures(tmp_path: Path) -> None:
    class Explaining(Brightness):
        def explain(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rows = self.run(batch)
            return rows, np.stack([np.full((2, 1, 1), row[1]) * [[[1]], [[3]]] for row in rows])

    for runner, threads in ((Explaining(thread_safe=True), 2), (Explaining(), 2), (Explaining(), 0)):
        answers = list(classify([50, BAD, 200], prepare, runner, threads=threads, cam=True))
        assert [answer.maps is None for answer in answers] == [False, True, False]
        evidence = answers[2].evidence(("dark", "light"))
        assert evidence is not None and evidence.item() == pytest.approx(
            0.8
        )  # 2.4 less the mean of 0.8 and 2.4
        first = answers[0].evidence(("dark", "light"))
        assert first is not None and first.item() == pytest.approx(-0.2)
        assert replace(answers[0], decision="light").evidence(("dark", "light")) == pytest.approx(0.2)
