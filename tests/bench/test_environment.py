from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.machine import environment


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    files = {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
        "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\n",
        "proc/meminfo": "MemTotal:        7802680 kB\nMemFree: 1 kB\n",
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/memory.max": "4294967296\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1510400\n",
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "schedutil\n",
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "729600\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq": "1510400\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "1510400\n",
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_min_freq": "729600\n",
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_max_freq": "1510400\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "624750000\n",
        "sys/class/devfreq/15480000.nvdec/cur_freq": "1\n",
        "var/lib/nvpmodel/status": "pmode:0002",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
        "var/lib/dpkg/status": (
            "Package: nvidia-jetpack-dev\nVersion: 1\n\n"
            "Package: nvidia-jetpack\nStatus: install ok installed\nDescription: x\n more\nVersion: 6.2.1+b38\n"
        ),
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "48562\n",
        "sys/class/thermal/thermal_zone1/type": "cv0-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "-256000\n",
    }
    for name, text in files.items():
        write(tmp_path, name, text)
    return tmp_path


def test_a_jetson_is_read(jetson: Path) -> None:
    found = environment(jetson)
    expected = {
        "machine": "NVIDIA Jetson Orin Nano Developer Kit",
        "jetson": "NVIDIA Jetson Orin Nano Developer Kit",
        "l4t": "36.4.3",
        "jetpack": "6.2.1+b38",
        "power_mode": "2 MAXN_SUPER",
        "clocks_fixed": False,
        "gpu_mhz": 624.75,
        "cpu": "ARMv8 Processor rev 1 (v8l)",
        "cpu_limit": 1.5,
        "gpu": None,
        "governor": "schedutil",
        "frequency_mhz": [730, 1510],
        "memory_gib": 7.4,
        "memory_limit_gib": 4.0,
        "os": "Ubuntu 22.04.5 LTS",
        "temperatures_c": {"cpu-thermal": 48.6},
    }
    assert {key: found[key] for key in expected} == expected


def test_a_server_with_a_gpu_and_an_old_cgroup_is_read(tmp_path: Path) -> None:
    write(tmp_path, "sys/class/dmi/id/product_name", "PowerEdge R760\n")
    write(tmp_path, "proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t\t NVIDIA L4\nIRQ: 12\n")
    write(
        tmp_path,
        "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n",
    )
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path, "proc/cpuinfo", "CPU part\t: 0xd42\ncpu MHz\t\t: 2100.5\ncpu MHz\t\t: 3300.2\n")
    found = environment(tmp_path)
    expected = {
        "machine": "PowerEdge R760",
        "jetson": None,
        "cpu": "ARM part 0xd42",
        "gpu": "NVIDIA L4",
        "gpu_driver": "580.65.06",
        "cpu_limit": None,
        "memory_limit_gib": None,
        "frequency_mhz": [2100, 3300],
    }
    assert {key: found[key] for key in expected} == expected


def test_missing_and_broken_files_are_absent_never_an_error(tmp_path: Path) -> None:
    assert environment(tmp_path / "nothing")["l4t"] is None
    write(tmp_path, "sys/fs/cgroup/cpu.max", "lots\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", "much\n")
    write(tmp_path, "sys/class/thermal/thermal_zone0/type", "cpu\n")
    write(tmp_path, "sys/class/thermal/thermal_zone0/temp", "warm\n")
    write(tmp_path, "etc/nv_tegra_release", "unknown\n")
    (tmp_path / "proc/device-tree/model").mkdir(parents=True)
    found = environment(tmp_path)
    keys = ("cpu_limit", "memory_limit_gib", "temperatures_c", "l4t", "machine", "memory_gib")
    assert {key: found[key] for key in keys} == dict.fromkeys(keys)


def test_this_machine_is_json() -> None:
    found = environment()
    assert found["cores"] >= 1
    assert json.loads(json.dumps(found, allow_nan=False)) == found
