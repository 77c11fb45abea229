"""What a run says on standard error, and the one object of ``--json``."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from edge_dsc.cli.console import board_table, give, give_json, progress_bar, say, study_board
from edge_dsc.study.run_study import Board, Problem, Standing
from edge_dsc.study.trainings import Setting, Training


@dataclass(frozen=True)
class Made:
    path: Path
    images: int


class Recorded(msgspec.Struct, frozen=True):
    path: Path
    images: int


@pytest.mark.parametrize(
    "body", [Made(Path("a/b"), 3), Recorded(Path("a/b"), 3), {"path": "a/b", "images": 3}]
)
def test_any_record_is_printed_as_one_object(body: object, capsys: pytest.CaptureFixture[str]) -> None:
    give_json("edge-dsc/test", body, schema_version=2)
    said = capsys.readouterr()
    assert json.loads(said.out) == {
        "kind": "edge-dsc/test",
        "schema_version": 2,
        "path": "a/b",
        "images": 3,
    }
    assert said.err == ""


def test_numbers_that_json_has_no_word_for_are_refused() -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        give_json("edge-dsc/test", {"accuracy": float("nan")})


def test_progress_in_a_log_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 5.0, 10.0, 11.0, 25.0, 25.0])
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    with progress_bar() as progress:
        progress("reading", 0, 4)
        progress("reading", 1, 4)  # 5 s: not worth a line yet
        progress("reading", 2, 4)
        progress("reading", 3, 4)
        progress("reading\tloss 0.5", 4, 4)
        progress("reading", 4, 4)  # it is finished already
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["reading: 2/4 (10.0 s)", "reading: 4/4 loss 0.5 (25.0 s)"]


def test_words_cannot_move_the_cursor_and_json_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    say("first\nse\x1b[31mcond\r\u202ethird")
    give("one\ntwo\x1b")
    give_json("k", {"name": "\x1b[0m\x7f\x9b"})
    said = capsys.readouterr()
    assert said.err == "first\\nse\\x1b[31mcond\\r\\u202ethird\n"
    assert said.out.startswith("one\ntwo\\x1b\n{")
    assert json.loads(said.out[len("one\ntwo\\x1b\n") :])["name"] == "\x1b[0m\x7f\x9b"
    assert said.out.replace("\n", "").isprintable()


def standing(state: str, done: int = 0, seed: int = 0, **known: object) -> Standing:
    training = Training(Setting("dsc", True), seed=seed)
    return Standing(training=training, state=state, epochs=50, done=done, **known)  # type: ignore[arg-type]


def test_a_study_in_a_log_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    diverged = Problem(exit_code=7, what="training diverged", remedy="")
    boards = [
        (0, standing("waiting", 4)),
        (1, standing("running", 4, phase="starting")),
        (20, standing("running", 6, phase="training", epoch_seconds=90.0)),
        (70, standing("running", 7, phase="training", epoch_seconds=90.0)),
        (80, standing("done", 50)),
    ]
    with study_board() as watch:
        for seconds, first in boards:
            now[0] = seconds
            watch(Board(standings=(first, standing("done", 50, seed=1)), jobs=1))
        for state, problem in (("running", None), ("failed", diverged)):
            watch(Board(standings=(standing(state, seed=2, problem=problem),), jobs=1))
    assert capsys.readouterr().err.splitlines() == [
        "dsc aug., seed 0 running: from epoch 5 of 50",
        "1 of 2 trainings done, about 1:04:30 of training left; dsc aug., seed 0: training, 7/50 epochs",
        "dsc aug., seed 0 done: 2 of 2 trainings done",
        "dsc aug., seed 2 running: from epoch 1 of 50",
        "dsc aug., seed 2 failed: training diverged",
    ]


@pytest.mark.parametrize(("height", "rows"), [(30, 8), (8, 1)])
def test_a_study_on_a_terminal(height: int, rows: int) -> None:
    from rich.console import Console

    screen = Console(width=100, height=height, record=True, file=io.StringIO())
    at_work = standing(
        "running", 7, phase="asking \x1b[31m", accuracy=0.5, validation=0.25, epoch_seconds=2.0
    )
    board = Board(standings=(at_work, *(standing("done", 50, seed=seed) for seed in range(1, 8))), jobs=1)
    screen.print(board_table(board, screen))
    lines = screen.export_text().splitlines()
    assert lines[0].split() == ["training", "epoch", "training", "validation"]
    assert lines[1].split() == ["dsc", "aug.,", "seed", "0", "asking", r"\x1b[31m", "7/50", "50.0%", "25.0%"]
    assert len(lines) == rows + 2
    assert lines[-1].strip() == "7 of 8 trainings done, about 0:01:26 of training left"
