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


def test_network_flags() -> None:
    assert versions.network_flags(release(weakly=True)) == 0b01
    assert versions.network_flags(release(weakly=False)) == 0b10


@pytest.mark.parametrize(
    ("weakly", "precision", "expected"),
    [
        (True, "fp32", [("clear", "TF32")]),
        (True, "fp16", [("set", "FP16")]),
        (True, "int8", [("set", "FP16"), ("set", "INT8")]),
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
    assert versions.attach_monitor(SimpleNamespace(), Config(), lambda *step: None, []) is None
    assert versions.attach_monitor(SimpleNamespace(IProgressMonitor=object), Config(), print, []) is None


def test_a_monitor_stops_the_build_also_where_nobody_listens() -> None:
    config, interrupts = SimpleNamespace(progress_monitor=None), list[int]()
    monitor = versions.attach_monitor(SimpleNamespace(IProgressMonitor=object), config, None, interrupts)
    assert config.progress_monitor is monitor
    monitor.phase_start("building", None, 3)
    assert monitor.step_complete("building", 0)
    interrupts.append(2)
    assert not monitor.step_complete("building", 1)


def test_the_harmless_error_of_rtx() -> None:
    assert versions.is_harmless("Thread context has not been set! Using global log stream.")
    assert not versions.is_harmless("Error Code 1: Cuda Runtime")


def test_a_parser_error_names_its_node_where_the_release_does() -> None:
    error = SimpleNamespace(desc=lambda: "not\n supported")
    assert versions.describe_parser_error(error) == "not supported"
    error.node_operator, error.node_name = (lambda: "Softmax"), (lambda: "softmax_3")
    assert versions.describe_parser_error(error) == "Softmax softmax_3: not supported"
    error.node_operator = lambda: ""
    assert versions.describe_parser_error(error) == "not supported"
