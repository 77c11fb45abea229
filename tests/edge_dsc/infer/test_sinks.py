from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_dsc.infer.classify import Answer
from edge_dsc.infer.live_page import Page
from edge_dsc.infer.pictures import AnnotatedFolder, AnnotatedVideo, UnsureFolder, Window
from edge_dsc.infer.sinks import Outputs, Sink, open_sinks
from edge_dsc.infer.source import parse_source
from edge_dsc.infer.stop import Stop
from engines.errors import EnvironmentProblem, UsageError
from engines.files import VIDEO_MARK
from engines.record import Precision

RECORD: Any = SimpleNamespace(
    engine="dsc.engine",
    engine_sha256="0" * 64,
    contract=SimpleNamespace(labels=("a", "b"), architecture="dsc"),
    precision=Precision.FP32,
    runtime="onnxruntime",
)


def opened(outputs: Outputs, source: str = "scans", said: list[str] | None = None) -> list[Sink]:
    say = said.append if said is not None else None
    sinks = list(open_sinks(outputs, RECORD, parse_source(source), Stop(), say))
    for sink in sinks:
        sink.close()
    return sinks


def test_nothing_is_opened_unless_it_is_asked_for() -> None:
    assert opened(Outputs()) == []
    assert not Outputs(host="0.0.0.0").need_pictures


@pytest.mark.parametrize(
    ("outputs", "kind"),
    [
        (Outputs(annotate=Path("drawn")), AnnotatedFolder),
        (Outputs(unsure=(0.6, Path("unsure"))), UnsureFolder),
        (Outputs(serve=0), Page),
    ],
)
def test_each_output_is_a_sink_that_needs_pictures(outputs: Outputs, kind: type) -> None:
    assert [type(sink) for sink in opened(outputs)] == [kind]
    assert outputs.need_pictures


def test_a_window_needs_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert Outputs(show=True).need_pictures
    with pytest.raises(EnvironmentProblem, match="--show needs a screen"):
        opened(Outputs(show=True))
    monkeypatch.setenv("DISPLAY", ":0")
    for name in ("namedWindow", "destroyWindow"):
        monkeypatch.setattr(f"cv2.{name}", lambda *arguments: None, raising=False)
    assert [type(sink) for sink in opened(Outputs(show=True))] == [Window]


def test_a_video_is_annotated_into_a_video_by_its_suffix(tmp_path: Path) -> None:
    outputs = Outputs(annotate=tmp_path / "drawn.avi")
    assert [type(sink) for sink in opened(outputs, "/dev/video0")] == [AnnotatedVideo]
    with pytest.raises(UsageError, match="images are annotated into a folder"):
        opened(outputs)


def test_a_video_is_never_annotated_onto_its_source_or_another_file(tmp_path: Path) -> None:
    video, link, engine = tmp_path / "v.avi", tmp_path / "link.avi", tmp_path / "x.engine"
    video.write_bytes(b"RIFF1234AVI ")
    link.symlink_to(video)
    engine.write_bytes(b"plan")
    mine = tmp_path / "mine.avi"
    mine.write_bytes(video.read_bytes())
    for place, words in (
        (video, "is a video, and would be replaced by an annotated video"),
        (link, "is a video, and would be"),
        (mine, "is a video, and would be"),
        (engine, "is an engine, and would be"),
    ):
        with pytest.raises(UsageError, match=words):
            opened(Outputs(annotate=place), str(video))
    for path in (video, mine):
        path.write_bytes(path.read_bytes() + VIDEO_MARK)
    assert [type(sink) for sink in opened(Outputs(annotate=mine), str(video))] == [AnnotatedVideo]
    with pytest.raises(UsageError, match="is the source"):
        opened(Outputs(annotate=link), str(video))


def test_a_folder_of_pictures_may_not_lie_in_the_source(tmp_path: Path) -> None:
    for outputs in (Outputs(annotate=tmp_path / "in"), Outputs(unsure=(0.5, tmp_path))):
        with pytest.raises(UsageError, match="lies in the source"):
            opened(outputs, str(tmp_path))


def test_the_sinks_before_the_one_that_fails_can_be_closed(tmp_path: Path) -> None:
    outputs = Outputs(annotate=tmp_path / "drawn", unsure=(7.0, tmp_path / "unsure"))
    sinks = open_sinks(outputs, RECORD, parse_source("scans"), Stop())
    assert isinstance(next(sinks), AnnotatedFolder)
    with pytest.raises(UsageError, match="is no probability"):
        next(sinks)


def test_the_address_of_the_page_is_said_and_who_may_look() -> None:
    said: list[str] = []
    opened(Outputs(serve=0), said=said)
    address = r"http://127\.0\.0\.1:\d+/"
    assert re.fullmatch(f"live page: {address}, metrics: {address}metrics", said[0])
    assert said[1:] == ["note: the metrics hold no drift of the input: no engine file is at hand"]
    said.clear()
    opened(Outputs(serve=0, host="0.0.0.0"), said=said)
    assert said[-1] == "note: everybody who reaches 0.0.0.0 sees the pictures; there is no password"


def test_a_sink_takes_an_answer_without_a_picture(tmp_path: Path) -> None:
    outputs = Outputs(annotate=tmp_path / "drawn", unsure=(0.9, tmp_path / "unsure"), serve=0)
    bad = Answer("bad.png", None, "no image")
    for sink in open_sinks(outputs, RECORD, parse_source("scans"), Stop()):
        sink.write(bad)
        sink.close()
    assert list(tmp_path.iterdir()) == []
