"""RTSP for real: a small server with RTP/JPEG over TCP (RFC 2326, RFC 2435), read by OpenCV's FFmpeg."""

from __future__ import annotations

import itertools
import json
import socketserver
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_dsc.infer.camera import open_capture
from edge_dsc.infer.classify import Prepared, prepare_video_frame
from edge_dsc.infer.inference import InferRequest, infer_source
from edge_dsc.infer.source import parse_source
from edge_dsc.infer.video import Frame
from engines.contract import ModelContract

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
    contract = ModelContract(labels=("a", "b"), architecture="dsc")
    prepared: Prepared = prepare_video_frame(
        Frame(index=0, pixels=pictures[0], captured=0.0), "cam", contract
    )
    assert prepared.pixels.shape == (224, 224, 1)
    assert abs(float(prepared.pixels.mean()) - levels[0]) <= 3


def test_infer_reads_it_and_hides_the_password(
    rtsp: str, deployed_models: dict[str, Path], tmp_path: Path
) -> None:
    from edge_dsc.build.engine import BuildRequest, build_engine

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
