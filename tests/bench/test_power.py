from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from bench import power
from bench.power import Power, Rail, find_rails, measure_power


def write(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "first_gpu", lambda: None)


def test_rails_of_a_jetson(tmp_path: Path) -> None:
    chip = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
    for number, (name, volts, amperes) in enumerate(
        [("VDD_IN", 5000, 1200), ("VDD_CPU_GPU_CV", 4960, 400)], start=1
    ):
        write(tmp_path, f"{chip}/in{number}_label", f"{name}\n")
        write(tmp_path, f"{chip}/in{number}_input", f"{volts}\n")
        write(tmp_path, f"{chip}/curr{number}_input", f"{amperes}\n")
    write(tmp_path, f"{chip}/in3_label", "NC\n")
    rails = find_rails(tmp_path)
    assert [(rail.name, rail.watts()) for rail in rails] == [
        ("INA3221 VDD_IN", 6.0),
        ("INA3221 VDD_CPU_GPU_CV", 1.984),
    ]
    (tmp_path / f"{chip}/curr1_input").unlink()
    assert rails[0].watts() is None


def test_a_counter_of_energy_is_the_mean_power_between_two_readings(tmp_path: Path) -> None:
    folder = "sys/class/powercap/intel-rapl:0"
    write(tmp_path, f"{folder}/name", "package-0\n")
    write(tmp_path, f"{folder}/max_energy_range_uj", "10000000\n")
    counter = write(tmp_path, f"{folder}/energy_uj", "4000000\n")
    write(tmp_path, "sys/class/powercap/intel-rapl:1/name", "package-1\n")  # its counter may not be read
    times = iter([0, 2 * 10**9, 3 * 10**9])
    (rail,) = power._rapl(tmp_path, lambda: next(times))
    assert (rail.name, rail.watts()) == ("RAPL package-0", None)
    counter.write_text("9000000\n")
    assert rail.watts() == 2.5
    counter.write_text("1000000\n")  # it went past 10 J and began anew
    assert rail.watts() == pytest.approx(2.0)
    assert [rail.name for rail in find_rails(tmp_path)] == ["RAPL package-0"]


def test_a_board_tells_its_power() -> None:
    class Board:
        def power_w(self) -> float:
            return 71.5

    (rail,) = find_rails(Path("/nowhere"), gpu=Board())  # type: ignore[arg-type]
    assert (rail.name, rail.watts()) == ("NVML board", 71.5)
    assert find_rails(Path("/nowhere")) == ()


def test_joules_are_above_the_idle_machine() -> None:
    found = Power(rail="r", idle_w=2.0, busy_w=6.0, calls=400, seconds=2.0, readings=10)
    assert found.joules == 0.02


def test_a_pass_reads_idle_first_and_then_busy() -> None:
    state = {"watts": 3.0, "now": 0}

    seen = threading.Event()

    def call() -> None:
        state["watts"] = 7.0
        seen.clear()
        assert seen.wait(10)
        state["now"] += 10**9

    def watts() -> float:
        value = state["watts"]
        if value == 7.0:
            seen.set()
        return value

    rails = [Rail(name="a", watts=watts), Rail(name="dead", watts=lambda: None)]

    def pause(seconds: float) -> Any:
        return None

    (found,) = measure_power(call, rails, seconds=2, pause=pause, clock=lambda: int(state["now"]))
    assert (found.rail, found.idle_w, found.calls, found.seconds) == ("a", 3.0, 2, 2.0)
    assert 3.0 < found.busy_w <= 7.0
    assert found.readings >= 1
