from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_dsc.networks import build_network, fold_network, load_network, save_network
from engines.errors import ArtefactError


@pytest.mark.slow
def test_a_network_is_saved_and_loaded(tmp_path: Path) -> None:
    model = build_network("dsc", 3)
    save_network(model, tmp_path / "model.keras")
    loaded = load_network(tmp_path / "model.keras", "dsc", 3)
    assert loaded.name == "dsc"
    for one, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
        assert np.array_equal(one, other)


def other_networks() -> dict[str, Callable[[], Any]]:
    """Networks that Keras reads gladly and that are not ours."""
    import keras

    layers = keras.layers

    def two_outputs() -> Any:
        made = build_network("dsc", 3)
        return keras.Model(made.input, [made.output, made.get_layer("dense").output], name="dsc")

    def of_another_side() -> Any:
        image = layers.Input((64, 64, 1), name="image")
        return keras.Model(image, layers.Dense(3)(layers.Flatten()(image)), name="dsc")

    return {
        "the other network": lambda: build_network("cnn", 3),
        "of four classes": lambda: build_network("dsc", 4),
        "a chain": lambda: keras.Sequential([layers.Input((224, 224, 1)), layers.Flatten(), layers.Dense(3)]),
        "two outputs": two_outputs,
        "another side": of_another_side,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "which", ["the other network", "of four classes", "a chain", "two outputs", "another side"]
)
def test_another_network_is_refused(tmp_path: Path, which: str) -> None:
    save_network(other_networks()[which](), tmp_path / "model.keras")
    with pytest.raises(ArtefactError, match=r"model\.keras is not the dsc of 3 classes that its run records"):
        load_network(tmp_path / "model.keras", "dsc", 3)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["dsc", "cnn"])
def test_a_deployed_network_is_loaded_too(tmp_path: Path, architecture: str) -> None:
    save_network(fold_network(build_network(architecture, 3)), tmp_path / "model.keras")
    assert load_network(tmp_path / "model.keras", architecture, 3).name == architecture


@pytest.mark.slow
def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.keras").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(ArtefactError, match=r"Keras cannot load .*model\.keras: .*train again"):
        load_network(tmp_path / "model.keras", "dsc", 3)


@pytest.mark.slow
def test_a_lambda_layer_is_not_run(tmp_path: Path) -> None:
    import keras

    image = keras.layers.Input((2,))
    model = keras.Model(image, keras.layers.Lambda(lambda x: x * 2, output_shape=(2,))(image))
    save_network(model, tmp_path / "model.keras")
    with pytest.raises(ArtefactError, match=r"Keras cannot load"):
        load_network(tmp_path / "model.keras", "dsc", 3)


@pytest.mark.slow
def test_a_layer_of_pytorch_is_refused_and_no_package_is_named(tmp_path: Path) -> None:
    save_network(build_network("dsc", 3), tmp_path / "whole.keras")
    with (
        zipfile.ZipFile(tmp_path / "whole.keras") as whole,
        zipfile.ZipFile(tmp_path / "m.keras", "w") as other,
    ):
        for name in whole.namelist():
            data = whole.read(name)
            if name == "config.json":
                config = json.loads(data)
                layer = config["config"]["layers"][1]
                layer["class_name"], layer["registered_name"] = "TorchModuleWrapper", None
                layer["config"] = {"name": layer["config"]["name"], "module": "gASVAAAA"}
                data = json.dumps(config).encode()
            other.writestr(name, data)
    with pytest.raises(ArtefactError, match=r"Keras cannot load .*m\.keras: .*torch.*train again"):
        load_network(tmp_path / "m.keras", "dsc", 3)
