"""Ctrl-C and SIGTERM ask the loop to end after the picture at hand; a second one ends it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name))


class Stop:
    """A request to end that any thread may make and the loop looks at between pictures.

    Attributes:
        signal: Name of the signal that asked, or None.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._asked = threading.Event()

    @property
    def asked(self) -> bool:
        """Whether to end."""
        return self._asked.is_set()

    def ask(self) -> None:
        """Ask for the end; a second call does nothing."""
        self._asked.set()

    def wait(self, seconds: float) -> bool:
        """Sleep until the end is asked for or the time is over; say whether it was asked for."""
        return self._asked.wait(seconds)


@contextlib.contextmanager
def stop_on_signals(stop: Stop) -> Iterator[Stop]:
    """Let SIGINT and SIGTERM ask for the end while the block runs.

    The second signal raises ``KeyboardInterrupt`` where it arrives, for a loop that hangs. Outside the main
    thread, where Python allows no handlers, nothing is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = signal.Signals(number).name
        stop.ask()

    before: dict[int, Any] = {}
    try:
        for number in _SIGNALS:
            before[number] = signal.signal(number, handle)
        yield stop
    finally:
        for number, handler in before.items():
            # None: installed by something that is not Python, which cannot be put back from here.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
