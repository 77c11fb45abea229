"""Commands that use an engine: rows, figures, and their ``--json``, one object on standard output."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any


def test_infer_prints_csv(edge_dsc: Any, engine: Path, textures: Path) -> None:
    done = edge_dsc("infer", engine, textures / "focal")
    assert done.code == 0
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert [row["path"] for row in rows] == sorted(str(path) for path in (textures / "focal").iterdir())
    assert "30 images classified" in done.err


def test_infer_json_is_one_object(edge_dsc: Any, engine: Path, textures: Path, tmp_path: Path) -> None:
    done = edge_dsc("infer", engine, f"{textures}/clear/00*.png", "--out", tmp_path / "a.jsonl", "--json")
    assert done.json["kind"] == "edge-dsc/infer-result"
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert done.json["rows"] == lines and len(lines) == 10


def test_evaluate_against_itself_agrees(edge_dsc: Any, engine: Path, textures: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation.json"
    done = edge_dsc("evaluate", engine, textures, "--reference", engine, "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json == json.loads(out.read_text())
    assert done.json["agreement"]["same_top1"] == done.json["images"] == 150
    assert done.json["agreement"]["largest_difference"] == 0
    text = edge_dsc("evaluate", engine, textures, "--reference", engine).out
    assert "same class for 150 of 150 images (100.00%)" in text
