from __future__ import annotations

import cv2
import pytest

from edge_dsc.infer import camera as capture
from edge_dsc.infer.source import parse_source
from engines.errors import BadInputError, EnvironmentProblem


def test_the_csi_pipeline_asks_for_grey_and_keeps_one_frame() -> None:
    assert capture.csi_pipeline(parse_source("csi://1?width=1920&height=1080&fps=60")) == (
        "nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM), width=(int)1920, height=(int)1080, "
        "format=(string)NV12, framerate=(fraction)60/1 ! nvvidconv ! video/x-raw, format=(string)GRAY8 ! "
        "appsink drop=true max-buffers=1 sync=false"
    )
    assert "width=(int)1280, height=(int)720" in capture.csi_pipeline(parse_source("csi://0"))


def test_without_gstreamer_csi_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2.videoio_registry, "hasBackend", lambda backend: backend != cv2.CAP_GSTREAMER)
    with pytest.raises(EnvironmentProblem, match=r"csi://0 needs GStreamer.*JetPack's OpenCV") as caught:
        capture.open_capture(parse_source("csi://0"))
    assert caught.value.exit_code == 3


def test_an_old_opencv_is_asked_by_its_build_information(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2.videoio_registry, "hasBackend")
    for answer in ("YES (1.20.3)", "NO"):
        monkeypatch.setattr(
            cv2, "getBuildInformation", lambda answer=answer: f"  Video I/O:\n    GStreamer: {answer}\n"
        )
        assert capture.has_gstreamer() == answer.startswith("YES")


def test_a_camera_that_is_not_there() -> None:
    with pytest.raises(BadInputError, match="there is no camera /dev/video99"):
        capture.open_capture(parse_source("/dev/video99"))


def test_a_stream_that_does_not_answer_keeps_its_password_to_itself() -> None:
    with pytest.raises(BadInputError, match=r"cannot open rtsp://u:\*\*\*@127\.0\.0\.1:1/live"):
        capture.open_capture(parse_source("rtsp://u:secret@127.0.0.1:1/live"))
