from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from engines.contract import ModelContract
from engines.errors import ArtefactError
from engines.files import canonical_json, sha256_bytes
from engines.record import RECORD as KIND
from engines.record import BatchRange, EngineRecord, Precision, load_record, record_path, save_record

PLAN = b"a plan"
MODEL = b"a model"


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "dsc.engine"
    path.write_bytes(PLAN)
    (tmp_path / "model.onnx").write_bytes(MODEL)
    save_record(path, RECORD)
    return path


RECORD = EngineRecord(
    engine="dsc.engine",
    engine_sha256=sha256_bytes(PLAN),
    engine_bytes=len(PLAN),
    runtime="onnxruntime",
    runtime_version="1.0",
    platform={"os": "Linux"},
    precision=Precision.INT8,
    batch=BatchRange(1, 8, 32),
    contract=ModelContract(labels=("a", "b"), architecture="dsc"),
    onnx="model.onnx",
    onnx_sha256=sha256_bytes(MODEL),
    calibration_sha256="0" * 64,
    layers={"INT8": 7, "FP32": 2},
    layers_source="test",
    build_seconds=0.5,
    build_command="edge-dsc build-engine model.onnx --int8",
    edge_dsc="0.1.0",
    created="2026-01-01T00:00:00+00:00",
    notes=("slow",),
)


def refusal(engine: Path) -> ArtefactError:
    with pytest.raises(ArtefactError) as caught:
        load_record(engine)
    return caught.value


def test_a_record_comes_back_equal(engine: Path) -> None:
    assert load_record(engine) == RECORD


def test_a_renamed_engine_is_refused_with_the_rebuild_command(engine: Path) -> None:
    other = engine.with_name("cnn.engine")
    engine.rename(other)
    record_path(engine).rename(record_path(other))
    error = refusal(other)
    assert "cnn.engine was renamed: its record is of dsc.engine" in error.what
    assert error.remedy == "rebuild it: edge-dsc build-engine model.onnx --int8"


def test_a_truncated_engine_is_refused(engine: Path) -> None:
    engine.write_bytes(PLAN[:-1])
    assert "has 5 bytes, its record says 6" in refusal(engine).what


def test_a_foreign_engine_is_refused(engine: Path) -> None:
    engine.write_bytes(PLAN[::-1])
    assert "is not the engine of its record" in refusal(engine).what


def test_a_stale_engine_is_refused(engine: Path) -> None:
    (engine.parent / "model.onnx").write_bytes(b"trained again")
    assert "is stale:" in refusal(engine).what


def test_an_engine_travels_without_its_model(engine: Path) -> None:
    (engine.parent / "model.onnx").unlink()
    assert load_record(engine) == RECORD


def test_a_missing_engine_or_record_is_refused(engine: Path) -> None:
    record_path(engine).unlink()
    assert "has no record beside it (dsc.engine.json)" in refusal(engine).what
    engine.unlink()
    assert "there is no engine" in refusal(engine).what


def test_an_edited_record_is_refused(engine: Path) -> None:
    path = record_path(engine)
    document = json.loads(path.read_text())
    document["precision"] = "fp32"
    path.write_text(json.dumps(document))
    assert "was edited after it was made" in refusal(engine).what


def test_a_record_that_lacks_a_field_is_refused(tmp_path: Path) -> None:
    values = msgspec.to_builtins(RECORD)
    del values["runtime"]
    write_record(tmp_path / "x.json", values)
    with pytest.raises(
        ArtefactError, match=r"no readable edge-dsc/engine-record: .*missing required field `runtime`"
    ):
        KIND.load(tmp_path / "x.json")


def write_record(path: Path, values: dict[str, object]) -> None:
    head = {"kind": KIND.name, "schema_version": KIND.version}
    path.write_text(json.dumps({**head, **values, "record_sha256": sha256_bytes(canonical_json(values))}))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("engine_bytes", "many", "Expected `int`, got `str` - at `$.engine_bytes`"),
        ("layers", {"INT8": 1.5}, "Expected `int`, got `float` - at `$.layers[...]`"),
        ("batch", {"smallest": 2, "best": 1, "largest": 3}, "MIN <= OPT <= MAX - at `$.batch`"),
        ("mood", "good", "unknown field `mood`"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    write_record(tmp_path / "x.json", {**msgspec.to_builtins(RECORD), field: value})
    with pytest.raises(ArtefactError, match=re.escape(message)):
        KIND.load(tmp_path / "x.json")


@pytest.mark.parametrize("sizes", [(0, 1, 1), (2, 1, 3), (1, 4, 3)])
def test_batches_out_of_order_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="MIN <= OPT <= MAX"):
        BatchRange(*sizes)


def test_contract_round_trip_and_refusals() -> None:
    contract = RECORD.contract
    assert ModelContract.from_metadata(contract.to_metadata(), source="m") == contract
    with pytest.raises(ArtefactError, match="not exported by edge-dsc"):
        ModelContract.from_metadata({}, source="m")
    with pytest.raises(ArtefactError, match="damaged contract"):
        ModelContract.from_metadata({"edge_dsc.contract": "{"}, source="m")
    with pytest.raises(ArtefactError, match="resize 'crop-v9', this edge-dsc knows 'halve-area-v1'"):
        replace(contract, resize="crop-v9").check("m")
    with pytest.raises(ArtefactError, match=r"damaged contract: .*missing required field `architecture`"):
        ModelContract.from_metadata({"edge_dsc.contract": '{"labels": []}'}, source="m")


def test_the_preprocess_hash_depends_on_pixels_not_on_labels() -> None:
    contract = RECORD.contract
    assert replace(contract, labels=("x", "y")).preprocess_sha256 == contract.preprocess_sha256
    assert replace(contract, scale=1.0).preprocess_sha256 != contract.preprocess_sha256
    assert replace(contract, height=256).preprocess_sha256 != contract.preprocess_sha256
