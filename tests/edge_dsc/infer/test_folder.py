from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from edge_dsc.infer.classify import Answer, classify_files, read_files
from engines.contract import ModelContract
from engines.errors import ImageError
from engines.record import BatchRange
from engines.runtimes import DirectSubmission, Ticket

CONTRACT = ModelContract(labels=("dark", "light"), architecture="dsc")


@dataclass
class BrightnessRunner(DirectSubmission):
    """Calls an image light by its mean; notes every batch and the thread that ran it."""

    batch: BatchRange
    thread_safe: bool
    sizes: list[int] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    @property
    def record(self) -> Any:
        return SimpleNamespace(contract=CONTRACT, batch=self.batch)

    def run(self, batch: np.ndarray) -> np.ndarray:
        self.sizes.append(len(batch))
        self.threads.add(threading.get_ident())
        light = batch.reshape(len(batch), -1).mean(axis=1) / 255
        return np.stack([1 - light, light], axis=1).astype(np.float32)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = []
    for index in range(23):
        path = tmp_path / f"{index:02}.png"
        cv2.imwrite(str(path), np.full((64, 64), index * 10, np.uint8))
        found.append(path)
    found[5].write_bytes(b"damaged")
    found[22].unlink()
    return found


def check(answers: list[Answer], paths: list[Path]) -> None:
    assert [answer.path for answer in answers] == paths
    for index, answer in enumerate(answers):
        if index in (5, 22):
            assert answer.probabilities is None and answer.top is None
            assert str(paths[index]) in str(answer.error)
        else:
            assert answer.error is None and answer.probabilities is not None
            assert answer.probabilities[1] == pytest.approx(index * 10 / 255, abs=1e-6)
            assert answer.top == int(index * 10 > 127)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_thread_safe_runner_answers_in_order_from_several_threads(paths: list[Path], threads: int) -> None:
    runner = BrightnessRunner(BatchRange(1, 8, 8), thread_safe=True)
    check(list(classify_files(paths, runner, threads=threads)), paths)
    assert runner.sizes == [1] * 21
    assert threading.get_ident() not in runner.threads


def test_any_other_runner_gets_batches_in_its_own_thread(paths: list[Path]) -> None:
    runner = BrightnessRunner(BatchRange(1, 8, 8), thread_safe=False)
    check(list(classify_files(paths, runner, threads=3)), paths)
    assert runner.sizes == [7, 8, 6]
    assert runner.threads == {threading.get_ident()}


def test_a_batch_below_the_profile_is_filled_up_and_cut_again(paths: list[Path]) -> None:
    runner = BrightnessRunner(BatchRange(4, 10, 10), thread_safe=True)
    check(list(classify_files(paths, runner, threads=2)), paths)
    assert runner.sizes == [9, 10, 4]


def test_batches_are_submitted_ahead_and_answered_in_order(paths: list[Path]) -> None:
    class TwoSlots(BrightnessRunner):
        slots = 2
        log: list[str] = []  # noqa: RUF012 - one runner a test

        def submit(self, batch: np.ndarray) -> Ticket:
            self.log.append("submit")
            return super().submit(batch)

        def collect(self, ticket: Ticket) -> np.ndarray:
            self.log.append("collect")
            return super().collect(ticket)

    runner = TwoSlots(BatchRange(1, 8, 8), thread_safe=False)
    check(list(classify_files(paths, runner, threads=3)), paths)
    assert runner.log == ["submit", "submit", "collect", "submit", "collect", "collect"]


@pytest.mark.parametrize("best", [1, 3])
def test_batches_without_a_good_picture_keep_their_place(paths: list[Path], best: int) -> None:
    for path in paths[:9]:
        path.unlink(missing_ok=True)
    runner = BrightnessRunner(BatchRange(1, best, best), thread_safe=False)
    answers = list(classify_files(paths, runner, threads=2))
    assert [answer.path for answer in answers] == paths
    assert [answer.error is None for answer in answers] == [False] * 9 + [True] * 13 + [False]


def test_only_a_bounded_number_of_images_waits(paths: list[Path]) -> None:
    taken: list[Path] = []

    def source() -> Any:
        for path in paths:
            taken.append(path)
            yield path

    answers = classify_files(source(), BrightnessRunner(BatchRange(), thread_safe=True), threads=2)
    next(answers)
    assert len(taken) == 16
    answers.close()


def test_a_failing_runner_ends_the_loop_with_its_error(paths: list[Path]) -> None:
    runner = BrightnessRunner(BatchRange(), thread_safe=True)
    runner.run = lambda batch: 1 / 0  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        list(classify_files(paths, runner, threads=2))


def test_read_files_gives_inputs_and_errors_in_order(paths: list[Path]) -> None:
    found = list(read_files(paths, CONTRACT, threads=2))
    assert [path for path, _ in found] == paths
    assert isinstance(found[5][1], ImageError)
    assert found[6][1].shape == (224, 224, 1)
