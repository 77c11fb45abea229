"""What a run says on standard error, and the one object of ``--json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from edge_dsc.cli.console import give, give_json, progress_bar, say


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
