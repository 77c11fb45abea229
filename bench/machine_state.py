"""What a machine does while it is measured: clocks, temperature, throttling. From /sys and NVML, never with root."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.co_load import read_scheduled
from bench.nvml import Gpu, first_gpu

State = Mapping[str, Any]
_GPU_NODE = re.compile(r"gpu|ga10b|gv11b|gp10b", re.IGNORECASE)
_THROTTLE_COUNTERS = (
    "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count",  # x86
    "sys/class/hwmon/hwmon[0-9]*/oc[0-9]_event_cnt",  # Jetson: over-current and thermal events
)


def read_state(root: Path = Path("/"), gpu: Gpu | None = None) -> State:
    """Read what changes during a measurement. Never raises; what cannot be read is None.

    Args:
        root: Where /proc and /sys lie.
        gpu: A discrete GPU; the first that NVML knows by default.

    Returns:
        JSON values: ``cpu_mhz`` (mean over the cores), ``gpu_mhz``, ``hottest_c`` (of all zones),
        ``throttle_events`` (all counters since boot), ``cooling`` (names of the devices that hold something back now,
        and why a discrete GPU is held back), ``ran_ns`` and ``waited_ns`` of :func:`bench.co_load.read_scheduled`.
    """
    board = gpu or first_gpu()
    held = [f"GPU {reason}" for reason in (board.throttled_by() if board else None) or ()]
    return {
        "cpu_mhz": _mean(read_cpu_frequencies(root)),
        "gpu_mhz": board.graphics_mhz() if board else read_gpu_frequency(root),
        "hottest_c": max((value for _, value in read_temperatures(root)), default=None),
        "throttle_events": _throttle_events(root),
        "cooling": [*_cooling(root), *held],
        **read_scheduled(root),
    }


def read_cpu_frequencies(root: Path) -> list[float]:
    """Return the frequency of each core now, MHz; from cpufreq, or from /proc/cpuinfo."""
    kilohertz = _numbers(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))
    if kilohertz:
        return [value / 1000 for value in kilohertz]
    cpuinfo = read_text(root / "proc/cpuinfo") or ""
    return [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", cpuinfo, re.MULTILINE)]


def read_gpu_frequency(root: Path) -> float | None:
    """Return the frequency of a Jetson's GPU, MHz."""
    for node in sorted(root.glob("sys/class/devfreq/*")):
        if _GPU_NODE.search(node.name):
            return next((value / 1e6 for value in _numbers([node / "cur_freq"])), None)
    return None


def read_temperatures(root: Path) -> list[tuple[str, float]]:
    """Return each thermal zone with its temperature, degrees Celsius."""
    found = []
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone[0-9]*")):
        # A zone that is off answers EAGAIN, on a Jetson also -256000.
        name, value = read_text(zone / "type"), next(iter(_numbers([zone / "temp"])), None)
        if name and value is not None and value > -100_000:
            found.append((name, round(value / 1000, 1)))
    return found


def read_text(path: Path) -> str | None:
    """Return what a small file holds, or None where it cannot be read or is empty."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def throttling(states: Iterable[State]) -> tuple[str, ...]:
    """Say what held the machine back between the first and the last state; empty when nothing did."""
    known = list(states)
    lines = []
    counts = [state["throttle_events"] for state in known if state.get("throttle_events") is not None]
    if counts and counts[-1] > counts[0]:
        lines.append(f"throttled {counts[-1] - counts[0]} times during the run")
    held = sorted({name for state in known for name in state.get("cooling") or ()})
    if held:
        lines.append(f"held back by {', '.join(held)} during the run")
    return tuple(lines)


def throttled_between(before: State, after: State) -> bool:
    """Say whether something held the machine back from one state to the next."""
    first, last = before.get("throttle_events"), after.get("throttle_events")
    return bool(after.get("cooling")) or (first is not None and last is not None and last > first)


def _throttle_events(root: Path) -> int | None:
    counts = [value for pattern in _THROTTLE_COUNTERS for value in _numbers(root.glob(pattern))]
    return int(sum(counts)) if counts else None


def _cooling(root: Path) -> list[str]:
    """Name the cooling devices that are active; a fan holds nothing back."""
    active = []
    for device in sorted(root.glob("sys/class/thermal/cooling_device[0-9]*")):
        name = read_text(device / "type") or device.name
        state = next(iter(_numbers([device / "cur_state"])), 0)
        if state > 0 and not re.search("fan", name, re.IGNORECASE):
            active.append(name)
    return active


def _numbers(paths: Iterable[Path]) -> list[float]:
    found = []
    for path in paths:
        try:
            found.append(float(read_text(path) or ""))
        except ValueError:
            continue
    return found


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values)) if values else None
