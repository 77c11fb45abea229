from __future__ import annotations

import signal
import threading

import pytest

from edge_dsc.infer.stop import Stop, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    stop = Stop()
    with stop_on_signals(stop):
        assert not stop.asked
        signal.raise_signal(number)
        assert stop.asked and stop.signal == number.name
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_installs_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def run() -> None:
        with stop_on_signals(Stop()):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_asking_wakes_a_wait() -> None:
    stop = Stop()
    stop.ask()
    assert stop.wait(60)
    assert stop.signal is None
