from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from engines.trt import cuda as driver
from engines.trt.cuda import Gpu, find_gpu


def fake_driver(*, start: int = 0, devices: int = 1, name: int = 0) -> Any:
    def count(out: Any) -> int:
        out._obj.value = devices
        return 0

    def get_name(buffer: Any, size: int, device: Any) -> int:
        buffer.value = b"Orin"
        return name

    def attribute(out: Any, number: int, device: Any) -> int:
        out._obj.value = {75: 8, 76: 7}[number]
        return 0

    return SimpleNamespace(
        cuInit=lambda flags: start,
        cuDeviceGetCount=count,
        cuDeviceGet=lambda out, index: 0,
        cuDeviceGetName=get_name,
        cuDeviceGetAttribute=attribute,
    )


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (fake_driver(), (Gpu("Orin", "8.7"), "")),
        (fake_driver(start=100), (None, "the CUDA driver does not start: cuInit gives error 100")),
        (fake_driver(devices=0), (None, "the CUDA driver finds no GPU")),
        (fake_driver(name=1), (None, "the CUDA driver does not describe its GPU: errors (0, 1, 0, 0)")),
    ],
)
def test_what_the_driver_says(monkeypatch: pytest.MonkeyPatch, library: Any, expected: object) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert find_gpu() == expected


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_LIBRARY", "libcuda-that-is-not-there.so.1")
    assert find_gpu() == (None, "no CUDA driver: libcuda-that-is-not-there.so.1 not found")
