from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_dsc.evaluate.evaluation import read_accuracies
from engines.errors import ArtefactError


def test_accuracies_are_read_from_what_evaluate_wrote(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    body = {"kind": "edge-dsc/evaluation", "schema_version": 1, "engine": "runs/dsc-int8.onnxruntime.engine"}
    path.write_text(json.dumps({**body, "metrics": {"accuracy": 0.825}}))
    assert read_accuracies([path]) == {"dsc-int8.onnxruntime": 0.825}
    path.write_text(json.dumps({**body, "metrics": {}}))
    with pytest.raises(ArtefactError, match="holds no accuracy"):
        read_accuracies([path])
