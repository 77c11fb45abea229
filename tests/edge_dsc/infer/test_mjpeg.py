from __future__ import annotations

import itertools
import socket
import threading
import time
from typing import Any

import pytest

from edge_dsc.infer import mjpeg
from edge_dsc.infer.camera import open_capture
from edge_dsc.infer.mjpeg import open_mjpeg
from edge_dsc.infer.source import parse_source
from engines.errors import BadInputError


def read_all(stream: Any) -> list[bytes]:
    found = []
    while (data := stream.read()) is not None:
        found.append(data)
    stream.release()
    return found


@pytest.mark.parametrize("length", [True, False])
def test_every_part_is_one_picture(network_camera: Any, jpeg: Any, length: bool) -> None:
    pictures = [jpeg(value) for value in (10, 100, 200)]
    body = b"".join(network_camera.part(picture, length=length) for picture in pictures)
    network_camera.scripts = [b"\r\npreamble\r\n" + body]
    read = read_all(open_capture(parse_source(network_camera.url)))
    assert [data.rstrip(b"\r\n") for data in read] == pictures


@pytest.mark.parametrize("length", [True, False])
def test_a_stream_that_ends_in_mid_frame_gives_no_half_picture(
    network_camera: Any, jpeg: Any, length: bool
) -> None:
    whole, torn = network_camera.part(jpeg(10), length=length), network_camera.part(jpeg(90), length=length)
    network_camera.scripts = [whole + torn[: len(torn) // 2]]
    assert len(read_all(open_mjpeg(parse_source(network_camera.url), timeout_s=5))) == 1


def test_the_closing_delimiter_ends_it(network_camera: Any, jpeg: Any) -> None:
    network_camera.scripts = [
        network_camera.part(jpeg(10)) + b"--frame--\r\n" + network_camera.part(jpeg(20))
    ]
    assert len(read_all(open_mjpeg(parse_source(network_camera.url), timeout_s=5))) == 1


def test_a_boundary_may_hold_its_own_dashes(network_camera: Any, jpeg: Any) -> None:
    network_camera.content_type = 'multipart/x-mixed-replace;boundary="--frame"'
    network_camera.scripts = [network_camera.part(jpeg(10))]
    assert len(read_all(open_mjpeg(parse_source(network_camera.url), timeout_s=5))) == 1


def test_a_length_that_lies_ends_the_stream(network_camera: Any) -> None:
    network_camera.scripts = [b"--frame\r\nContent-Length: 999999999999\r\n\r\nxx"]
    assert read_all(open_mjpeg(parse_source(network_camera.url), timeout_s=5)) == []
    network_camera.scripts = [b"--frame\r\nContent-Length: many\r\n\r\nxx"]
    assert read_all(open_mjpeg(parse_source(network_camera.url), timeout_s=5)) == []


def test_a_boundary_that_lies_ends_after_so_many_bytes(
    network_camera: Any, jpeg: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mjpeg, "_MAX_BYTES", 100_000)
    picture = network_camera.part(jpeg(10))
    network_camera.scripts = [picture + b"--other\r\n" * 20_000 + picture]
    assert len(read_all(open_mjpeg(parse_source(network_camera.url), timeout_s=5))) == 1


def test_a_part_of_very_many_headers_ends_the_stream(network_camera: Any, jpeg: Any) -> None:
    head, picture = network_camera.part(jpeg(10)).split(b"\r\n", 1)
    network_camera.scripts = [head + b"\r\n" + b"X: y\r\n" * 101 + picture]
    assert read_all(open_mjpeg(parse_source(network_camera.url), timeout_s=5)) == []


def test_bytes_now_and_then_are_not_waited_for(
    network_camera: Any, jpeg: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network_camera.scripts = [network_camera.part(jpeg(10, 900, 900)) * 3]
    stream = open_mjpeg(parse_source(network_camera.url), timeout_s=5)
    now = time.monotonic()
    monkeypatch.setattr(mjpeg.time, "monotonic", itertools.count(now, 10.1).__next__)
    assert stream is not None and stream.read() is None
    stream.release()
    with pytest.raises(BadInputError, match="10 s without a picture"):
        open_mjpeg(parse_source(network_camera.url), timeout_s=5)


def test_compressed_streams_and_streams_without_a_boundary_are_refused(network_camera: Any) -> None:
    network_camera.scripts = [b""]
    network_camera.encoding = "gzip"
    with pytest.raises(BadInputError, match=r"is compressed \('gzip'\)"):
        open_mjpeg(parse_source(network_camera.url), timeout_s=5)
    network_camera.encoding, network_camera.content_type = "identity", "multipart/x-mixed-replace"
    with pytest.raises(BadInputError, match="names no boundary"):
        open_mjpeg(parse_source(network_camera.url), timeout_s=5)


def test_user_and_password_are_sent(network_camera: Any, jpeg: Any) -> None:
    network_camera.scripts = [network_camera.part(jpeg(10))]
    url = network_camera.url.replace("http://", "http://me:p%40ss@")
    read_all(open_mjpeg(parse_source(url), timeout_s=5))
    assert network_camera.requests[0]["Authorization"] == "Basic bWU6cEBzcw=="


def test_what_is_not_mjpeg_is_left_to_ffmpeg(network_camera: Any) -> None:
    network_camera.scripts = [b"text"]
    network_camera.content_type = "text/plain"
    assert open_mjpeg(parse_source(network_camera.url), timeout_s=5) is None


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"\x1b[2Jnot HTTP\r\n\r\n", r"does not speak HTTP \(BadStatusLine\)"),
        (b"HTTP/1.0 401 \x1b[2J\r\n\r\n", "answers 401 Unauthorized"),
        (b"HTTP/1.0 799 \x1b[2J\r\n\r\n", r"answers 799 \("),
        (b"HTTP/1.0 200 OK\r\nContent-Encoding: \x1b[2J\r\n\r\n", "is compressed"),
        (b"HTTP/1.0 200 OK\r\n" + b"X: y\r\n" * 101 + b"\r\n", r"does not speak HTTP \(HTTPException\)"),
    ],
)
def test_a_refusal_has_no_word_of_the_server(answer: bytes, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        source = parse_source(f"http://127.0.0.1:{server.getsockname()[1]}/")
        with pytest.raises(BadInputError, match=words) as refused:
            open_mjpeg(source, timeout_s=5)
        thread.join()
    assert str(refused.value).isprintable()


def test_refusals_are_said(network_camera: Any) -> None:
    network_camera.scripts = [b""]
    network_camera.status = 401
    with pytest.raises(BadInputError, match=r"answers 401 .*password"):
        open_mjpeg(parse_source(network_camera.url), timeout_s=5)
    with pytest.raises(BadInputError, match=r"cannot open http://u:\*\*\*@127.0.0.1:1/: Connection refused"):
        open_mjpeg(parse_source("http://u:secret@127.0.0.1:1/"), timeout_s=5)
