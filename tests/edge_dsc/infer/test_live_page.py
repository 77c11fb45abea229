from __future__ import annotations

import errno
import http.client
import json
import re
import socket
import socketserver
import threading
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest

from edge_dsc.infer import live_page
from edge_dsc.infer.classify import Answer
from edge_dsc.infer.live_page import Board, Page, RecentRate, TimeHistogram
from edge_dsc.infer.live_page.monitoring import Monitor
from edge_dsc.infer.source import Frame
from engines.errors import EnvironmentProblem, UsageError

LABELS = ("dark", "light")


@dataclass
class Served:
    page: Page
    host: str
    port: int

    def get(self, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response, body


@pytest.fixture
def served() -> Iterator[Served]:
    page = Page(Board("dsc.engine", "rtsp://u:***@host/live", LABELS), Monitor(LABELS, {}), "127.0.0.1", 0)
    parts = urlsplit(page.address)
    yield Served(page, str(parts.hostname), int(parts.port or 0))
    page.close()
    assert "page" not in [thread.name for thread in threading.enumerate()]


def live(index: int, light: float = 0.75) -> Answer:
    frame = Frame(index=index, pixels=b"", captured=0.0, dropped=index * 2)
    picture = np.full((300, 400), index, np.uint8)
    return Answer("cam", (1 - light, light), latency_ms=1.5, age_ms=4.0, frame=frame, picture=picture)


def test_the_page_needs_nothing_from_outside_and_its_policy_fits_it(served: Served) -> None:
    response, body = served.get("/")
    text = body.decode()
    assert response.status == 200 and response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert not re.search(r"https?://|//[a-z]+\.", text)
    policy = str(response.headers["Content-Security-Policy"])
    for tag in ("style", "script"):
        content = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(content) == 1
        assert f"{tag}-src 'sha256-{b64encode(sha256(content[0].encode()).digest()).decode()}'" in policy
    assert "--ink:" in text, "the style that it shares with reports"
    assert "not a medical device" in text


def test_prometheus_finds_its_metrics_on_the_same_port(served: Served) -> None:
    served.page.write(live(3))
    response, body = served.get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    lines = body.decode().splitlines()
    assert 'edge_dsc_answers_total{label="light"} 1.0' in lines
    assert "edge_dsc_dropped_frames_total 6.0" in lines
    assert "edge_dsc_age_seconds_sum 0.004" in lines
    accept = "application/openmetrics-text; version=1.0.0"
    response, body = served.get("/metrics", Accept=accept)
    assert response.headers["Content-Type"].startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    assert served.get("/metrics", Host="evil.example")[0].status == 403


def test_the_state_tells_the_latest_answers(served: Served) -> None:
    assert json.loads(served.get("/state.json")[1])["answers"] == 0
    for index in range(15):
        served.page.write(live(index))
    served.page.write(Answer(Path("bad.png"), None, "no image"))
    state = json.loads(served.get("/state.json")[1])
    assert (state["engine"], state["source"]) == ("dsc.engine", "rtsp://u:***@host/live")
    assert (state["answers"], state["failed"], state["dropped"]) == (16, 1, 28)
    assert state["latency"]["median_ms"] == pytest.approx(1.5, rel=0.011)
    assert state["age"]["max_ms"] == 4.0
    assert len(state["latest"]) == 12
    assert state["latest"][0] == {
        "name": "bad.png", "label": None, "probability": None, "latency_ms": 0.0, "error": "no image",
    }  # fmt: skip
    assert state["latest"][1]["name"] == "frame 14" and state["latest"][1]["probability"] == 0.75


def test_the_stream_shows_the_newest_picture_with_its_answer(served: Served) -> None:
    for value in (10, 200):
        served.page.write(live(value))
    connection = http.client.HTTPConnection(served.host, served.port, timeout=30)
    connection.request("GET", "/stream.mjpg")
    response = connection.getresponse()
    assert response.headers["Content-Type"] == "multipart/x-mixed-replace; boundary=picture"

    def picture() -> np.ndarray:
        assert response.readline() == b"--picture\r\n"
        assert response.readline() == b"Content-Type: image/jpeg\r\n"
        length = int(response.readline().split(b":")[1])
        assert response.readline() == b"\r\n"
        data = response.read(length)
        assert response.readline() == b"\r\n"
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)

    first = picture()
    assert first.shape == (330, 400, 3) and abs(int(first[100, 100, 0]) - 200) <= 2
    served.page.write(live(90))
    assert abs(int(picture()[100, 100, 0]) - 90) <= 2
    connection.close()


def test_a_picture_is_encoded_once_for_all_browsers() -> None:
    board = Board("e", "s", LABELS)
    board.put(live(1))
    first = board.picture(0)
    assert first is not None and board.picture(0) is not None
    assert board.picture(0)[1] is first[1]  # type: ignore[index]
    board.end()
    assert board.picture(first[0]) is None


@pytest.mark.parametrize("path", ["/x", "/../etc/passwd", "/state.json/"])
def test_nothing_else_is_served(served: Served, path: str) -> None:
    assert served.get(path)[0].status == 404


def test_a_foreign_name_for_loopback_is_refused(served: Served) -> None:
    assert served.get("/state.json", Host="evil.example")[0].status == 403
    assert served.get("/state.json", Host=f"localhost:{served.port}")[0].status == 200


def test_idle_visitors_are_few_and_the_next_one_is_told(served: Served) -> None:
    idle = [socket.create_connection((served.host, served.port)) for _ in range(16)]
    with socket.create_connection((served.host, served.port), timeout=5) as one_too_many:
        assert one_too_many.recv(100).startswith(b"HTTP/1.0 503 ")
    assert len([thread for thread in threading.enumerate() if "process_request" in thread.name]) == 16
    for visitor in idle:
        visitor.close()
    for thread in [thread for thread in threading.enumerate() if "process_request" in thread.name]:
        thread.join(5)
    assert served.get("/state.json")[0].status == 200


def test_a_silent_visitor_is_sent_away(monkeypatch: pytest.MonkeyPatch, served: Served) -> None:
    assert live_page._Handler.timeout == 10
    monkeypatch.setattr(live_page._Handler, "timeout", 0.01)
    with socket.create_connection((served.host, served.port), timeout=5) as silent:
        assert silent.recv(1) == b""


def test_a_browser_that_left_is_noticed_without_a_new_picture(
    monkeypatch: pytest.MonkeyPatch, served: Served
) -> None:
    monkeypatch.setattr(live_page, "_WAIT_S", 0.01)
    browser = socket.create_connection((served.host, served.port))
    browser.sendall(b"GET /stream.mjpg HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert browser.recv(15) == b"HTTP/1.0 200 OK"
    (thread,) = (thread for thread in threading.enumerate() if "process_request" in thread.name)
    browser.close()
    thread.join(5)
    assert not thread.is_alive()


def test_a_failed_accept_backs_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(server: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    waits: list[float] = []
    monkeypatch.setattr(socketserver.TCPServer, "get_request", fail)
    monkeypatch.setattr(live_page.time, "sleep", waits.append)
    with live_page._Server(("127.0.0.1", 0), live_page._Handler) as server:
        server._handle_request_noblock()  # type: ignore[attr-defined]
    assert waits == [0.1]


def test_a_taken_port_is_said(served: Served) -> None:
    with pytest.raises(
        EnvironmentProblem, match=f"cannot serve on 127.0.0.1:{served.port}: Address already in use"
    ):
        Page(Board("e", "s", LABELS), Monitor(LABELS, {}), "127.0.0.1", served.port)


@pytest.mark.parametrize("host", ["ü" * 70, "a\0", "\n"])
def test_a_host_that_is_no_name_is_said(host: str) -> None:
    with pytest.raises(UsageError, match="is no host name"):
        Page(Board("e", "s", LABELS), Monitor(LABELS, {}), host, 0)


def test_the_loopback_of_ipv6() -> None:
    try:
        page = Page(Board("e", "s", LABELS), Monitor(LABELS, {}), "::1", 0)
    except EnvironmentProblem as error:
        pytest.skip(str(error))  # a machine without IPv6
    parts = urlsplit(page.address)
    assert parts.hostname == "::1"
    served = Served(page, "::1", int(parts.port or 0))
    assert served.get("/state.json")[0].status == 200
    assert served.get("/state.json", Host="evil.example")[0].status == 403
    page.close()


def test_quantiles_are_right_to_one_percent_and_the_largest_exactly() -> None:
    times = TimeHistogram()
    for value in range(1, 1001):
        times.add(value / 10)
    assert times.quantile(0.5) == pytest.approx(50.0, rel=0.011)
    assert times.quantile(0.99) == pytest.approx(99.0, rel=0.011)
    assert times.quantile(1.0) == pytest.approx(100.0, rel=0.011)
    assert times.to_dict()["max_ms"] == 100.0


def test_few_samples_give_no_p99_and_none_give_nothing() -> None:
    times = TimeHistogram()
    assert times.to_dict() == {"median_ms": None, "p99_ms": None, "max_ms": None}
    times.add(0.0)
    assert times.to_dict() == {"median_ms": 0.0, "p99_ms": None, "max_ms": 0.0}


def test_the_rate_is_that_of_the_last_answers() -> None:
    rate = RecentRate(window=5)
    assert rate.per_second() is None
    for now in (0.0, 100.0, 100.5, 101.0, 101.5, 102.0):
        rate.add(now)
    assert rate.per_second() == 2.0
