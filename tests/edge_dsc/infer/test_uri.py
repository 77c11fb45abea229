from __future__ import annotations

from pathlib import Path

import pytest

from edge_dsc.infer.source import CameraMode, SourceKind, hide_password, parse_source
from engines.errors import UsageError


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
