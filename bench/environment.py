"""The machine that a report was measured on: read from /proc, /sys and the interpreter, never with root."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.machine_state import read_cpu_frequencies, read_gpu_frequency, read_temperatures, read_text
from bench.nvml import first_gpu

_GIB = 1 << 30
_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


def environment(root: Path = Path("/")) -> dict[str, Any]:
    """Describe this machine as it is now. Never raises; what cannot be read is None.

    Args:
        root: Where /proc, /sys and /etc lie.

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
        "gpu": _gpu,
        "gpu_driver": _gpu_driver,
        "nvml": _nvml,
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
        "temperatures_c": _temperatures,
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


def _gpu(root: Path) -> str | None:
    for path in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
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


def _nvml(_root: Path) -> dict[str, Any] | None:
    gpu = first_gpu()
    return gpu.describe() if gpu else None


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


def _temperatures(root: Path) -> dict[str, float] | None:
    return dict(read_temperatures(root)) or None
