"""Folders of textures to calibrate on, a network small enough to calibrate in a moment, and tables of the real two."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from branched_networks import BRANCHED
from onnx import TensorProto, helper, numpy_helper

from calibration.collect import calibrate
from calibration.select import CalibrationSet, Candidate, read_set, select_images
from calibration.table import CalibrationOptions, CalibrationTable
from engines.contract import ModelContract
from engines.files import sha256_file
from engines.graph import load_model

Lister = Callable[[Path], list[Candidate]]


def candidates_below(root: Path) -> list[Candidate]:
    return [Candidate(path, path.parent.name, sha256_file(path)) for path in sorted(root.glob("*/*"))]


@pytest.fixture
def list_images() -> Lister:
    """Lists the images of a folder as they are found: with class and hash."""
    return candidates_below


@pytest.fixture
def copied(textures: Path, tmp_path: Path) -> Path:
    """A copy of the textures that a test may change."""
    return Path(shutil.copytree(textures, tmp_path / "copied"))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployed network of one convolution and two dense layers over 32x32 pixels."""
    rng = np.random.default_rng(7)
    contract = ModelContract(labels=("clear", "diffuse", "focal"), architecture="small", height=32, width=32)
    stored = {
        "planes": np.array([-1, 1, 32, 32], np.int64),
        "flat": np.array([-1, 1024], np.int64),
        "stem.weight": (rng.standard_normal((4, 1, 3, 3)) / 255).astype(np.float32),
        "stem.bias": rng.standard_normal(4).astype(np.float32),
        "dense.weight": (rng.standard_normal((1024, 8)) / 32).astype(np.float32),
        "dense.bias": rng.standard_normal(8).astype(np.float32),
        "logits.weight": rng.standard_normal((8, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["cast"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["cast", "planes"], ["pixels"], "reshape"),
        helper.make_node("Conv", ["pixels", "stem.weight", "stem.bias"], ["conv"], "stem", pads=[1] * 4),
        helper.make_node("Relu", ["conv"], ["relu"], "relu"),
        helper.make_node("MaxPool", ["relu"], ["pool"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Reshape", ["pool", "flat"], ["features"], "flatten"),
        helper.make_node("MatMul", ["features", "dense.weight"], ["matmul"], "dense"),
        helper.make_node("Add", ["matmul", "dense.bias"], ["dense_out"], "dense_bias"),
        helper.make_node("Relu", ["dense_out"], ["hidden"], "hidden_relu"),
        helper.make_node("MatMul", ["hidden", "logits.weight"], ["logits"], "logits"),
        helper.make_node("Softmax", ["logits"], ["probabilities"], "softmax", axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 32, 32, 1])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, contract.to_metadata())
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def small_set(small_model: Path, textures: Path) -> CalibrationSet:
    """128 textures as the small network sees them."""
    return read_set(select_images(candidates_below(textures), 128, 0), load_model(small_model).contract)


@pytest.fixture(scope="session")
def small_table(small_model: Path, small_set: CalibrationSet) -> CalibrationTable:
    return calibrate(load_model(small_model), small_set, CalibrationOptions(method="minmax"))


@pytest.fixture(scope="session")
def network_tables(deployed_models: dict[str, Path], textures: Path) -> dict[str, CalibrationTable]:
    """minmax tables of both networks."""
    models = {name: load_model(path) for name, path in deployed_models.items()}
    images = read_set(select_images(candidates_below(textures), 128, 0), models["dsc"].contract)
    options = CalibrationOptions(method="minmax")
    return {name: calibrate(model, images, options) for name, model in models.items()}


@pytest.fixture(scope="session")
def branched_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ONNX files of the networks that are no chains. Read only; copy before you change one."""
    folder = tmp_path_factory.mktemp("branched")
    paths = {name: folder / f"{name}.onnx" for name in BRANCHED}
    for name, path in paths.items():
        onnx.save(BRANCHED[name](), path)
    return paths


@pytest.fixture(scope="session")
def branched_set(branched_models: dict[str, Path], textures: Path) -> CalibrationSet:
    """128 textures as those networks see them."""
    contract = load_model(branched_models["residual"]).contract
    return read_set(select_images(candidates_below(textures), 128, 0), contract)


@pytest.fixture(scope="session")
def branched_tables(
    branched_models: dict[str, Path], branched_set: CalibrationSet
) -> dict[str, CalibrationTable]:
    """mse tables of those networks."""
    return {
        name: calibrate(load_model(path), branched_set, CalibrationOptions())
        for name, path in branched_models.items()
    }
