"""The whole line in one go, at the smallest size: real trainings, real engines of every runtime that builds here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_dsc.demo import DemoPlan, DemoResult, run_demo
from engines.record import load_record
from engines.runtimes import get_runtime


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, list[str]]:
    said: list[str] = []
    plan = DemoPlan(per_class=70, epochs=1, seconds=0.4)
    out = tmp_path_factory.mktemp("demo") / "out"
    return run_demo(out, plan, progress=lambda phase, done, total: None, say=said.append), said


def test_a_row_for_every_engine(demo: tuple[DemoResult, list[str]]) -> None:
    result, _ = demo
    expected = [("onnxruntime", "fp32"), ("onnxruntime", "int8")]
    if get_runtime("tensorrt-rtx").availability().no_build is None:
        expected += [("tensorrt-rtx", precision) for precision in ("fp32", "fp16", "int8")]
    for network, features, multiply_adds in (("dsc", 4640, 36_453_056), ("cnn", 28_640, 166_584_512)):
        rows = [row for row in result.rows if row.network == network]
        assert [(row.runtime, row.precision) for row in rows] == expected
        assert {(row.features, row.multiply_adds) for row in rows} == {(features, multiply_adds)}
        for row in rows:
            assert 0 <= row.accuracy <= 1
            measured = row.runtime == "onnxruntime"
            assert (row.median_ms is not None) == measured
            assert row.accuracy_of == ("engine" if measured else "graph")


def test_what_it_leaves_behind(demo: tuple[DemoResult, list[str]]) -> None:
    result, said = demo
    out = result.page.parent
    page = result.page.read_text()
    assert page.count("data:image/png;base64,") == 5
    for row in result.rows:
        assert f"{row.multiply_adds / 1e6:.1f} M" in page
    assert len((out / "results.csv").read_text().splitlines()) == 211
    assert {path.suffix for path in (out / "phantoms").rglob("*.*")} == {".png", ".jpg", ".csv"}
    for engine in (out / "cnn").glob("*.engine"):
        assert load_record(engine).contract.labels == ("clear", "diffuse", "focal")
    assert sum(line.startswith("8/8 $ edge-dsc bench") for line in said) == 1
    assert json.loads(json.dumps(result.to_dict()))["rows"][0]["network"] == "dsc"
    assert str(result.page) in result.text()


def test_a_second_demo_replaces_the_first_and_nothing_else(tmp_path: Path) -> None:
    from edge_dsc.demo import _clear
    from engines.errors import UsageError

    _clear(tmp_path / "out")
    (tmp_path / "out" / "old").touch()
    _clear(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".edge-dsc-demo"]
    (tmp_path / "other").touch()
    with pytest.raises(UsageError, match="is not empty and no earlier demo"):
        _clear(tmp_path)
    assert (tmp_path / "other").exists()
