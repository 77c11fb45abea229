"""A live source: a thread reads it, the newest frame wins, and an unplugged camera is opened again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from edge_dsc.loop.stopping import Stop
from edge_dsc.sources.capture import Capture, open_capture
from edge_dsc.sources.frames import Frame
from edge_dsc.sources.uri import SourceSpec
from engines.errors import BadInputError, EdgeDscError
from engines.images import Array

BACKOFF_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # the last one is repeated
_POLL_S = 0.1
_JOIN_S = 1.0


class LiveSource:
    """An open camera or stream.

    Attributes:
        dropped: Frames that were replaced by newer ones before the engine was free.
        reconnects: How often it was lost and found again.
    """

    def __init__(
        self,
        spec: SourceSpec,
        *,
        open_source: Callable[[SourceSpec], Capture] = open_capture,
        backoff_s: tuple[float, ...] = BACKOFF_S,
        give_up_s: float | None = None,
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open it and begin to read.

        Args:
            spec: A live source.
            open_source: Opens it.
            backoff_s: Waiting times before each attempt to open it again.
            give_up_s: End after so long without a frame; None tries for ever.
            say: Called with a line when it is lost and when it is back.
            clock: Monotonic, seconds.

        Raises:
            BadInputError: It cannot be opened.
            EnvironmentProblem: OpenCV lacks what it needs.
        """
        self.dropped = 0
        self.reconnects = 0
        self._spec, self._open, self._backoff_s = spec, open_source, backoff_s
        self._give_up_s, self._say, self._clock = give_up_s, say, clock
        self._closing = Stop()
        self._changed = threading.Condition()
        self._newest: Frame | None = None
        self._index = 0
        self._attempts = 0
        self._lost: float | None = None
        self._ended: BaseException | None = None
        self._done = False
        first = open_source(spec)
        self._thread = threading.Thread(target=self._read, args=(first,), name="camera", daemon=True)
        self._thread.start()

    def frames(self, stop: Stop) -> Iterator[Frame]:
        """Yield the newest frame each time the caller is free for one.

        Args:
            stop: Ends the waiting.

        Raises:
            BadInputError: The source stayed away for longer than ``give_up_s``.
        """
        while not stop.asked:
            with self._changed:
                if self._newest is None and not self._done:
                    self._changed.wait(_POLL_S)
                frame, self._newest = self._newest, None
                done, ended = self._done, self._ended
            if frame is not None:
                yield frame
            elif ended is not None:
                raise ended
            elif done:
                return

    def close(self) -> None:
        """Stop reading. A read that hangs in the driver is left behind: it ends with the process."""
        self._closing.ask()
        self._thread.join(_JOIN_S)

    def _read(self, capture: Capture | None) -> None:
        try:
            while capture is not None and not self._closing.asked:
                pixels = capture.read()
                captured = self._clock()
                if pixels is not None:
                    self._put(pixels, captured)
                    continue
                capture.release()
                capture = self._open_again()
            if capture is not None:
                capture.release()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that takes the frames
            self._ended = error
        finally:
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def _put(self, pixels: Array, captured: float) -> None:
        if self._lost is not None:  # only a frame proves that it is back: a bad cable opens and gives none
            self.reconnects += 1
            self._tell(f"{self._spec.name} is back after {captured - self._lost:.1f} s")
            self._lost, self._attempts = None, 0
        with self._changed:
            self.dropped += self._newest is not None
            self._newest = Frame(index=self._index, pixels=pixels, captured=captured, dropped=self.dropped)
            self._index += 1
            self._changed.notify_all()

    def _open_again(self) -> Capture | None:
        if self._lost is None:
            self._lost = self._clock()
            self._tell(f"{self._spec.name} is gone: trying to open it again")
        else:
            self._check_patience("it opens and gives no frame", "check the cable and the camera's mode")
        while not self._closing.wait(self._backoff_s[min(self._attempts, len(self._backoff_s) - 1)]):
            self._attempts += 1
            try:
                return self._open(self._spec)
            except EdgeDscError as error:
                self._check_patience(error.what, error.remedy)
        return None

    def _check_patience(self, what: str, remedy: str) -> None:
        away = self._clock() - (self._lost or 0.0)
        if self._give_up_s is not None and away >= self._give_up_s:
            raise BadInputError(f"{self._spec.name} stayed away for {away:.0f} s: {what}", remedy=remedy)

    def _tell(self, line: str) -> None:
        if self._say is not None:
            self._say(line)
