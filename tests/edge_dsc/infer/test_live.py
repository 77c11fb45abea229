from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edge_dsc.infer.camera import LiveSource
from edge_dsc.infer.source import SourceSpec, parse_source
from edge_dsc.infer.stop import Stop
from engines.errors import BadInputError

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
        source._closing.ask()
        if isinstance(camera, Camera):
            camera.pictures.put(None)
        source.close()
        assert not source._thread.is_alive()


def gone() -> BadInputError:
    return BadInputError("cannot open v4l2://0", remedy="check the cable")


def test_the_newest_frame_wins_and_the_others_are_counted(opened: Opened) -> None:
    camera = Camera()
    source = opened(camera, clock=iter(range(100)).__next__)
    frames = source.frames(Stop())
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
    frames = source.frames(Stop())
    ages = []
    for _ in range(300):
        camera.give(*range(7))  # the engine takes seven seconds for each
        ages.append(now[0] - next(frames).captured)
    assert ages == [0.0] * 300
    assert source.dropped == 300 * 6


def test_an_unplugged_camera_is_opened_again_with_growing_pauses(opened: Opened) -> None:
    first, second = Camera(), Camera()
    lines: list[str] = []
    source = opened(
        first, gone(), gone(), second, backoff_s=(0.0, 0.001), say=lines.append, clock=lambda: 5.0
    )
    waits: list[float] = []
    original = source._closing.wait
    source._closing.wait = lambda seconds: waits.append(seconds) or original(seconds)  # type: ignore[method-assign, func-returns-value]
    frames = source.frames(Stop())
    first.give("a")
    assert next(frames).pixels == "a"
    first.pictures.put(None)
    second.give("b")
    assert (next(frames).pixels, source.reconnects, first.released) == ("b", 1, 1)
    assert waits == [0.0, 0.001, 0.001]
    assert lines == ["v4l2://0 is gone: trying to open it again", "v4l2://0 is back after 0.0 s"]


def test_a_camera_that_opens_and_gives_no_frame_is_not_back(opened: Opened) -> None:
    first, dead, last = Camera(), Camera(), Camera()
    dead.pictures.put(None)
    lines: list[str] = []
    source = opened(
        first, dead, gone(), last, backoff_s=(0.0, 0.001, 0.002), say=lines.append, clock=lambda: 5.0
    )
    waits: list[float] = []
    original = source._closing.wait
    source._closing.wait = lambda seconds: waits.append(seconds) or original(seconds)  # type: ignore[method-assign, func-returns-value]
    first.pictures.put(None)
    last.give("b")
    assert (next(source.frames(Stop())).pixels, source.reconnects, dead.released) == ("b", 1, 1)
    assert waits == [0.0, 0.001, 0.002]
    assert lines == ["v4l2://0 is gone: trying to open it again", "v4l2://0 is back after 0.0 s"]


def test_it_gives_up_on_one_that_only_opens(opened: Opened) -> None:
    cameras = [Camera() for _ in range(4)]
    for camera in cameras:
        camera.pictures.put(None)
    source = opened(*cameras, backoff_s=(0.0,), give_up_s=2, clock=iter(range(9)).__next__)
    with pytest.raises(BadInputError, match="stayed away for 2 s: it opens and gives no frame"):
        next(source.frames(Stop()))


def test_it_gives_up_when_asked_to(opened: Opened) -> None:
    camera = Camera()
    source = opened(
        camera, gone(), gone(), gone(), backoff_s=(0.0,), give_up_s=2, clock=iter(range(9)).__next__
    )
    camera.pictures.put(None)
    with pytest.raises(BadInputError, match="stayed away for 2 s: cannot open v4l2://0"):
        next(source.frames(Stop()))


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
        next(source.frames(Stop()))


def test_a_stop_ends_the_waiting(opened: Opened) -> None:
    stop = Stop()
    stop.ask()
    assert list(opened(Camera()).frames(stop)) == []
