from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_dsc.engine_builder import BuildRequest, build_engine
from edge_dsc.inference import InferRequest, infer_source
from engines.errors import BadInputError, UsageError
from engines.record import BatchRange


@pytest.fixture(scope="module")
def engine(deployed_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engine") / "dsc.engine"
    request = BuildRequest(
        model=deployed_models["dsc"], runtime="onnxruntime", batch=BatchRange(1, 1, 4), out=out
    )
    return build_engine(request).path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        noise = np.random.default_rng(index).integers(0, 256, (256, 256), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{index}.png"), noise)
    (folder / "1.png").write_text("text")
    return folder


def infer(engine: Path, source: Path, out: Path | None, *, keep: bool = False):
    return infer_source(InferRequest(engine=engine, source=str(source), out=out, threads=2, keep_rows=keep))


def test_csv_and_json_lines_hold_the_same_rows(engine: Path, folder: Path, tmp_path: Path) -> None:
    summary = infer(engine, folder, tmp_path / "a.csv", keep=True)
    infer(engine, folder, tmp_path / "a.jsonl")
    with (tmp_path / "a.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines == summary.rows
    assert [
        {key: "" if value is None else str(value) for key, value in line.items()} for line in lines
    ] == rows
    assert list(lines[0]) == ["path", "label", "probability", "p_clear", "p_focal", "p_diffuse", "error"]
    assert [line["path"] for line in lines] == [str(folder / f"{i}.png") for i in range(3)]
    assert sum(lines[0][f"p_{name}"] for name in ("clear", "focal", "diffuse")) == pytest.approx(1, abs=2e-6)
    assert lines[1]["label"] is None and "is damaged or no image (4 bytes" in lines[1]["error"]
    assert (summary.images, summary.answered, summary.failed) == (3, 2, 1)


def test_standard_output_gets_csv(engine: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    infer(engine, folder, None)
    assert capsys.readouterr().out.splitlines()[0] == "path,label,probability,p_clear,p_focal,p_diffuse,error"


def test_a_folder_of_bad_images_is_an_error_with_the_rows_kept(
    engine: Path, folder: Path, tmp_path: Path
) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(BadInputError, match="none of the 3 images"):
        infer(engine, folder, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().count("is empty (0 bytes)") == 3


def test_other_suffixes_are_refused(engine: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.xls"):
        infer(engine, folder, tmp_path / "a.xls")
