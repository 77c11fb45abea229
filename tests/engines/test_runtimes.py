from __future__ import annotations

from pathlib import Path

import pytest

from engines import runtimes
from engines.errors import AccuracyGateError, ArtefactError, UsageError
from engines.record import Precision
from engines.runtimes import Availability, BuildOptions, check_precision, choose_runtime, get_runtime


@pytest.mark.parametrize("name", runtimes.RUNTIME_NAMES)
def test_the_table_holds_what_it_names(name: str) -> None:
    runtime = get_runtime(name)
    assert runtime.name == name
    found = runtime.availability()
    assert (found.version is None) <= (found.no_build is not None and found.no_run is not None)


def test_an_unknown_runtime_is_refused_with_the_names() -> None:
    with pytest.raises(UsageError, match="no runtime 'openvino'") as caught:
        get_runtime("openvino")
    assert "onnxruntime, tensorrt, tensorrt-rtx" in caught.value.remedy


@pytest.mark.parametrize(
    ("found", "name", "reason"),
    [
        (Availability("10.3", None, None), "tensorrt", "tensorrt 10.3 and a GPU are here"),
        (Availability(None, "not installed", "not installed"), "onnxruntime", "not installed"),
        (Availability("10.3", None, "no CUDA driver"), "onnxruntime", "no CUDA driver"),
    ],
)
def test_auto_takes_tensorrt_where_it_works_and_says_why(
    monkeypatch: pytest.MonkeyPatch, found: Availability, name: str, reason: str
) -> None:
    monkeypatch.setattr(type(get_runtime("tensorrt")), "availability", lambda self: found)
    runtime, why = choose_runtime("auto")
    assert runtime.name == name
    assert reason in why


def test_a_precision_that_too_few_layers_have_is_refused() -> None:
    options = BuildOptions(precision=Precision.INT8, required_layers=8)
    check_precision({"INT8": 8, "FP32": 1}, options)
    with pytest.raises(
        AccuracyGateError, match="asked for 8 layers in INT8, the engine would have 2 in FP32, 7 in INT8"
    ):
        check_precision({"INT8": 7, "FP32": 2}, options)


def test_an_engine_is_checked_before_its_runtime_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(name: str) -> None:
        raise AssertionError("the runtime was asked for an engine without a record")

    monkeypatch.setattr(runtimes, "get_runtime", never)
    (tmp_path / "a.engine").write_bytes(b"plan")
    with pytest.raises(ArtefactError, match="has no record"):
        runtimes.open_engine(tmp_path / "a.engine")
