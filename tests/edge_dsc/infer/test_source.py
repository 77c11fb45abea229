from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from edge_dsc.infer.source import (
    CameraMode,
    ImageFiles,
    ListedFiles,
    SourceKind,
    expand_source,
    hide_password,
    parse_source,
)
from edge_dsc.infer.stop import Stop
from engines.errors import BadInputError, UsageError


@pytest.mark.parametrize(
    ("source", "kind", "scheme", "target"),
    [
        ("-", SourceKind.LIST, "file", "-"),
        ("scan.png", SourceKind.FILES, "file", "scan.png"),
        ("folder/*.mp4", SourceKind.FILES, "file", "folder/*.mp4"),
        ("ward.MP4", SourceKind.VIDEO, "file", "ward.MP4"),
        ("/dev/video3", SourceKind.LIVE, "v4l2", "/dev/video3"),
        ("v4l2:///dev/video3", SourceKind.LIVE, "v4l2", "/dev/video3"),
        ("v4l2://3", SourceKind.LIVE, "v4l2", "/dev/video3"),
        ("csi://1", SourceKind.LIVE, "csi", "1"),
        ("RTSP://host/live", SourceKind.LIVE, "rtsp", "RTSP://host/live"),
        ("https://host/cam", SourceKind.LIVE, "http", "https://host/cam"),
    ],
)
def test_a_source_is_what_its_name_says(source: str, kind: SourceKind, scheme: str, target: str) -> None:
    spec = parse_source(source)
    assert (spec.kind, spec.scheme, spec.target) == (kind, scheme, target)


def test_a_folder_with_the_name_of_a_video_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "study.ts").mkdir()
    assert parse_source(str(tmp_path / "study.ts")).kind is SourceKind.FILES


def test_a_camera_may_be_asked_for_a_mode() -> None:
    assert parse_source("csi://0?width=1920&height=1080&fps=60").mode == CameraMode(
        width=1920, height=1080, fps=60
    )
    assert parse_source("v4l2://0?fps=5").mode == CameraMode(fps=5)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("ftp://host/x", "cannot read ftp:// sources"),
        ("csi://left", "names no camera"),
        ("v4l2:///dev/sda", "names no camera"),
        ("csi://0?width=wide", "width is 'wide'"),
        ("csi://0?width=0", "width is '0'"),
        ("csi://0?zoom=2", "asks for zoom"),
    ],
)
def test_what_is_no_source_is_refused(source: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_source(source)


def test_a_password_stays_out_of_the_name() -> None:
    spec = parse_source("rtsp://admin:se:cret@10.0.0.9:554/live?x=1")
    assert spec.name == "rtsp://admin:***@10.0.0.9:554/live?x=1"
    assert spec.target == "rtsp://admin:se:cret@10.0.0.9:554/live?x=1"
    assert hide_password("http://host/a@b") == "http://host/a@b"
    assert hide_password("http://key@host/x") == "http://key:***@host/x"
    assert hide_password("rtsp://host:554/x") == "rtsp://host:554/x"


@pytest.mark.parametrize(
    "source", ["rtsp:/admin:secret@10.0.0.9/x", "HTTP:admin:secret@x", "http:/a:secret@b://c"]
)
def test_an_address_with_too_few_slashes_is_no_file_name(source: str) -> None:
    with pytest.raises(UsageError, match=r"a (rtsp|http) address begins with (rtsp|http)://") as refused:
        parse_source(source)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "password", ["secret", "se/cret", "se#cret", "se?cret", "se@cret", "se:cret", "se[cret"]
)
@pytest.mark.parametrize("scheme", ["rtsp", "http", "rtmp", "v4l2", "csi", "RTMP"])
def test_no_message_shows_a_password(scheme: str, password: str) -> None:
    source = f"{scheme}://admin:{password}@10.0.0.9/0?width=x"
    try:
        shown = parse_source(source).name
    except UsageError as error:
        shown = str(error)
    assert "cret" not in shown and "://admin:***@10.0.0.9/0?width=x" in shown


@pytest.mark.parametrize("source", ["http://[::1", "rtsp://[", "http://\u2100.x/"])
def test_what_is_no_address_is_refused(source: str) -> None:
    with pytest.raises(UsageError, match="is no address"):
        parse_source(source)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "b.png",
        "a.JPG",
        "sub/c.jpeg",
        "sub/deep/d.tiff",
        "notes.txt",
        ".hidden.png",
        ".cache/e.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def names(folder: Path, source: str) -> list[str]:
    return [str(path.relative_to(folder)) for path in expand_source(source)]


def test_a_folder_is_searched_recursively_in_a_stable_order(folder: Path) -> None:
    assert names(folder, str(folder)) == ["a.JPG", "b.png", "sub/c.jpeg", "sub/deep/d.tiff"]


def test_a_file_is_taken_whatever_its_name(folder: Path) -> None:
    assert names(folder, str(folder / "notes.txt")) == ["notes.txt"]


def test_globs(folder: Path) -> None:
    assert names(folder, f"{folder}/*.png") == ["b.png"]
    assert names(folder, f"{folder}/**/*") == ["a.JPG", "b.png", "sub/c.jpeg", "sub/deep/d.tiff"]


def test_links_in_a_circle_end(folder: Path) -> None:
    (folder / "sub" / "again").symlink_to(folder)
    assert len(expand_source(str(folder))) == 4


def test_a_source_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"no file, folder or glob match '.*nowhere'"):
        expand_source(str(tmp_path / "nowhere"))
    for source in (str(tmp_path), str(tmp_path / "*.png")):
        with pytest.raises(BadInputError, match="no images in"):
            expand_source(source)


def test_image_files_are_counted_and_never_wait(folder: Path) -> None:
    source = ImageFiles(str(folder))
    stop = Stop()
    stop.ask()
    assert source.total == len(list(source.items(stop))) == 4
    assert (source.dropped, source.reconnects, source.note) == (0, 0, None)


def test_each_line_is_a_path() -> None:
    lines = io.StringIO("a.png\r\n\n b c.png\nlast.png")
    assert [path for path in ListedFiles(lines).items(Stop()) if path] == [
        Path("a.png"),
        Path(" b c.png"),
        Path("last.png"),
    ]


def test_a_silent_pipe_is_idle_and_can_be_stopped() -> None:
    reading, writing = os.pipe()
    stop = Stop()
    with os.fdopen(reading) as stream:
        paths = ListedFiles(stream).items(stop)
        assert next(paths) is None
        os.write(writing, b"a.png\n")
        assert next(path for path in paths if path) == Path("a.png")
        stop.ask()
        assert list(paths) == []
        os.close(writing)


def test_a_name_may_be_any_bytes() -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"a\xff.png\n"), encoding="utf-8")
    assert [path for path in ListedFiles(stream).items(Stop()) if path] == [Path(os.fsdecode(b"a\xff.png"))]


def test_a_stream_that_fails_is_an_error() -> None:
    class Broken(io.StringIO):
        def readline(self, size: int | None = -1, /) -> str:
            raise ZeroDivisionError("disk")

    with pytest.raises(ZeroDivisionError, match="disk"):
        list(ListedFiles(Broken()).items(Stop()))


def test_a_line_without_an_end_is_not_kept() -> None:
    paths = ListedFiles(io.StringIO("a.png\n" + "\0" * (1 << 17))).items(Stop())
    assert next(path for path in paths if path) == Path("a.png")
    with pytest.raises(BadInputError, match="a line of standard input has more than 65536 characters"):
        list(paths)


def test_a_process_without_standard_input_says_so() -> None:
    with pytest.raises(BadInputError, match="standard input is closed"):
        list(ListedFiles(None).items(Stop()))
