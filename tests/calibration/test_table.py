from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from msgspec import structs, to_builtins
from onnx import numpy_helper

from calibration.table import (
    METHODS,
    CalibrationOptions,
    CalibrationTable,
    Correction,
    SkippedImage,
    calibrate_command,
    check_table,
    load_table,
    save_table,
)
from engines.contract import ModelContract
from engines.errors import ArtefactError, UsageError
from engines.files import canonical_json, sha256_bytes
from engines.graph import load_model
from engines.images import LEVEL_BINS


def write_sealed(folder: Path, body: dict[str, Any], *, version: int) -> Path:
    path = folder / "calibration.json"
    seal = sha256_bytes(canonical_json(body))
    document = {"kind": "edge-dsc/calibration-table", "schema_version": version, **body, "table_sha256": seal}
    path.write_text(json.dumps(document))
    return path


def test_a_table_survives_its_file(small_table: CalibrationTable, tmp_path: Path) -> None:
    table = structs.replace(small_table, skipped=(SkippedImage("clear/x.png", "clear/x.png is empty"),))
    path = tmp_path / "calibration.json"
    save_table(path, table)
    again = load_table(path)
    assert again == table
    document = json.loads(path.read_text())
    assert (document["kind"], document["schema_version"]) == ("edge-dsc/calibration-table", 4)
    assert list(document)[2:] == [
        "method",
        "parameters",
        "seed",
        "onnx_sha256",
        "preprocess_sha256",
        "versions",
        "ranges",
        "channel_factors",
        "images",
        "skipped",
        "pixel_levels",
        "corrections",
        "table_sha256",
    ]
    save_table(tmp_path / "again.json", again)
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_the_file_does_not_depend_on_the_order_of_things(
    small_table: CalibrationTable, tmp_path: Path
) -> None:
    turned = structs.replace(
        small_table,
        ranges=dict(reversed(list(small_table.ranges.items()))),
        images=tuple(reversed(small_table.images)),
    )
    save_table(tmp_path / "a.json", small_table)
    save_table(tmp_path / "b.json", turned)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_an_edited_range_is_refused(small_table: CalibrationTable, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    save_table(path, small_table)
    document = json.loads(path.read_text())
    document["ranges"]["features"][1] *= 2
    path.write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match=r"calibration\.json was edited after it was made") as caught:
        load_table(path)
    assert caught.value.remedy == (
        f"make it again: edge-dsc calibrate MODEL --calib-data DIR --calib-method mse --out {path}"
    )


ONE_TOO_FEW = [{"name": f"{index}.png", "label": "a", "sha256": f"{index:064}"} for index in range(127)]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ranges": {"features": [0.0, 0.0]}}, r"holds no range for features: 0\.0\.\.0\.0"),
        ({"ranges": {"features": [1.0, -1.0]}}, "holds no range for features"),
        ({"ranges": {}}, "holds no ranges"),
        ({"ranges": {"features": [1.0]}}, r"is no readable edge-dsc/calibration-table: .*`\$\.ranges"),
        ({"ranges": [1]}, r"is no readable edge-dsc/calibration-table: .*`\$\.ranges`"),
        ({"method": "random"}, "names the unknown method 'random'"),
        ({"images": []}, "was made on 0 images, at least 128 are needed"),
        ({"images": ONE_TOO_FEW}, "was made on 127 images, at least 128 are needed"),
        ({"images": [{"file": "x"}]}, r"unknown field `file` - at `\$\.images"),
        ({"seed": "0"}, r"Expected `int`, got `str` - at `\$\.seed`"),
        (
            {"channel_factors": {"features": [1.0, 0.0]}},
            r"`float` >= 1e-0?6 - at `\$\.channel_factors\[...\]\[1\]`",
        ),
        ({"channel_factors": {"features": [1e300]}}, r"`float` <= 1000000.0 - at `\$\.channel_factors"),
        ({"channel_factors": {"features": []}}, "holds no channel factors for features"),
        ({"channel_factors": [1]}, r"`\$\.channel_factors`"),
        ({"corrections": {"stem": {"bias": [1e39]}}}, r"`float` <= 3.4e\+?38 - at `\$\.corrections"),
        ({"corrections": {"stem": {"rounded_up": "no base64"}}}, r"matching regex .* - at `\$\.corrections"),
        ({"extra": 1}, "unknown field `extra`"),
    ],
)
def test_a_senseless_table_is_refused_even_when_sealed(
    small_table: CalibrationTable, tmp_path: Path, change: dict[str, object], text: str
) -> None:
    path = write_sealed(tmp_path, {**to_builtins(small_table), **change}, version=4)
    with pytest.raises(ArtefactError, match=text) as caught:
        load_table(path)
    assert caught.value.remedy.startswith("make it again: edge-dsc calibrate MODEL --calib-data DIR")


def test_tables_of_version_1_are_read_with_channel_factors_or_without(
    small_table: CalibrationTable, tmp_path: Path
) -> None:
    scaled = structs.replace(small_table, channel_factors={"features": (1.0, 2.0, 1.0, 1.0)})
    assert load_table(write_sealed(tmp_path, to_builtins(scaled), version=1)) == scaled
    body = to_builtins(small_table)
    del body["channel_factors"]
    assert load_table(write_sealed(tmp_path, body, version=1)) == small_table
    with pytest.raises(ArtefactError, match="has schema version 5, this edge-dsc reads 1 and 2 and 3 and 4"):
        load_table(write_sealed(tmp_path, body, version=5))


def test_tables_of_version_2_are_read_without_grey_levels(
    small_table: CalibrationTable, tmp_path: Path
) -> None:
    body = to_builtins(small_table)
    del body["pixel_levels"]
    assert load_table(write_sealed(tmp_path, body, version=2)) == structs.replace(
        small_table, pixel_levels=()
    )


def test_tables_of_version_3_are_read_without_corrections(
    small_table: CalibrationTable, tmp_path: Path
) -> None:
    body = to_builtins(small_table)
    del body["corrections"]
    assert load_table(write_sealed(tmp_path, body, version=3)) == small_table
    assert small_table.corrections == {} and small_table.describe_corrections() == ""
    corrected = structs.replace(
        small_table,
        corrections={
            "stem": Correction(bias=(1.5, -2.0), rounded_up="AP8="),
            "dense": Correction(bias=(0.5,)),
        },
    )
    save_table(tmp_path / "corrected.json", corrected)
    assert load_table(tmp_path / "corrected.json") == corrected


def test_a_table_counts_the_grey_levels_of_its_images(small_table: CalibrationTable) -> None:
    sizes = len(small_table.images) * 32 * 32
    assert (len(small_table.pixel_levels), sum(small_table.pixel_levels)) == (LEVEL_BINS, sizes)


@pytest.mark.parametrize("levels", [(0,) * 32, (1,) * 31])
def test_grey_levels_that_no_images_have_are_refused(
    small_table: CalibrationTable, tmp_path: Path, levels: tuple[int, ...]
) -> None:
    save_table(tmp_path / "calibration.json", structs.replace(small_table, pixel_levels=levels))
    with pytest.raises(ArtefactError, match=f"holds {len(levels)} grey levels of {sum(levels)} pixels"):
        load_table(tmp_path / "calibration.json")


def test_a_table_of_its_model_passes(small_table: CalibrationTable, small_model: Path) -> None:
    check_table(small_table, load_model(small_model))


def test_a_table_of_another_model_is_refused(
    small_table: CalibrationTable, deployed_models: dict[str, Path]
) -> None:
    model = onnx.load(deployed_models["dsc"])
    with pytest.raises(ArtefactError, match="is of another preprocess"):
        check_table(small_table, load_model(deployed_models["dsc"]))
    contract = ModelContract.from_metadata({e.key: e.value for e in model.metadata_props}, source="dsc")
    same = structs.replace(small_table, preprocess_sha256=contract.preprocess_sha256)
    with pytest.raises(ArtefactError, match="is of another model") as caught:
        check_table(same, load_model(deployed_models["dsc"]), path=Path("t.json"))
    assert caught.value.remedy == (
        f"calibrate again: edge-dsc calibrate {deployed_models['dsc']} --calib-data DIR "
        "--calib-method minmax --out t.json"
    )


def test_weights_changed_after_calibration_are_refused(
    small_table: CalibrationTable, small_model: Path, tmp_path: Path
) -> None:
    model = onnx.load(small_model)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "stem.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 2, weight.name))
    changed = tmp_path / "small.onnx"
    onnx.save(model, changed)
    with pytest.raises(ArtefactError, match="is of another model"):
        check_table(small_table, load_model(changed))


def test_the_command_names_what_is_known_and_quotes_it() -> None:
    assert calibrate_command(model=Path("my runs/model.onnx"), method="percentile", out=Path("c.json")) == (
        "edge-dsc calibrate 'my runs/model.onnx' --calib-data DIR --calib-method percentile --out c.json"
    )


def test_an_unknown_method_is_refused() -> None:
    assert METHODS == ("mse", "entropy", "minmax", "percentile")
    with pytest.raises(UsageError, match="no calibration method 'random'") as caught:
        CalibrationOptions(method="random")
    assert caught.value.remedy == "choose one of mse, entropy, minmax, percentile"


@pytest.mark.parametrize("percentile", [50, 100.1, float("nan")])
def test_a_percentile_outside_its_range_is_refused(percentile: float) -> None:
    with pytest.raises(UsageError, match="percentile"):
        CalibrationOptions(method="percentile", percentile=percentile)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 10**30),
        ("onnx_sha256", "x"),
        ("ranges", {"features": [0.0, 1e300]}),
        ("ranges", {"a\x1b[31m": [0.0, 1.0]}),
        ("channel_factors", {"features": [10**400]}),
        ("parameters", {"percentile": 10**400}),
        ("seed", "\ud800"),
    ],
)
def test_a_number_beyond_reason_is_refused_by_its_field(
    small_table: CalibrationTable, tmp_path: Path, field: str, value: object
) -> None:
    path = write_sealed(tmp_path, {**to_builtins(small_table), field: value}, version=3)
    with pytest.raises(ArtefactError, match=r"is no readable edge-dsc/calibration-table: "):
        load_table(path)


def test_tensorrts_own_ranges_name_the_cache_that_they_are_of(
    small_table: CalibrationTable, tmp_path: Path
) -> None:
    body = {**to_builtins(small_table), "method": "tensorrt-entropy"}
    with pytest.raises(ArtefactError, match="does not say which release's cache it holds"):
        load_table(write_sealed(tmp_path, body, version=3))
    body["parameters"] = {"trt_version": 8601}
    assert load_table(write_sealed(tmp_path, body, version=3)).implicit
