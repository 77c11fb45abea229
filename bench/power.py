"""Power in a pass of its own: rails read beside a loop of calls, the idle machine subtracted."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.machine import Gpu, first_gpu, read_text

_PERIOD = 0.05  # seconds between readings: INA3221 averages over tens of milliseconds
Pause = Callable[[float], object]


@dataclass(frozen=True, kw_only=True)
class Rail:
    """Something whose power can be read.

    Attributes:
        name: What it feeds, with its source: ``INA3221 VDD_IN``.
        watts: Reads the power now; None where a reading fails.
    """

    name: str
    watts: Callable[[], float | None]


@dataclass(frozen=True, kw_only=True)
class Power:
    """What one rail drew for one subject.

    Attributes:
        rail: Name of the rail.
        idle_w: Mean power of the idle machine just before, watts.
        busy_w: Mean power during the calls, watts.
        calls: Number of calls.
        seconds: Time of the calls.
        readings: Readings during the calls.
    """

    rail: str
    idle_w: float
    busy_w: float
    calls: int
    seconds: float
    readings: int

    @property
    def joules(self) -> float:
        """Energy of one call above the idle machine's: (busy - idle) / throughput, joules."""
        return (self.busy_w - self.idle_w) * self.seconds / self.calls


def find_rails(root: Path = Path("/"), gpu: Gpu | None = None) -> tuple[Rail, ...]:
    """Return every rail that may be read here without root: INA3221 of a Jetson, RAPL, and a discrete GPU's board.

    Args:
        root: Where /sys lies.
        gpu: The GPU; the first that NVML knows by default.
    """
    board = gpu or first_gpu()
    found = [*_ina3221(root), *_rapl(root)]
    if board is not None and board.power_w() is not None:
        found.append(Rail(name="NVML board", watts=board.power_w))
    return tuple(found)


def measure_power(
    call: Callable[[], object],
    rails: Sequence[Rail],
    *,
    seconds: float,
    pause: Pause = time.sleep,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> tuple[Power, ...]:
    """Read the rails while the machine idles, then while it answers calls one after the other.

    Args:
        call: One request.
        rails: What to read.
        seconds: Time of each of the two.
        pause: Waits for so many seconds.
        clock: Monotonic time in nanoseconds.

    Returns:
        One per rail that gave readings both times.
    """
    with _Reader(rails, pause) as idle:
        pause(seconds)
    with _Reader(rails, pause) as busy:
        start, calls = clock(), 0
        while not calls or clock() - start < seconds * 1e9:
            call()
            calls += 1
        length = (clock() - start) / 1e9
    return tuple(
        Power(
            rail=rail.name,
            idle_w=statistics.fmean(idle.readings[rail.name]),
            busy_w=statistics.fmean(busy.readings[rail.name]),
            calls=calls,
            seconds=length,
            readings=len(busy.readings[rail.name]),
        )
        for rail in rails
        if idle.readings[rail.name] and busy.readings[rail.name]
    )


class _Reader:
    """A thread that reads rails until the block ends; at least once."""

    def __init__(self, rails: Sequence[Rail], pause: Pause) -> None:
        self.readings: dict[str, list[float]] = {rail.name: [] for rail in rails}
        self._rails = rails
        self._pause = pause
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read, name="power", daemon=True)

    def _read(self) -> None:
        while True:
            self._pause(_PERIOD)
            for rail in self._rails:
                watts = rail.watts()
                if watts is not None:
                    self.readings[rail.name].append(watts)
            if self._done.is_set():
                return

    def __enter__(self) -> _Reader:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._done.set()
        self._thread.join()


def _ina3221(root: Path) -> list[Rail]:
    """Rails of a Jetson: millivolts times milliamperes."""
    rails = []
    for chip in sorted(root.glob("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*")):
        for label in sorted(chip.glob("in[1-3]_label")):
            number, name = label.name[2], read_text(label)
            volts, amperes = chip / f"in{number}_input", chip / f"curr{number}_input"
            if name and _number(volts) is not None and _number(amperes) is not None:
                rails.append(Rail(name=f"INA3221 {name}", watts=_product(volts, amperes)))
    return rails


def _product(volts: Path, amperes: Path) -> Callable[[], float | None]:
    def watts() -> float | None:
        voltage, current = _number(volts), _number(amperes)
        return None if voltage is None or current is None else voltage * current / 1e6

    return watts


def _rapl(root: Path, clock: Callable[[], int] = time.perf_counter_ns) -> list[Rail]:
    """Packages of an x86 processor: counters of microjoules, which most systems let only root read."""
    rails = []
    for domain in sorted(root.glob("sys/class/powercap/intel-rapl:[0-9]")):
        name = read_text(domain / "name")
        if name and _number(domain / "energy_uj") is not None:
            span = _number(domain / "max_energy_range_uj") or 0.0
            rails.append(Rail(name=f"RAPL {name}", watts=_slope(domain / "energy_uj", span, clock)))
    return rails


def _slope(counter: Path, span: float, clock: Callable[[], int]) -> Callable[[], float | None]:
    """Mean power since the reading before; None for the first. The counter starts again from 0 at ``span``."""
    before: list[tuple[int, float]] = []

    def watts() -> float | None:
        energy, now = _number(counter), clock()
        if energy is None:
            return None
        last = before.pop() if before else None
        before.append((now, energy))
        if last is None or now <= last[0]:
            return None
        used = energy - last[1]
        return (used if used >= 0 else used + span) / (now - last[0]) * 1e3

    return watts


def _number(path: Path) -> float | None:
    try:
        return float(read_text(path) or "")
    except ValueError:
        return None
