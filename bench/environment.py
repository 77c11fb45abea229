"""The machine that a report was measured on: read from /proc, /sys and the interpreter, never with root."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_GIB = 1 << 30
_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


def environment(root: Path = Path("/")) -> dict[str, Any]:
    """Describe this machine as it is now. Never raises; what cannot be read is None.

    Args:
        root: Where /proc, /sys and /etc lie.

    Returns:
        JSON values: ``machine``, ``jetson``, ``l4t``, ``architecture``, ``cpu``, ``cores`` (those that this
        process may use), ``cpu_limit`` (of the container, in cores), ``gpu``, ``gpu_driver``, ``governor``,
        ``frequency_mhz`` (slowest and fastest core now), ``load`` (mean of the last minute),
        ``memory_gib``, ``memory_limit_gib`` (of the container), ``os``, ``kernel``, ``python`` and
        ``temperatures_c`` by zone.
    """
    readers: dict[str, Callable[[Path], Any]] = {
        "machine": _machine,
        "jetson": _jetson,
        "l4t": _l4t,
        "architecture": lambda _root: platform.machine() or None,
        "cpu": _cpu,
        "cores": lambda _root: _usable_cores(),
        "cpu_limit": _cpu_limit,
        "gpu": _gpu,
        "gpu_driver": _gpu_driver,
        "governor": _governor,
        "frequency_mhz": _frequency,
        "load": lambda _root: round(os.getloadavg()[0], 2),
        "memory_gib": _memory,
        "memory_limit_gib": _memory_limit,
        "os": _os,
        "kernel": lambda _root: platform.release() or None,
        "python": lambda _root: f"{platform.python_implementation()} {platform.python_version()}",
        "temperatures_c": _temperatures,
    }
    return {name: _read(reader, root) for name, reader in readers.items()}


def _read(reader: Callable[[Path], Any], root: Path) -> Any:
    """Whatever a strange machine answers must not cost the user the measurement."""
    try:
        return reader(root)
    except (OSError, ValueError, IndexError, KeyError, AttributeError, ZeroDivisionError):
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _jetson(root: Path) -> str | None:
    model = _text(root / "proc/device-tree/model")
    return model if model and re.search("jetson|nvidia", model, re.IGNORECASE) else None


def _machine(root: Path) -> str | None:
    return _text(root / "proc/device-tree/model") or _text(root / "sys/class/dmi/id/product_name")


def _l4t(root: Path) -> str | None:
    # "# R36 (release), REVISION: 4.3, GCID: ..." is L4T 36.4.3.
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release") or "")
    return f"{found[1]}.{found[2]}" if found else None


def _cpu(root: Path) -> str | None:
    text = _text(root / "proc/cpuinfo") or ""
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
    text = _text(root / "sys/fs/cgroup/cpu.max")
    if text:
        quota, _, period = text.partition(" ")
        return None if quota == "max" else round(int(quota) / int(period), 2)
    quota_v1 = _text(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    period_v1 = _text(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota_v1 and period_v1 and int(quota_v1) > 0:
        return round(int(quota_v1) / int(period_v1), 2)
    return None


def _gpu(root: Path) -> str | None:
    for path in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        found = re.search(r"^Model:\s*(.+)$", _text(path) or "", re.MULTILINE)
        if found:
            return found[1].strip()
    return None


def _gpu_driver(root: Path) -> str | None:
    found = re.search(r"Kernel Module[^\d]*([\d.]+)", _text(root / "proc/driver/nvidia/version") or "")
    return found[1] if found else None


def _governor(root: Path) -> str | None:
    paths = sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"))
    names = sorted({name for name in map(_text, paths) if name})
    return ", ".join(names) or None


def _frequency(root: Path) -> list[float] | None:
    paths = root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    kilohertz = [int(text) for text in map(_text, paths) if text]
    megahertz = [value / 1000 for value in kilohertz]
    if not megahertz:
        cpuinfo = _text(root / "proc/cpuinfo") or ""
        megahertz = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", cpuinfo, re.MULTILINE)]
    return [round(min(megahertz)), round(max(megahertz))] if megahertz else None


def _memory(root: Path) -> float | None:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo") or "", re.MULTILINE)
    return round(int(found[1]) * 1024 / _GIB, 1) if found else None


def _memory_limit(root: Path) -> float | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _text(root / "sys/fs/cgroup" / name)
        if text and text != "max" and int(text) < _UNLIMITED:
            return round(int(text) / _GIB, 1)
    return None


def _os(root: Path) -> str | None:
    found = re.search(r'^PRETTY_NAME="?([^"\n]+)', _text(root / "etc/os-release") or "", re.MULTILINE)
    return found[1] if found else platform.system() or None


def _temperatures(root: Path) -> dict[str, float] | None:
    temperatures = {}
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone[0-9]*")):
        # A zone that is off answers EAGAIN, on a Jetson also -256000.
        name, value = _text(zone / "type"), _text(zone / "temp")
        if name and value and int(value) > -100_000:
            temperatures[name] = round(int(value) / 1000, 1)
    return temperatures or None
