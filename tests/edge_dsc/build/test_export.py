"""A run becomes the deployed graph: the one that a runtime wants, with the same answers, refused where it differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edge_dsc.build import export as export_module
from edge_dsc.build.export import convert_to_onnx, deploy_graph, export_run, measure_parity
from edge_dsc.networks import build_network, fold_network
from edge_dsc.training import TrainResult
from engines.contract import ModelContract
from engines.errors import AccuracyGateError, ArtefactError, BadInputError, EdgeDscError
from engines.files import sha256_file
from engines.graph import OnnxModel, load_model

pytestmark = pytest.mark.slow  # TensorFlow alone takes seconds to start

LABELS = ("clear", "diffuse", "focal")


class TrainedRun(Protocol):
    """What the fixture ``dsc_run`` gives."""

    result: TrainResult


@pytest.fixture(scope="module")
def exported(dsc_run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    """The trained separable network, exported."""
    result = export_run(dsc_run.result.run, out=tmp_path_factory.mktemp("exported") / "dsc.onnx")
    assert result.parity <= 1e-5
    assert result.images > 8
    assert result.contract == ModelContract(labels=LABELS, architecture="dsc")
    return result.model


def random_network(architecture: str) -> Any:
    """A network whose every weight, bias and statistic is drawn, so that none can be lost unseen."""
    model, rng = build_network(architecture, 3), np.random.default_rng(1)
    for layer in model.layers:
        values = [value + 0.05 * rng.random(value.shape) for value in layer.get_weights()]
        layer.set_weights(values)
    return model


def copy_run(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def deployed_form(model: onnx.ModelProto) -> list[tuple[object, ...]]:
    """What a runtime sees: ops, attributes, and the shapes of the constants."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return [
        (
            node.op_type,
            sorted(
                (attribute.name, str(onnx.helper.get_attribute_value(attribute)))
                for attribute in node.attribute
            ),
            [shapes[name] for name in node.input if name in shapes],
        )
        for node in model.graph.node
    ]


@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_the_graph_is_the_deployed_one_with_the_answers_of_keras(
    architecture: str, deployed_models: dict[str, Path]
) -> None:
    trained = random_network(architecture)
    contract = ModelContract(labels=LABELS, architecture=architecture)
    ours = deploy_graph(convert_to_onnx(fold_network(trained)), contract, {})
    expected = onnx.load(deployed_models[architecture])
    assert deployed_form(ours) == deployed_form(expected)
    assert ours.graph.input == expected.graph.input
    assert ours.graph.output == expected.graph.output
    assert ours.opset_import == expected.opset_import
    assert ours.graph.node[0].op_type == "Cast"
    assert "Transpose" not in {node.op_type for node in ours.graph.node}
    pixels = np.random.default_rng(0).integers(0, 256, (5, 224, 224, 1), np.uint8)
    for batch in (1, 5):
        assert measure_parity(trained, ours, pixels[:batch]) <= 1e-5


def test_names_are_readable_and_stable(exported: OnnxModel) -> None:
    names = [node.name for node in exported.proto.graph.node]
    blocks = [
        f"block{block}_{name}" for block in (1, 2, 3) for name in ("pool", "depthwise", "pointwise", "relu")
    ]
    dense = ["flatten", "dense", "dense_bias", "dense_relu", "logits", "logits_bias", "probabilities"]
    assert names == ["pixels", "planes", "stem", "stem_relu", *blocks, "pool", *dense]


def test_the_metadata_carry_the_contract_and_the_parent(exported: OnnxModel, dsc_run: TrainedRun) -> None:
    metadata = {entry.key: entry.value for entry in exported.proto.metadata_props}
    assert set(metadata) == {"edge_dsc.contract", "edge_dsc.parents"}
    contract = ModelContract.from_metadata(metadata, source="model")
    assert contract == ModelContract(labels=("clear", "diffuse", "focal"), architecture="dsc")
    assert json.loads(metadata["edge_dsc.parents"]) == {
        "model.keras": sha256_file(dsc_run.result.run / "model.keras")
    }


def test_the_same_run_gives_the_same_bytes(exported: OnnxModel, dsc_run: TrainedRun, tmp_path: Path) -> None:
    again = export_run(dsc_run.result.run, out=tmp_path / "again.onnx")
    assert again.path.read_bytes() == exported.path.read_bytes()


def test_a_moved_data_folder_is_named(dsc_run: TrainedRun, phantom_folder: Path, tmp_path: Path) -> None:
    run = copy_run(dsc_run.result.run, tmp_path / "run")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        BadInputError, match=r"none of the run's held-out images are below .*empty \(.*--data DIR"
    ):
        export_run(run, data=empty)
    assert not (run / "model.onnx").exists()
    calls = []
    result = export_run(run, data=phantom_folder, progress=lambda *call: calls.append(call))
    assert result.path == run / "model.onnx"
    assert calls == [("loading", 0, 3), ("converting", 1, 3), ("comparing", 2, 3), ("comparing", 3, 3)]


def test_a_difference_is_refused_and_nothing_written(
    dsc_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = fold_network

    def fold_badly(trained: object) -> object:
        model = fold(trained)
        layer = model.get_layer("probabilities")
        kernel, bias = layer.get_weights()
        layer.set_weights([kernel, bias + np.array([0, 0, 1e-4], np.float32)])
        return model

    monkeypatch.setattr(export_module, "fold_network", fold_badly)
    with pytest.raises(
        AccuracyGateError, match=r"differs from Keras by .* more than 1e-05 \(nothing was written"
    ):
        export_run(dsc_run.result.run, out=tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_files_that_are_not_the_runs_are_refused(dsc_run: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"cannot read .*training\.json: No such file.*edge-dsc train"):
        export_run(tmp_path / "nowhere")
    run = copy_run(dsc_run.result.run, tmp_path / "run")
    with (run / "model.keras").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(ArtefactError, match=r"model\.keras is not the model of training\.json \(SHA-256 "):
        export_run(run)
    (run / "model.keras").unlink()
    with pytest.raises(ArtefactError, match=r"there is no .*model\.keras"):
        export_run(run)
    shutil.copy(dsc_run.result.run / "model.keras", run / "model.keras")
    record = json.loads((run / "training.json").read_text())
    record["labels"].reverse()
    record["schema_version"] = 1  # which had no seal
    del record["record_sha256"]
    (run / "training.json").write_text(json.dumps(record))
    with pytest.raises(ArtefactError, match=r"split\.json is not the split of its run"):
        export_run(run)
    (run / "split.json").unlink()
    with pytest.raises(ArtefactError, match=r"cannot read .*split\.json"):
        export_run(run)


def test_biases_that_the_converter_drops_are_written(deployed_models: dict[str, Path]) -> None:
    """tf2onnx optimises a bias of zeros away; an untrained network has nothing else."""
    contract = ModelContract(labels=LABELS, architecture="cnn")
    model = deploy_graph(convert_to_onnx(fold_network(build_network("cnn", 3))), contract, {})
    assert deployed_form(model) == deployed_form(onnx.load(deployed_models["cnn"]))
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "stem.bias")
    assert not numpy_helper.to_array(bias).any()
    with pytest.raises(EdgeDscError, match=r"tf2onnx gave an unexpected graph: Conv Relu .*constraints"):
        deploy_graph(model, msgspec.structs.replace(contract, architecture="dsc"), {})


def test_the_model_that_is_handed_on_is_the_file(exported: OnnxModel) -> None:
    written = load_model(exported.path)
    assert written.proto == exported.proto
    assert (written.sha256, written.contract) == (exported.sha256, exported.contract)
