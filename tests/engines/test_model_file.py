from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from engines import graph as model_file
from engines.errors import ArtefactError
from engines.graph import contract_of, load_model


def save(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def model(deployed_models: dict[str, Path]) -> onnx.ModelProto:
    return load_model(deployed_models["dsc"]).proto


def test_a_model_of_ours_is_read(model: onnx.ModelProto) -> None:
    contract = contract_of(model, "here")
    assert contract.labels == ("clear", "focal", "diffuse")
    assert contract.architecture == "dsc"


@pytest.mark.parametrize("data", [b"", b"not a protobuf", b"\x89PNG\r\n\x1a\n" + bytes(64)])
def test_what_is_no_onnx_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match="is not an ONNX model") as caught:
        load_model(path)
    assert caught.value.remedy == "export it again: edge-dsc export RUN"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"cannot read .*absent.onnx: No such file"):
        load_model(tmp_path / "absent.onnx")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="cannot read"):
        load_model(tmp_path)


def test_a_truncated_file_is_refused(deployed_models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(deployed_models["dsc"].read_bytes()[:-1000])
    with pytest.raises(ArtefactError, match="is not an ONNX model"):
        load_model(path)


def test_too_large_a_file_is_not_read(
    deployed_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_file, "LARGEST_MODEL", 1000)
    with pytest.raises(ArtefactError, match="a model of ours at most 1000"):
        load_model(deployed_models["dsc"])


def test_a_foreign_model_is_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    del model.metadata_props[:]
    with pytest.raises(ArtefactError, match="was not exported by edge-dsc"):
        load_model(save(model, tmp_path))


def test_tensors_in_other_files_are_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    tensor = model.graph.initializer[1]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    with pytest.raises(ArtefactError, match=f"keeps {tensor.name} in another file"):
        load_model(save(model, tmp_path))


def test_inputs_that_break_the_contract_are_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    with pytest.raises(ArtefactError, match=r"takes image float \[N, 224, 224, 1\].*says image uint8 \["):
        load_model(save(model, tmp_path))


def test_an_invalid_graph_is_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    model.graph.node.append(helper.make_node("Relu", ["nowhere"], ["lost"]))
    with pytest.raises(ArtefactError, match="is not a valid ONNX model"):
        load_model(save(model, tmp_path))
