from __future__ import annotations

import io
from pathlib import Path

import pytest

from edge_dsc.infer.inference import FeedOptions, open_feed
from edge_dsc.infer.source import parse_source
from edge_dsc.infer.stop import Stop
from engines.errors import BadInputError, UsageError


def test_silence_on_standard_input_does_not_count_as_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_dsc.infer import inference as feeds

    def silent(stream: io.TextIOBase, stop: Stop):
        yield from (None, Path("a"), None, None, Path("b"), Path("c"))

    taken: list[Path] = []
    monkeypatch.setattr(feeds, "read_list", silent)
    monkeypatch.setattr(
        feeds,
        "classify_files",
        lambda paths, runner, **options: taken.extend(p for p in paths if p) or iter(()),
    )
    feed = open_feed(parse_source("-"), FeedOptions(limit=2))
    list(feed.answers(None, Stop()))  # type: ignore[arg-type]
    assert taken == [Path("a"), Path("b")]
    assert feed.total is None


def test_videos_and_cameras_have_no_second_time(video: Path) -> None:
    feed = open_feed(parse_source(str(video)), FeedOptions())
    assert feed.total == 12
    with pytest.raises(UsageError, match="--resume cannot go on with"):
        feed.skip(["x"], Path("rows.csv"), Stop())
    feed.close()


def test_nothing_there_is_said_when_it_is_opened(tmp_path: Path) -> None:
    for source in (str(tmp_path), str(tmp_path / "no.avi"), "/dev/video99", "http://127.0.0.1:1/"):
        with pytest.raises(BadInputError):
            open_feed(parse_source(source), FeedOptions())
