from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_dsc.infer.classify import ABSTAIN, Answer
from edge_dsc.infer.pictures import (
    AnnotatedFolder,
    AnnotatedVideo,
    UnsureFolder,
    Window,
    annotated_sink,
    caption_of,
    draw_answer,
    picture_name,
)
from edge_dsc.infer.source import Frame, SourceKind
from edge_dsc.infer.stop import Stop
from engines.errors import EnvironmentProblem, UsageError
from engines.files import ANNOTATED_VIDEO, kind_of_file

LABELS = ("dark", "light")
PICTURE = np.random.default_rng(0).integers(0, 256, (401, 333), dtype=np.uint8)


def answer(path: Path | str = "a.png", *, light: float = 0.75, frame: Frame | None = None) -> Answer:
    return Answer(path, (1 - light, light), latency_ms=1.26, frame=frame, picture=PICTURE)


def frame(index: int, seconds: float | None) -> Frame:
    return Frame(index=index, pixels=b"", captured=0.0, seconds=seconds)


def test_the_caption_tells_label_probability_and_latency() -> None:
    assert caption_of(answer(), LABELS) == "light 75.0%   1.3 ms"
    live = Answer("cam", (0.9, 0.1), latency_ms=2.0, age_ms=12.4)
    assert caption_of(live, LABELS) == "dark 90.0%   2.0 ms   age 12 ms"
    assert caption_of(Answer("x", None, "no image"), LABELS) == "no image"
    decided = [replace(answer(), decision=decision) for decision in ("dark", ABSTAIN)]
    assert [caption_of(one, LABELS)[:13] for one in decided] == ["dark 25.0%   ", "abstain 75.0%"]


def test_evidence_is_drawn_over_the_picture_and_the_caption_below() -> None:
    grey = np.full((320, 320), 90, np.uint8)
    maps = np.zeros((2, 4, 4), np.float32)
    maps[1, 0, 0] = 1
    plain, heated = (
        draw_answer(grey, answer(), LABELS),
        draw_answer(grey, replace(answer(), maps=maps), LABELS),
    )
    assert (plain[320:] == heated[320:]).all() and (plain[160:320] == heated[160:320]).all()
    assert heated[10, 10, 2] > 110 and (grey == 90).all()


@pytest.mark.parametrize("shape", [(401, 333), (720, 1280, 3), (64, 64), (2000, 33)])
def test_the_caption_stands_below_the_untouched_picture(shape: tuple[int, ...]) -> None:
    picture = np.full(shape, 77, np.uint8)
    drawn = draw_answer(picture, answer(), ("dark", "lüght" * 30))
    height, width = drawn.shape[:2]
    assert drawn.dtype == np.uint8 and height % 2 == width % 2 == 0 and width >= 320
    shown = round(shape[0] * 320 / shape[1]) if shape[1] < 320 else shape[0]
    assert (drawn[:shown, : max(320, shape[1])] == 77).all()
    assert drawn[shown:].max() > 100


def test_annotated_pictures_keep_the_folders_of_the_source(tmp_path: Path) -> None:
    sink = annotated_sink(tmp_path / "drawn", LABELS, SourceKind.FILES, tmp_path / "scans")
    sink.write(answer(tmp_path / "scans" / "sub" / "a.png"))
    sink.write(answer(tmp_path / "scans" / "sub" / "a.jpg"))
    sink.write(answer("../elsewhere/b.png"))
    sink.write(Answer("bad.png", None, "no image"))
    sink.write(answer("cam", frame=frame(7, None)))
    sink.write(answer("ward.avi", frame=frame(8, 0.8)))
    sink.close()
    found = sorted(str(path.relative_to(tmp_path / "drawn")) for path in (tmp_path / "drawn").rglob("*.*"))
    assert found == [
        "elsewhere/b.png.jpg",
        "frame-00000007.jpg",
        "sub/a.jpg.jpg",
        "sub/a.png.jpg",
        "ward-00000008.jpg",
    ]
    assert cv2.imread(str(tmp_path / "drawn" / "sub" / "a.png.jpg")).shape == (426, 334, 3)


def test_pictures_of_a_list_that_meet_in_one_name_both_stay(tmp_path: Path) -> None:
    for _ in range(2):  # the second run replaces what the first one wrote
        sink = annotated_sink(tmp_path, LABELS, SourceKind.LIST, None)
        for path in ("../a/x.png", "a/x.png", "a/x.png"):
            sink.write(answer(path))
        assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["x.png-2.jpg", "x.png.jpg"]


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".mkv", ".mov"])
def test_an_annotated_video_can_be_played_and_is_known_as_ours(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"drawn{suffix}"
    sink = annotated_sink(path, LABELS, SourceKind.VIDEO, None)
    for index in range(5):
        sink.write(answer("ward.avi", frame=frame(index, index / 10)))
    smaller = Answer("ward.avi", (0.5, 0.5), frame=frame(5, 0.5), picture=PICTURE[:100])
    sink.write(smaller)
    sink.close()
    capture = cv2.VideoCapture(str(path))
    shapes = []
    while (read := capture.read())[0]:
        shapes.append(read[1].shape)
    capture.release()
    assert shapes == [(426, 334, 3)] * 6
    assert kind_of_file(path) == ANNOTATED_VIDEO


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".mkv"])
def test_a_video_that_a_full_disk_cut_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"drawn{suffix}"
    sink = annotated_sink(path, LABELS, SourceKind.VIDEO, None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for index in range(20):
            sink.write(answer("ward.avi", frame=frame(index, index / 10)))
        with pytest.raises(EnvironmentProblem, match="does not hold all of its 20 frames"):
            sink.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_picture_of_somebody_else_is_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "drawn" / "a.png.jpg"
    mine.parent.mkdir()
    cv2.imwrite(str(mine), PICTURE)
    before = mine.read_bytes()
    for _ in range(2):  # its own are replaced
        annotated_sink(mine.parent, LABELS, SourceKind.FILES, None).write(answer("a.png"))
    assert mine.read_bytes() == before
    assert sorted(path.name for path in mine.parent.iterdir()) == ["a.png-2.jpg", "a.png.jpg"]
    assert cv2.imread(str(tmp_path / "drawn" / "a.png-2.jpg")).shape[1] == 334


def test_unsure_pictures_of_one_name_are_all_kept(tmp_path: Path) -> None:
    source, kept = tmp_path / "a.png", tmp_path / "kept"
    for value in (10, 20, 10, 20):
        cv2.imwrite(str(source), np.full((40, 40), value, np.uint8))
        UnsureFolder(kept, 0.8, None).write(answer(source))
        UnsureFolder(kept, 0.8, None).write(
            replace(answer("cam", frame=frame(0, None)), picture=cv2.imread(str(source)))
        )
    place = kept / picture_name(answer(source), None, "")
    assert [cv2.imread(str(path))[0, 0, 0] for path in (place, place.with_name("a-2.png"))] == [10, 20]
    assert sorted(path.name for path in kept.glob("*.png")) == ["frame-00000000-2.png", "frame-00000000.png"]
    assert sorted(path.name for path in place.parent.iterdir()) == ["a-2.png", "a.png"]


def test_places_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="images are annotated into a folder"):
        AnnotatedVideo(tmp_path / "x.avi", LABELS, SourceKind.FILES)
    with pytest.raises(UsageError, match=r"cannot write \.webm"):
        AnnotatedVideo(tmp_path / "x.webm", LABELS, SourceKind.LIVE)
    for make in (
        lambda: AnnotatedFolder(tmp_path / "in", LABELS, tmp_path),
        lambda: UnsureFolder(tmp_path, 0.5, tmp_path),
    ):
        with pytest.raises(UsageError, match="lies in the source"):
            make()
    for threshold in (0.0, 1.5, float("nan")):
        with pytest.raises(UsageError, match="is no probability"):
            UnsureFolder(tmp_path, threshold, None)


def test_unsure_pictures_are_kept_as_they_are(tmp_path: Path) -> None:
    source = tmp_path / "scans"
    source.mkdir()
    for name in ("sure.png", "unsure.png"):
        cv2.imwrite(str(source / name), PICTURE)
    secret = bytes(128) + b"DICM" + b"Doe^Jane"
    (source / "unsure.dcm").write_bytes(secret)
    sink = UnsureFolder(tmp_path / "kept", 0.8, source)
    sink.write(answer(source / "sure.png", light=0.8))
    sink.write(answer(source / "unsure.png"))
    sink.write(answer(source / "unsure.dcm"))
    sink.write(answer("cam", frame=frame(3, None)))
    sink.write(Answer("bad.png", None, "no image"))
    sink.close()
    kept = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert sorted(kept) == ["frame-00000003.png", "unsure.dcm.png", "unsure.png"]
    assert kept["unsure.png"] == (source / "unsure.png").read_bytes()
    assert all(b"Doe" not in data for data in kept.values())
    decoded = cv2.imdecode(np.frombuffer(kept["unsure.dcm.png"], np.uint8), cv2.IMREAD_GRAYSCALE)
    assert (decoded == PICTURE).all()


def test_of_a_camera_one_unsure_frame_a_second_is_kept(tmp_path: Path) -> None:
    sink = UnsureFolder(tmp_path, 0.8, None)
    for index in range(35):
        moment = Frame(index=index, pixels=b"", captured=100 + index / 10)
        sink.write(Answer("cam", (0.5, 0.5), frame=moment, picture=PICTURE))
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [f"frame-{index:08}.png" for index in (0, 10, 20, 30)]


def test_a_full_disk_is_said_and_leaves_no_half_picture(tmp_path: Path) -> None:
    source = tmp_path / "scans"
    source.mkdir()
    cv2.imwrite(str(source / "a.png"), PICTURE)
    sink = UnsureFolder(tmp_path / "kept", 0.8, source)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(EnvironmentProblem, match=r"cannot write .*a\.png: File too large"):
            sink.write(answer(source / "a.png"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "kept").iterdir()) == []


def test_an_unsure_file_that_is_gone_is_kept_as_it_was_seen(tmp_path: Path) -> None:
    source = tmp_path / "scans"
    UnsureFolder(tmp_path / "kept", 0.8, source).write(answer(source / "a.jpg"))
    assert (cv2.imread(str(tmp_path / "kept" / "a.jpg.png"), cv2.IMREAD_GRAYSCALE) == PICTURE).all()


def test_a_window_without_a_screen_says_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(EnvironmentProblem, match=r"DISPLAY is not set .*--serve PORT"):
        Window(LABELS, Stop())
    monkeypatch.setenv("DISPLAY", ":0")

    def no_windows(*arguments: object) -> None:
        raise cv2.error("The function is not implemented")

    monkeypatch.setattr(cv2, "namedWindow", no_windows, raising=False)
    with pytest.raises(EnvironmentProblem, match=r"has no windows .*--serve PORT"):
        Window(LABELS, Stop())


def test_q_in_the_window_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    shown = []
    keys = iter([-1, ord("q")])
    for name, double in (
        ("namedWindow", lambda *arguments: None),
        ("imshow", lambda title, picture: shown.append(picture.shape)),
        ("waitKey", lambda wait: next(keys)),
        ("destroyWindow", lambda title: shown.append(title)),
    ):
        monkeypatch.setattr(cv2, name, double, raising=False)
    stop = Stop()
    window = Window(LABELS, stop)
    window.write(answer())
    assert not stop.asked
    window.write(Answer("bad", None, "no image"))
    assert stop.asked
    window.close()
    assert shown == [(426, 334, 3), "edge-dsc"]
