"""``--serve``: a small page with the live picture and the latest answers, for a device without a screen; and metrics.

The page itself, its style and its script are in ``live_page.html``.
"""

from __future__ import annotations

import http.server
import json
import math
import re
import selectors
import socket
import threading
import time
from base64 import b64encode
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from http import HTTPStatus
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from edge_dsc.infer.classify import Answer
from edge_dsc.infer.live_page.monitoring import Monitor
from edge_dsc.infer.pictures import draw_answer, encode
from engines.errors import EnvironmentProblem, UsageError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_STEP = math.log(1.02)  # a bucket is 2 % wide
_FLOOR_MS = 1e-3
_LATEST = 12
_PICTURES_PER_S = 15.0  # more would only cost the device its processor
_WAIT_S = 1.0
_MAX_VISITORS = 16  # connections at once: each costs a thread and a file descriptor, which the pictures need
_VISITOR_TIMEOUT_S = (
    10.0  # for each wait for a request's bytes, and for a browser that takes no more of a picture
)
_BACK_OFF_S = 0.1
_BUSY = b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 5\r\n\r\n"
_SHARED_STYLE = "/* the style that reports share */"


@dataclass
class TimeHistogram:
    """Counts durations in buckets 2 % wide: quantiles to 1 %, a few hundred numbers however long it runs.

    Attributes:
        count: Durations added.
        largest_ms: The longest, exactly.
    """

    count: int = 0
    largest_ms: float = 0.0
    _buckets: dict[int, int] = field(default_factory=dict)

    def add(self, milliseconds: float) -> None:
        """Count one duration."""
        self.count += 1
        self.largest_ms = max(self.largest_ms, milliseconds)
        bucket = math.floor(math.log(max(milliseconds, _FLOOR_MS) / _FLOOR_MS) / _STEP)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    def quantile(self, fraction: float) -> float | None:
        """Return the duration below which ``fraction`` of all lie, to 1 %; None where nothing was added."""
        rank = math.ceil(fraction * self.count)
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= max(rank, 1):
                return min(_FLOOR_MS * math.exp((bucket + 0.5) * _STEP), self.largest_ms)
        return None

    def to_dict(self) -> dict[str, float | None]:
        """Return ``median_ms``, ``p99_ms`` and ``max_ms``, rounded to a microsecond; None where too few."""
        median = self.quantile(0.5)
        p99 = self.quantile(0.99) if self.count >= 100 else None
        return {
            "median_ms": round(median, 3) if median is not None else None,
            "p99_ms": round(p99, 3) if p99 is not None else None,
            "max_ms": round(self.largest_ms, 3) if self.count else None,
        }


class RecentRate:
    """Answers per second over the last hundred or so."""

    def __init__(self, window: int = 120) -> None:
        self._times: deque[float] = deque(maxlen=window)

    def add(self, now: float) -> None:
        """Note an answer at a monotonic time, in seconds."""
        self._times.append(now)

    def per_second(self) -> float | None:
        """Return the rate, or None before the second answer."""
        if len(self._times) < 2 or self._times[-1] <= self._times[0]:
            return None
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])


class Board:
    """What the page shows, shared by the loop, which writes, and the requests, which read.

    Nothing is drawn or encoded until a browser asks for it, and then once for all browsers.
    """

    def __init__(self, engine: str, source: str, labels: Sequence[str]) -> None:
        self._engine, self._source, self._labels = engine, source, labels
        self._changed = threading.Condition()
        self._answer: Answer | None = None
        self._number = 0
        self._failed = 0
        self._latest: deque[dict[str, Any]] = deque(maxlen=_LATEST)
        self._latency = TimeHistogram()
        self._age = TimeHistogram()
        self._rate = RecentRate()
        self._encoding = threading.Lock()
        self._encoded: tuple[int, bytes] = (0, b"")
        self.ended = False

    def put(self, answer: Answer) -> None:
        """Take an answer."""
        with self._changed:
            self._number += 1
            self._rate.add(time.monotonic())
            if answer.error is not None:
                self._failed += 1
            else:
                self._latency.add(answer.latency_ms)
            if answer.age_ms is not None:
                self._age.add(answer.age_ms)
            if answer.picture is not None:
                self._answer = answer
            self._latest.appendleft(self._row(answer))
            self._changed.notify_all()

    def end(self) -> None:
        """Let every waiting request go."""
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def picture(self, after: int) -> tuple[int, bytes] | None:
        """Return the newest annotated picture as JPEG with its number, or None where none came in a second.

        Args:
            after: Number of the picture that the browser has.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.ended or self._shown() > after, _WAIT_S)
            answer, number = self._answer, self._number
            if answer is None or number <= after:
                return None
        with self._encoding:
            if self._encoded[0] < number:
                assert answer.picture is not None
                self._encoded = (number, encode(draw_answer(answer.picture, answer, self._labels), ".jpg"))
            return self._encoded

    def state(self) -> dict[str, Any]:
        """Return what the page says in words."""
        with self._changed:
            rate = self._rate.per_second()
            frame = self._answer.frame if self._answer else None
            return {
                "engine": self._engine,
                "source": self._source,
                "answers": self._number,
                "failed": self._failed,
                "per_second": round(rate, 1) if rate is not None else None,
                "latency": self._latency.to_dict(),
                "age": self._age.to_dict() if self._age.count else None,
                "dropped": frame.dropped if frame is not None and frame.seconds is None else None,
                "latest": list(self._latest),
            }

    def _shown(self) -> int:
        return self._number if self._answer is not None else 0

    def _row(self, answer: Answer) -> dict[str, Any]:
        name = str(answer.path) if answer.frame is None else f"frame {answer.frame.index}"
        called = answer.called(self._labels)
        return {
            "name": name,
            "label": called[0] if called else None,
            "probability": round(called[1], 4) if called else None,
            "latency_ms": round(answer.latency_ms, 2),
            "error": answer.error,
        }


class Page:
    """The sink: a web server in threads of its own."""

    def __init__(self, board: Board, monitor: Monitor, host: str, port: int) -> None:
        """Start to serve.

        Args:
            board: What is shown.
            monitor: What ``/metrics`` gives to Prometheus.
            host: Address to listen on; loopback unless the person says otherwise.
            port: Port; 0 takes a free one.

        Raises:
            EnvironmentProblem: The port is taken, or the address is not of this machine.
            UsageError: The host is no name that can be looked up.
        """
        self._board, self._monitor = board, monitor
        page, policy = page_and_policy()
        shown = {
            "board": board,
            "monitor": monitor,
            "local_only": host in LOOPBACK,
            "page": page,
            "policy": policy,
        }
        handler = type("Handler", (_Handler,), shown)
        try:
            if not host.isprintable():
                raise ValueError("control characters")
            self._server = (_Server6 if ":" in host else _Server)((host, port), handler)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{host!r} is no host name", remedy="such as --host 127.0.0.1") from error
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise EnvironmentProblem(
                f"cannot serve on {host}:{port}: {reason}", remedy="choose another --serve PORT"
            ) from error
        name = f"[{host}]" if ":" in host else host
        self.address = f"http://{name}:{self._server.server_port}/"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="page", daemon=True
        )
        self._thread.start()

    def write(self, answer: Answer) -> None:
        """Show an answer and count it."""
        self._board.put(answer)
        frame = answer.frame
        self._monitor.observe(
            answer.probabilities,
            latency_s=answer.latency_ms / 1e3,
            age_s=None if answer.age_ms is None else answer.age_ms / 1e3,
            dropped=frame.dropped if frame is not None and frame.seconds is None else None,
            levels=answer.levels,
        )

    def close(self) -> None:
        """Stop serving."""
        self._board.end()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def page_and_policy() -> tuple[bytes, str]:
    """Return the page and the Content-Security-Policy that allows its own style and script and nothing else."""
    from edge_dsc.page import CSS

    text = resources.files(__name__).joinpath("live_page.html").read_text(encoding="utf-8")
    text = text.replace(_SHARED_STYLE, CSS)
    allowed = {}
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        allowed[tag] = b64encode(sha256(content.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src 'sha256-{allowed['script']}'; "
        f"style-src 'sha256-{allowed['style']}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = _MAX_VISITORS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._free = threading.BoundedSemaphore(_MAX_VISITORS)
        super().__init__(*arguments, **options)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a visitor; without a free file descriptor wait, since the same visitor is found again at once."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(_BACK_OFF_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a visitor in a thread of its own, or turn away one too many."""
        if not self._free.acquire(blocking=False):
            request.settimeout(0)
            with suppress(OSError):
                request.send(_BUSY)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a visitor, then let in another one."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a browser that went away is no error of the run."""


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(http.server.BaseHTTPRequestHandler):
    board: Board
    monitor: Monitor
    local_only: bool
    page: bytes
    policy: str
    timeout = _VISITOR_TIMEOUT_S
    server_version = "edge-dsc"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer one request."""
        # A page of a foreign site may reach loopback through a name of its own: only our names are answered.
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if self.local_only and host not in LOOPBACK:
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        path = urlsplit(self.path).path
        if path == "/":
            self._give("text/html; charset=utf-8", self.page)
        elif path == "/state.json":
            self._give("application/json", json.dumps(self.board.state(), allow_nan=False).encode())
        elif path == "/metrics":
            text, content_type = self.monitor.render(self.headers.get("Accept", ""))
            self._give(content_type, text)
        elif path == "/stream.mjpg":
            self._stream()
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal belongs to the run."""

    def _give(self, content_type: str, body: bytes) -> None:
        self.send_response(HTTPStatus.OK)
        self._headers(content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _left(self) -> bool:
        """Say whether the browser closed the connection: it has nothing more to say, so only its end can be read."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ)
            return bool(selector.select(0))

    def _headers(self, content_type: str) -> None:
        self.send_header("Content-Type", content_type)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", self.policy)
        self.send_header("X-Content-Type-Options", "nosniff")

    def _stream(self) -> None:
        self.send_response(HTTPStatus.OK)
        self._headers("multipart/x-mixed-replace; boundary=picture")
        self.end_headers()
        number = 0
        while not self.board.ended:
            found = self.board.picture(number)
            if found is None:
                if self._left():
                    return
                continue
            number, jpeg = found
            head = f"--picture\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
            self.wfile.write(head.encode() + jpeg + b"\r\n")
            time.sleep(1 / _PICTURES_PER_S)
