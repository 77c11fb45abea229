from __future__ import annotations

import itertools
import json
import os
import queue
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import edge_dsc.infer.camera
from edge_dsc.build.engine import BuildRequest, build_engine
from edge_dsc.infer.camera import LiveSource, Patience, csi_pipeline, has_gstreamer, open_capture
from edge_dsc.infer.inference import InferRequest, infer_source
from edge_dsc.infer.source import SourceSpec, parse_source
from edge_dsc.infer.stop import Stop
from engines.errors import BadInputError, EnvironmentProblem


def test_the_csi_pipeline_asks_for_grey_and_keeps_one_frame() -> None:
    assert csi_pipeline(parse_source("csi://1?width=1920&height=1080&fps=60")) == (
        "nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM), width=(int)1920, height=(int)1080, "
        "format=(string)NV12, framerate=(fraction)60/1 ! nvvidconv ! video/x-raw, format=(string)GRAY8 ! "
        "appsink drop=true max-buffers=1 sync=false"
    )
    assert "width=(int)1280, height=(int)720" in csi_pipeline(parse_source("csi://0"))


@pytest.mark.skipif(
    not has_gstreamer(), reason="this OpenCV has no GStreamer; Debian's and JetPack's have it"
)
def test_the_csi_pipeline_runs_in_gstreamer(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = parse_source("csi://0?width=322&height=242&fps=15")
    pipeline = csi_pipeline(spec)
    for nvidia, stand_in in (
        ("nvarguscamerasrc sensor-id=0", "videotestsrc pattern=smpte num-buffers=4"),
        ("(memory:NVMM)", ""),
        ("nvvidconv", "videoconvert"),
    ):
        assert pipeline.count(nvidia) == 1
        pipeline = pipeline.replace(nvidia, stand_in)
    monkeypatch.setattr(edge_dsc.infer.camera, "csi_pipeline", {spec: pipeline}.__getitem__)
    camera = open_capture(spec)
    frames = []
    while (frame := camera.read()) is not None:
        frames.append(frame)
    camera.release()
    assert 1 <= len(frames) <= 4  # the sink holds the newest one
    for frame in frames:
        assert (frame.dtype, frame.shape) == (np.uint8, (242, 322))
        bars = frame[:100].mean(axis=0)[23::46]
        assert (np.diff(bars) < 0).all()  # white, yellow, cyan, green, magenta, red, blue: each one darker


def test_without_gstreamer_csi_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2.videoio_registry, "hasBackend", lambda backend: backend != cv2.CAP_GSTREAMER)
    with pytest.raises(EnvironmentProblem, match=r"csi://0 needs GStreamer.*JetPack's OpenCV") as caught:
        open_capture(parse_source("csi://0"))
    assert caught.value.exit_code == 3


def test_an_old_opencv_is_asked_by_its_build_information(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2.videoio_registry, "hasBackend")
    for answer in ("YES (1.20.3)", "NO"):
        monkeypatch.setattr(
            cv2, "getBuildInformation", lambda answer=answer: f"  Video I/O:\n    GStreamer: {answer}\n"
        )
        assert has_gstreamer() == answer.startswith("YES")


def test_a_camera_that_is_not_there() -> None:
    with pytest.raises(BadInputError, match="there is no camera /dev/video99"):
        open_capture(parse_source("/dev/video99"))


def test_a_stream_that_does_not_answer_keeps_its_password_to_itself() -> None:
    with pytest.raises(BadInputError, match=r"cannot open rtsp://u:\*\*\*@127\.0\.0\.1:1/live"):
        open_capture(parse_source("rtsp://u:secret@127.0.0.1:1/live"))


SPEC = parse_source("v4l2://0")


class Camera:
    """Gives what the test puts; ``None`` is an unplugged cable. ``idle`` is set while it waits for the test."""

    def __init__(self) -> None:
        self.pictures: queue.Queue[Any] = queue.Queue()
        self.idle = threading.Semaphore(0)
        self.released = 0

    def read(self) -> Any:
        if self.pictures.empty():
            self.idle.release()
        picture = self.pictures.get(timeout=30)
        if isinstance(picture, Exception):
            raise picture
        return picture

    def release(self) -> None:
        self.released += 1

    def give(self, *pictures: Any) -> None:
        """Let the reader take all of them, and wait until it asks for more."""
        assert self.idle.acquire(timeout=30)
        for picture in pictures[:-1]:
            self.pictures.queue.append(picture)
        self.pictures.put(pictures[-1])
        assert self.idle.acquire(timeout=30)
        self.idle.release()


Opened = Callable[..., LiveSource]


@pytest.fixture
def opened() -> Iterator[Opened]:
    sources: list[tuple[LiveSource, Camera]] = []

    def open_live(*cameras: Any, **options: Any) -> LiveSource:
        script = iter(cameras)

        def open_source(spec: SourceSpec) -> Camera:
            found = next(script)
            if isinstance(found, Exception):
                raise found
            return found

        source = LiveSource(SPEC, open_source=open_source, **options)
        sources.append((source, cameras[-1]))
        return source

    yield open_live
    for source, camera in sources:
        if isinstance(camera, Camera):
            camera.pictures.put(None)
        source.close()
    assert "camera" not in [thread.name for thread in threading.enumerate()]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before each attempt to open it again; none is waited for."""
    seen: list[float] = []
    wait = Stop.wait

    def note(stop: Stop, seconds: float) -> bool:
        seen.append(seconds)
        return wait(stop, 0)

    monkeypatch.setattr(Stop, "wait", note)
    return seen


def gone() -> BadInputError:
    return BadInputError("cannot open v4l2://0", remedy="check the cable")


def test_the_newest_frame_wins_and_the_others_are_counted(opened: Opened) -> None:
    camera = Camera()
    source = opened(camera, clock=iter(range(100)).__next__)
    frames = source.items(Stop())
    camera.give("a", "b", "c", "d", "e")
    newest = next(frames)
    assert (newest.pixels, newest.index, newest.captured, newest.dropped) == ("e", 4, 4, 4)
    camera.give("f")
    assert (next(frames).pixels, source.dropped) == ("f", 4)


def test_the_age_of_a_frame_does_not_grow_with_a_source_faster_than_the_engine(opened: Opened) -> None:
    camera = Camera()
    now = [0.0]

    def clock() -> float:
        now[0] += 1  # a frame a second
        return now[0]

    source = opened(camera, clock=clock)
    frames = source.items(Stop())
    ages = []
    for _ in range(300):
        camera.give(*range(7))  # the engine takes seven seconds for each
        ages.append(now[0] - next(frames).captured)
    assert ages == [0.0] * 300
    assert source.dropped == 300 * 6


def test_an_unplugged_camera_is_opened_again_with_growing_pauses(opened: Opened, pauses: list[float]) -> None:
    first, second = Camera(), Camera()
    lines: list[str] = []
    patience = Patience(backoff_s=(0.5, 8.0))
    source = opened(first, gone(), gone(), second, patience=patience, say=lines.append, clock=lambda: 5.0)
    frames = source.items(Stop())
    first.give("a")
    assert next(frames).pixels == "a"
    first.pictures.put(None)
    second.give("b")
    assert (next(frames).pixels, source.reconnects, first.released) == ("b", 1, 1)
    assert pauses == [0.5, 8.0, 8.0]
    assert lines == ["v4l2://0 is gone: trying to open it again", "v4l2://0 is back after 0.0 s"]


def test_a_camera_that_opens_and_gives_no_frame_is_not_back(opened: Opened, pauses: list[float]) -> None:
    first, dead, last = Camera(), Camera(), Camera()
    dead.pictures.put(None)
    lines: list[str] = []
    source = opened(first, dead, gone(), last, say=lines.append, clock=lambda: 5.0)
    first.pictures.put(None)
    last.give("b")
    assert (next(source.items(Stop())).pixels, source.reconnects, dead.released) == ("b", 1, 1)
    assert pauses == [0.5, 1.0, 2.0]
    assert lines == ["v4l2://0 is gone: trying to open it again", "v4l2://0 is back after 0.0 s"]


def test_a_camera_that_came_back_is_waited_for_from_the_beginning(
    opened: Opened, pauses: list[float]
) -> None:
    first, second, third = Camera(), Camera(), Camera()
    frames = opened(first, gone(), second, gone(), third).items(Stop())
    for lost, back in ((first, second), (second, third)):
        lost.pictures.put(None)
        back.give("a")
        assert next(frames).pixels == "a"
    assert pauses == [0.5, 1.0, 0.5, 1.0]


def test_it_gives_up_on_one_that_only_opens(opened: Opened, pauses: list[float]) -> None:
    cameras = [Camera() for _ in range(4)]
    for camera in cameras:
        camera.pictures.put(None)
    source = opened(*cameras, patience=Patience(give_up_s=2), clock=iter(range(9)).__next__)
    with pytest.raises(BadInputError, match="stayed away for 2 s: it opens and gives no frame"):
        next(source.items(Stop()))


def test_it_gives_up_when_asked_to(opened: Opened, pauses: list[float]) -> None:
    camera = Camera()
    patience = Patience(give_up_s=2)
    source = opened(camera, gone(), gone(), gone(), patience=patience, clock=iter(range(9)).__next__)
    camera.pictures.put(None)
    with pytest.raises(BadInputError, match="stayed away for 2 s: cannot open v4l2://0"):
        next(source.items(Stop()))


def test_a_source_that_never_opened_is_an_error_at_once() -> None:
    def refuse(spec: SourceSpec) -> Camera:
        raise gone()

    with pytest.raises(BadInputError, match="cannot open"):
        LiveSource(SPEC, open_source=refuse)


def test_an_error_in_the_reader_reaches_the_loop(opened: Opened) -> None:
    camera = Camera()
    source = opened(camera)
    camera.pictures.put(ZeroDivisionError("driver"))
    with pytest.raises(ZeroDivisionError, match="driver"):
        next(source.items(Stop()))


def test_a_stop_ends_the_waiting(opened: Opened) -> None:
    stop = Stop()
    stop.ask()
    assert list(opened(Camera()).items(stop)) == []


SIDE = 256
LEVELS = (40, 120, 200)
SDP = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=cam\r\nt=0 0\r\nm=video 0 RTP/AVP 26\r\na=control:track\r\n"


def rtp_packets(level: int, index: int, sequence: Iterator[int]) -> Iterator[bytes]:
    """One grey picture as interleaved RTP/JPEG packets."""
    jpeg = bytes(cv2.imencode(".jpg", np.full((SIDE, SIDE, 3), level, np.uint8))[1])
    tables, scan, position = b"", b"", 2
    while not scan:
        marker, length = struct.unpack(">xBH", jpeg[position : position + 4])
        segment = jpeg[position + 4 : position + 2 + length]
        if marker == 0xDB:
            tables += b"".join(segment[at + 1 : at + 65] for at in range(0, len(segment), 65))
        position += 2 + length
        if marker == 0xDA:
            scan = jpeg[position:-2]
    assert len(tables) == 128
    for offset in range(0, len(scan), 1400):
        piece = scan[offset : offset + 1400]
        last = offset + 1400 >= len(scan)
        header = struct.pack(">I", offset) + bytes(
            [1, 255, SIDE // 8, SIDE // 8]
        )  # 1: 4:2:0; 255: own tables
        if offset == 0:
            header += struct.pack(">BBH", 0, 0, len(tables)) + tables
        rtp = (
            struct.pack(">BBHII", 0x80, 26 | last << 7, next(sequence) & 0xFFFF, index * 3000, 7)
            + header
            + piece
        )
        yield struct.pack(">cBH", b"$", 0, len(rtp)) + rtp


def _sequence(request: list[str]) -> str:
    return next(line.split(":")[1] for line in request if line.startswith("CSeq"))


class Session(socketserver.StreamRequestHandler):
    """RTSP for real, read by OpenCV's FFmpeg: RTP/JPEG over TCP (RFC 2326, RFC 2435)."""

    def handle(self) -> None:
        while request := self._request():
            method, number = (
                request[0].split()[0],
                _sequence(request),
            )
            extra, body = "Session: 1\r\n", ""
            if method == "OPTIONS":
                extra = "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
            elif method == "DESCRIBE":
                body, extra = SDP, f"Content-Type: application/sdp\r\nContent-Length: {len(SDP)}\r\n"
            elif method == "SETUP":
                extra += "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n"
            self.wfile.write(f"RTSP/1.0 200 OK\r\nCSeq:{number}\r\n{extra}\r\n{body}".encode())
            if method == "PLAY":
                self._play()
                return

    def _request(self) -> list[str]:
        lines = []
        while line := self.rfile.readline().decode().strip():
            lines.append(line)
        return lines

    def _play(self) -> None:
        index, sequence = 0, itertools.count()
        try:
            while not self.server.closing.is_set():  # type: ignore[attr-defined]
                for packet in rtp_packets(LEVELS[index // 10 % len(LEVELS)], index, sequence):
                    self.wfile.write(packet)
                index += 1
        except OSError:
            return


@pytest.fixture
def rtsp() -> Iterator[str]:
    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False
        closing = threading.Event()

    server = Server(("127.0.0.1", 0), Session)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"rtsp://me:secret@127.0.0.1:{server.server_address[1]}/live"
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_pictures_arrive_whole_and_in_order(rtsp: str) -> None:
    capture = open_capture(parse_source(rtsp))
    pictures = [capture.read() for _ in range(25)]
    capture.release()
    assert all(picture is not None and picture.shape == (SIDE, SIDE, 3) for picture in pictures)
    levels = [min(LEVELS, key=lambda level: abs(level - float(picture.mean()))) for picture in pictures]
    assert all(
        float(np.abs(p.astype(int) - level).max()) <= 3 for p, level in zip(pictures, levels, strict=True)
    )
    changes = [b for a, b in itertools.pairwise(levels) if a != b]
    assert len(changes) >= 2


def test_tcp_is_asked_for_unless_the_environment_says_otherwise(
    rtsp: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENCV_FFMPEG_CAPTURE_OPTIONS", raising=False)
    open_capture(parse_source(rtsp)).release()
    assert os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] == "rtsp_flags;prefer_tcp"
    monkeypatch.setenv("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_transport;tcp")
    open_capture(parse_source(rtsp)).release()
    assert os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] == "rtsp_transport;tcp"


def test_infer_reads_it_and_hides_the_password(
    rtsp: str, deployed_models: dict[str, Path], tmp_path: Path
) -> None:
    engine = build_engine(
        BuildRequest(model=deployed_models["dsc"], runtime="onnxruntime", out=tmp_path / "dsc.engine")
    ).path
    out = tmp_path / "rows.jsonl"
    summary = infer_source(InferRequest(engine=engine, source=rtsp, out=out, limit=5))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == summary.answered == 5 and summary.reconnects == 0
    assert {row["path"] for row in rows} == {rtsp.replace("secret", "***")}
    frames = [row["frame"] for row in rows]
    assert frames == sorted(set(frames)) and rows[-1]["dropped"] == frames[-1] - 4
