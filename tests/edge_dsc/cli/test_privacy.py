"""Nothing is sent, and nothing is written but what was asked for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def child(home: Path, code: str, *arguments: object) -> str:
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    places = {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_CONFIG_HOME": str(home / "config"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**kept, **places, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("package", ["engines", "calibration.collect", "bench.report", "edge_dsc.cli.using"])
def test_telemetry_is_off_before_any_package_of_ours_loads_onnxruntime(tmp_path: Path, package: str) -> None:
    code = (
        f"import sys, os, {package}; print('onnxruntime' in sys.modules, os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    assert child(tmp_path / "home", code) == "False 1\n"


@pytest.mark.slow
@pytest.mark.parametrize("package", ["openvino.tools.ovc", "ray"])
def test_what_else_calls_home_is_off_before_it_loads(tmp_path: Path, package: str) -> None:
    """OpenVINO reports its own import; the guard below sees Python's sockets in this process alone."""
    pytest.importorskip(package.partition(".")[0])
    code = f"""
import engines, os, socket, sys, time
def refuse(*arguments): raise SystemExit(f"a connection to {{arguments}}")
socket.socket.connect = socket.getaddrinfo = refuse
import {package}
print(sys.modules["openvino_telemetry"], os.environ["RAY_USAGE_STATS_ENABLED"])
"""
    home = tmp_path / "home"
    assert child(home, code) == "None 0\n"
    assert list(home.rglob("*")) == []


@pytest.mark.slow
def test_infer_leaves_nothing_in_the_home_folder(tmp_path: Path, engine: Path, textures: Path) -> None:
    home = tmp_path / "home"
    image = next((textures / "focal").iterdir())
    out = child(home, "from edge_dsc.cli import main; main()", "infer", engine, image)
    assert out.count("\n") == 2
    assert list(home.rglob("*")) == []


def test_the_guard_of_these_tests_stops_what_leaves_loopback(_calls_out: list[str]) -> None:
    with socket.socket() as plug:
        with pytest.raises(ConnectionRefusedError, match="no test leaves this machine"):
            plug.connect(("192.0.2.1", 9))
        with pytest.raises(ConnectionRefusedError, match="no test leaves this machine"):
            plug.connect_ex(("192.0.2.1", 9))
    with pytest.raises(ConnectionRefusedError, match="no test leaves this machine"):
        socket.getaddrinfo("collector.example", 443)
    assert socket.getaddrinfo("127.0.0.1", 9)
    assert len(_calls_out) == 3
    _calls_out.clear()
