from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from edge_dsc.build import export as export_module
from edge_dsc.build.export import deploy_graph, export_run
from edge_dsc.data import load_split
from edge_dsc.networks import (
    build_network,
    fold_batch_norm,
    fold_network,
    fold_separable_stem,
    fold_stem,
    load_network,
)
from edge_dsc.training.fit import predict
from engines.contract import ModelContract
from engines.errors import AccuracyGateError, ArtefactError, BadInputError, EdgeDscError
from engines.files import sha256_file
from engines.images import read_input

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    paths = {}
    for architecture in ("dsc", "cnn"):
        run = request.getfixturevalue(f"{architecture}_run").result.run
        result = export_run(run, out=folder / f"{architecture}.onnx")
        assert result.parity <= 1e-5
        assert result.images > 8
        assert result.contract.architecture == architecture
        paths[architecture] = result.path
    return paths


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
def test_the_graph_is_the_deployed_one(
    architecture: str, exported: dict[str, Path], deployed_models: dict[str, Path]
) -> None:
    ours, expected = onnx.load(exported[architecture]), onnx.load(deployed_models[architecture])
    assert deployed_form(ours) == deployed_form(expected)
    assert ours.graph.input == expected.graph.input
    assert ours.graph.output == expected.graph.output
    assert ours.opset_import == expected.opset_import
    assert ours.graph.node[0].op_type == "Cast"
    assert "Transpose" not in {node.op_type for node in ours.graph.node}


def test_names_are_readable_and_stable(exported: dict[str, Path]) -> None:
    names = [node.name for node in onnx.load(exported["dsc"]).graph.node]
    blocks = [
        f"block{block}_{name}" for block in (1, 2, 3) for name in ("pool", "depthwise", "pointwise", "relu")
    ]
    dense = ["flatten", "dense", "dense_bias", "dense_relu", "logits", "logits_bias", "probabilities"]
    assert names == ["pixels", "planes", "stem", "stem_relu", *blocks, "pool", *dense]


@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_keras_and_onnxruntime_agree_for_every_batch_size(
    architecture: str, exported: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(f"{architecture}_run").result.run
    split = load_split(run / "split.json")
    session = onnxruntime.InferenceSession(exported[architecture], providers=["CPUExecutionProvider"])
    contract = ModelContract.from_metadata(session.get_modelmeta().custom_metadata_map, source="model")
    pixels = np.stack([read_input(split.root / s.path, contract) for s in split.samples("validation")[:5]])
    expected = predict(load_network(run / "model.keras"), pixels)
    for batch in (1, 5):
        (answers,) = session.run([contract.output_name], {contract.input_name: pixels[:batch]})
        assert np.abs(answers - expected[:batch]).max() <= 1e-5


def test_the_metadata_carry_the_contract_and_the_parent(exported: dict[str, Path], dsc_run: object) -> None:
    metadata = {entry.key: entry.value for entry in onnx.load(exported["dsc"]).metadata_props}
    assert set(metadata) == {"edge_dsc.contract", "edge_dsc.parents"}
    contract = ModelContract.from_metadata(metadata, source="model")
    assert contract == ModelContract(labels=("clear", "diffuse", "focal"), architecture="dsc")
    assert json.loads(metadata["edge_dsc.parents"]) == {
        "model.keras": sha256_file(dsc_run.result.run / "model.keras")
    }


def test_the_same_run_gives_the_same_bytes(
    exported: dict[str, Path], dsc_run: object, tmp_path: Path
) -> None:
    again = export_run(dsc_run.result.run, out=tmp_path / "again.onnx")
    assert again.path.read_bytes() == exported["dsc"].read_bytes()


def test_a_moved_data_folder_is_named(dsc_run: object, phantom_folder: Path, tmp_path: Path) -> None:
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
    dsc_run: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_files_that_are_not_the_runs_are_refused(dsc_run: object, cnn_run: object, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"cannot read .*training\.json: No such file.*edge-dsc train"):
        export_run(tmp_path / "nowhere")
    run = copy_run(dsc_run.result.run, tmp_path / "run")
    shutil.copy(cnn_run.result.run / "model.keras", run / "model.keras")
    with pytest.raises(ArtefactError, match=r"model\.keras is not the model of training\.json \(SHA-256 "):
        export_run(run)
    (run / "model.keras").unlink()
    with pytest.raises(ArtefactError, match=r"there is no .*model\.keras"):
        export_run(run)
    shutil.copy(dsc_run.result.run / "model.keras", run / "model.keras")
    (run / "split.json").unlink()
    with pytest.raises(ArtefactError, match=r"cannot read .*split\.json"):
        export_run(run)


def test_an_untrained_network_with_zero_biases_keeps_the_form(exported: dict[str, Path]) -> None:
    from edge_dsc.build.export import convert_to_onnx

    contract = ModelContract(labels=("clear", "diffuse", "focal"), architecture="cnn")
    model = deploy_graph(convert_to_onnx(fold_network(build_network("cnn", 3))), contract, {})
    assert deployed_form(model) == deployed_form(onnx.load(exported["cnn"]))
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "stem.bias")
    assert not numpy_helper.to_array(bias).any()
    with pytest.raises(EdgeDscError, match=r"tf2onnx gave an unexpected graph: Conv Relu .*constraints"):
        deploy_graph(model, msgspec.structs.replace(contract, architecture="dsc"), {})


def correlate(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return cv2.filter2D(image, cv2.CV_64F, kernel, borderType=cv2.BORDER_CONSTANT)


def test_the_stems_fold_exactly() -> None:
    image = RNG.integers(0, 256, (12, 12)).astype(np.float64)
    kernel = RNG.standard_normal((3, 3, 3, 32))
    whole = sum(correlate(image / 255, kernel[:, :, channel, 7]) for channel in range(3))
    assert np.allclose(correlate(image, fold_stem(kernel, 1 / 255)[:, :, 0, 7]), whole, atol=1e-12)
    pointwise, depthwise = RNG.standard_normal((1, 1, 3, 32)), RNG.standard_normal((3, 3, 32, 1))
    mixed = sum(image / 255 * pointwise[0, 0, channel, 7] for channel in range(3))
    folded = fold_separable_stem(pointwise, depthwise, 1 / 255)
    assert folded.shape == (3, 3, 1, 32)
    assert np.allclose(
        correlate(image, folded[:, :, 0, 7]), correlate(mixed, depthwise[:, :, 7, 0]), atol=1e-12
    )


def test_batch_norm_folds_exactly() -> None:
    kernel, bias = RNG.standard_normal((1, 1, 4, 5)), RNG.standard_normal(5)
    gamma, beta, mean = RNG.standard_normal((3, 5))
    variance = RNG.uniform(0.1, 2, 5)
    x = RNG.standard_normal(4)
    expected = gamma * (x @ kernel[0, 0] + bias - mean) / np.sqrt(variance + 1e-3) + beta
    folded_kernel, folded_bias = fold_batch_norm(kernel, bias, [gamma, beta, mean, variance], 1e-3)
    assert np.allclose(x @ folded_kernel[0, 0] + folded_bias, expected, atol=1e-12)
