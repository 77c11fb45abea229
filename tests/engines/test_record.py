from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from edge_dsc.checks.inspection import format_record
from engines.contract import ModelContract
from engines.errors import ArtefactError
from engines.files import canonical_json, sha256_bytes
from engines.record import RECORD as KIND
from engines.record import (
    Agreement,
    BatchRange,
    Change,
    EngineRecord,
    Flip,
    Precision,
    Validation,
    load_record,
    peek_record,
    read_engine,
    record_path,
    save_record,
)

DATA = Path(__file__).parent / "data"  # records as version 0.1.0 wrote them
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
    weight_bits=8,
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


def write_record(path: Path, values: dict[str, object], version: int = KIND.version) -> None:
    head = {"kind": KIND.name, "schema_version": version}
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


def earlier(name: str, folder: Path) -> Path:
    """Put the engine of a record that an earlier version wrote into a folder, with that record beside it."""
    engine = folder / f"{name}.engine"
    engine.write_bytes(PLAN)
    shutil.copy(DATA / f"record-v1-{name}.json", record_path(engine))
    return engine


@pytest.mark.parametrize("name", ["first", "int8", "gated"])
def test_records_of_version_1_load_and_become_the_latest(tmp_path: Path, name: str) -> None:
    engine = earlier(name, tmp_path)
    record = load_record(engine)
    assert (record.engine, record.precision, record.batch) == (engine.name, "int8", BatchRange(1, 8, 32))
    assert record.contract.labels == ("covid19", "normal", "pneumonia")
    save_record(engine, record)
    assert json.loads(record_path(engine).read_text())["schema_version"] == KIND.version
    assert load_record(engine) == record


def test_what_version_1_gained_under_its_number_is_read_where_it_stands(tmp_path: Path) -> None:
    first, int8, gated = (load_record(earlier(name, tmp_path)) for name in ("first", "int8", "gated"))
    assert (first.layer_types, first.float_layers, first.validation) == ({}, (), None)
    assert int8.layer_types["logits"] == "FP32"
    assert replace(int8, engine="first.engine", layer_types={}) == first
    assert gated.float_layers == ("block1_depthwise",)
    assert gated.validation is not None
    assert gated.validation.passed
    assert gated.validation.agreement.flipped[0] == Flip(
        "xrays/covid19/0.jpg", "covid19", "normal", "covid19"
    )


def test_an_edited_record_of_version_1_is_refused(tmp_path: Path) -> None:
    engine = earlier("int8", tmp_path)
    path = record_path(engine)
    path.write_text(path.read_text().replace('"FP32"', '"INT8"'))
    assert "was edited after it was made" in refusal(engine).what


def test_a_later_version_is_refused_by_its_number(tmp_path: Path) -> None:
    write_record(tmp_path / "x.json", msgspec.to_builtins(RECORD), version=7)
    with pytest.raises(
        ArtefactError, match="has schema version 7, this edge-dsc reads 1 and 2 and 3 and 4 and 5 and 6"
    ):
        KIND.load(tmp_path / "x.json")


@pytest.mark.parametrize(("layers", "bits"), [({"INT8": 7, "FP32": 2}, 8), ({"FP32": 9}, None)])
def test_records_of_version_5_knew_weights_of_8_bits_alone(
    tmp_path: Path, layers: dict[str, int], bits: int | None
) -> None:
    values = {**msgspec.to_builtins(RECORD), "layers": layers}
    assert values.pop("weight_bits") == 8
    write_record(tmp_path / "x.json", values, version=5)
    assert KIND.load(tmp_path / "x.json").weight_bits == bits


def test_records_of_version_4_have_a_contract_without_temperature_and_maps(tmp_path: Path) -> None:
    values = msgspec.to_builtins(RECORD)
    assert values["contract"].pop("temperature") == 1.0 and values["contract"].pop("cam") is None
    values["contract"]["schema_version"] = 1
    write_record(tmp_path / "x.json", values, version=4)
    assert KIND.load(tmp_path / "x.json") == RECORD


def test_records_of_version_3_knew_nothing_of_the_accelerator(tmp_path: Path) -> None:
    values = msgspec.to_builtins(RECORD)
    assert values.pop("gpu_layers") == () and values["tuning"].pop("dla") is None
    write_record(tmp_path / "x.json", values, version=3)
    assert KIND.load(tmp_path / "x.json") == RECORD
    write_record(tmp_path / "x.json", {**values, "tuning": {"dla": 16}})
    with pytest.raises(ArtefactError, match=r"\$\.tuning\.dla"):
        KIND.load(tmp_path / "x.json")


def test_the_content_is_checked_when_the_engine_is_read(engine: Path) -> None:
    record = peek_record(engine)
    assert read_engine(engine, record) == PLAN
    engine.write_bytes(PLAN[::-1])
    assert peek_record(engine) == record
    with pytest.raises(ArtefactError, match="is not the engine of its record") as caught:
        read_engine(engine, record)
    assert caught.value.remedy == "rebuild it: edge-dsc build-engine model.onnx --int8"
    engine.unlink()
    with pytest.raises(ArtefactError, match=r"cannot read .*No such file"):
        read_engine(engine, record)


def change(reference: float, candidate: float) -> Change:
    return Change(reference=reference, candidate=candidate, low=-1.0, high=1.0)


def an_agreement(**figures: Any) -> Agreement:
    others: dict[str, Any] = {
        "reference": "FP32",
        "won": 1,
        "mcnemar_p": 1.0,
        "reference_calibration_error": 0.0,
        "candidate_calibration_error": 0.0,
        "largest_difference": 0.1,
        "flipped": (),
    }
    return Agreement(**{**others, **figures})


@pytest.mark.parametrize(("right", "passed"), [(98, True), (97, False), (101, True)])
def test_a_drop_up_to_the_budget_passes(right: int, passed: bool) -> None:
    agreement = an_agreement(
        images=200, same_top1=190, accuracy=change(100 / 200, right / 200), macro_f1=change(0.5, 0.5), lost=3
    )
    validation = Validation(
        images="test", images_sha256="", answered_by="", max_drop=1.0, skipped=0, agreement=agreement
    )
    assert validation.drop == pytest.approx((100 - right) / 2)
    assert validation.passed is passed


@pytest.mark.parametrize("sizes", [(0, 1, 1), (2, 1, 3), (1, 4, 3)])
def test_batches_out_of_order_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="MIN <= OPT <= MAX"):
        BatchRange(*sizes)


def test_contract_round_trip_and_refusals() -> None:
    contract = RECORD.contract
    assert ModelContract.from_metadata(contract.to_metadata(), source="m") == contract
    first = {**msgspec.to_builtins(contract), "schema_version": 1}
    assert first.pop("temperature") == 1.0 and first.pop("cam") is None
    assert ModelContract.from_metadata({"edge_dsc.contract": json.dumps(first)}, source="m") == contract
    with pytest.raises(ArtefactError, match="not exported by edge-dsc"):
        ModelContract.from_metadata({}, source="m")
    with pytest.raises(ArtefactError, match="damaged contract"):
        ModelContract.from_metadata({"edge_dsc.contract": "{"}, source="m")
    with pytest.raises(ArtefactError, match="resize 'crop-v9', this edge-dsc knows 'halve-area-v1' and "):
        replace(contract, resize="crop-v9").check("m")
    with pytest.raises(ArtefactError, match=r"damaged contract: .*missing required field `architecture`"):
        ModelContract.from_metadata({"edge_dsc.contract": '{"labels": ["a", "b"]}'}, source="m")
    for text in ("[" * 100_000, f'"{"x" * (1 << 20)}"'):
        with pytest.raises(ArtefactError, match="damaged contract"):
            ModelContract.from_metadata({"edge_dsc.contract": text}, source="m")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            ("architecture", name)
            for name in ("../../evil", "/tmp/evil", "", ".dsc", "a/b", "a\nb", "x" * 65)
        ],
        *[("labels", names) for names in ([], ["a"], ["a", "a"], ["a", ""], ["a", "\x1b[31m"], ["a", "b\n"])],
        *[("labels", names) for names in (["a", "\ud800"], ["a", "x" * 201], [f"{n}" for n in range(1001)])],
        *[("input_name", name) for name in ("", "a\0b", "x" * 201)],
        *[("height", size) for size in (0, -1, 4097, 10**30, 224.0, True, None)],
        *[("scale", factor) for factor in (0, -1, 1e300, 10**400, float("inf"), "1")],
    ],
)
def test_a_strangers_contract_is_refused_by_the_field(field: str, value: object) -> None:
    values = {**msgspec.to_builtins(RECORD.contract), field: value}
    with pytest.raises(ArtefactError, match="holds a damaged contract"):
        ModelContract.from_metadata({"edge_dsc.contract": json.dumps(values)}, source="m")


def keys(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path to every field of a document, however deep."""
    names = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for name in names:
        yield (*path, name)
        yield from keys(value[name], (*path, name))  # type: ignore[index]


HOSTILE = (
    None,
    "x<é>",
    "",
    "\x1b]0;x\x07",
    "a\0b",
    "\ud800",
    [[]],
    {"a": 1},
    10**30,
    10**400,
    1e300,
    -1,
    1.5,
    0,
    True,
)


@pytest.mark.slow
def test_a_record_with_any_field_of_a_stranger_is_read_or_refused(engine: Path) -> None:
    share = Change(reference=0.9, candidate=0.8, low=-0.2, high=0.1)
    agreement = an_agreement(
        images=10, same_top1=9, accuracy=share, macro_f1=share, lost=1, flipped=(Flip("a", "b", "b", "a"),)
    )
    validation = Validation(
        images="test", images_sha256="", answered_by="", max_drop=1.0, skipped=0, agreement=agreement
    )
    body = msgspec.to_builtins(replace(RECORD, validation=validation))
    for path in list(keys(body)):
        for value in HOSTILE:
            changed: Any = json.loads(json.dumps(body))
            place = changed
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value
            write_record(record_path(engine), changed)
            try:
                format_record(load_record(engine))
            except ArtefactError:
                continue


def test_a_number_that_no_float_holds_is_refused_before_the_seal_is_checked(engine: Path) -> None:
    path = record_path(engine)
    path.write_text(path.read_text().replace('"build_seconds": 0.5', '"build_seconds": 1e999'))
    assert "is not valid JSON: 1e999 is too large a number" in refusal(engine).what


@pytest.mark.parametrize("model", ["x" * 300, "a\ud800", "/proc/kmsg", "/proc/self/environ"])
def test_a_records_model_is_no_endless_file_and_no_path_that_the_system_refuses(
    engine: Path, model: str
) -> None:
    save_record(engine, replace(RECORD, onnx=model))
    if model.startswith("/"):
        assert "is stale" in refusal(engine).what
    else:
        assert load_record(engine).onnx == model


def test_the_preprocess_hash_depends_on_pixels_not_on_labels() -> None:
    contract = RECORD.contract
    assert replace(contract, labels=("x", "y")).preprocess_sha256 == contract.preprocess_sha256
    assert replace(contract, scale=1.0).preprocess_sha256 != contract.preprocess_sha256
    assert replace(contract, height=256).preprocess_sha256 != contract.preprocess_sha256


def test_grey_of_224_keeps_the_hash_that_earlier_versions_gave_it() -> None:
    grey = ModelContract(labels=("a", "b"), architecture="dsc")
    assert grey.preprocess_sha256 == "5a0b8e4f02ee4807b7e6ec1b50c28b041d1929e20bbf8798ea030596b05a83c9"
    assert (grey.channels, grey.input_shape) == (1, (224, 224, 1))


def test_a_contract_of_colour_and_of_another_size() -> None:
    colour = ModelContract(labels=("a", "b"), architecture="x", decode="rgb8-v1", height=299, width=64)
    assert colour.input_shape == (299, 64, 3)
    assert ModelContract.from_metadata(colour.to_metadata(), source="m") == colour
    assert colour.preprocess_sha256 != replace(colour, decode="grey8-v1").preprocess_sha256
    with pytest.raises(ArtefactError, match="decode 'bgr8-v1', this edge-dsc knows 'grey8-v1' and 'rgb8-v1'"):
        replace(colour, decode="bgr8-v1").check("m")
