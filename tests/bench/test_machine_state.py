from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.compare import compare_within
from bench.machine import read_state, throttled_between, throttling
from bench.tables import render_report

Make = Callable[..., Any]


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    cpu, thermal = "sys/devices/system/cpu", "sys/class/thermal"
    files = {
        f"{cpu}/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
        f"{cpu}/cpu1/cpufreq/scaling_cur_freq": "500000\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
        f"{thermal}/thermal_zone0/type": "cpu-thermal\n",
        f"{thermal}/thermal_zone0/temp": "51000\n",
        f"{thermal}/thermal_zone1/type": "gpu-thermal\n",
        f"{thermal}/thermal_zone1/temp": "60500\n",
        f"{thermal}/thermal_zone2/type": "cv0-thermal\n",
        f"{thermal}/thermal_zone2/temp": "-256000\n",
        f"{thermal}/cooling_device0/type": "pwm-fan\n",
        f"{thermal}/cooling_device0/cur_state": "3\n",
        f"{thermal}/cooling_device1/type": "gpu-throttle-alert\n",
        f"{thermal}/cooling_device1/cur_state": "1\n",
        "sys/class/hwmon/hwmon3/oc1_event_cnt": "2\n",
        "sys/class/hwmon/hwmon3/oc3_event_cnt": "5\n",
        "proc/self/task/41/schedstat": "2000000000 150000000 91\n",
        "proc/self/task/42/schedstat": "1000000000 100000000 17\n",
        "proc/self/task/43/schedstat": "\n",
    }
    write(tmp_path, files)
    return tmp_path


def test_a_jetson_is_read(jetson: Path) -> None:
    assert read_state(jetson) == {
        "cpu_mhz": 1000,
        "gpu_mhz": 306.0,
        "hottest_c": 60.5,
        "throttle_events": 7,
        "cooling": ["gpu-throttle-alert"],
        "ran_ns": 3_000_000_000,
        "waited_ns": 250_000_000,
    }


def test_an_x86_machine_counts_throttling_by_core(tmp_path: Path) -> None:
    cores = {f"sys/devices/system/cpu/cpu{i}/thermal_throttle/core_throttle_count": f"{i}\n" for i in (1, 4)}
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


def state(events: int | None, *cooling: str) -> dict[str, Any]:
    return {"throttle_events": events, "cooling": list(cooling)}


def test_throttling_is_what_happened_between_the_states() -> None:
    assert throttling([]) == throttling([state(7), state(7)]) == throttling([state(None)] * 2) == ()
    assert throttling([state(7), state(7), state(9)]) == ("throttled 2 times during the run",)
    assert throttling([state(7), state(7, "gpu", "cpu"), state(7)]) == (
        "held back by cpu, gpu during the run",
    )
    assert not throttled_between(state(7), state(7))
    assert throttled_between(state(7), state(8))
    assert throttled_between(state(None), state(None, "gpu"))


def test_throttling_stands_below_the_table_and_the_comparison(subject: Make, report: Make) -> None:
    made = report(subject("a", [[5]] * 6), subject("b", [[6]] * 6), states=(state(1), state(4)))
    assert "* throttled 3 times during the run" in render_report(made).splitlines()
    assert compare_within(made).cautions == ("throttled 3 times during the run",)
