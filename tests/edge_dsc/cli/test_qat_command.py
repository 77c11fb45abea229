"""From a trained run to an INT8 engine without calibration, as a user gives it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest


def test_a_fine_tuned_run_builds_in_int8(
    edge_dsc: Any, dsc_run: Any, phantom_folder: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(dsc_run.result.run, tmp_path / "dsc"))
    done = edge_dsc("train", phantom_folder, "--qat", run, "--epochs", 1, "--json")
    assert done.code == 0, done.err
    tuned = tmp_path / "dsc-qat"
    assert (done.json["run"], done.json["calibration"]) == (str(tuned), str(tuned / "calibration.json"))
    assert set(done.json["metrics"]) == {"evaluation", "test", "held_out"}
    ort = ("--backend", "onnxruntime", "--validate", phantom_folder, "--max-drop", 100)
    built = edge_dsc("build-engine", tuned, "--int8", *ort, "--json")
    assert built.code == 0, built.err
    assert f"using the calibration table {tuned / 'calibration.json'}" in built.err
    record = built.json["record"]
    assert record["layers"] == {"INT8": 8, "FP32": 1}
    assert record["validation"]["images"].startswith("evaluation and test of the model's split")
    assert json.loads((tuned / "training.json").read_text())["parent_sha256"]
    again = edge_dsc("train", phantom_folder, "--qat", run, "--epochs", 1)
    assert again.code == 2 and "holds a finished run" in again.err


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        (("--resume",), 2, "--resume has no use with --qat"),
        (("--out", "{run}"), 2, "is the run to start from"),
        (("--qat", "{run}/nowhere"), 4, "cannot read"),
    ],
)
def test_what_fine_tuning_refuses(
    edge_dsc: Any, dsc_run: Any, phantom_folder: Path, extra: tuple[str, ...], code: int, words: str
) -> None:
    run = dsc_run.result.run
    done = edge_dsc("train", phantom_folder, "--qat", run, *(word.format(run=run) for word in extra))
    assert done.code == code, done.err
    assert words in done.err and done.out == ""
