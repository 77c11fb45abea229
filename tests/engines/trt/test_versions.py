from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engines.record import Precision
from engines.trt import versions


def release(*, weakly: bool) -> Any:
    """The parts of TensorRT 8.6 or 11 that decide how a network is typed."""
    flags = SimpleNamespace(TF32="TF32", **({"FP16": "FP16", "INT8": "INT8"} if weakly else {}))
    kinds = SimpleNamespace(EXPLICIT_BATCH=0) if weakly else SimpleNamespace(STRONGLY_TYPED=1)
    return SimpleNamespace(NetworkDefinitionCreationFlag=kinds, BuilderFlag=flags)


class Config:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def set_flag(self, flag: str) -> None:
        self.calls.append(("set", flag))

    def clear_flag(self, flag: str) -> None:
        self.calls.append(("clear", flag))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.16.1.11", (10, 16, 1, 11)),
        ("8.6.1.post1", (8, 6, 1)),
        ("10.3.0", (10, 3, 0)),
        ("1.7.1+cu13", (1, 7, 1)),
        ("unknown", ()),
    ],
)
def test_versions_are_numbers(text: str, expected: tuple[int, ...]) -> None:
    assert versions.parse_version(text) == expected


def test_ten_is_later_than_eight() -> None:
    assert versions.parse_version("10.3") > versions.parse_version("8.6.1")


def test_network_flags() -> None:
    assert versions.network_flags(release(weakly=True)) == 0b01
    assert versions.network_flags(release(weakly=False)) == 0b10


@pytest.mark.parametrize(
    ("weakly", "precision", "expected"),
    [
        (True, "fp32", [("clear", "TF32")]),
        (True, "fp16", [("set", "FP16")]),
        (True, "int8", [("set", "INT8")]),
        (False, "fp32", [("clear", "TF32")]),
        (False, "fp16", []),
        (False, "int8", []),
    ],
)
def test_flags_are_for_weakly_typed_networks(weakly: bool, precision: str, expected: list) -> None:
    config = Config()
    versions.set_precision(release(weakly=weakly), config, Precision(precision))
    assert config.calls == expected


def test_a_release_without_progress_gets_no_monitor() -> None:
    assert versions.attach_monitor(SimpleNamespace(), Config(), lambda *step: None) is None
    assert versions.attach_monitor(SimpleNamespace(IProgressMonitor=object), Config(), print) is None


def test_nobody_who_listens_means_no_monitor() -> None:
    config = SimpleNamespace(progress_monitor=None)
    assert versions.attach_monitor(SimpleNamespace(IProgressMonitor=object), config, None) is None
    assert config.progress_monitor is None


def test_the_harmless_error_of_rtx() -> None:
    assert versions.is_harmless("Thread context has not been set! Using global log stream.")
    assert not versions.is_harmless("Error Code 1: Cuda Runtime")
