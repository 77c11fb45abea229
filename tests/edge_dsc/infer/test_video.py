from __future__ import annotations

from pathlib import Path

import pytest

from edge_dsc.infer.source import VideoFile
from edge_dsc.infer.stop import Stop
from engines.errors import BadInputError


def test_every_frame_comes_in_order_with_its_time(video: Path) -> None:
    source = VideoFile(video)
    frames = list(source.items(Stop()))
    source.close()
    assert [frame.index for frame in frames] == list(range(12))
    assert [frame.seconds for frame in frames] == [index / 10 for index in range(12)]
    assert [round(float(frame.pixels.mean()), -1) for frame in frames] == list(range(0, 240, 20))
    assert frames[0].pixels.shape == (64, 64, 3)
    assert (source.total, source.note) == (12, None)


def test_a_truncated_video_gives_what_it_has_and_says_so(video: Path) -> None:
    data = video.read_bytes()
    video.write_bytes(data[: len(data) * 3 // 4])
    source = VideoFile(video)
    read = len(list(source.items(Stop())))
    source.close()
    assert 0 < read < 12
    assert source.note == f"{video} states 12 frames, {read} could be read: it is damaged or truncated"


def test_what_is_no_video_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="there is no video file"):
        VideoFile(tmp_path / "no.avi")
    (tmp_path / "text.avi").write_text("text")
    with pytest.raises(BadInputError, match=r"no video that OpenCV can read \(4 bytes\)"):
        VideoFile(tmp_path / "text.avi")
