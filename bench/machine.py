"""The machine: what it is, what state it is in, and who else uses its processor.

Everything is read from files that need no root, a discrete GPU through NVML. What cannot be read is None, never an
exception: whatever a strange machine answers must not cost the user the measurement.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from engines.errors import EnvironmentProblem
from engines.packages import load

MOST_WAITING = 0.05  # of the time that the process wanted to run
State = Mapping[str, Any]
_GIB = 1 << 30
_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63
_GPU_NODE = re.compile(r"gpu|ga10b|gv11b|gp10b", re.IGNORECASE)
_THROTTLE_COUNTERS = (
    "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count",  # x86
    "sys/class/hwmon/hwmon[0-9]*/oc[0-9]_event_cnt",  # Jetson: over-current and thermal events
)
# nvmlClocksEventReasons that hold a GPU back. NVML's own names for them changed between releases, the bits did not.
_THROTTLE_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


def environment(root: Path = Path("/"), gpu: Gpu | None = None) -> dict[str, Any]:
    """Describe this machine as it is now. Never raises; what cannot be read is None.

    Args:
        root: Where /proc, /sys and /etc lie.
        gpu: The discrete GPU that is meant; the first that NVML knows by default.

    Returns:
        JSON values: ``machine``, ``jetson``, ``l4t``, ``jetpack``, ``power_mode`` (nvpmodel), ``architecture``,
        ``cpu``, ``cores`` (those that this process may use), ``cpu_limit`` (of the container, in cores), ``gpu``,
        ``gpu_driver``, ``nvml`` (what a discrete GPU says of itself), ``governor``, ``clocks_fixed``,
        ``frequency_mhz`` (slowest and fastest core now), ``load`` (mean of the last minute),
        ``memory_gib``, ``memory_limit_gib`` (of the container), ``os``, ``kernel``, ``python``,
        ``gpu_mhz`` (a Jetson's) and ``temperatures_c`` by zone.
    """
    readers: dict[str, Callable[[Path], Any]] = {
        "machine": _machine,
        "jetson": _jetson,
        "l4t": _l4t,
        "jetpack": _jetpack,
        "power_mode": _power_mode,
        "architecture": lambda _root: platform.machine() or None,
        "cpu": _cpu,
        "cores": lambda _root: _usable_cores(),
        "cpu_limit": _cpu_limit,
        "gpu": functools.partial(_gpu, board=gpu),
        "gpu_driver": _gpu_driver,
        "nvml": lambda _root: board.describe() if (board := gpu or first_gpu()) else None,
        "governor": _governor,
        "clocks_fixed": _clocks_fixed,
        "frequency_mhz": _frequency,
        "load": lambda _root: round(os.getloadavg()[0], 2),
        "memory_gib": _memory,
        "memory_limit_gib": _memory_limit,
        "os": _os,
        "kernel": lambda _root: platform.release() or None,
        "python": lambda _root: f"{platform.python_implementation()} {platform.python_version()}",
        "gpu_mhz": read_gpu_frequency,
        "temperatures_c": lambda root: dict(read_temperatures(root)) or None,
    }
    return {name: _read(reader, root) for name, reader in readers.items()}


def _read(reader: Callable[[Path], Any], root: Path) -> Any:
    """Whatever a strange machine answers must not cost the user the measurement."""
    try:
        return reader(root)
    except (OSError, ValueError, IndexError, KeyError, AttributeError, ZeroDivisionError):
        return None


def _jetson(root: Path) -> str | None:
    model = read_text(root / "proc/device-tree/model")
    return model if model and re.search("jetson|nvidia", model, re.IGNORECASE) else None


def _machine(root: Path) -> str | None:
    return read_text(root / "proc/device-tree/model") or read_text(root / "sys/class/dmi/id/product_name")


def _l4t(root: Path) -> str | None:
    # "# R36 (release), REVISION: 4.3, GCID: ..." is L4T 36.4.3.
    found = re.search(
        r"R(\d+) \(release\), REVISION: ([\d.]+)", read_text(root / "etc/nv_tegra_release") or ""
    )
    return f"{found[1]}.{found[2]}" if found else None


def _cpu(root: Path) -> str | None:
    text = read_text(root / "proc/cpuinfo") or ""
    for key in ("model name", "Model", "Hardware", "CPU part"):
        found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
        if found:
            name = found[1].strip()
            return f"ARM part {name}" if key == "CPU part" else name
    return platform.processor() or None


def _usable_cores() -> int | None:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _cpu_limit(root: Path) -> float | None:
    text = read_text(root / "sys/fs/cgroup/cpu.max")
    if text:
        quota, _, period = text.partition(" ")
        return None if quota == "max" else round(int(quota) / int(period), 2)
    quota_v1 = read_text(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    period_v1 = read_text(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota_v1 and period_v1 and int(quota_v1) > 0:
        return round(int(quota_v1) / int(period_v1), 2)
    return None


def _gpu(root: Path, board: Gpu | None) -> str | None:
    """The model of the GPU that is meant, by its place on the bus, or of the first."""
    meant = board.bus_id.lower() if board is not None else ""
    paths = sorted(root.glob("proc/driver/nvidia/gpus/*/information"))
    for path in [path for path in paths if path.parent.name == meant] or paths:
        found = re.search(r"^Model:\s*(.+)$", read_text(path) or "", re.MULTILINE)
        if found:
            return found[1].strip()
    return None


def _gpu_driver(root: Path) -> str | None:
    found = re.search(r"Kernel Module[^\d]*([\d.]+)", read_text(root / "proc/driver/nvidia/version") or "")
    return found[1] if found else None


def _governor(root: Path) -> str | None:
    paths = sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"))
    names = sorted({name for name in map(read_text, paths) if name})
    return ", ".join(names) or None


def _frequency(root: Path) -> list[int] | None:
    megahertz = read_cpu_frequencies(root)
    return [round(min(megahertz)), round(max(megahertz))] if megahertz else None


def _clocks_fixed(root: Path) -> bool | None:
    """Whether no core may change its frequency, as after jetson_clocks."""
    cores = sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq"))
    ends = [(read_text(core / "scaling_min_freq"), read_text(core / "scaling_max_freq")) for core in cores]
    known = [low == high for low, high in ends if low and high]
    return all(known) if known else None


def _power_mode(root: Path) -> str | None:
    """The mode that nvpmodel set, by its number and, where its table is there, its name."""
    found = re.search(r"pmode:(\d+)", read_text(root / "var/lib/nvpmodel/status") or "")
    if not found:
        return None
    number = int(found[1])
    table = read_text(root / "etc/nvpmodel.conf") or ""
    name = re.search(rf"<\s*POWER_MODEL\s+ID={number}\s+NAME=(\S+)\s*>", table)
    return f"{number} {name[1]}" if name else str(number)


def _jetpack(root: Path) -> str | None:
    """Version of the package nvidia-jetpack, where it is installed."""
    packages = read_text(root / "var/lib/dpkg/status") or ""
    found = re.search(r"^Package: nvidia-jetpack\n(?:\S.*\n| .*\n)*?Version: (\S+)", packages, re.MULTILINE)
    return found[1] if found else None


def _memory(root: Path) -> float | None:
    found = re.search(r"^MemTotal:\s*(\d+) kB", read_text(root / "proc/meminfo") or "", re.MULTILINE)
    return round(int(found[1]) * 1024 / _GIB, 1) if found else None


def _memory_limit(root: Path) -> float | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = read_text(root / "sys/fs/cgroup" / name)
        if text and text != "max" and int(text) < _UNLIMITED:
            return round(int(text) / _GIB, 1)
    return None


def _os(root: Path) -> str | None:
    found = re.search(r'^PRETTY_NAME="?([^"\n]+)', read_text(root / "etc/os-release") or "", re.MULTILINE)
    return found[1] if found else platform.system() or None


class Gpu:
    """A GPU that NVML knows. A reading that the driver or the GPU does not give is None.

    Args:
        nvml: The module ``pynvml``, initialised.
        device: Its handle of the GPU.
        bus_id: Where it sits, such as ``0000:01:00.0``, where it was found by that.
    """

    def __init__(self, nvml: Any, device: Any, bus_id: str = "") -> None:
        self._nvml = nvml
        self._device = device
        self.bus_id = bus_id

    def describe(self) -> dict[str, Any]:
        """Return name, clocks, temperature, power limit and throttling as JSON values."""
        nvml = self._nvml
        return {
            "name": self._read("nvmlDeviceGetName"),
            "graphics_mhz": self.graphics_mhz(),
            "memory_mhz": self._read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            "temperature_c": self._read("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            "power_limit_w": _thousandth(self._read("nvmlDeviceGetPowerManagementLimit")),
            "throttled_by": self.throttled_by(),
        }

    def graphics_mhz(self) -> int | None:
        """Return the clock of the cores now, MHz."""
        clock: int | None = self._read("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_GRAPHICS)
        return clock

    def memory_used(self) -> int | None:
        """Return the memory that all processes together use on the device now, bytes."""
        memory = self._read("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.used)

    def power_w(self) -> float | None:
        """Return the power that the whole board draws now, watts."""
        return _thousandth(self._read("nvmlDeviceGetPowerUsage"))

    def throttled_by(self) -> list[str] | None:
        """Name what holds the clocks down now."""
        # Drivers before R535 know only this name of it, later ones know both.
        reasons = self._read("nvmlDeviceGetCurrentClocksThrottleReasons")
        return None if reasons is None else [name for bit, name in _THROTTLE_REASONS.items() if reasons & bit]

    def _read(self, function: str, *arguments: int) -> Any:
        try:
            return getattr(self._nvml, function)(self._device, *arguments)
        except self._nvml.NVMLError:
            return None


@functools.lru_cache(maxsize=1)
def first_gpu() -> Gpu | None:
    """Return the first GPU that NVML knows, or None: no driver, no GPU, or a Jetson whose NVML is a stub."""
    return _find_board(lambda nvml: Gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(0)))


@functools.lru_cache(maxsize=16)
def gpu_at(bus_id: str) -> Gpu | None:
    """Return the GPU at a place on the bus, such as ``0000:01:00.0``, or None where NVML knows none there."""
    return _find_board(lambda nvml: Gpu(nvml, nvml.nvmlDeviceGetHandleByPciBusId(bus_id.encode()), bus_id))


def _find_board(find: Callable[[Any], Gpu]) -> Gpu | None:
    try:
        nvml = load("pynvml")
    except EnvironmentProblem:
        return None
    try:
        nvml.nvmlInit()
        return find(nvml)
    except nvml.NVMLError:
        return None


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1000


def read_state(root: Path = Path("/"), gpu: Gpu | None = None) -> State:
    """Read what changes during a measurement. Never raises; what cannot be read is None.

    Args:
        root: Where /proc and /sys lie.
        gpu: A discrete GPU; the first that NVML knows by default.

    Returns:
        JSON values: ``cpu_mhz`` (mean over the cores), ``gpu_mhz``, ``hottest_c`` (of all zones),
        ``throttle_events`` (all counters since boot), ``cooling`` (names of the devices that hold something back now,
        and why a discrete GPU is held back), ``ran_ns`` and ``waited_ns`` of :func:`bench.machine.read_scheduled`.
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


def read_scheduled(root: Path = Path("/")) -> dict[str, int | None]:
    """Read how long this process has run and how long it has waited for a processor, all threads together.

    Args:
        root: Where /proc lies.

    Returns:
        ``ran_ns`` and ``waited_ns``, nanoseconds since each thread's start; None where the kernel does not tell.

    Source:
        Linux, Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat: time spent on the processor, time spent
        waiting on a run queue.
    """
    accounts = [_first_numbers(path) for path in root.glob("proc/self/task/*/schedstat")]
    known = [numbers for numbers in accounts if len(numbers) >= 2]
    if not known:
        return {"ran_ns": None, "waited_ns": None}
    return {"ran_ns": sum(numbers[0] for numbers in known), "waited_ns": sum(numbers[1] for numbers in known)}


def waiting_share(states: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the share of the time that the process wanted to run and had to wait, from the first state to the last.

    Returns:
        0 to 1, or None where it is not known.
    """
    known = [
        state for state in states if state.get("ran_ns") is not None and state.get("waited_ns") is not None
    ]
    if len(known) < 2:
        return None
    # A thread that ended took its time along.
    ran, waited = (max(0, int(known[-1][key]) - int(known[0][key])) for key in ("ran_ns", "waited_ns"))
    return waited / (ran + waited) if ran + waited else None


def crowded(states: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Say that other programs took the processor away; empty where they did not, or where it is not known."""
    share = waiting_share(states)
    if share is None or share <= MOST_WAITING:
        return ()
    return (
        f"other programs had the processor for {share:.0%} of the time that the measurement wanted it, "
        f"{MOST_WAITING:.0%} is the limit",
    )


def _first_numbers(path: Path) -> list[int]:
    try:
        return [int(word) for word in path.read_text(encoding="ascii").split()]
    except (OSError, ValueError):
        return []
