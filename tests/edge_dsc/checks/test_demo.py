"""The whole line in one go, at the smallest size: real trainings, real engines of every runtime that builds here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.plan import choose_plan
from edge_dsc.checks.demo import DemoPlan, DemoResult, run_demo
from engines.errors import UsageError
from engines.record import load_record
from engines.runtimes import get_runtime


@pytest.fixture(scope="module")
def demo(make_once: Any, few_calibrate: None, small_pictures: Any) -> tuple[DemoResult, list[str]]:
    """Nothing here learns or is measured well: one epoch in large batches, the quickest ranges, no warm-up."""

    def walk(folder: Path) -> tuple[DemoResult, list[str]]:
        said: list[str] = []
        plan = DemoPlan(
            out=folder / "out",
            per_class=18,
            recipe="paper",
            epochs=1,
            method="minmax",
            latency=choose_plan(seconds=0.2, warmup_seconds=0),
        )
        with small_pictures():
            return run_demo(plan, progress=lambda phase, done, total: None, say=said.append), said

    return make_once("demo", walk)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_row_for_every_engine(demo: tuple[DemoResult, list[str]]) -> None:
    result, _ = demo
    expected = [("onnxruntime", "fp32"), ("onnxruntime", "int8")]
    if get_runtime("openvino").availability().no_build is None:
        seen = [row.precision for row in result.rows if (row.network, row.runtime) == ("dsc", "openvino")]
        assert {"fp32", "int8"} <= set(seen)  # and what this processor has beside them
        expected += [("openvino", precision) for precision in seen]
    if get_runtime("tensorrt-rtx").availability().no_build is None:
        expected += [("tensorrt-rtx", precision) for precision in ("fp32", "fp16", "int8")]
    for network, features, multiply_adds in (("dsc", 4640, 2_975_936), ("cnn", 28_640, 13_598_912)):
        rows = [row for row in result.rows if row.network == network]
        assert [(row.runtime, row.precision) for row in rows] == expected
        assert {(row.features, row.multiply_adds) for row in rows} == {(features, multiply_adds)}
        for row in rows:
            assert 0 <= row.accuracy <= 1
            measured = row.runtime in ("onnxruntime", "openvino")
            assert (row.median_ms is not None) == measured
            assert row.accuracy_of == ("engine" if measured else "graph")


@pytest.mark.slow
def test_what_it_leaves_behind(demo: tuple[DemoResult, list[str]]) -> None:
    result, said = demo
    out = result.page.parent
    page = result.page.read_text()
    assert page.count("data:image/png;base64,") == 5
    for row in result.rows:
        assert f"{row.multiply_adds / 1e6:.1f} M" in page
    assert len((out / "results.csv").read_text().splitlines()) == 55
    assert {path.suffix for path in (out / "phantoms").rglob("*.*")} == {".png", ".jpg", ".csv"}
    for engine in (out / "cnn").glob("*.engine"):
        assert load_record(engine).contract.labels == ("clear", "diffuse", "focal")
    assert sum(line.startswith("10/10 $ edge-dsc bench") for line in said) == 1
    assert str(result.page) in result.text()
    assert msgspec.to_builtins(result, enc_hook=str)["rows"][0]["network"] == "dsc"  # what --json prints


@pytest.mark.slow
def test_a_verdict_a_twin_and_an_adopted_network(demo: tuple[DemoResult, list[str]]) -> None:
    result, _ = demo
    assert result.verdict.startswith("Is dsc not inferior to cnn by more than 2 points? ")
    assert "over 13 pairs of answers" in result.verdict
    for name in ("twin", "theirs"):
        guests = [guest for guest in result.guests if guest.network == name]
        assert [(guest.runtime, guest.precision) for guest in guests] == [
            (row.runtime, row.precision) for row in result.rows if row.network == "cnn"
        ]
        assert guests[0].agreement == 1.0
        assert all(0.8 <= guest.agreement <= 1 for guest in guests)
    cnn = next(row for row in result.rows if row.network == "cnn")
    assert next(guest.accuracy for guest in result.guests if guest.network == "theirs") == cnn.accuracy
    assert "4,640 parameters" in result.origins[0]
    page = result.page.read_text()
    assert result.verdict in page
    assert result.origins[1] in page
    assert result.origins[1] in result.text()


def test_another_folder_is_spared(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with pytest.raises(UsageError, match="is not empty and no earlier demo"):
        run_demo(DemoPlan(out=tmp_path), progress=lambda *call: None, say=lambda text: None)
    assert (tmp_path / "other").exists()


def test_an_earlier_demo_is_replaced_and_what_lies_beside_it_stays(tmp_path: Path) -> None:
    def stop(text: str) -> None:
        raise KeyboardInterrupt

    out, kept = tmp_path / "out", tmp_path / "out" / "mine" / "model.keras"
    for names in ({".edge-dsc-demo"}, {".edge-dsc-demo", "mine"}):
        with pytest.raises(KeyboardInterrupt):
            run_demo(DemoPlan(out=out), progress=lambda *call: None, say=stop)
        assert {path.name for path in out.iterdir()} == names
        for path in (kept, out / "dsc" / "model.keras", out / "phantoms" / "a.png", out / "report.json"):
            path.parent.mkdir(exist_ok=True)
            path.write_text("precious")
    assert kept.read_text() == "precious"
