from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bench.machine import (
    crowded,
    environment,
    first_gpu,
    gpu_at,
    read_scheduled,
    read_state,
    throttled_between,
    throttling,
    waiting_share,
)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


CPU, THERMAL = "sys/devices/system/cpu", "sys/class/thermal"
JETSON = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\n",
    "proc/meminfo": "MemTotal:        7802680 kB\nMemFree: 1 kB\n",
    "sys/fs/cgroup/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/memory.max": "4294967296\n",
    f"{CPU}/cpu0/cpufreq/scaling_governor": "schedutil\n",
    f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "1510400\n",
    f"{CPU}/cpu0/cpufreq/scaling_min_freq": "1510400\n",
    f"{CPU}/cpu0/cpufreq/scaling_max_freq": "1510400\n",
    f"{CPU}/cpu1/cpufreq/scaling_governor": "schedutil\n",
    f"{CPU}/cpu1/cpufreq/scaling_cur_freq": "729600\n",
    f"{CPU}/cpu1/cpufreq/scaling_min_freq": "729600\n",
    f"{CPU}/cpu1/cpufreq/scaling_max_freq": "1510400\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "624750000\n",
    "sys/class/devfreq/15480000.nvdec/cur_freq": "1\n",
    "var/lib/nvpmodel/status": "pmode:0002",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    "var/lib/dpkg/status": (
        "Package: nvidia-jetpack-dev\nVersion: 1\n\n"
        "Package: nvidia-jetpack\nStatus: install ok installed\nDescription: x\n more\nVersion: 6.2.1+b38\n"
    ),
    f"{THERMAL}/thermal_zone0/type": "cpu-thermal\n",
    f"{THERMAL}/thermal_zone0/temp": "48562\n",
    f"{THERMAL}/thermal_zone1/type": "gpu-thermal\n",
    f"{THERMAL}/thermal_zone1/temp": "60500\n",
    f"{THERMAL}/thermal_zone2/type": "cv0-thermal\n",
    f"{THERMAL}/thermal_zone2/temp": "-256000\n",
    f"{THERMAL}/cooling_device0/type": "pwm-fan\n",
    f"{THERMAL}/cooling_device0/cur_state": "3\n",
    f"{THERMAL}/cooling_device1/type": "gpu-throttle-alert\n",
    f"{THERMAL}/cooling_device1/cur_state": "1\n",
    "sys/class/hwmon/hwmon3/oc1_event_cnt": "2\n",
    "sys/class/hwmon/hwmon3/oc3_event_cnt": "5\n",
    "proc/self/task/41/schedstat": "2000000000 150000000 91\n",
    "proc/self/task/42/schedstat": "1000000000 100000000 17\n",
    "proc/self/task/43/schedstat": "\n",
}


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    write(tmp_path, JETSON)
    return tmp_path


def test_a_jetson_describes_itself(jetson: Path) -> None:
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
        "temperatures_c": {"cpu-thermal": 48.6, "gpu-thermal": 60.5},
    }
    assert {key: found[key] for key in expected} == expected


def test_a_server_with_a_gpu_and_an_old_cgroup_is_read(tmp_path: Path) -> None:
    files = {
        "sys/class/dmi/id/product_name": "PowerEdge R760\n",
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA L4\nIRQ: 12\n",
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "proc/cpuinfo": "CPU part\t: 0xd42\ncpu MHz\t\t: 2100.5\ncpu MHz\t\t: 3300.2\n",
    }
    write(tmp_path, files)
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
    broken = {
        "sys/fs/cgroup/cpu.max": "lots\n",
        "sys/fs/cgroup/memory.max": "much\n",
        f"{THERMAL}/thermal_zone0/type": "cpu\n",
        f"{THERMAL}/thermal_zone0/temp": "warm\n",
        "etc/nv_tegra_release": "unknown\n",
    }
    write(tmp_path, broken)
    (tmp_path / "proc/device-tree/model").mkdir(parents=True)
    found = environment(tmp_path)
    keys = ("cpu_limit", "memory_limit_gib", "temperatures_c", "l4t", "machine", "memory_gib")
    assert {key: found[key] for key in keys} == dict.fromkeys(keys)


def test_this_machine_is_json() -> None:
    found = environment()
    assert found["cores"] >= 1
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_state_of_a_jetson(jetson: Path) -> None:
    assert read_state(jetson) == {
        "cpu_mhz": 1120,
        "gpu_mhz": 624.75,
        "hottest_c": 60.5,
        "throttle_events": 7,
        "cooling": ["gpu-throttle-alert"],
        "ran_ns": 3_000_000_000,
        "waited_ns": 250_000_000,
    }


def test_an_x86_machine_counts_throttling_by_core(tmp_path: Path) -> None:
    cores = {f"{CPU}/cpu{i}/thermal_throttle/core_throttle_count": f"{i}\n" for i in (1, 4)}
    write(tmp_path, {**cores, "proc/cpuinfo": "cpu MHz\t\t: 2100.5\ncpu MHz\t\t: 3300.5\n"})
    assert read_state(tmp_path) == {
        "cpu_mhz": 2700,
        "gpu_mhz": None,
        "hottest_c": None,
        "throttle_events": 5,
        "cooling": [],
        "ran_ns": None,
        "waited_ns": None,
    }


def test_nothing_is_known_of_a_machine_without_files(tmp_path: Path) -> None:
    found = read_state(tmp_path)
    assert (found["cpu_mhz"], found["throttle_events"], found["cooling"]) == (None, None, [])


def throttled(events: int | None, *cooling: str) -> dict[str, Any]:
    return {"throttle_events": events, "cooling": list(cooling)}


def test_throttling_is_what_happened_between_the_states() -> None:
    assert throttling([]) == throttling([throttled(7)] * 2) == throttling([throttled(None)] * 2) == ()
    assert throttling([throttled(7), throttled(7), throttled(9)]) == ("throttled 2 times during the run",)
    assert throttling([throttled(7), throttled(7, "gpu", "cpu"), throttled(7)]) == (
        "held back by cpu, gpu during the run",
    )
    assert not throttled_between(throttled(7), throttled(7))
    assert throttled_between(throttled(7), throttled(8))
    assert throttled_between(throttled(None), throttled(None, "gpu"))


def scheduled(ran_ms: int | None, waited_ms: int | None) -> dict[str, Any]:
    return {
        "ran_ns": None if ran_ms is None else ran_ms * 10**6,
        "waited_ns": None if waited_ms is None else waited_ms * 10**6,
    }


@pytest.mark.parametrize(
    ("states", "share"),
    [
        ([scheduled(100, 50), scheduled(150, 60), scheduled(190, 60)], 0.1),
        ([scheduled(100, 50), scheduled(190, 50)], 0.0),
        ([scheduled(100, 50), scheduled(0, 60)], 1.0),  # the thread that had run has ended
        ([scheduled(100, 50), scheduled(100, 50)], None),
        ([scheduled(100, 50)], None),
        ([scheduled(None, None)] * 2, None),
        ([{}, {}], None),
        ([], None),
    ],
)
def test_the_share_is_of_the_time_that_the_process_wanted(
    states: list[dict[str, Any]], share: float | None
) -> None:
    assert waiting_share(states) == share


def test_up_to_the_limit_nothing_is_said() -> None:
    assert crowded([scheduled(0, 0), scheduled(95, 5)]) == ()
    assert crowded([scheduled(0, 0), scheduled(94, 6)]) == (
        "other programs had the processor for 6% of the time that the measurement wanted it, 5% is the limit",
    )


def test_this_process_runs_and_its_time_grows() -> None:
    before = read_scheduled()
    if before["ran_ns"] is None:
        pytest.skip("this kernel keeps no account")
    sum(range(2_000_000))
    after = read_scheduled()
    assert after["ran_ns"] is not None and after["ran_ns"] > before["ran_ns"]
    assert after["waited_ns"] is not None and after["waited_ns"] >= 0


class NVMLError(Exception):
    """As ``pynvml`` raises it: no driver, no GPU, or a reading that the GPU does not give."""


def nvml(**changes: Any) -> ModuleType:
    """A module ``pynvml`` with what is used of it, on a machine with one GPU; None takes a reading away."""

    def refuse(*_arguments: object) -> None:
        raise NVMLError

    clocks = {0: 1980, 2: 2619}
    module: Any = ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.NVML_CLOCK_GRAPHICS, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = 0, 2, 0
    readings = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: ["first GPU"][index],
        "nvmlDeviceGetName": lambda device: {"first GPU": "NVIDIA H100"}[device],
        "nvmlDeviceGetClockInfo": lambda _device, kind: clocks[kind],
        "nvmlDeviceGetTemperature": lambda _device, _sensor: 41,
        "nvmlDeviceGetPowerManagementLimit": lambda _device: 350_000,
        "nvmlDeviceGetPowerUsage": lambda _device: 71_500,
        "nvmlDeviceGetMemoryInfo": lambda _device: SimpleNamespace(
            total=80 << 30, free=77 << 30, used=3 << 30
        ),
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda _device: 0x4 | 0x1 | 0x40,
        **changes,
    }
    vars(module).update({name: reading or refuse for name, reading in readings.items()})
    return module


@pytest.fixture(autouse=True)
def forgotten_gpu() -> Iterator[None]:
    first_gpu.cache_clear()
    gpu_at.cache_clear()
    yield
    first_gpu.cache_clear()
    gpu_at.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)


def test_a_gpu_describes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, nvml())
    gpu = first_gpu()
    assert gpu is not None
    assert environment()["nvml"] == {
        "name": "NVIDIA H100",
        "graphics_mhz": 1980,
        "memory_mhz": 2619,
        "temperature_c": 41,
        "power_limit_w": 350.0,
        "throttled_by": ["power cap", "hardware thermal slowdown"],
    }
    assert gpu.power_w() == 71.5
    assert gpu.memory_used() == 3 << 30


def test_the_gpu_that_is_meant_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's order may be another than NVML's: a GPU is found by its place on the bus."""
    names = {"first GPU": "NVIDIA H100", "second GPU": "NVIDIA T4"}
    places = {b"0000:41:00.0": "second GPU"}
    module = nvml(
        nvmlDeviceGetHandleByPciBusId=lambda place: places[place],
        nvmlDeviceGetName=lambda device: names[device],
        nvmlDeviceGetClockInfo=lambda device, kind: {"first GPU": 1980, "second GPU": 585}[device],
    )
    install(monkeypatch, module)
    for place, model in (("0000:01:00.0", "H100"), ("0000:41:00.0", "T4")):
        information = tmp_path / "proc/driver/nvidia/gpus" / place / "information"
        information.parent.mkdir(parents=True)
        information.write_text(f"Model: \t NVIDIA {model}\n")
    second = gpu_at("0000:41:00.0")
    found = environment(tmp_path, second)
    assert (found["gpu"], found["nvml"]["name"]) == ("NVIDIA T4", "NVIDIA T4")
    assert read_state(tmp_path, second)["gpu_mhz"] == 585
    first = environment(tmp_path)
    assert (first["gpu"], first["nvml"]["name"]) == ("NVIDIA H100", "NVIDIA H100")


def test_a_place_where_nvml_knows_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, nvml(nvmlDeviceGetHandleByPciBusId=None))
    assert gpu_at("0000:99:00.0") is None


def test_a_gpu_that_is_held_back_is_part_of_the_machines_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, nvml())
    found = read_state(tmp_path)
    assert (found["gpu_mhz"], found["cooling"]) == (1980, ["GPU power cap", "GPU hardware thermal slowdown"])
    assert throttling([found]) == (
        "held back by GPU hardware thermal slowdown, GPU power cap during the run",
    )


def test_what_a_gpu_does_not_give_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = ("Name", "ClockInfo", "Temperature", "PowerManagementLimit", "PowerUsage", "MemoryInfo")
    missing = [*(f"nvmlDeviceGet{name}" for name in readings), "nvmlDeviceGetCurrentClocksThrottleReasons"]
    install(monkeypatch, nvml(**dict.fromkeys(missing)))
    gpu = first_gpu()
    assert gpu is not None
    assert set(gpu.describe().values()) == {None}
    assert gpu.memory_used() is gpu.power_w() is None


@pytest.mark.parametrize(
    "module",
    [None, nvml(nvmlInit=None), nvml(nvmlDeviceGetHandleByIndex=None)],
    ids=["package", "driver", "GPU"],
)
def test_without_package_driver_or_gpu_there_is_none(
    module: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, module)
    assert first_gpu() is None
    assert environment()["nvml"] is None


def test_the_real_library_answers_or_is_absent() -> None:
    gpu = first_gpu()
    assert gpu is None or gpu.describe()["name"]
